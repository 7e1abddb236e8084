from __future__ import annotations

import math

import numpy as np
import pytest

from exporter.prepare import gelu
from tests.exporter import graphs

X = {"x": graphs.noise(0, 64, 8) * 3}
WEIGHTS = {
    "root2": np.float32(math.sqrt(2)), "rootHalf": np.float32(math.sqrt(0.5)), "one": np.float32(1), "half": np.float32(0.5),
    "three": np.float32(3), "c": np.float32(0.044715), "k": np.float32(math.sqrt(2 / math.pi)), "root3": np.float32(math.sqrt(3)),
    "two": np.float32(2),
}  # fmt: skip
ERF = {"quotient": "d = Div(x, root2)\n g = Erf(d)", "product": "d = Mul(x, rootHalf)\n g = Erf(d)"}
TANH = {
    "power": "q = Pow(x, three)\n r = Mul(q, c)\n s = Add(x, r)\n t = Mul(s, k)\n g = Tanh(t)",
    "products": "p = Mul(x, x)\n q = Mul(p, x)\n r = Mul(q, c)\n s = Add(x, r)\n t = Mul(s, k)\n g = Tanh(t)",
}
PRODUCTS = {
    "half first": "h = Mul(x, half)\n y = Mul(h, a)",
    "half inside": "h = Mul(a, half)\n y = Mul(x, h)",
    "half last": "h = Mul(x, a)\n y = Mul(h, half)",
    "half first, swapped": "h = Mul(half, x)\n y = Mul(a, h)",
}


def fused(body: str, outputs: str = "float[N,8] y") -> list[tuple[str, str]]:
    model = graphs.model(f"(float[N,8] x) => ({outputs}) {{ {body} }}", WEIGHTS)
    after, _ = graphs.rewritten(model, gelu.rewrite, X)
    return [(node.op_type, node.attributes.get_string("approximate", "")) for node in after.graph]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("gate", ERF)
def test_erf_gelu_is_one_node(gate: str, product: str) -> None:
    for add in ("a = Add(g, one)", "a = Add(one, g)"):
        assert fused(f"{ERF[gate]}\n {add}\n {PRODUCTS[product]}") == [("Gelu", "none")]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("gate", TANH)
def test_tanh_gelu_is_one_node_and_says_so(gate: str, product: str) -> None:
    assert fused(f"{TANH[gate]}\n a = Add(g, one)\n {PRODUCTS[product]}") == [("Gelu", "tanh")]


@pytest.mark.parametrize(
    "body",
    [
        "d = Div(x, root3)\n g = Erf(d)\n a = Add(g, one)\n h = Mul(x, half)\n y = Mul(h, a)",  # not √2
        "d = Div(x, root2)\n g = Erf(d)\n a = Add(g, two)\n h = Mul(x, half)\n y = Mul(h, a)",  # not 1 + erf
        "d = Div(x, root2)\n g = Erf(d)\n a = Add(g, one)\n h = Mul(x, two)\n y = Mul(h, a)",  # not ½
        "d = Div(x, root2)\n g = Tanh(d)\n a = Add(g, one)\n h = Mul(x, half)\n y = Mul(h, a)",  # not erf
        "z = Abs(x)\n d = Div(z, root2)\n g = Erf(d)\n a = Add(g, one)\n h = Mul(x, half)\n y = Mul(h, a)",  # two xs
    ],
)
def test_near_miss_is_left_alone(body: str) -> None:
    assert "Gelu" not in [op_type for op_type, _ in fused(body)]


def test_inner_value_that_is_read_elsewhere_is_kept() -> None:
    found = fused(
        f"{ERF['quotient']}\n a = Add(g, one)\n h = Mul(x, half)\n y = Mul(h, a)", "float[N,8] y, float[N,8] g"
    )
    assert ("Erf", "") in found
