"""exporter.search: plans whose gates are open, beside those whose gates are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from exporter import correct
from exporter.correct import Opened
from exporter.numerics.formats import W8A8
from exporter.place import Decision, Plan
from exporter.progress import Silent
from exporter.search import Goal, Point, Problem, search
from exporter.search.score import OPENED_NS
from exporter.target import X86_VNNI
from runtime.manifest import Budget
from tests.exporter import graphs
from tests.exporter.correct.test_opened import HARD
from tests.exporter.search.test_find import problem

LINE_MACS = 200_000
GOAL = Goal(budget=Budget(), aim_snr_db=60.0, max_slower=10.0)


def opening(asked: list[Plan]) -> Callable[[Plan], Opened]:
    """Gates whose opening rounds nothing any more: the int8 graph of such a plan is the float one."""
    model = graphs.model(HARD, {"w": graphs.noise(1, 8, 8, 3, 3), "v": graphs.noise(2, 6, 8, 1, 1)})
    batches = [{"x": graphs.noise(seed, 2, 8, 9, 9)} for seed in range(4)]
    plan, ranges = graphs.planned(model, *batches)
    means = {("x", 1): graphs.noise(3, 8), ("s", 1): graphs.noise(4, 8)}
    corrected = correct.improve(model, plan, ranges, means, X86_VNNI, batches)

    def open_gates(plan: Plan) -> Opened:
        asked.append(plan)
        line = Decision(node="gate_line", op_type="Conv", scheme=W8A8, reason="", macs=LINE_MACS)
        wider = replace(plan, decisions=(*plan.decisions, line))
        return Opened(names=("gate",), plan=wider, corrected=replace(corrected, int8=problem().plans.model))

    return open_gates


def test_base_with_open_gates_that_reaches_the_aim_ends_the_search() -> None:
    asked: list[Plan] = []
    given = replace(problem(), open=opening(asked), ratio=lambda point, _: 1.1)
    found = search(given, GOAL, Silent())
    assert found.chosen.opened == ("gate",) and found.chosen.timed and found.reached
    assert found.chosen.ms == pytest.approx(1.1 * found.first.ms)
    assert found.evaluations == 2 and len(asked) == 1
    assert found.opened is not None and found.opened.plan == found.plan


def test_open_gates_that_cost_more_than_they_are_worth_stay_closed() -> None:
    asked: list[Plan] = []
    slow = replace(problem(), open=opening(asked), ratio=lambda point, _: 9.0 if point.opened else 1.0)
    found = search(slow, replace(GOAL, aim_snr_db=25.0), Silent())
    assert found.chosen.opened == () and found.opened is None
    assert any(point.opened and point.timed for point in found.points)


def test_best_plan_is_tried_with_open_gates_in_the_end() -> None:
    """What the base could not pay for, a plan with fewer gates may."""
    asked: list[Plan] = []

    def ratio(point: Point, _: object) -> float:
        return 1.0 if not point.opened else 1.05 if point.float_layers else 9.0

    given = replace(problem(), open=opening(asked), ratio=ratio)
    found = search(given, replace(GOAL, aim_snr_db=200.0), Silent())
    assert len(asked) == 2 and asked[0].float_layers != asked[1].float_layers
    assert found.chosen.opened == ("gate",) and found.chosen.float_layers
    assert abs(found.announced - found.evaluations) <= 3


def test_no_gate_is_opened_where_the_static_plan_is_accurate_enough_or_caps_forbid() -> None:
    asked: list[Plan] = []
    given: Problem = replace(problem(), open=opening(asked))
    assert search(given, replace(GOAL, aim_snr_db=-100.0), Silent()).evaluations == 1
    assert search(given, replace(GOAL, max_evaluations=1), Silent()).evaluations == 1
    assert asked == []


def test_plan_without_gates_is_what_it_was() -> None:
    plain = search(problem(), GOAL, Silent())
    found = search(replace(problem(), open=lambda plan: None), GOAL, Silent())
    assert (found.chosen, found.points, found.announced) == (plain.chosen, plain.points, plain.announced)


def test_what_a_line_takes_is_in_the_prediction() -> None:
    found = search(replace(problem(), open=opening([])), GOAL, Silent())
    (opened,) = [point for point in found.points if point.opened]
    assert not opened.timed
    assert opened.ms == pytest.approx(found.first.ms + LINE_MACS * OPENED_NS / 1e6)
