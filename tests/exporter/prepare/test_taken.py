from __future__ import annotations

import numpy as np
import pytest

from exporter.numerics.quantized import Grid
from tests.exporter import graphs
from tests.exporter.prepare.quantized import snr_db, take

ROUNDED = """(float[4,8] x) => (float[4,6] y) {{
    [q] q = QuantizeLinear(x, sx, zx)
    [dq] d = DequantizeLinear(q, sx, zx)
    [mm] y = MatMul(d, w)
}}"""


@pytest.mark.parametrize(
    ("zero_point", "grid"),
    [
        (np.uint8(100), Grid(scale=np.float32(0.05), zero_point=100)),
        (np.int8(0), Grid(scale=np.float32(0.05), zero_point=128)),
        (np.int16(0), None),
    ],
)
def test_a_tensor_has_the_grid_of_its_codes_where_uint8_says_it(zero_point: np.generic, grid: Grid | None) -> None:
    before, after, found = take(
        ROUNDED.format(), {"sx": np.float32(0.05), "zx": zero_point, "w": graphs.noise(1, 8, 6)}, opset=21
    )
    assert graphs.op_types(after) == ["MatMul"]
    assert found.grids == ({} if grid is None else {"x": grid})
    assert snr_db(before, after) > 30


def test_values_far_beyond_the_codes_are_still_cut() -> None:
    narrow = {"sx": np.float32(0.002), "zx": np.uint8(128), "w": graphs.noise(1, 8, 6)}
    before, after, _ = take(ROUNDED.format(), narrow)
    assert graphs.op_types(after) == ["Clip", "MatMul"]
    assert snr_db(before, after) > 30


def test_codes_from_zero_upwards_leave_a_relu() -> None:
    before, after, found = take(
        ROUNDED.format(), {"sx": np.float32(0.02), "zx": np.uint8(0), "w": graphs.noise(1, 8, 6)}
    )
    assert graphs.op_types(after) == ["Relu", "MatMul"]
    assert found.grids == {"x_cut": Grid(scale=np.float32(0.02), zero_point=0)}
    assert snr_db(before, after) > 30


def test_nodes_that_move_codes_move_real_numbers_then() -> None:
    before, after, found = take(
        """(float[4,8] x) => (float[2,2,6] y) {
            [q] q = QuantizeLinear(x, sx, zx)
            [r] r = Reshape(q, shape)
            [c] c = Clip(r, low, high)
            [dq] d = DequantizeLinear(c, sx, zx)
            [mm] y = MatMul(d, w)
        }""",
        {"sx": np.float32(0.03), "zx": np.uint8(128), "shape": np.array([2, 2, 8]), "w": graphs.noise(1, 8, 6)}
        | {"low": np.uint8(108), "high": np.uint8(148)},
    )
    assert graphs.op_types(after) == ["Clip", "Reshape", "Clip", "MatMul"]
    assert {found.grids[name].zero_point for name in ("x_cut", "r", "c")} == {128}
    assert snr_db(before, after) > 25


def test_pairs_in_a_row_all_go_and_codes_of_two_scales_stay() -> None:
    row = """(float[4,8] x) => (float[4,6] y) {
        [q] q = QuantizeLinear(x, sx, zx)
        [dq] d = DequantizeLinear(q, sx, zx)
        [q2] q2 = QuantizeLinear(d, s2, zx)
        [dq2] d2 = DequantizeLinear(q2, s2, zx)
        [mm] y = MatMul(d2, w)
    }"""
    weights = {"sx": np.float32(0.03), "s2": np.float32(0.04), "zx": np.uint8(128), "w": graphs.noise(1, 8, 6)}
    _, after, found = take(row, weights)
    assert graphs.op_types(after) == ["MatMul"]
    assert found.grids == {"x": Grid(scale=np.float32(0.04), zero_point=128)}
    other = row.replace("DequantizeLinear(q, sx", "DequantizeLinear(q, s2")
    assert graphs.op_types(take(other, weights)[1])[:2] == ["QuantizeLinear", "DequantizeLinear"]
