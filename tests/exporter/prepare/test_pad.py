from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from exporter.prepare import constants, pad
from tests.exporter import graphs

X = {"x": graphs.noise(0, 2, 3, 6, 6)}


def folded(pads: list[int], attributes: str = "", value: float | None = None, conv: str = "Conv") -> list[str]:
    weights = {"pads": np.array(pads), "w": graphs.noise(1, 4, 3, 3, 3)}
    weights |= {"value": np.float32(value)} if value is not None else {}
    given = "x, pads, value" if value is not None else "x, pads"
    text = f"(float[N,3,6,6] x) => (float[N,4,H,W] y) {{ p = Pad{attributes}({given})\n y = {conv}(p, w) }}"
    return graphs.op_types(graphs.rewritten(graphs.model(text, weights), pad.rewrite, X)[0])


@pytest.mark.parametrize("pads", [[0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0, 1, 2]])
def test_zero_padding_is_folded_into_conv(pads: list[int]) -> None:
    assert folded(pads) == ["Conv"]
    assert folded(pads, value=0.0) == ["Conv"]
    assert folded(pads, conv="Conv<pads=[1,0,1,0], strides=[2,2]>") == ["Conv"]


def test_padding_with_another_value_mode_or_axis_stays() -> None:
    around = [0, 0, 1, 1, 0, 0, 1, 1]
    assert folded(around, value=1.0) == ["Pad", "Conv"]
    assert folded(around, '<mode="reflect">') == ["Pad", "Conv"]
    assert folded(around, '<mode="edge">') == ["Pad", "Conv"]
    assert folded([1, 0, 1, 1, 0, 0, 1, 1]) == ["Pad", "Conv"]


def test_negative_padding_stays() -> None:
    assert folded([0, 0, -1, 0, 0, 0, 0, 0]) == ["Pad", "Conv"]


def test_padding_that_something_else_reads_keeps_its_value() -> None:
    model = graphs.model(
        "(float[N,3,6,6] x) => (float[N,4,6,6] y, float[N,3,8,8] p) { p = Pad(x, pads)\n y = Conv(p, w) }",
        {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "w": graphs.noise(1, 4, 3, 3, 3)},
    )
    after, _ = graphs.rewritten(model, pad.rewrite, X)
    assert "Pad" in graphs.op_types(after)


RELU = "[r] r = Relu(x)\n "


def pooled(pool: str, value: float, before: str = "", pads: tuple[int, ...] = (0, 0, 1, 1, 0, 0, 0, 1)) -> list[str]:
    read = "r" if before else "x"
    text = f"(float[N,3,6,6] x) => (float[N,3,H,W] y) {{ {before} p = Pad({read}, pads, value)\n y = {pool}(p) }}"
    weights = {"pads": np.array(pads), "value": np.float32(value)}
    return graphs.op_types(graphs.rewritten(graphs.model(text, weights), pad.rewrite, X)[0])


def test_padding_is_folded_into_a_pool_where_it_means_the_same() -> None:
    lowest = float(np.finfo(np.float32).min)
    assert pooled("AveragePool<kernel_shape=[2,2]>", 0.0) == ["AveragePool"]
    assert pooled("AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>", 0.0) == ["AveragePool"]
    assert pooled("MaxPool<kernel_shape=[3,3], strides=[2,2]>", lowest) == ["MaxPool"]
    assert pooled("MaxPool<kernel_shape=[2,2]>", 0.0, RELU) == ["Relu", "MaxPool"]


def test_padding_that_a_pool_would_count_otherwise_stays() -> None:
    assert pooled("AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>", 0.0) == [
        "Pad",
        "AveragePool",
    ]  # counts its own not
    assert pooled("AveragePool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>", 0.0) == ["Pad", "AveragePool"]
    assert pooled("AveragePool<kernel_shape=[2,2]>", 1.0) == ["Pad", "AveragePool"]
    assert pooled("MaxPool<kernel_shape=[2,2]>", 0.0) == ["Pad", "MaxPool"]  # x may be negative
    assert pooled("AveragePool<kernel_shape=[2,2]>", 0.0, pads=(0, 0, 2, 2, 0, 0, 2, 2)) == ["Pad", "AveragePool"]


def test_padding_by_nothing_goes_and_one_of_two_readers_leaves_it_to_the_other() -> None:
    text = "(float[N,3,6,6] x) => (float[N,3,6,6] y) { p = Pad(x, pads)\n y = Sin(p) }"
    assert graphs.op_types(
        graphs.rewritten(graphs.model(text, {"pads": np.zeros(8, np.int64)}), pad.rewrite, X)[0]
    ) == ["Sin"]
    text = (
        "(float[N,3,6,6] x) => (float[N,4,H,W] y, float[N,3,8,8] z) { p = Pad(x, pads)\n y = Conv(p, w)\n z = Sin(p) }"
    )
    weights = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "w": graphs.noise(1, 4, 3, 3, 3)}
    after, _ = graphs.rewritten(graphs.model(text, weights), pad.rewrite, X)
    conv = next(node for node in after.graph if node.op_type == "Conv")
    assert conv.attributes["pads"].as_ints() == (1, 1, 1, 1) and conv.inputs[0] is after.graph.inputs[0]


def test_padding_that_torchscript_computes_from_constants_is_folded() -> None:
    """ConstantOfShape, Concat, Reshape, Slice, Transpose: torch turns its order of pads into ONNX's in the graph."""
    chain = """zeros = ConstantOfShape<value = int64[1] {0}>(four)
        all = Concat<axis=0>(given, zeros)
        pairs = Reshape(all, two)
        back = Slice(pairs, minus, least, zero, minus)
        turned = Transpose<perm=[1,0]>(back)
        pads = Reshape(turned, minus)
        p = Pad(x, pads)
        y = Conv(p, w)"""
    weights = {
        "four": np.array([4]), "given": np.array([0, 1, 0, 1]), "two": np.array([-1, 2]), "minus": np.array([-1]),
        "least": np.array([np.iinfo(np.int64).min]), "zero": np.array([0]), "w": graphs.noise(1, 4, 3, 3, 3),
    }  # fmt: skip
    model = graphs.model(f"(float[N,3,6,6] x) => (float[N,4,H,W] y) {{ {chain} }}", weights)

    def both(model: ir.Model) -> int:
        return constants.rewrite(model) + pad.rewrite(model)

    after, _ = graphs.rewritten(model, both, X)
    assert graphs.op_types(after) == ["Conv"]
    assert graphs.node(after, after.graph[0].name or "").attributes["pads"].as_ints() == (0, 0, 1, 1)
