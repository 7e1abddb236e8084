from __future__ import annotations

import numpy as np
import pytest

from exporter.prepare import layernorm
from tests.exporter import graphs

X = {"x": graphs.noise(0, 2, 6, 8) * 2 + 1}
WEIGHTS = {
    "g": graphs.noise(1, 8) + 1, "b": graphs.noise(2, 8), "eps": np.float32(1e-5), "two": np.float32(2),
    "last": np.array([-1]), "first": np.array([1]),
}  # fmt: skip


def body(axis: str = "last", square: str = "s = Pow(d, two)", scaled: str = "y = Mul(n, g)") -> str:
    return f"""(float[N,6,8] x) => (float[N,6,8] y) {{
        m = ReduceMean(x, {axis})
        d = Sub(x, m)
        {square}
        v = ReduceMean(s, {axis})
        e = Add(v, eps)
        r = Sqrt(e)
        n = Div(d, r)
        {scaled}
    }}"""


def fused(text: str) -> list[str]:
    return graphs.op_types(graphs.rewritten(graphs.model(text, WEIGHTS), layernorm.rewrite, X)[0])


@pytest.mark.parametrize("square", ["s = Pow(d, two)", "s = Mul(d, d)"])
def test_decomposed_layernorm_is_one_node(square: str) -> None:
    assert fused(body(square=square)) == ["LayerNormalization"]


def test_bias_goes_in() -> None:
    text = body(scaled="k = Mul(n, g)\n y = Add(k, b)")
    after, _ = graphs.rewritten(graphs.model(text, WEIGHTS), layernorm.rewrite, X)
    assert graphs.op_types(after) == ["LayerNormalization"]
    assert [value.name for value in after.graph[0].inputs][1:] == ["g", "b"]


def test_mean_over_another_axis_is_left_alone() -> None:
    assert "LayerNormalization" not in fused(body(axis="first", scaled="y = Mul(n, g)"))


def test_residual_behind_a_layernorm_is_no_bias() -> None:
    text = """(float[N,6,8] x) => (float[N,6,8] y) { [norm] n = LayerNormalization(x, g)
        y = Add(n, x)
    }"""
    assert fused(text) == ["LayerNormalization", "Add"]


def test_shift_along_another_axis_is_no_bias() -> None:
    text = "(float[N,6,8] x) => (float[N,6,8] y) { n = LayerNormalization(x, g)\n y = Add(n, row) }"
    model = graphs.model(text, WEIGHTS | {"row": graphs.noise(3, 6, 1)})
    assert graphs.op_types(graphs.rewritten(model, layernorm.rewrite, X)[0]) == ["LayerNormalization", "Add"]


def test_epsilon_is_kept() -> None:
    model = graphs.model(body(), WEIGHTS | {"eps": np.float32(0.01)})
    after, _ = graphs.rewritten(model, layernorm.rewrite, X)
    assert after.graph[0].attributes.get_float("epsilon") == pytest.approx(0.01)


def test_last_axis_counted_from_the_front_is_the_last_axis() -> None:
    model = graphs.model(body(axis="two_axis"), WEIGHTS | {"two_axis": np.array([2])})
    after, _ = graphs.rewritten(model, layernorm.rewrite, X)
    assert graphs.op_types(after) == ["LayerNormalization"]
    assert layernorm.rewrite(after) == 0
