from __future__ import annotations

import numpy as np
import pytest

from exporter.prepare import hardswish
from tests.exporter import graphs

X = {"x": graphs.noise(0, 64, 8) * 4}
WEIGHTS = {"three": np.float32(3), "zero": np.float32(0), "six": np.float32(6), "five": np.float32(5)}


def fused(body: str) -> list[str]:
    model = graphs.model(f"(float[N,8] x) => (float[N,8] y) {{ {body} }}", WEIGHTS)
    return graphs.op_types(graphs.rewritten(model, hardswish.rewrite, X)[0])


def test_hardswish_is_a_product_with_a_hardsigmoid_decomposed_or_not() -> None:
    assert fused("a = Add(x, three)\n c = Clip(a, zero, six)\n m = Mul(x, c)\n y = Div(m, six)") == [
        "HardSigmoid",
        "Mul",
    ]
    assert fused("y = HardSwish(x)") == ["HardSigmoid", "Mul"]


def test_product_keeps_the_name_of_its_hardswish() -> None:
    model = graphs.model("(float[N,8] x) => (float[N,8] y) { [swish] y = HardSwish(x) }")
    names = [node.name for node in graphs.rewritten(model, hardswish.rewrite, X)[0].graph]
    assert names == ["swish_gate", "swish"]


def test_decomposed_hardsigmoid_is_one_node() -> None:
    assert fused("a = Add(x, three)\n c = Clip(a, zero, six)\n y = Div(c, six)") == ["HardSigmoid"]


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, five)\n c = Clip(a, zero, six)\n m = Mul(x, c)\n y = Div(m, six)",
        "a = Add(x, three)\n c = Clip(a, zero, five)\n m = Mul(x, c)\n y = Div(m, six)",
        "a = Add(x, three)\n c = Clip(a, zero, six)\n m = Mul(x, c)\n y = Div(m, five)",
    ],
)
def test_near_miss_is_left_alone(body: str) -> None:
    assert "HardSigmoid" not in fused(body)


def test_doubles_are_left_alone() -> None:
    weights = {name: value.astype(np.float64) for name, value in WEIGHTS.items()}
    for body in ("m = Mul(x, c)\n y = Div(m, six)", "y = Div(c, six)"):
        model = graphs.model(
            f"(double[N,8] x) => (double[N,8] y) {{ a = Add(x, three)\n c = Clip(a, zero, six)\n {body} }}", weights
        )
        assert graphs.rewritten(model, hardswish.rewrite, {"x": X["x"].astype(np.float64)})[1] == 0
