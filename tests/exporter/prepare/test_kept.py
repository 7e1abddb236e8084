from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from exporter import graph
from exporter.numerics.quantized import decode
from exporter.prepare import kept, taken
from tests.exporter import graphs
from tests.exporter.prepare.quantized import CODES, SCALE, X, take


def test_codes_behind_dequantize_become_the_weight_and_are_found_again() -> None:
    _, after, found = take(
        "(float[4,8] x) => (float[4,6] y) { [dq] w = DequantizeLinear<axis=1>(c, s)\n [mm] y = MatMul(x, w) }",
        {"c": CODES, "s": SCALE},
    )
    assert graphs.op_types(after) == ["MatMul"]
    assert np.array_equal(graph.constant(after.graph.initializers["w"]), CODES * SCALE)
    weight = kept.found(after, found, after).weights["w"]
    assert np.array_equal(weight.codes, CODES)
    assert np.array_equal(weight.scale, SCALE)
    assert weight.channel_axis == 1


def test_float_weights_that_are_rounded_in_the_file_are_its_codes_too() -> None:
    _, after, found = take(
        """(float[4,8] x) => (float[4,6] y) {
            [q] q = QuantizeLinear<axis=1>(w, s, z)
            [clip] n = Clip(q, low, high)
            [dq] d = DequantizeLinear<axis=1>(n, s, z)
            [mm] y = MatMul(x, d)
        }""",
        {"w": graphs.noise(1, 8, 6), "s": SCALE, "z": np.zeros(6, np.int8), "low": np.int8(-127), "high": np.int8(127)},
    )
    assert graphs.op_types(after) == ["MatMul"]
    assert np.array_equal(kept.found(after, found, after).weights["d"].codes, CODES)


@pytest.mark.parametrize("dtype", [TensorProto.INT4, TensorProto.UINT4])
def test_four_bits_per_channel_are_int8_codes_of_the_same_scale(dtype: int) -> None:
    codes = np.clip(np.rint(graphs.noise(1, 8, 6) / (18 * SCALE)), -7, 7).astype(np.int64)
    zero = 8 if dtype == TensorProto.UINT4 else 0
    proto = graphs.proto(
        "(float[4,8] x) => (float[4,6] y) { [mm] y = MatMul(x, d) }", {"d": graphs.noise(1, 8, 6)}, opset=21
    )
    proto.ir_version = 10
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(
        [
            helper.make_tensor("c", dtype, codes.shape, (codes + zero).reshape(-1).tolist()),
            helper.make_tensor("s", TensorProto.FLOAT, [6], (18 * SCALE).tolist()),
            helper.make_tensor("z", dtype, [6], [zero] * 6),
        ]
    )
    proto.graph.node.insert(0, helper.make_node("DequantizeLinear", ["c", "s", "z"], ["d"], axis=1))
    model = ir.serde.deserialize_model(proto)
    found = taken.take(model, X)
    weight = kept.found(model, found, model).weights["d"]
    assert np.array_equal(weight.codes, codes)
    np.testing.assert_allclose(weight.scale, 18 * SCALE, rtol=1e-6)


def test_blocks_are_a_weight_that_is_rounded_anew_and_says_so() -> None:
    scale = np.abs(graphs.noise(1, 8, 6)).reshape(2, 4, 6).max(axis=1).astype(np.float32) / 127
    codes = np.rint(graphs.noise(1, 8, 6) / np.repeat(scale, 4, axis=0)).astype(np.int8)
    _, after, found = take(
        """(float[4,8] x) => (float[4,6] y) {
            [dq] w = DequantizeLinear<axis=0, block_size=4>(c, s)
            [mm] y = MatMul(x, w)
        }""",
        {"c": codes, "s": scale},
        opset=21,
    )
    said = kept.found(after, found, after)
    assert (said.weights, said.anew) == ({}, {"w": "int8 in blocks"})
    np.testing.assert_allclose(
        graph.constant(after.graph.initializers["w"]), codes * np.repeat(scale, 4, axis=0), rtol=1e-6
    )


def test_numbers_that_are_no_codes_are_none() -> None:
    assert kept.lattice(graphs.noise(3, 8, 6), 1, np.zeros(0, np.float32)) is None
    found = kept.lattice(np.asarray(CODES * SCALE * np.float32(3.7)), 1, SCALE)  # as behind a BatchNormalization
    assert found is not None
    np.testing.assert_allclose(decode(found), CODES * SCALE * np.float32(3.7), rtol=1e-6)


def test_the_code_minus_128_becomes_minus_127_at_the_same_scale() -> None:
    codes = np.array([[-128, 3, 127], [5, -6, 8]], np.int64)
    found = kept.lattice((codes * np.float32(0.5)).astype(np.float32), 0, np.array([0.5], np.float32))
    assert found is not None
    assert found.codes.tolist() == [[-127, 3, 127], [5, -6, 8]]
    assert found.scale.tolist() == [0.5, 0.5]
