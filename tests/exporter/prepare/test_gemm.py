from __future__ import annotations

import numpy as np
import pytest

from exporter import graph
from exporter.prepare import gemm
from tests.exporter import graphs

W, B = graphs.noise(1, 5, 8), graphs.noise(2, 8)


def test_matmul_and_bias_over_rank_2_is_gemm() -> None:
    model = graphs.model(
        "(float[N,5] x) => (float[N,8] y) { [m] p = MatMul(x, w)\n [a] y = Add(p, b) }", {"w": W, "b": B}
    )
    after, matched = graphs.rewritten(model, gemm.rewrite, {"x": graphs.noise(0, 4, 5)})
    assert (matched, graphs.op_types(after)) == (1, ["Gemm"])
    np.testing.assert_array_equal(graph.constant(after.graph[0].inputs[2]), B)


def test_transposed_weight_goes_into_the_gemm() -> None:
    model = graphs.model(
        "(float[N,5] x) => (float[N,8] y) { t = Transpose<perm=[1,0]>(w)\n p = MatMul(x, t)\n y = Add(p, b) }",
        {"w": W.T.copy(), "b": B},
    )
    after, _ = graphs.rewritten(model, gemm.rewrite, {"x": graphs.noise(0, 4, 5)})
    assert graphs.op_types(after)[-1] == "Gemm" and "Add" not in graphs.op_types(after)


def test_rank_3_is_left_alone() -> None:
    model = graphs.model("(float[N,3,5] x) => (float[N,3,8] y) { p = MatMul(x, w)\n y = Add(p, b) }", {"w": W, "b": B})
    assert graphs.rewritten(model, gemm.rewrite, {"x": graphs.noise(0, 2, 3, 5)})[1] == 0


def test_product_that_is_read_elsewhere_is_left_alone() -> None:
    model = graphs.model(
        "(float[N,5] x) => (float[N,8] y, float[N,8] p) { p = MatMul(x, w)\n y = Add(p, b) }", {"w": W, "b": B}
    )
    after, _ = graphs.rewritten(model, gemm.rewrite, {"x": graphs.noise(0, 4, 5)})
    assert "MatMul" in graphs.op_types(after)


def test_addend_with_more_rows_than_the_product_is_left_alone() -> None:
    """Gemm's C must broadcast to the product; Add's may broadcast the product."""
    model = graphs.model(
        "(float[1,5] x) => (float[3,8] y) { p = MatMul(x, w)\n y = Add(p, c) }", {"w": W, "c": graphs.noise(3, 3, 8)}
    )
    assert graphs.rewritten(model, gemm.rewrite, {"x": graphs.noise(0, 1, 5)})[1] == 0


def test_residual_that_is_added_to_a_product_is_no_bias() -> None:
    """As one it is computed at run time, and would keep the layer float."""
    model = graphs.model(
        "(float[N,5] x, float[N,8] r) => (float[N,8] y) { p = MatMul(x, w)\n y = Add(p, r) }", {"w": W}
    )
    after, matched = graphs.rewritten(model, gemm.rewrite, {"x": graphs.noise(0, 4, 5), "r": graphs.noise(1, 4, 8)})
    assert (matched, graphs.op_types(after)) == (0, ["MatMul", "Add"])


def test_bias_before_the_product_is_the_same_bias() -> None:
    model = graphs.model("(float[N,5] x) => (float[N,8] y) { p = MatMul(x, w)\n y = Add(b, p) }", {"w": W, "b": B})
    after, _ = graphs.rewritten(model, gemm.rewrite, {"x": graphs.noise(0, 4, 5)})
    assert graphs.op_types(after) == ["Gemm"]


def test_product_of_integers_is_left_alone() -> None:
    model = graphs.model(
        "(int32[N,5] x) => (int32[N,8] y) { p = MatMul(x, w)\n y = Add(p, b) }",
        {"w": np.ones((5, 8), np.int32), "b": np.ones(8, np.int32)},
    )
    after, matched = graphs.rewritten(model, gemm.rewrite, {"x": np.arange(10, dtype=np.int32).reshape(2, 5)})
    assert (matched, graphs.op_types(after)) == (0, ["MatMul", "Add"])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (8,), (1, 8)])
