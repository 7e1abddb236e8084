"""The cheapest plan that is accurate enough: measured error against ms, layers turned float where that buys most.

    gain(g)  = noise(plan) - noise(plan with g float)         noise = 10^(-SNR / 10) of the worst output, on calibration batches,
                                                              what a last Softmax or Sigmoid reads in its place
    price(g) = ms(plan with g float) - ms(plan)               `costs.predict`; the cut places what stands around g anew

0. Layers that make the model faster in float (`Costs.faster`) are float, unless that misses the budget.
1. Each group of neighbouring layers is turned float by itself; the int8 graph of that plan runs, and gives its gain.
2. Groups are ranked by gain over price.
3. Plans are scored jointly, for gains of single groups do not add up: the first 1, 2, 4, ... groups of the rank, then by
   halves between the last plan that does not reach the aim and the first that does.
4. Where the plan has collapsed (SNR below COLLAPSED_DB) the noise of everything else hides what one group does. Then a
   group's gain is the noise of the plan in which it alone is int8.

5. What kernels take by themselves leaves out what a change of layout costs their neighbours. So the plan that seems best is
   timed as a whole beside the static one, where the target is this machine, and counts with that time; then the next.

The number of evaluations is known beforehand but for the halving.

Source: sensitivity by one layer at a time, Cai et al. 2020, arXiv 2001.00281, section 3; greedy by gain over cost is the
classic bound of the knapsack.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from exporter import graph
from exporter.batches import Batch
from exporter.budget import Accepts
from exporter.place import Plan
from exporter.progress import Progress
from exporter.search import costs
from exporter.search.costs import Costs
from exporter.search.plans import Plans
from runtime import drift, gate
from runtime.manifest import Budget

COLLAPSED_DB = 12.0
NAMED = 3  # groups that are told
MOST_TIMED = 6  # plans that are timed as a whole
DB_PER_PERCENT = 1.0  # of the outputs' SNR, that a percent of time must buy


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What is asked of a plan.

    budget: limits on drift, which a plan must meet if any can.
    aim_snr_db: of the worst output; accuracy is bought until it is reached...
    max_slower: ... or a plan would take more than 1 + max_slower times the ms of the fastest.
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
    """One plan that was evaluated: its float layers, error, and ms, predicted or as the whole model was timed."""

    float_layers: tuple[str, ...]
    snr_db: float
    ms: float
    met: bool
    timed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The chosen plan, and every plan that was looked at on the way.

    first: the static plan. accepted: whether the chosen one meets the budget; reached: and the aim.
    capped: whether a cap ended the search. worst: the groups of layers in which most of the static plan's noise arises.
    announced: evaluations that were announced, all counted; evaluations: those there were. seconds: of the search.
    """

    plan: Plan
    first: Point
    chosen: Point
    accepted: bool
    reached: bool
    capped: bool
    worst: tuple[tuple[str, ...], ...]
    points: tuple[Point, ...]
    announced: int
    evaluations: int
    seconds: float


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
    costs: from `costs.measure`, `costs.from_table` or a file. The same costs and batches find the same plan.
    ratio: the time of a plan's int8 graph over that of the static plan's, given the layers that are float; None predicts.
    """

    plans: Plans
    batches: Sequence[Batch]
    costs: Costs
    ratio: Callable[[tuple[str, ...], ir.Model], float] | None = None


def search(problem: Problem, goal: Goal, tell: Progress) -> Found:
    """Turn layers of the plan float until it is accurate enough, or as accurate as its speed allows."""
    scores = _Scores(problem, goal)
    start = time.monotonic()
    first = scores.of(frozenset())
    allowed = _allowed(goal, start)
    quick = frozenset(problem.costs.faster) & frozenset(problem.plans.layers)
    if quick and allowed(len(scores.points)):
        scores.of(quick)
    enough = any(map(scores.reached, list(scores.points.values())))
    groups = [] if enough or not allowed(len(scores.points)) else problem.plans.groups()
    each_takes = 2 if first.snr_db < COLLAPSED_DB else 1
    announced = len(scores.points) + each_takes * len(groups) + (_halvings(len(groups)) if groups else 0)
    gains: list[_Gain] = []
    if groups:
        each = tell.each(groups, f"search: {first.snr_db:.1f} dB, up to {announced} evaluations", len(groups))
        gains = [_gain(scores, first, group) for group in each if allowed(len(scores.points))]
        _refine(scores, goal, _ranked(quick, first, gains), allowed)
    chosen = _choose(scores, first)
    return Found(
        plan=_explained(problem, chosen, first),
        first=first,
        chosen=chosen,
        accepted=scores.accepts(chosen),
        reached=scores.reached(chosen),
        capped=not scores.reached(chosen) and not allowed(len(scores.points)),
        worst=_worst(problem.plans.layers, gains),
        points=tuple(scores.points.values()),
        announced=announced,
        evaluations=len(scores.points),
        seconds=time.monotonic() - start,
    )


class _Scores:
    """The plans that were looked at: {layers turned float: its point}."""

    def __init__(self, problem: Problem, goal: Goal) -> None:
        self.problem, self.goal = problem, goal
        model = problem.plans.model
        self.outputs = list(map(graph.runner(model), problem.batches))
        self.squashed = any(graph.squashing(output) is not None for output in model.graph.outputs)
        self.inner = (
            list(map(graph.runner(graph.unsquashed(model)), problem.batches)) if self.squashed else self.outputs
        )
        self.points: dict[frozenset[str], Point] = {}
        self.accepted: dict[tuple[str, ...], bool] = {}

    def timed(self, point: Point, first: Point) -> Point:
        """The point with the time of its whole model, in the ms of the static plan."""
        floats = frozenset(point.float_layers)
        if not point.timed and floats and self.problem.ratio is not None:
            ratio = self.problem.ratio(point.float_layers, self.problem.plans.int8(floats))
            self.points[floats] = replace(point, ms=first.ms * ratio, timed=True)
        return self.points[floats]

    def of(self, floats: frozenset[str]) -> Point:
        if floats not in self.points:
            given = self.problem
            plan, int8 = given.plans.plan(floats), given.plans.int8(floats)
            found = drift.measure(zip(self.outputs, map(graph.runner(int8), given.batches), strict=True))
            noise = found
            if self.squashed:
                inner = graph.runner(graph.unsquashed(int8))
                noise = drift.measure(zip(self.inner, map(inner, given.batches), strict=True))
            share = sum(d.macs for d in plan.decisions if d.precision == "int8") / max(
                1, sum(d.macs for d in plan.decisions)
            )
            self.points[floats] = Point(
                float_layers=tuple(name for name in given.plans.layers if name in floats),
                snr_db=noise.worst_snr_db,
                ms=costs.predict(given.plans.model, plan, given.costs, given.plans.shapes),
                met=all(line.met for line in gate.limits(self.goal.budget, found, share, 0, 0)),
            )
        return self.points[floats]

    def accepts(self, point: Point) -> bool:
        """Whether a point meets the budget, and the caller's own measure where there is one."""
        if not point.met or self.goal.accepts is None:
            return point.met
        if point.float_layers not in self.accepted:
            int8 = self.problem.plans.int8(frozenset(point.float_layers))
            self.accepted[point.float_layers] = self.goal.accepts(graph.runner(int8))
        return self.accepted[point.float_layers]

    def reached(self, point: Point) -> bool:
        return point.snr_db >= self.goal.aim_snr_db and self.accepts(point)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gain:
    """What turning a group float takes off the noise, and adds to the ms."""

    group: frozenset[str]
    noise: float
    ms: float


