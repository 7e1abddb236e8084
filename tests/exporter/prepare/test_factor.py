from __future__ import annotations

import numpy as np
import pytest

from exporter.prepare import factor
from tests.exporter import graphs

WEIGHTS = {
    "w": graphs.noise(1, 6, 8),
    "b": graphs.noise(2, 8),
    "k": graphs.noise(3, 6, 8),
    "a": np.array(0.35, np.float32),
    "one": np.array([0.5], np.float32),
    "many": graphs.noise(4, 5),
    "zero": np.array(0, np.float32),
    "rows": np.array([2, 5, 2, 4], np.int64),
    "pages": np.array([1, 5, 2, 6], np.int64),
}
X = {"x": graphs.noise(0, 10, 6), "y": graphs.noise(5, 2, 5, 6)}
LAYER = "[q] q0 = Gemm(x, w, b)\n q1 = Reshape(q0, rows)\n q = Transpose<perm=[0,2,1,3]>(q1)"
OTHER = "[k] k0 = MatMul(y, k)\n k1 = Reshape(k0, rows)\n k2 = Transpose<perm=[0,2,3,1]>(k1)"


def folded(body: str) -> list[str]:
    model = graphs.model(f"(float[10,6] x, float[2,5,6] y) => (float[A,B,C,D] z) {{ {body} }}", WEIGHTS)
    return graphs.op_types(graphs.rewritten(model, factor.rewrite, X)[0])


@pytest.mark.parametrize("scaled", ["Mul(s, a)", "Mul(a, s)", "Div(s, a)", "Mul(s, one)"])
def test_factor_behind_a_product_is_in_the_layer_that_makes_its_first_factor(scaled: str) -> None:
    left = folded(f"{LAYER}\n{OTHER}\n s = MatMul(q, k2)\n [m] t = {scaled}\n z = Relu(t)")
    assert not {"Mul", "Div"} & set(left)
    assert left.count("MatMul") == 2


def test_factor_of_either_side_of_a_product_is_in_the_layer_that_makes_it() -> None:
    left = folded(f"{LAYER}\n{OTHER}\n m = Mul(q, a)\n n = Div(k2, a)\n z = MatMul(m, n)")
    assert left == ["Gemm", "Reshape", "Transpose", "MatMul", "Reshape", "Transpose", "MatMul"]


@pytest.mark.parametrize(
    ("body", "op_type"),
    [
        (f"{LAYER}\n{OTHER}\n s = MatMul(q, k2)\n t = Mul(s, many)\n z = Relu(t)", "Mul"),  # one factor a column
        (f"{LAYER}\n{OTHER}\n s = MatMul(q, k2)\n t = Mul(s, zero)\n z = Relu(t)", "Mul"),
        (f"{LAYER}\n{OTHER}\n s = MatMul(q, k2)\n t = Div(a, s)\n z = Relu(t)", "Div"),
        (f"{LAYER}\n{OTHER}\n s = MatMul(q, k2)\n t = Mul(s, a)\n z = Add(t, s)", "Mul"),  # the product is read twice
        (f"{LAYER}\n m = Mul(q, a)\n z = Relu(m)", "Mul"),  # no product
        (
            "r = Reshape(x, pages)\n t = Transpose<perm=[0,1,3,2]>(r)\n m = Mul(t, a)\n z = MatMul(m, r)",
            "Mul",
        ),  # no layer
    ],
)
def test_factor_stays_where_it_is_no_single_one_of_a_product_or_no_layer_is_behind(body: str, op_type: str) -> None:
    assert op_type in folded(body)
