from __future__ import annotations

import numpy as np
import pytest

from exporter import graph
from exporter.prepare import batchnorm
from tests.exporter import graphs

X = {"x": graphs.noise(0, 2, 3, 6, 6)}
# statistics as training leaves them
NORM = {
    "g": graphs.noise(1, 8) + 1,
    "s": graphs.noise(2, 8),
    "m": graphs.noise(3, 8),
    "v": np.abs(graphs.noise(4, 8)) + 0.5,
}


def test_batchnorm_behind_conv_is_folded_into_its_weight_and_bias() -> None:
    model = graphs.model(
        """(float[N,3,6,6] x) => (float[N,8,4,4] y) {
            [conv] c = Conv(x, w, b)
            [norm] y = BatchNormalization<epsilon=0.01>(c, g, s, m, v)
        }""",
        NORM | {"w": graphs.noise(5, 8, 3, 3, 3), "b": graphs.noise(6, 8)},
    )
    after, matched = graphs.rewritten(model, batchnorm.rewrite, X)
    assert (matched, graphs.op_types(after)) == (1, ["Conv"])
    gain = NORM["g"] / np.sqrt(NORM["v"] + np.float32(0.01))
    bias = (graphs.noise(6, 8) - NORM["m"]) * gain + NORM["s"]
    np.testing.assert_allclose(graph.constant(after.graph[0].inputs[2]), bias, rtol=1e-5)


def test_batchnorm_behind_conv_without_bias_and_behind_conv_transpose_and_gemm_are_folded() -> None:
    conv = "[c] c = Conv<group=1>(x, w)"
    transpose = "[c] c = ConvTranspose<strides=[2,2]>(x, t)"
    for layer in (conv, transpose):
        model = graphs.model(
            f"(float[N,3,6,6] x) => (float[N,8,H,W] y) {{ {layer}\n [n] y = BatchNormalization(c, g, s, m, v) }}",
            NORM | {"w": graphs.noise(5, 8, 3, 3, 3), "t": graphs.noise(6, 3, 8, 2, 2)},
        )
        assert graphs.op_types(graphs.rewritten(model, batchnorm.rewrite, X)[0]) == [layer.split("= ")[1].split("<")[0]]
    gemm = graphs.model(
        "(float[N,5] x) => (float[N,8] y) { [c] c = Gemm(x, w, b)\n [n] y = BatchNormalization(c, g, s, m, v) }",
        NORM | {"w": graphs.noise(5, 5, 8), "b": graphs.noise(6, 8)},
    )
    assert graphs.op_types(graphs.rewritten(gemm, batchnorm.rewrite, {"x": graphs.noise(7, 4, 5)})[0]) == ["Gemm"]


def affine(op_type: str, factor: np.ndarray, conv: str = "Conv(x, w, b)", swapped: bool = False) -> str:
    pair = "k, c" if swapped else "c, k"
    output = "float[A,N,M,H,W]" if factor.ndim == 5 else "float[N,M,H,W]"
    model = graphs.model(
        f"(float[N,3,6,6] x) => ({output} y) {{ [conv] c = {conv}\n [scale] y = {op_type}({pair}) }}",
        {"w": graphs.noise(5, 8, 3, 3, 3), "b": graphs.noise(6, 8), "k": factor},
    )
    after, matched = graphs.rewritten(model, batchnorm.rewrite, X)
    assert matched == (len(after.graph) == 1)
    return " ".join(graphs.op_types(after))


@pytest.mark.parametrize("op_type", ["Mul", "Add"])
@pytest.mark.parametrize("swapped", [False, True])
def test_constant_per_channel_behind_conv_is_folded(op_type: str, swapped: bool) -> None:
    assert affine(op_type, graphs.noise(7, 8, 1, 1), swapped=swapped) == "Conv"
    assert affine(op_type, graphs.noise(7, 1, 8, 1, 1), swapped=swapped) == "Conv"
    assert affine(op_type, np.float32(1.5), swapped=swapped) == "Conv"
    assert affine(op_type, graphs.noise(7, 8, 1, 1), "Conv(x, w)", swapped) == "Conv"


