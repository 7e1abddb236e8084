from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from exporter.causal import blocks
from exporter.causal.blocks import Blocked, Blocks
from runtime.session import open_session
from tests.exporter.graphs import noise

FORMATS = [
    Blocks(bits=bits, size=size, symmetric=sym) for bits in (4, 8) for size in (16, 32, 128) for sym in (False, True)
]


def tensors(found: Blocked, **shapes: tuple[int, ...]) -> list[onnx.TensorProto]:
    stored = {"weight": found.packed(), "scale": found.scale, "zero": found.packed_zero()}
    return [
        numpy_helper.from_array(each.reshape(shapes.get(name, each.shape)), name)
        for name, each in stored.items()
        if each is not None
    ]


def run(node: onnx.NodeProto, weights: list[onnx.TensorProto], kind: int, x: np.ndarray) -> np.ndarray:
    value = helper.make_tensor_value_info
    graph = helper.make_graph([node], "g", [value("x", kind, None)], [value("y", TensorProto.FLOAT, None)], weights)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    return np.asarray(open_session(model.SerializeToString()).run(None, {"x": x})[0])


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("columns", [128, 72])
def test_codes_are_what_onnxruntimes_kernel_multiplies_by(form: Blocks, columns: int) -> None:
    weight, x = noise(1, 24, columns), noise(2, 5, columns)
    found = blocks.nearest(weight, form)
    attributes = {"bits": form.bits, "block_size": form.size, "N": 24, "K": columns}
    names = ["x", "weight", "scale"] + ([] if form.symmetric else ["zero"])
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **attributes)
    assert np.allclose(run(node, tensors(found), TensorProto.FLOAT, x), x @ found.weight().T, atol=2e-5)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_codes_are_what_onnxruntime_gathers(form: Blocks) -> None:
    found = blocks.nearest(noise(1, 24, 128), form)
    names = ["weight", "x", "scale"] + ([] if form.symmetric else ["zero"])
    node = helper.make_node(
        "GatherBlockQuantized", names, ["y"], domain="com.microsoft", bits=form.bits, block_size=form.size,
        gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    ids = np.array([[3, 23, 0]])
    got = run(node, tensors(found, weight=(24, 128 * form.bits // 8)), TensorProto.INT64, ids)
    assert np.array_equal(got, found.weight()[ids])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(FORMATS), st.sampled_from([1e-6, 1.0, 300.0]))
def test_error_is_half_a_step_at_most_where_nothing_is_clipped(seed: int, form: Blocks, factor: float) -> None:
    parts = blocks.in_blocks(noise(seed, 3, 128) * np.float32(factor), form)
    scale, zero = blocks._range(parts, form, np.float32(1))
    codes = blocks.encode(parts, scale, zero, form)
    real = (codes.astype(np.float32) - zero[:, :, None]) * scale[:, :, None]
    most = np.abs(scale)[:, :, None] * np.float32(1.0001)
    clipped = (codes == 0) | (codes == form.levels - 1)  # the end beside the extreme, and the zero point's own rounding
    assert (np.abs(real - parts) <= np.where(clipped, most, most / 2)).all()


def test_zero_stays_zero_and_a_block_of_zeros_has_a_scale() -> None:
    weight = np.zeros((2, 64), np.float32)
    weight[0, :16] = np.linspace(0.5, 2, 16, dtype=np.float32)
    for form in FORMATS:
        found = blocks.nearest(weight, form)
        assert not found.weight()[weight == 0].any() and (found.scale != 0).all()


def test_smaller_blocks_more_bits_and_zero_points_each_take_error_off_and_bytes_on() -> None:
    weight = noise(5, 64, 512) + np.float32(0.3)

    def error(form: Blocks) -> float:
        return float(np.square(blocks.nearest(weight, form).weight() - weight).mean())

    order = [
        Blocks(bits=4, size=128, symmetric=True), Blocks(bits=4, size=32, symmetric=True), Blocks(bits=4, size=32),
        Blocks(bits=8, size=32, symmetric=True),
    ]  # fmt: skip
    errors, sizes = [error(form) for form in order], [form.bytes(64, 512) for form in order]
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes)


def test_bytes_are_those_of_what_is_stored() -> None:
    for form in FORMATS:
        found = blocks.nearest(noise(1, 6, 200), form)
        stored = [found.packed(), found.scale, found.packed_zero()]
        assert form.bytes(6, 200) == sum(each.nbytes for each in stored if each is not None)


def test_columns_that_matter_more_are_rounded_better() -> None:
    weight, form = noise(3, 32, 64), Blocks(bits=4, size=64)
    importance = np.ones(64, np.float32)
    importance[:8] = 100
    flat, heard = blocks.nearest(weight, form).weight(), blocks.nearest(weight, form, importance).weight()
    assert np.square(heard - weight)[:, :8].sum() < np.square(flat - weight)[:, :8].sum()


@pytest.mark.parametrize(("bits", "size"), [(3, 32), (4, 24), (4, 8)])
def test_formats_that_no_kernel_has_are_refused(bits: Literal[4, 8], size: int) -> None:
    with pytest.raises(ValueError, match="MatMulNBits"):
        Blocks(bits=bits, size=size)