def _halvings(groups: int) -> int:
    """Joint scores: the first 1, 2, 4, ... groups, and as many halves."""
    return 2 * max(1, groups).bit_length() - 1


def _allowed(goal: Goal, start: float) -> Callable[[int], bool]:
    """Whether one more evaluation is within the caps."""

    def allowed(done: int) -> bool:
        late = goal.max_minutes is not None and time.monotonic() - start > 60 * goal.max_minutes
        return not late and (goal.max_evaluations is None or done < goal.max_evaluations)

    return allowed


def _noise(snr_db: float) -> float:
    return 10 ** (-snr_db / 10) if snr_db > -math.inf else math.inf


def _gain(scores: _Scores, first: Point, group: frozenset[str]) -> _Gain:
    alone = scores.of(group)
    if first.snr_db >= COLLAPSED_DB:
        return _Gain(group=group, noise=_noise(first.snr_db) - _noise(alone.snr_db), ms=alone.ms - first.ms)
    others = scores.of(frozenset(scores.problem.plans.layers) - group)
    return _Gain(group=group, noise=_noise(others.snr_db), ms=alone.ms - first.ms)


def _worst(layers: Sequence[str], gains: Sequence[_Gain]) -> tuple[tuple[str, ...], ...]:
    """The smallest groups that take most off the noise, worst first."""
    least = min((len(gain.group) for gain in gains), default=0)
    single = sorted((g for g in gains if len(g.group) == least and g.noise > 0), key=lambda gain: -gain.noise)
    return tuple(tuple(name for name in layers if name in gain.group) for gain in single[:NAMED])


