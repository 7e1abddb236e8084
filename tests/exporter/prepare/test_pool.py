from __future__ import annotations

import numpy as np
import pytest

from exporter.prepare import pool
from tests.exporter import graphs


def pooled(shape: str, axes: list[int], keepdims: int = 1, out: str = "N,C,1,1") -> list[str]:
    text = f"(float[{shape}] x) => (float[{out}] y) {{ r = Relu(x)\n [mean] y = ReduceMean<keepdims={keepdims}>(r, axes) }}"
    size = [2, *(int(each) for each in shape.split(",")[1:])]
    after, matched = graphs.rewritten(
        graphs.model(text, {"axes": np.array(axes)}), pool.rewrite, {"x": graphs.noise(0, *size)}
    )
    assert matched == ("ReduceMean" not in graphs.op_types(after))
    return graphs.op_types(after)[1:]


@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [-2, 3]])
def test_mean_over_all_spatial_axes_is_a_global_average_pool(axes: list[int]) -> None:
    assert pooled("N,8,5,6", axes) == ["GlobalAveragePool"]
    assert pooled("N,8,5,6", axes, keepdims=0, out="N,C") == ["GlobalAveragePool", "Squeeze"]


def over_rank_3(before: str) -> list[str]:
    text = f"(float[N,8,5] x) => (float[N,8,1] y) {{ {before}\n y = ReduceMean(r, axes) }}"
    model = graphs.model(text, {"axes": np.array([2]), "w": graphs.noise(1, 8, 8, 1)})
    return graphs.op_types(graphs.rewritten(model, pool.rewrite, {"x": graphs.noise(0, 2, 8, 5)})[0])


def test_one_and_three_spatial_axes_too() -> None:
    assert over_rank_3("c = Conv(x, w)\n r = Relu(c)") == ["Conv", "Relu", "GlobalAveragePool"]
    assert pooled("N,8,5,4,3", [2, 3, 4], keepdims=0, out="N,C") == ["GlobalAveragePool", "Squeeze"]


@pytest.mark.parametrize(
    ("shape", "axes", "out"),
    [
        ("N,8,5,6", [2], "N,C,1,W"),
        ("N,8,5,6", [1], "N,1,H,W"),
        ("N,8,5,6", [1, 2, 3], "N,1,1,1"),
        ("N,8", [1], "N,1"),
    ],
)
def test_mean_over_other_axes_stays(shape: str, axes: list[int], out: str) -> None:
    assert pooled(shape, axes, out=out) == ["ReduceMean"]


def test_other_reductions_stay() -> None:
    text = "(float[N,8,5,6] x) => (float[N,C,1,1] y) { y = ReduceSum(x, axes) }"
    model = graphs.model(text, {"axes": np.array([2, 3])})
    assert graphs.rewritten(model, pool.rewrite, {"x": graphs.noise(0, 2, 8, 5, 6)})[1] == 0


def test_two_means_are_both_rewritten_and_each_keeps_its_name() -> None:
    model = graphs.model(
        "(float[N,4,3,3] x) => (float[N,4] y, float[N,4] z) { [a] y = ReduceMean<keepdims=0>(x, axes)\n q = Neg(x)\n"
        " [b] z = ReduceMean<keepdims=0>(q, axes) }",
        {"axes": np.array([2, 3])},
    )
    after, matched = graphs.rewritten(model, pool.rewrite, {"x": graphs.noise(0, 2, 4, 3, 3)})
    assert matched == 2
    assert [graphs.node(after, name).op_type for name in "ab"] == ["GlobalAveragePool"] * 2


def averaged(attributes: str, before: str = "r = Relu(x)", reader: str = "Relu") -> list[str]:
    text = f"(float[N,6,7,8] x) => (float[N,6,P,Q] y) {{ {before}\n [p] a = AveragePool<{attributes}>(r)\n y = {reader}(a) }}"
    after, matched = graphs.rewritten(graphs.model(text), pool.rewrite, {"x": graphs.noise(0, 2, 6, 7, 8)})
    assert matched == ("AveragePool" not in graphs.op_types(after))
    return graphs.op_types(after)[1:-1]


@pytest.mark.parametrize(
    "attributes",
    [
        "kernel_shape=[2,2], strides=[2,2]",
        "kernel_shape=[3,2]",
        "kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1",
    ],
)
def test_average_pool_of_whole_windows_is_a_depthwise_conv(attributes: str) -> None:
    assert averaged(attributes) == ["Conv"]


@pytest.mark.parametrize(
    "attributes",
    [
        "kernel_shape=[3,3], pads=[1,1,1,1]",  # a border window divides by what it covers
        "kernel_shape=[2,2], strides=[2,2], ceil_mode=1",
        'kernel_shape=[2,2], auto_pad="SAME_UPPER"',
        "kernel_shape=[2,2], dilations=[2,2]",
    ],
)
def test_average_pool_of_uneven_windows_stays(attributes: str) -> None:
    assert averaged(attributes) == ["AveragePool"]


def test_average_pool_among_float_nodes_stays() -> None:
    assert averaged("kernel_shape=[2,2]", before="r = Tanh(x)", reader="Exp") == ["AveragePool"]


@pytest.mark.parametrize("kind", ["double", "int32"])
def test_mean_of_other_types_than_float32_stays(kind: str) -> None:
    text = f"({kind}[N,8,5,6] x) => ({kind}[N,8] y) {{ y = ReduceMean<keepdims=0>(x, axes) }}"
    model = graphs.model(text, {"axes": np.array([2, 3])})
    x = (graphs.noise(0, 2, 8, 5, 6) * 9).astype(np.float64 if kind == "double" else np.int32)
    assert graphs.rewritten(model, pool.rewrite, {"x": x})[1] == 0


def test_average_pool_of_doubles_stays() -> None:
    body = "m = MaxPool<kernel_shape=[1,1]>(x)\n y = AveragePool<kernel_shape=[2,2]>(m)"
    text = f"(double[N,6,7,8] x) => (double[N,6,6,7] y) {{ {body} }}"
    assert pool.rewrite(graphs.model(text)) == 0


def test_mean_over_the_features_of_tokens_stays() -> None:
    assert over_rank_3("r = Relu(x)") == ["Relu", "ReduceMean"]
