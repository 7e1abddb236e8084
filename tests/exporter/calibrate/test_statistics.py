from __future__ import annotations

import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.calibrate import observer, statistics
from exporter.calibrate.observe import CHUNK, SATURATING
from exporter.calibrate.statistics import AVERAGING, SEGMENTS, Statistics
from exporter.errors import CalibrationError
from tests.exporter import graphs

NEG = graphs.model("(float[N,M] x) => (float[N,M] y) { [n] y = Neg(x) }")
LOOK = observer(NEG, ("x", "y"), (("x", 1),), histograms=True)


def exact(found: Statistics) -> bytes:
    """All but the moving average, whose last bits depend on how parts were put together."""
    with_arrays = statistics.to_bytes(found)
    again = statistics.from_bytes(with_arrays)
    parts = [(t.low, t.high, t.elements, t.masked, t.lows.tolist(), t.highs.tolist()) for t in again.tensors.values()]
    counts = [t.histogram.counts.tolist() for t in again.tensors.values() if t.histogram is not None]
    sums = [(c.high_word.tolist(), c.low_word.tolist(), c.count) for c in again.channels.values()]
    return json.dumps([again.first, again.stop, again.batches, parts, counts, sums]).encode()


@functools.cache
def parts(count: int = 6) -> tuple[Statistics, ...]:
    def batch(number: int) -> dict[str, np.ndarray]:
        return {"x": graphs.noise(number, 1 + number % 3, 3) * np.float32(1 + number)}

    return tuple(LOOK([batch(first + i) for i in range(CHUNK)], first) for first in range(0, count * CHUNK, CHUNK))


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(6)), st.data())
def test_any_order_and_any_tree_of_merges_gives_the_same_bytes(order: list[int], data: st.DataObject) -> None:
    waiting = [parts()[i] for i in order]
    while len(waiting) > 1:
        at = data.draw(st.integers(0, len(waiting) - 2))
        waiting[at : at + 2] = [statistics.merge(waiting[at], waiting[at + 1])]
    assert exact(waiting[0]) == exact(functools.reduce(statistics.merge, parts()))


def test_merged_statistics_are_those_of_everything_in_memory() -> None:
    whole = functools.reduce(statistics.merge, parts())
    batches = [graphs.noise(n, 1 + n % 3, 3) * np.float32(1 + n) for n in range(6 * CHUNK)]
    everything = np.concatenate(batches)
    x = whole.of("x")
    assert (x.low, x.high, x.elements, x.masked) == (everything.min(), everything.max(), everything.size, 0)
    assert x.histogram is not None
    np.testing.assert_array_equal(x.histogram.counts, np.histogram(everything, x.histogram.edges)[0])
    np.testing.assert_allclose(whole.means["x", 1], everything.mean(0, dtype=np.float64), rtol=1e-9, atol=1e-9)
    average = float(batches[0].min())
    for batch in batches[1:]:
        average += AVERAGING * (float(batch.min()) - average)
    assert x.average_low is not None
    assert x.average_low.start == pytest.approx(average, rel=1e-12)


def test_bytes_are_the_value_and_the_value_the_bytes() -> None:
    for found in (parts()[0], functools.reduce(statistics.merge, parts())):
        data = statistics.to_bytes(found)
        assert statistics.to_bytes(statistics.from_bytes(data)) == data


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04nonsense", statistics.to_bytes(parts()[0])[:-40]])
def test_bytes_that_are_not_ours_are_refused(data: bytes) -> None:
    with pytest.raises(CalibrationError, match="expected what to_bytes wrote"):
        statistics.from_bytes(data)


def test_statistics_of_another_graph_are_refused() -> None:
    other = observer(NEG, ("x",))([{"x": graphs.noise(0, 1, 3)}], 0)
    with pytest.raises(CalibrationError, match="other tensors or channels"):
        statistics.merge(parts()[0], other)


def test_curve_has_at_most_so_many_segments_whatever_the_number_of_batches() -> None:
    look = observer(NEG, ("x",))
    chunk = [{"x": np.full((1, 1), 2, np.float32)}] * CHUNK
    far = functools.reduce(statistics.merge, (look(chunk, first) for first in range(0, 40 * CHUNK, CHUNK)))
    assert (far.segment, len(far.of("x").lows)) == (8, 40)
    assert len(far.of("x").lows) <= SEGMENTS


def test_masked_values_are_counted_and_are_in_no_sum() -> None:
    x = np.array([[1, -3.4e38], [3, 5]], np.float32)
    found = LOOK([{"x": x}], 0)
    assert (found.of("x").high, found.of("x").low, found.of("x").masked) == (5, 1, 1)
    assert found.of("x").histogram is not None
    assert found.means["x", 1].max() < SATURATING and found.means["x", 1].tolist() == [2, 2.5]


def test_exact_sums_hold_small_and_large_numbers_of_both_signs() -> None:
    given_sums = np.array([-1e-9, 1e-9, -12345.678, 1e15, -1e15, 0])
    np.testing.assert_allclose(statistics.exact_sums(given_sums, 1).sum, given_sums, rtol=1e-15, atol=2e-11)