@pytest.mark.parametrize("op_type", ["Mul", "Add"])
def test_constant_along_another_axis_is_not_folded(op_type: str) -> None:
    assert affine(op_type, graphs.noise(7, 4)) == f"Conv {op_type}"
    assert affine(op_type, graphs.noise(7, 1, 1, 4, 1)) == f"Conv {op_type}"
    assert affine(op_type, graphs.noise(7, 1, 8, 4, 4)) == f"Conv {op_type}"
    assert affine(op_type, graphs.noise(7, 2, 1, 1, 1)) == f"Conv {op_type}"
    assert affine(op_type, graphs.noise(7, 1, 1, 1, 1, 1)) == f"Conv {op_type}"  # it would add an axis


def test_scale_and_shift_in_a_row_are_both_folded() -> None:
    model = graphs.model(
        """(float[N,3,6,6] x) => (float[N,8,4,4] y) {
            c = Conv(x, w)
            d = Mul(c, k)
            e = Add(d, l)
            y = Mul(e, k)
        }""",
        {"w": graphs.noise(5, 8, 3, 3, 3), "k": graphs.noise(6, 8, 1, 1), "l": graphs.noise(7, 8, 1, 1)},
    )
    after, matched = graphs.rewritten(model, batchnorm.rewrite, X)
    assert (matched, graphs.op_types(after)) == (3, ["Conv"])


@pytest.mark.parametrize("more", ["", ", float[N,8,4,4] c"])
def test_conv_that_something_else_reads_is_left_alone(more: str) -> None:
    other = "z = Add(m, c)" if not more else "z = Relu(m)"
    model = graphs.model(
        f"(float[N,3,6,6] x) => (float[N,8,4,4] z{more}) {{ c = Conv(x, w)\n m = Mul(c, k)\n {other} }}",
        {"w": graphs.noise(5, 8, 3, 3, 3), "k": graphs.noise(6, 8, 1, 1)},
    )
    after, matched = graphs.rewritten(model, batchnorm.rewrite, X)
    assert (matched, len(after.graph)) == (0, 3)


def test_factor_that_is_computed_is_not_folded() -> None:
    model = graphs.model(
        "(float[N,3,6,6] x, float[8,1,1] k) => (float[N,8,4,4] y) { c = Conv(x, w)\n y = Mul(c, k) }",
        {"w": graphs.noise(5, 8, 3, 3, 3)},
    )
    assert graphs.rewritten(model, batchnorm.rewrite, X | {"k": graphs.noise(1, 8, 1, 1)})[1] == 0


def test_batchnorm_that_stands_alone_becomes_a_depthwise_conv() -> None:
    for shape, spatial in (("8,6", 1), ("8,6,6", 2), ("8,4,4,4", 3)):
        model = graphs.model(
            f"(float[N,{shape}] x) => (float[N,{shape}] y) {{ r = Relu(x)\n [norm] y = BatchNormalization(r, g, s, m, v) }}",
            NORM,
        )
        x = graphs.noise(9, 2, *map(int, shape.split(",")))
        after, matched = graphs.rewritten(model, batchnorm.rewrite, {"x": x})
        assert (matched, graphs.op_types(after)) == (1, ["Relu", "Conv"])
        conv = graphs.node(after, "norm")
        assert conv.attributes.get_int("group") == 8
        assert graph.constant(conv.inputs[1]).shape == (8, *[1] * (spatial + 1))


def test_batchnorm_over_rank_2_is_left_alone() -> None:
    model = graphs.model(
        "(float[N,8] x) => (float[N,8] y) { r = Relu(x)\n y = BatchNormalization(r, g, s, m, v) }", NORM
    )
    assert graphs.rewritten(model, batchnorm.rewrite, {"x": graphs.noise(9, 3, 8)})[1] == 0


def test_batchnorm_of_doubles_is_left_alone() -> None:
    model = graphs.model(
        "(double[N,8,6,6] x) => (double[N,8,6,6] y) { r = Relu(x)\n y = BatchNormalization(r, g, s, m, v) }",
        {name: value.astype(np.float64) for name, value in NORM.items()},
    )
    x = graphs.noise(9, 2, 8, 6, 6).astype(np.float64)
    assert graphs.rewritten(model, batchnorm.rewrite, {"x": x})[1] == 0
