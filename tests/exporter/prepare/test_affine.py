from __future__ import annotations

import numpy as np
import pytest

from exporter.prepare import affine
from tests.exporter import graphs

WEIGHTS = {
    "w": graphs.noise(1, 5, 3, 3, 3),
    "c": graphs.noise(2, 5),
    "d": graphs.noise(3, 3, 1, 3, 3),
    "a": np.array([0.7], np.float32),
    "b": np.array([-0.4], np.float32),
    "zero": np.array([0], np.float32),
    "v": graphs.noise(4, 3, 1, 1),
}
X = {"x": graphs.noise(0, 2, 3, 7, 7)}


def folded(body: str) -> list[str]:
    model = graphs.model(f"(float[2,3,7,7] x) => (float[N,M,P,Q] y) {{ {body} }}", WEIGHTS)
    return graphs.op_types(graphs.rewritten(model, affine.rewrite, X)[0])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("m = Mul(x, a)\n [k] y = Conv<pads=[1,1,1,1]>(m, w)", ["Conv"]),
        ("m = Mul(a, x)\n s = Add(m, b)\n [k] y = Conv(m2, w, c)".replace("m2", "s"), ["Conv"]),
        ("s = Add(x, b)\n [k] y = Conv(s, w)", ["Conv"]),
        ("m = Mul(x, a)\n [s] s = Add(m, b)\n [k] y = Conv<pads=[1,1,1,1], group=3>(s, d)", ["Add", "Conv"]),
        ("s = Add(x, b)\n [k] y = Conv<pads=[1,1,1,1]>(s, w)", ["Add", "Conv"]),
        ("m = Mul(x, zero)\n [k] y = Conv(m, w)", ["Mul", "Conv"]),
        ("m = Mul(x, v)\n [k] y = Conv(m, w)", ["Mul", "Conv"]),  # one factor a channel
        ("m = Mul(x, a)\n [k] p = Conv<pads=[1,1,1,1], group=3>(m, d)\n y = Add(m, p)", ["Mul", "Conv", "Add"]),
    ],
)
def test_scalar_steps_before_a_conv_are_in_its_weight_and_bias(body: str, expected: list[str]) -> None:
    assert folded(body) == expected
