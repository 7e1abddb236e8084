from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import pytest

from exporter.calibrate import Range, Ranges, enough, observe, observer, statistics
from exporter.calibrate.observe import CHUNK
from exporter.calibrate.statistics import Statistics
from tests.exporter import graphs

NEG = graphs.model("(float[N,M] x) => (float[N,M] y) { [n] y = Neg(x) }")


def batches(highs: Iterable[float]) -> list[dict[str, np.ndarray]]:
    return [{"x": np.array([[-1, high]], np.float32)} for high in highs]


def found(highs: Iterable[float], histograms: bool = False) -> Statistics:
    return observe(NEG, ("x",), batches(highs), (), histograms)


def test_data_that_repeats_is_enough() -> None:
    verdict = enough.judge(found([3.0] * 20))
    assert verdict.sentence == "more data would not change anything"
    assert verdict.curves[0].widths == (1, 1, 1, 1)


def test_range_that_widened_in_the_last_quarter_is_named_with_its_share() -> None:
    verdict = enough.judge(found([3.0] * 15 + [4.0]))
    assert verdict.curves[0].moved == pytest.approx(0.2)  # width 4 became 5
    assert verdict.sentence == "ranges still moving: x by 20% in the last quarter"


def test_what_moved_before_the_last_quarter_does_not_count() -> None:
    verdict = enough.judge(found([3.0] * 11 + [9.0] + [3.0] * 4))
    assert verdict.sentence == "more data would not change anything"
    assert verdict.curves[0].widths == pytest.approx((0.4, 0.4, 1, 1))


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_batches_are_called_that(count: int) -> None:
    assert enough.judge(found([3.0] * count)).sentence.startswith("too few batches to tell")


@pytest.mark.parametrize("count", [4, 63, 64, 65, 200, 520])
def test_last_quarter_is_that_of_all_the_data_whatever_its_size(count: int) -> None:
    """A jump just before and one just after three quarters, to a segment."""
    at = 3 * count // 4
    slack = max(1, count // 32)
    late, early = [3.0] * count, [3.0] * count
    late[min(at + 1, count - 1)], early[at - slack - 1] = 7.0, 7.0
    assert enough.learning(found(late))[0].moved == pytest.approx(0.5)
    assert enough.learning(found(early))[0].moved == 0


def test_curve_merges_in_any_order() -> None:
    look = observer(NEG, ("x",))
    highs = np.random.default_rng(0).random(30 * CHUNK) + np.arange(30 * CHUNK) / 100
    parts = [look(batches(highs[first : first + CHUNK].tolist()), first) for first in range(0, len(highs), CHUNK)]
    forward, backward = (functools.reduce(statistics.merge, order) for order in (parts, parts[::-1]))
    assert enough.learning(forward) == enough.learning(backward) == enough.learning(found(highs.tolist()))


def test_heldout_values_outside_the_range_are_counted_worst_first() -> None:
    model = graphs.model("(float[N,M] x, float[N,M] z) => (float[N,M] y) { [a] y = Add(x, z) }")
    x = np.linspace(-1, 3, 1000, dtype=np.float32)[None]
    heldout = observe(model, ("x", "z"), [{"x": x, "z": x / 3}], (), True)
    limit = Range(low=-1, high=1, elements=1, masked=0)
    worst, fine = enough.coverage(Ranges(tensors={"x": limit, "z": limit}, batches=1, method="minmax"), heldout)
    assert (worst.tensor, fine.tensor) == ("x", "z")
    assert worst.outside == pytest.approx(0.5, abs=0.002)
    assert worst.beyond == pytest.approx(1.0)
    assert (fine.outside, fine.beyond) == (0, 0)


def test_one_value_outside_is_never_none() -> None:
    heldout = found([1.0001], histograms=True)
    limit = Ranges(tensors={"x": Range(low=-1, high=1, elements=1, masked=0)}, batches=1, method="minmax")
    assert enough.coverage(limit, heldout)[0].outside == pytest.approx(0.5)