@pytest.mark.parametrize("transposed", [0, 1])
def test_bias_of_gemm_becomes_a_number_per_column(shape: tuple[int, ...], transposed: int) -> None:
    model = graphs.model(
        f"(float[N,5] x) => (float[N,8] y) {{ [g] y = Gemm <transB={transposed}> (x, w, b) }}",
        {"w": np.ascontiguousarray(W.T) if transposed else W, "b": graphs.noise(2, *shape)},
    )
    after, matched = graphs.rewritten(model, gemm.rewrite, {"x": graphs.noise(0, 4, 5)})
    assert matched == (shape != (8,))
    np.testing.assert_array_equal(
        graph.constant(after.graph[0].inputs[2]), np.broadcast_to(graphs.noise(2, *shape), (1, 8))[0]
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (8,), (1, 8)])
def test_bias_of_any_shape_that_adds_one_number_per_column_goes_into_the_gemm(shape: tuple[int, ...]) -> None:
    model = graphs.model(
        "(float[N,5] x) => (float[N,8] y) { p = MatMul(x, w)\n y = Add(p, b) }", {"w": W, "b": graphs.noise(2, *shape)}
    )
    after, _ = graphs.rewritten(model, gemm.rewrite, {"x": graphs.noise(0, 4, 5)})
    (node,) = after.graph
    assert node.op_type == "Gemm" and graph.constant(node.inputs[2]).shape == (8,)


@pytest.mark.parametrize("shape", [(1, 1, 8), (4, 1), (4, 8)])
def test_addend_that_makes_an_axis_or_varies_by_row_is_no_bias(shape: tuple[int, ...]) -> None:
    output = "float[1,4,8]" if len(shape) == 3 else "float[4,8]"
    model = graphs.model(
        f"(float[4,5] x) => ({output} y) {{ p = MatMul(x, w)\n y = Add(p, b) }}", {"w": W, "b": graphs.noise(2, *shape)}
    )
    after, matched = graphs.rewritten(model, gemm.rewrite, {"x": graphs.noise(0, 4, 5)})
    assert (matched, graphs.op_types(after)) == (0, ["MatMul", "Add"])


@pytest.mark.parametrize(
    ("attributes", "ops"),
    [
        ("alpha=0.5, beta=2.0", ["Gemm"]),
        ("beta=2.0, transB=1", ["Gemm"]),
        ("alpha=0.0", ["Gemm"]),
        ("transA=1, alpha=3.0", ["Transpose", "Gemm"]),
    ],
)
def test_factors_of_a_gemm_go_into_its_weight_and_bias(attributes: str, ops: list[str]) -> None:
    turned, weight = "transA" in attributes, W.T.copy() if "transB" in attributes else W
    rows = "float[5,N] x" if turned else "float[N,5] x"
    model = graphs.model(f"({rows}) => (float[N,8] y) {{ [g] y = Gemm<{attributes}>(x, w, b) }}", {"w": weight, "b": B})
    after, matched = graphs.rewritten(model, gemm.rewrite, {"x": graphs.noise(0, *((5, 4) if turned else (4, 5)))})
    assert (matched, graphs.op_types(after)) == (1, ops)
    assert {*after.graph[-1].attributes} == {"transB"}


@pytest.mark.parametrize(("beta", "ops"), [("1.0", ["Gemm", "Add"]), ("2.0", ["Gemm", "Mul", "Add"])])
def test_bias_that_is_computed_is_added_behind_the_gemm(beta: str, ops: list[str]) -> None:
    model = graphs.model(
        f"(float[N,5] x, float[N,8] c) => (float[N,8] y) {{ [g] y = Gemm<beta={beta}>(x, w, c) }}", {"w": W}
    )
    after, matched = graphs.rewritten(model, gemm.rewrite, {"x": graphs.noise(0, 4, 5), "c": graphs.noise(1, 4, 8)})
    assert (matched, graphs.op_types(after)) == (1, ops)


def test_gemm_of_two_activations_keeps_its_factors() -> None:
    model = graphs.model("(float[N,5] x, float[5,8] w) => (float[N,8] y) { y = Gemm<alpha=0.5>(x, w) }", {})
    assert graphs.rewritten(model, gemm.rewrite, {"x": graphs.noise(0, 4, 5), "w": W})[1] == 0
