"""Each method against a reference that holds every value in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest

from exporter.calibrate import methods, observe
from exporter.calibrate.statistics import Statistics
from exporter.errors import CalibrationError
from tests.exporter import graphs

NEG = graphs.model("(float[N,M] x) => (float[N,M] y) { [n] y = Neg(x) }")


def _relu(rng: np.random.Generator) -> np.ndarray:
    return np.maximum(rng.normal(size=(64, 2000)), 0)


DATA: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.normal(1, 3, size=(64, 2000)),
    "laplace": lambda rng: rng.laplace(size=(64, 2000)),
    "relu": _relu,
    "heavy": lambda rng: rng.standard_t(3, size=(64, 2000)),
    "skewed": lambda rng: rng.gamma(2, size=(64, 2000)) - 0.3,
}


@functools.cache
def everything(name: str) -> np.ndarray:
    return DATA[name](np.random.default_rng(5)).astype(np.float32)


@functools.cache
def found(name: str) -> Statistics:
    return observe(NEG, ("x",), ({"x": row[None]} for row in everything(name)), histograms=True)


def ends(name: str, method: str, percentile: float = 99.99) -> tuple[float, float]:
    made = methods.ranges(found(name), method, percentile).tensors["x"]
    return made.low, made.high


@pytest.mark.parametrize("name", DATA)
def test_minmax_is_min_and_max(name: str) -> None:
    assert ends(name, "minmax") == (everything(name).min(), everything(name).max())


@pytest.mark.parametrize("name", DATA)
def test_moving_average_is_that_of_the_batches(name: str) -> None:
    rows = everything(name)
    low, high = float(rows[0].min()), float(rows[0].max())
    for row in rows[1:]:
        low += 0.01 * (float(row.min()) - low)
        high += 0.01 * (float(row.max()) - high)
    assert ends(name, "moving-average") == pytest.approx((low, high), rel=1e-12)


@pytest.mark.parametrize("percentile", [100, 99.999, 99.99, 99, 50])
@pytest.mark.parametrize("name", DATA)
def test_percentile_is_numpys_within_one_bin(name: str, percentile: float) -> None:
    tail = (100 - percentile) / 2
    low, high = ends(name, "percentile", percentile)
    width = found(name).of("x").histogram.width  # type: ignore[union-attr]
    exact = everything(name)
    assert 0 <= np.percentile(exact, tail, method="lower") - low <= width
    assert 0 <= high - np.percentile(exact, 100 - tail, method="higher") <= width


def error_in_memory(values: np.ndarray, low: float, high: float) -> float:
    """The docstring's E(l, h), over every value."""
    step = (high - low) / 255
    inside = values[(values >= low) & (values <= high)]
    to_zero = np.abs(inside) <= step / 2
    outside = np.square(np.minimum(values - low, 0)).sum() + np.square(np.maximum(values - high, 0)).sum()
    return float(outside + np.square(inside[to_zero]).sum() + step**2 / 12 * (~to_zero).sum())


@pytest.mark.parametrize("name", DATA)
def test_mse_is_the_best_of_every_value_within_one_percent(name: str) -> None:
    values = everything(name).astype(np.float64).ravel()
    low, high = ends(name, "mse")
    lows = min(values.min(), 0) * methods.SHRINK
    highs = max(values.max(), 0) * methods.SHRINK
    at_low = lows[np.argmin([error_in_memory(values, each, high) for each in lows])] if low < 0 else low
    at_high = highs[np.argmin([error_in_memory(values, low, each) for each in highs])]
    assert (low, high) == pytest.approx((at_low, at_high), rel=0.0101)


def rounding_error(values: np.ndarray, low: float, high: float) -> float:
    scale = (high - min(low, 0)) / 255
    zero = np.rint(-min(low, 0) / scale)
    return float(np.square(values - (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale).mean())


@pytest.mark.parametrize("name", DATA)
def test_mse_rounds_with_less_error_than_any_other_method(name: str) -> None:
    values = everything(name).astype(np.float64)
    ours = rounding_error(values, *ends(name, "mse"))
    assert all(ours <= 1.01 * rounding_error(values, *ends(name, method)) for method in methods.METHODS)


def entropy_in_memory(values: np.ndarray, width: float) -> tuple[float, float]:
    """The docstring's KL(T), written out over the values themselves."""
    low, high = float(values.min()), float(values.max())
    best, chosen = np.inf, (low, high)
    bins = np.floor(values.astype(np.float64) / width).astype(int)
    at_zero = int((bins == 1).sum()) if (bins >= 1).any() else int((bins == -1).sum())
    for reach in max(-low, high) * methods.SHRINK:
        a, b = max(low, -reach), min(high, reach)
        start, stop = int(np.floor(a / width)), int(np.floor(b / width)) + 1
        size = stop - start
        if size < 256:
            continue
        inside = np.array(np.bincount(bins[(bins >= start) & (bins < stop)] - start, minlength=size), float)
        if start <= 0 < stop:
            inside[-start] = at_zero
        p = inside.copy()
        p[0] += (bins < start).sum()
        p[-1] += (bins >= stop).sum()
        q = np.zeros(size)
        group = np.arange(size) * 256 // size
        for level in range(256):
            members = (group == level) & (p > 0)
            if members.any():
                q[members] = inside[group == level].sum() / members.sum()
        full = p > 0
        p, q = p[full], np.maximum(q[full], methods.EMPTY)
        p, q = p / p.sum(), q / q.sum()
        divergence = float((p * np.log(p / q)).sum())
        if divergence < best:
            best, chosen = divergence, (a, b)
    return chosen


@pytest.mark.parametrize("name", ["normal", "relu", "skewed"])
def test_entropy_is_that_of_every_value_within_one_percent(name: str) -> None:
    width = found(name).of("x").histogram.width  # type: ignore[union-attr]
    assert ends(name, "entropy") == pytest.approx(entropy_in_memory(everything(name).ravel(), width), rel=0.01)


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_constant_tensor_keeps_its_value(method: str, value: float) -> None:
    same = observe(NEG, ("x",), [{"x": np.full((1, 5), value, np.float32)}], histograms=True)
    made = methods.ranges(same, method).tensors["x"]
    assert (made.low, made.high) == (value, value)


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("name", DATA)
def test_no_method_goes_beyond_the_values(name: str, method: str) -> None:
    low, high = ends(name, method)
    assert everything(name).min() <= low <= high <= everything(name).max()


def test_unknown_method_and_missing_histograms_are_refused() -> None:
    plain = observe(NEG, ("x",), [{"x": np.ones((1, 5), np.float32)}])
    with pytest.raises(CalibrationError, match="expected one of minmax"):
        methods.ranges(plain, "maximal")
    with pytest.raises(CalibrationError, match="statistics without histograms"):
        methods.ranges(plain, "mse")
    with pytest.raises(CalibrationError, match="above 0, at most 100"):
        methods.ranges(found("normal"), "percentile", 0)
