from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.calibrate import histogram
from exporter.calibrate.histogram import BINS, Histogram

floats = st.floats(-(2.0**99), 2.0**99, width=32)


def form(found: Histogram) -> tuple[int, int, bytes]:
    return found.exponent, found.first, found.counts.tobytes()


@settings(deadline=None)
@given(st.lists(floats, min_size=1, max_size=30), st.lists(floats, min_size=1, max_size=30), st.randoms())
def test_histogram_of_the_whole_is_that_of_its_parts_whatever_the_split(
    a: list[float], b: list[float], order: object
) -> None:
    one, two = np.array(a, np.float32), np.array(b, np.float32)
    both = np.concatenate([two, one])
    low, high = float(both.min()), float(both.max())
    whole = form(histogram.count(both))
    assert form(histogram.merge(histogram.count(one), histogram.count(two), low, high)) == whole
    assert form(histogram.merge(histogram.count(two), histogram.count(one), low, high)) == whole


@settings(deadline=None)
@given(st.lists(floats, min_size=1, max_size=50))
def test_every_value_lies_in_the_bin_that_counts_it(values: list[float]) -> None:
    found = histogram.count(np.array(values, np.float32))
    width = 2.0**found.exponent
    expected = np.bincount([math.floor(value / width) - found.first for value in values], minlength=len(found.counts))
    np.testing.assert_array_equal(found.counts, expected)
    assert len(found.counts) <= BINS


def test_bin_is_as_narrow_as_the_range_allows() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    found = histogram.count(values)
    assert BINS / 2 <= len(found.counts) <= BINS
    np.testing.assert_array_equal(found.counts, np.histogram(values, found.edges)[0])


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-45, -1e-45, 3e29, -1e-30])
def test_constant_is_one_bin(value: float) -> None:
    found = histogram.count(np.full(7, value, np.float32))
    assert found.counts.tolist() == [7]
    assert found.edges[0] <= np.float32(value) <= found.edges[1]


def test_tiny_negative_value_stays_below_zero_in_wide_bins() -> None:
    found = histogram.count(np.array([-1e-45, 0, 1e9], np.float32))
    assert (found.first, found.counts[0], found.counts[1], found.counts[-1]) == (-1, 1, 1, 1)
