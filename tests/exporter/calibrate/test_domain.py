from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter import graph
from exporter.calibrate import Range, Ranges, distinguish
from tests.exporter import graphs

WEIGHTS = {
    "low": np.float32(-1), "high": np.float32(6), "one": np.float32(1), "two": np.float32(2), "minus": np.float32(-2),
}  # fmt: skip


def reader(body: str, outputs: str = "float[N,4] y") -> ir.Model:
    """x is doubled into d, which `body` reads."""
    return graphs.model(f"(float[N,4] x) => ({outputs}) {{ [two] d = Add(x, x)\n {body} }}", WEIGHTS)


def ranges(low: float, high: float) -> Ranges:
    return Ranges(tensors={"d": Range(low=low, high=high, elements=8, masked=0)}, batches=1, method="minmax")


def cut(model: ir.Model, low: float = -10, high: float = 10) -> tuple[float, float]:
    found = distinguish(model, ranges(low, high)).tensors["d"]
    return found.low, found.high


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = HardSwish(d)", (-3, 10)),
        ("y = HardSigmoid(d)", (-2.5, 2.5)),
        ("y = HardSigmoid<alpha=0.1, beta=0.25>(d)", (-2.5, 7.5)),
        ("g = HardSigmoid(d)\n y = Mul(d, g)", (-2.5, 10)),
        ("g = HardSigmoid<alpha=0.1, beta=0.25>(d)\n y = Mul(g, d)", (-2.5, 10)),
        ("g = HardSigmoid(x)\n y = Mul(d, g)", (-10, 10)),  # of another tensor
        ("g = HardSigmoid(d)\n y = Add(d, g)", (-10, 10)),
        ("y = Relu(d)", (0, 10)),
        ("y = Clip(d, low, high)", (-1, 6)),
        ("y = Clip(d, low)", (-1, 10)),
        ("y = Clip(d)", (-10, 10)),
        ("y = Clip(d, one, two)", (0, 2)),  # 0 stays inside: codes are laid around it
        ("y = Clip(d, minus, low)", (-2, 0)),
        ("y = Tanh(d)", (-10, 10)),
        ("y = Add(d, d)", (-10, 10)),
        ("a = HardSwish(d)\n b = Relu(d)\n y = Add(a, b)", (-3, 10)),  # what either can tell apart
        ("a = HardSigmoid(d)\n b = Relu(d)\n y = Add(a, b)", (-2.5, 10)),
        ("a = HardSwish(d)\n b = Tanh(d)\n y = Add(a, b)", (-10, 10)),
    ],
)
def test_range_is_cut_to_what_its_readers_tell_apart(body: str, expected: tuple[float, float]) -> None:
    assert cut(reader(body)) == pytest.approx(expected)


def test_cut_never_widens() -> None:
    assert cut(reader("y = HardSigmoid(d)"), -1, 1) == (-1, 1)
    assert cut(reader("y = Relu(d)"), 2, 3) == (2, 3)


def test_range_outside_of_what_is_seen_is_kept() -> None:
    assert cut(reader("y = Relu(d)"), -5, -4) == (-5, -4)


def test_user_can_tell_everything_apart() -> None:
    assert cut(reader("y = Relu(d)", "float[N,4] y, float[N,4] d")) == (-10, 10)


def test_bounds_that_are_computed_cut_nothing() -> None:
    text = "(float[N,4] x, float b) => (float[N,4] y) { d = Add(x, x)\n y = Clip(d, b) }"
    assert cut(graphs.model(text)) == (-10, 10)


def test_tensor_that_is_used_as_a_bound_is_not_cut() -> None:
    text = "(float x) => (float y) { d = Add(x, x)\n y = Clip(x, d) }"
    assert cut(graphs.model(text)) == (-10, 10)


def test_counts_and_other_tensors_are_left_as_they_are() -> None:
    other = Range(low=-9, high=9, elements=3, masked=1)
    given_ranges = Ranges(tensors=ranges(-10, 10).tensors | {"x": other}, batches=7, method="minmax")
    found = distinguish(reader("y = Relu(d)"), given_ranges)
    assert found.tensors["x"] == other
    assert (found.batches, found.tensors["d"].elements) == (7, 8)


SATURATING = {
    name: graph.runner(reader(body))
    for name, body in {
        "HardSwish": "y = HardSwish(d)",
        "HardSigmoid": "y = HardSigmoid<alpha=0.3, beta=0.4>(d)",
        "product": "g = HardSigmoid<alpha=0.3, beta=0.4>(d)\n y = Mul(g, d)",
        "Relu": "y = Relu(d)",
        "Clip": "y = Clip(d, low, high)",
    }.items()
}
MODELS = {
    "HardSwish": reader("y = HardSwish(d)"),
    "HardSigmoid": reader("y = HardSigmoid<alpha=0.3, beta=0.4>(d)"),
    "product": reader("g = HardSigmoid<alpha=0.3, beta=0.4>(d)\n y = Mul(g, d)"),
    "Relu": reader("y = Relu(d)"),
    "Clip": reader("y = Clip(d, low, high)"),
}


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None)
@given(st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4))
def test_function_of_the_clipped_value_is_the_function_of_the_value(name: str, values: list[float]) -> None:
    """f(clip(d)) = f(d): nothing that a reader sees is lost."""
    low, high = cut(MODELS[name], -100, 100)
    d = np.array([values], np.float32)
    whole, clipped = (SATURATING[name]({"x": each / 2})["y"] for each in (d, np.clip(d, low, high).astype(np.float32)))
    np.testing.assert_allclose(clipped, whole, rtol=0, atol=1e-6)
