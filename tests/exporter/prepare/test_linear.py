"""exporter.prepare.linear: a linear layer over many axes is a Gemm between two Reshapes."""

from __future__ import annotations

import numpy as np
import pytest

from exporter import graph
from exporter.prepare import linear
from tests.exporter import graphs

WEIGHTS = {
    "w": graphs.noise(1, 6, 5),
    "b": graphs.noise(2, 5),
    "w2": graphs.noise(3, 6, 4),
    "b2": graphs.noise(4, 1, 1, 4),
}


@pytest.mark.parametrize("shape", ["2,3,6", "N,3,6", "N,T,6", "2,T,3,6"])
def test_linear_layer_over_many_axes_is_a_gemm(shape: str) -> None:
    leading = shape.rsplit(",", 1)[0]
    text = f"(float[{shape}] x) => (float[{leading},5] y) {{ [product] p = MatMul(x, w) [add] y = Add(b, p) }}"
    batches = [
        {"x": graphs.noise(seed, *[int(n) if n.isdigit() else 2 + seed for n in shape.split(",")])} for seed in range(3)
    ]
    after, matched = graphs.rewritten(graphs.model(text, WEIGHTS), linear.rewrite, *batches)
    assert matched == 1
    assert "MatMul" not in graphs.op_types(after)
    assert graphs.op_types(after).count("Gemm") == 1
    assert ("Shape" in graphs.op_types(after)) == (shape == "N,T,6")


def test_layers_that_read_one_tensor_share_its_reshape() -> None:
    text = """(float[N,3,6] x) => (float[N,3,5] y, float[N,3,4] z) {
        [one] p = MatMul(x, w) [add1] y = Add(p, b) [two] q = MatMul(x, w2) [add2] z = Add(q, b2)
    }"""
    after, matched = graphs.rewritten(graphs.model(text, WEIGHTS), linear.rewrite, {"x": graphs.noise(0, 2, 3, 6)})
    assert matched == 2
    assert graphs.op_types(after).count("Reshape") == 3


@pytest.mark.parametrize(
    "body",
    [
        "[p] p = MatMul(x, w) [a] y = Add(p, x2)",  # a residual, no bias
        "[p] p = MatMul(x, w) [r] r = Relu(p) [a] y = Add(r, b)",
        "[p] y = MatMul(x, w)",
        "[p] p = MatMul(x, w) [a] q = Add(p, b) [m] y = Mul(q, p)",
    ],
)
def test_what_is_no_linear_layer_stays(body: str) -> None:
    text = f"(float[2,3,6] x, float[2,3,5] x2) => (float[2,3,5] y) {{ {body} }}"
    batch = {"x": graphs.noise(0, 2, 3, 6), "x2": graphs.noise(1, 2, 3, 5)}
    _, matched = graphs.rewritten(graphs.model(text, WEIGHTS), linear.rewrite, batch)
    assert matched == 0


def test_matrix_is_gemms_own_rewrite() -> None:
    model = graphs.model("(float[N,6] x) => (float[N,5] y) { [p] p = MatMul(x, w) [a] y = Add(p, b) }", WEIGHTS)
    assert linear.rewrite(model) == 0


def test_integer_kernel_writes_float_with_the_bias_added() -> None:
    text = "(float[2,3,6] x) => (float[2,3,5] y) { [product] p = MatMul(x, w) [add] y = Add(b, p) }"
    batch = {"x": graphs.noise(0, 2, 3, 6)}
    after, _ = graphs.rewritten(graphs.model(text, WEIGHTS), linear.rewrite, batch)
    plan, _ = graphs.planned(after, batch)
    assert graphs.precisions(plan)["product_gemm"] == "int8"
    expected = batch["x"] @ WEIGHTS["w"] + WEIGHTS["b"]
    assert np.allclose(graph.runner(after)(batch)["y"], expected, atol=1e-5)


def test_empty_batches_and_sequences_run_as_before() -> None:
    model = graphs.model(
        "(float[N,T,5] x) => (float[N,T,8] y) { p = MatMul(x, w)\n y = Add(p, b) }",
        {"w": graphs.noise(1, 5, 8), "b": graphs.noise(2, 8)},
    )
    shapes = ((2, 3, 5), (2, 0, 5), (0, 3, 5), (0, 0, 5))
    _, matched = graphs.rewritten(model, linear.rewrite, *({"x": graphs.noise(0, *shape)} for shape in shapes))
    assert matched == 1
