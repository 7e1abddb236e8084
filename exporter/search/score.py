"""Plans, and what they are weighed by: error on calibration batches, and ms, predicted or of the whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import onnx_ir as ir

from exporter import graph, optional, varies
from exporter.batches import Array, Batch
from exporter.budget import Accepts
from exporter.correct import Opened
from exporter.place import Plan
from exporter.search import costs
from exporter.search.costs import Costs
from exporter.search.memory import Evaluation, Memory
from exporter.search.plans import STATIC, Choice, Plans
from runtime import drift, gate
from runtime.manifest import Budget

# Of the outputs' SNR, that dynamic layers must buy: outputs that have the same bits elsewhere, and do not depend on what else is
# in the batch, are worth that
DYNAMIC_DB = 1.0
# Batches that plans are compared on: on 16 pages of a page classifier a plan had 29.8 dB, on 36 25.1, on others 24.9
COMPARED, COMPARED_MACS = 16, 16e9
# Of what a plan is predicted to take above the fastest, what it may take at least: profiles overrate what float layers cost where
# they are neighbours. PP-LCNet with its first 8 to 20 of 33 layers in float took a quarter to two thirds of it
HOPE = 0.5
# What the line of an open gate takes an element: 0.13 to 0.19 for 25 thousand to 400 thousand of them on x86 with VNNI
OPENED_NS = 0.15
NO_PLAN = Evaluation(snr_db=-math.inf, met=False, seconds=0.0)


def compared(kept: Sequence[Batch], plan: Plan) -> Sequence[Batch]:
    """The first of the kept batches: COMPARED, and more as long as all of them together take COMPARED_MACS at most."""
    macs = sum(each.macs for each in plan.decisions)
    return kept[: max(COMPARED, int(COMPARED_MACS / max(1, macs)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is asked of a plan.

    budget: limits on drift, which a plan must meet if any can.
    aim_snr_db: of the worst output; accuracy is bought until it is reached...
    max_slower: ... or a plan would take more than 1 + max_slower times the ms of the fastest, or more than FP32.
    accepts: whether a model's function batch -> outputs is good enough by a measure of the caller's own; asked of plans that
        meet all else.
    max_evaluations, max_minutes: None is no cap.
    """

    budget: Budget
    aim_snr_db: float
    max_slower: float
    accepts: Accepts | None = None
    max_evaluations: int | None = None
    max_minutes: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One plan that was evaluated: its float and dynamic layers, the gates that are open in it, error, and ms, predicted or as the

    whole model was timed.
    """

    float_layers: tuple[str, ...]
    dynamic_layers: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    snr_db: float
    ms: float
    met: bool
    timed: bool = False


def frontier(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that no other beats in both error and ms, fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda each: (each.ms, -each.snr_db)):
        if not best or point.snr_db > best[-1].snr_db:
            best.append(point)
    return tuple(best)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """What a search is about.

    plans: to choose from. batches: calibration batches to compare outputs on.
    costs: from `faster.settle`, `costs.from_table` or a file. The same costs and batches find the same plan.
    ratio: the time of a plan's int8 graph over that of the static plan's, or None where it cannot be timed; None predicts
        all. ratio_seconds: about what one such ratio takes, elapsed.
    open: the plan with its int8 gates open, or None where it has none; None opens none.
    truth: the graph whose outputs plans are compared with; None is the float graph that they are of.
    """

    plans: Plans
    batches: Sequence[Batch]
    costs: Costs
    ratio: Callable[[Point, ir.Model], float | None] | None = None
    ratio_seconds: float = 0.0
    open: Callable[[Plan], Opened | None] | None = None
    truth: ir.Model | None = None


class Scores:
    """The plans that were looked at: {what was chosen for the layers: its point}.

    behind_ms: the ms that the plan with every layer dynamic took, over what was predicted for it; others have their share of it.
    over_ms: the same of each plan without dynamic layers that was timed; those with its float layers and more have all of it.
    untimed: plans that were to be timed and cannot be, here.
    openings: what opening the gates of a plan made of it. opening_seconds: that the last took, elapsed, evaluation included.
    """

    def __init__(self, problem: Problem, goal: Goal, memory: Memory, clock: Callable[[], float]) -> None:
        self.problem, self.goal, self.memory, self.clock = problem, goal, memory, clock
        self.squashed = graph.unsquashed(problem.plans.model) is not problem.plans.model
        self.points: dict[Choice, Point] = {}
        self.accepted: dict[Choice, bool] = {}
        self.behind_ms = 0.0
        self.over_ms: dict[frozenset[str], float] = {}
        self.untimed: set[Choice] = set()
        self.openings: dict[Choice, Opened | None] = {}
        self.opening_seconds = 0.0

    def timed(self, point: Point, first: Point) -> Point:
        """The point with the time of its whole model, in the ms of the static plan."""
        choice = choice_of(point)
        if not point.timed and choice != STATIC and self.problem.ratio is not None:
            measure = self.problem.ratio
            ratio = optional.attempt(lambda: measure(point, self.int8(choice)), None).value
            if ratio is None:
                self.untimed.add(choice)
            else:
                self.points[choice] = replace(point, ms=first.ms * ratio, timed=True)
                if not choice.dynamic and not choice.opened:
                    predicted = self.predicted_ms(choice) - self._over_ms(choice)
                    self.over_ms[choice.floats] = first.ms * ratio - predicted
                    self._predict_again()
        return self.points[choice]

    def learn(self, dynamic: Choice, first: Point) -> None:
        """Look at the plan with every layer dynamic, and at how far its time is from the prediction.

        It is timed if it is worth more by that. If not it counts as no faster than the static one, for profiles say too little.
        """
        predicted = self.of(dynamic)
        self.points[dynamic] = replace(predicted, ms=max(predicted.ms, first.ms))
        if predicted.snr_db > first.snr_db + DYNAMIC_DB:
            self.timed(self.points[dynamic], first)
        self.behind_ms = self.points[dynamic].ms - predicted.ms

    @property
    def _truth(self) -> ir.Model:
        return self.problem.plans.model if self.problem.truth is None else self.problem.truth

    @cached_property
    def outputs(self) -> list[Mapping[str, Array]]:
        """Of the FP32 graph, on each batch."""
        return list(map(graph.runner(self._truth), self.problem.batches))

    @cached_property
    def inner(self) -> list[Mapping[str, Array]]:
        """The same, of what a last Softmax or Sigmoid reads."""
        if not self.squashed:
            return self.outputs
        return list(map(graph.runner(graph.unsquashed(self._truth)), self.problem.batches))

    @cached_property
    def grounds(self) -> Mapping[str, drift.Ground]:
        """What the drift of the outputs is held against."""
        return varies.grounds(self.problem.plans.model, self.outputs, self.problem.batches)

    @cached_property
    def inner_grounds(self) -> Mapping[str, drift.Ground]:
        """The same of what a last Softmax or Sigmoid reads."""
        if not self.squashed:
            return self.grounds
        return varies.grounds(graph.unsquashed(self.problem.plans.model), self.inner, self.problem.batches)

    def name(self, choice: Choice) -> str:
        plans = self.problem.plans
        return costs.name_of(plans.in_order(choice.floats), plans.in_order(choice.dynamic), choice.opened)

    def plan(self, choice: Choice) -> Plan:
        opened = self.openings.get(choice)
        return opened.plan if opened is not None else self.problem.plans.plan(choice)

    def int8(self, choice: Choice) -> ir.Model:
        opened = self.openings.get(choice)
        return opened.corrected.int8 if opened is not None else self.problem.plans.int8(choice)

    def opened(self, point: Point) -> Point | None:
        """The same plan with its gates open; None where it has none that scales go through. Nothing of it is kept on disk."""
        closed = choice_of(point)
        choice = replace(closed, opened=True)
        if choice not in self.openings and self.problem.open is not None:
            start = self.clock()
            made = self.openings[choice] = self.problem.open(self.plan(closed))
            if made is not None:
                found = self.evaluate(choice, made.plan)
                lines = sum(d.macs for d in made.plan.decisions) - sum(d.macs for d in self.plan(closed).decisions)
                self.points[choice] = replace(
                    point,
                    opened=made.names,
                    snr_db=found.snr_db,
                    met=found.met,
                    ms=self.predicted_ms(closed) + OPENED_NS * lines / 1e6,
                    timed=False,
                )
            self.opening_seconds = self.clock() - start
        return self.points.get(choice)

    def of(self, choice: Choice) -> Point:
        if choice not in self.points:
            given, name = self.problem, self.name(choice)
            plan = given.plans.plan(choice)
            found = self.memory.get(name)
            if found is None and choice == STATIC:
                found = self.evaluate(choice, plan)
                self.memory.keep(name, found)
            elif found is None:  # one that cannot be run is no plan, and others are
                tried = optional.attempt(partial(self.evaluate, choice, plan), NO_PLAN)
                found = tried.value
                if not tried.why:
                    self.memory.keep(name, found)
            self.points[choice] = Point(
                float_layers=given.plans.in_order(choice.floats),
                dynamic_layers=given.plans.in_order(choice.dynamic),
                snr_db=found.snr_db,
                ms=self.predicted_ms(choice),
                met=found.met,
            )
        return self.points[choice]

    def predicted_ms(self, choice: Choice) -> float:
        """By the costs, and by what the plans that were timed took over them."""
        given = self.problem
        plan = given.plans.plan(choice)
        could = sum(d.macs for d in plan.decisions if d.node in given.plans.dynamic)
        behind = sum(d.macs for d in plan.decisions if d.node in choice.dynamic) / max(1, could)
        laid = costs.predict(given.plans.model, plan, given.costs, given.plans.shapes)
        return laid + behind * self.behind_ms + self._over_ms(choice)

    def _predict_again(self) -> None:
        for choice, point in self.points.items():
            if not self.settled(point) and not choice.dynamic and not choice.opened:
                self.points[choice] = replace(point, ms=self.predicted_ms(choice))

    def _over_ms(self, choice: Choice) -> float:
        like = [floats for floats in self.over_ms if floats <= choice.floats and not choice.dynamic]
        return self.over_ms[max(like, key=len)] if like else 0.0

    def evaluate(self, choice: Choice, plan: Plan) -> Evaluation:
        """Run the plan's int8 graph beside FP32."""
        expected, inner = self.outputs, self.inner
        start, batches, int8 = self.clock(), self.problem.batches, self.int8(choice)
        found = drift.measure(zip(expected, map(graph.runner(int8), batches), strict=True), self.grounds)
        noise = found
        if self.squashed:
            made = map(graph.runner(graph.unsquashed(int8)), batches)
            noise = drift.measure(zip(inner, made, strict=True), self.inner_grounds)
        met = all(line.met for line in gate.limits(self.goal.budget, found, plan.integer_share, 0, 0))
        return Evaluation(snr_db=noise.worst_snr_db, met=met, seconds=self.clock() - start)

    def accepts(self, point: Point) -> bool:
        """Whether a point meets the budget, and the caller's own measure where there is one."""
        if not point.met or self.goal.accepts is None:
            return point.met
        choice = choice_of(point)
        if choice not in self.accepted:
            self.accepted[choice] = self.goal.accepts(graph.runner(self.int8(choice)))
        return self.accepted[choice]

    def most_ms(self, fastest: Point) -> float:
        """What accuracy may cost: a share of the fastest plan's time, and never more than FP32 takes, where that was timed."""
        most = (1 + self.goal.max_slower) * fastest.ms
        fp32 = self.problem.costs.fp32
        return most if fp32 is None else min(most, max(fastest.ms, fp32 * self.points[STATIC].ms))

    def settled(self, point: Point) -> bool:
        """Whether nothing more can be learnt of what it takes."""
        return point.timed or self.problem.ratio is None or choice_of(point) in {STATIC, *self.untimed}

    def hoped_ms(self, point: Point, fastest: Point) -> float:
        """What it takes; where that is predicted, and may still be timed, with the benefit of the doubt."""
        if self.settled(point):
            return point.ms
        return min(point.ms, fastest.ms + HOPE * (point.ms - fastest.ms))

    def too_slow(self, point: Point, fastest: Point) -> bool:
        return self.hoped_ms(point, fastest) > self.most_ms(fastest)

    def reached(self, point: Point) -> bool:
        return point.snr_db >= self.goal.aim_snr_db and self.accepts(point)


def choice_of(point: Point) -> Choice:
    return Choice(
        floats=frozenset(point.float_layers), dynamic=frozenset(point.dynamic_layers), opened=bool(point.opened)
    )