def _ranked(quick: frozenset[str], first: Point, gains: Sequence[_Gain]) -> list[frozenset[str]]:
    """The layers of the first n groups for each n, by gain over price; a group inside of those before it is left out."""
    free = 1e-3 * first.ms  # what is cheaper than this costs nothing that can be measured
    helping = sorted((gain for gain in gains if gain.noise > 0), key=lambda gain: -gain.noise / max(gain.ms, free))
    prefixes: list[frozenset[str]] = []
    covered = quick
    for gain in helping:
        if not gain.group <= covered:
            covered |= gain.group
            prefixes.append(covered)
    return prefixes


def _refine(scores: _Scores, goal: Goal, prefixes: Sequence[frozenset[str]], allowed: Callable[[int], bool]) -> None:
    """Score the first 1, 2, 4, ... groups until a plan is accurate enough or too slow, then between the last two."""
    base = scores.of(frozenset())

    def enough(size: int) -> bool:
        point = scores.of(prefixes[size - 1])
        return scores.reached(point) or (scores.accepts(point) and _is_slow(point, base, goal))

    low, high = 0, min(1, len(prefixes))
    while high and allowed(len(scores.points)) and not enough(high) and high < len(prefixes):
        low, high = high, min(2 * high, len(prefixes))
    while high - low > 1 and allowed(len(scores.points)):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)


def _is_slow(point: Point, fastest: Point, goal: Goal) -> bool:
    return point.ms > (1 + goal.max_slower) * fastest.ms


def _choose(scores: _Scores, first: Point) -> Point:
    """Of the plans that meet the budget and are not too slow the one worth most; else the fastest that meets it; else the closest.

    worth = min(SNR, aim) - DB_PER_PERCENT · percent of time above the fastest
    """
    for _ in range(MOST_TIMED):
        best = _best(scores, first, scores.points.values())
        if scores.timed(best, first) == best:
            return best
    return _best(scores, first, [point for point in scores.points.values() if point.timed or point == first])


def _best(scores: _Scores, first: Point, points: Iterable[Point]) -> Point:
    goal = scores.goal
    every = sorted(points, key=lambda point: (point.ms, -point.snr_db))
    every = [point for point in every if len(point.float_layers) < len(scores.problem.plans.layers)] or [first]
    fastest = min(every[0], first, key=lambda point: point.ms)

    def worth(point: Point) -> float:
        return min(point.snr_db, goal.aim_snr_db) - DB_PER_PERCENT * 100 * (point.ms / max(fastest.ms, 1e-9) - 1)

    quick = sorted((point for point in every if not _is_slow(point, fastest, goal)), key=lambda each: -worth(each))
    accepted = next((point for point in (*quick, *every) if scores.accepts(point)), None)
    return accepted or max(every, key=lambda point: point.snr_db)


def _explained(problem: Problem, chosen: Point, first: Point) -> Plan:
    """The chosen plan; each layer that was turned float says why."""
    plan = problem.plans.plan(frozenset(chosen.float_layers))
    count, quick = len(chosen.float_layers), set(problem.costs.faster)
    together = f", with {count - 1} more" if count > 1 else ""
    why = f"search: float{together} takes the outputs from {first.snr_db:.1f} to {chosen.snr_db:.1f} dB"
    reasons = {
        name: "search: the model is faster with it in float" if name in quick else why for name in chosen.float_layers
    }
    decisions = (replace(each, reason=reasons.get(each.node, each.reason)) for each in plan.decisions)
    return replace(plan, decisions=tuple(decisions))
