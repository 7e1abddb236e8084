from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from exporter import graph, quantize
from exporter.calibrate import Range, Ranges, distinguish, enough, observe, observer, statistics
from exporter.calibrate.enough import Coverage
from exporter.calibrate.observe import CHUNK
from exporter.calibrate.statistics import Statistics
from runtime import drift
from tests import models
from tests.exporter import graphs, stages

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


def covered(calibration: np.ndarray, heldout: np.ndarray, limit: Range, reader: str = "Neg") -> Coverage:
    """Of h = -x, which `reader` reads, with the given range of h."""
    model = graphs.model(f"(float[N,M] x) => (float[N,M] y) {{ h = Neg(x)\n y = {reader}(h) }}")
    seen, unseen = (observe(model, ("h",), [{"x": -values[None]}], (), True) for values in (calibration, heldout))
    (found,) = enough.coverage(Ranges(tensors={"h": limit}, batches=1, method="minmax"), unseen, seen, model)
    return found


def test_error_is_that_of_rounding_and_clipping_held_out_over_calibration() -> None:
    limit = Range(low=0, high=1, elements=1, masked=0)
    inside = np.linspace(0, 1, 1000, dtype=np.float32)
    outside = inside.copy()
    outside[:10] = 1.05  # STILL beyond
    found = covered(inside, outside, limit)
    assert (found.values, found.outside) == (10, 0.01)
    assert found.beyond == pytest.approx(0.05)
    step = 1 / 255
    assert found.error == pytest.approx(1 + 0.01 * 0.05**2 / (step**2 / 12), rel=0.02)
    assert found.uncovered
    on_purpose = covered(outside, outside, limit)
    assert (on_purpose.values, on_purpose.error) == (10, 1)
    assert not on_purpose.uncovered


def test_threshold_is_one_value_in_two_thousand_that_lies_outside_by_what_counts_as_moving() -> None:
    limit = Range(low=0, high=1, elements=1, masked=0)
    inside = np.linspace(0, 1, 100_000, dtype=np.float32)
    for share, uncovered in ((1 / 1500, True), (1 / 2500, False)):
        outside = inside.copy()
        outside[: int(share * len(inside))] = 1 + enough.STILL
        assert covered(inside, outside, limit).uncovered is uncovered


def test_few_values_far_outside_are_chance() -> None:
    limit = Range(low=0, high=1, elements=1, masked=0)
    inside = np.linspace(0, 1, 1000, dtype=np.float32)
    for few, uncovered in ((enough.FEW - 1, False), (enough.FEW, True)):
        outside = inside.copy()
        outside[:few] = 2
        found = covered(inside, outside, limit)
        assert found.error > 10 * enough.WORSE
        assert found.uncovered is uncovered


def test_what_no_reader_tells_apart_is_not_outside() -> None:
    values = np.linspace(-8, 8, 1000, dtype=np.float32)
    limit = Range(low=-3, high=8, elements=1, masked=0)
    assert covered(values, values, limit, "HardSwish").values == 0
    assert covered(values, values, limit, "Neg").values > 300
    half = replace(limit, low=-2)  # of its own, and not the reader's
    assert covered(values[400:], values, half, "HardSwish").outside == pytest.approx(6 / 16, abs=0.01)


def test_values_at_the_end_of_a_range_are_inside_though_another_lies_outside() -> None:
    values = np.full(1000, 1, np.float32)
    values[0] = 2
    assert covered(values, values, Range(low=0, high=1, elements=1, masked=0)).values == 1


def test_range_of_width_0_covers_nothing_else() -> None:
    nothing, some = np.zeros(100, np.float32), np.ones(100, np.float32)
    limit = Range(low=0, high=0, elements=1, masked=0)
    assert (covered(nothing, some, limit).error, covered(nothing, some, limit).beyond) == (np.inf, np.inf)
    assert covered(nothing, nothing, limit).error == 1


@pytest.mark.parametrize(("count", "uncovered"), [(2, True), (16, False)])
def test_uncovered_tensors_are_those_that_cost_the_outputs_of_heldout_data(count: int, uncovered: bool) -> None:
    model, plan = stages.prepared("residual").model, stages.plan("residual")
    seen, unseen = list(models.batches("residual", 1, count)), list(models.batches("residual", 2, 64))
    found, heldout = (observe(model, plan.tensors, each, (), True) for each in (seen, unseen))
    ranges = distinguish(model, found.ranges)
    int8 = quantize.to_int8(model, plan, ranges)
    fp32, rounded = graph.runner(model), graph.runner(int8)
    found_db, heldout_db = (drift.measure((fp32(x), rounded(x)) for x in each).worst_snr_db for each in (seen, unseen))
    assert any(each.uncovered for each in enough.judge(found, heldout, ranges, model).coverage) is uncovered
    assert found_db - heldout_db > 6 if uncovered else found_db - heldout_db < 3


def test_sentence_names_the_worst_tensor_that_heldout_data_leave() -> None:
    calibration, heldout = found([3.0] * 20), found([30.0] * 20, histograms=True)
    assert enough.judge(calibration, found([3.0] * 20, True)).sentence == "more data would not change anything"
    verdict = enough.judge(calibration, heldout)
    assert verdict.batches == 20
    assert verdict.sentence == (
        "more data of this kind would not change anything; held-out values lie outside the range of x: "
        "give data of more kinds"
    )
    moving = enough.judge(found([3.0] * 15 + [4.0]), heldout).sentence
    assert moving.startswith("ranges still moving: x by 20% in the last quarter; held-out values lie outside")


def test_watch_hands_batches_on_and_looks_at_the_first_of_them_a_chunk_at_a_time() -> None:
    ahead: list[int] = []
    read = 0

    def stream() -> Iterator[dict[str, np.ndarray]]:
        nonlocal read
        for batch in batches(range(100)):
            read += 1
            yield batch

    watch = enough.Watch(observer(NEG, ("x",), (), True))
    highs = []
    for batch in watch.through(stream()):
        highs.append(batch["x"][0, 1])
        ahead.append(read - len(highs))
    assert highs == list(range(100))
    assert max(ahead) == CHUNK - 1
    assert watch.found is not None
    assert (watch.found.batches, watch.found.ranges.tensors["x"].high) == (enough.MOST, enough.MOST - 1)


def test_watch_hands_on_what_it_cannot_look_at_and_says_which_heldout_batch_it_was() -> None:
    model = graphs.model("(float[N,M] x) => (float[N,M] y) { [e] h = Exp(x)\n y = Neg(h) }")
    watch = enough.Watch(observer(model, ("h",), (), True))
    given = batches([3.0, 300.0, *[1.0] * 20])
    assert list(watch.through(iter(given))) == given
    assert watch.found is None and watch.untried.startswith("held-out batch 1: tensor 'h': found infinity")


def test_one_value_outside_is_never_none() -> None:
    heldout = found([1.0001], histograms=True)
    limit = Ranges(tensors={"x": Range(low=-1, high=1, elements=1, masked=0)}, batches=1, method="minmax")
    assert enough.coverage(limit, heldout)[0].outside == pytest.approx(0.5)
