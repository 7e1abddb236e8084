"""The cheapest plan that is accurate enough: measured error against ms, layers turned float or dynamic where that buys most.

    gain(g)  = noise(base) - noise(base with g float)         noise = 10^(-SNR / 10) of the worst output, on calibration batches,
                                                              what a last Softmax or Sigmoid reads in its place
    price(g) = ms(base with g float) - ms(base)               `costs.predict`; the cut places what stands around g anew

0. Layers that make the model faster in float (`Costs.faster`) are float, unless that misses the budget.
1. Where the static plan does not reach the aim, that with every layer dynamic that may be is evaluated, and timed as a whole. The
   better of the two is the base; if it is the static one, though the other is more accurate, dynamic groups are tried too.
2. Each group of neighbouring layers is turned float by itself; the int8 graph of that plan runs, and gives its gain.
3. Groups are ranked by gain over price.
4. Plans are scored jointly, for gains of single groups do not add up: the first 1, 2, 4, ... groups of the rank, then by
   halves between the last plan that does not reach the aim and the first that does.
5. Where the plan has collapsed (SNR below COLLAPSED_DB) the noise of everything else hides what one group does. Then a
   group's gain is the noise of the plan in which it alone is as in the base, and all else float.

6. What kernels take by themselves leaves out what a change of layout costs their neighbours. So the plan that seems best is
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
from exporter.search.plans import STATIC, Choice, Plans
from runtime import drift, gate
from runtime.manifest import Budget

COLLAPSED_DB = 12.0
NAMED = 3  # groups that are told
MOST_TIMED = 6  # plans that are timed as a whole
DB_PER_PERCENT = 1.0  # of the outputs' SNR, that a percent of time must buy
# ... and dynamic layers: outputs that have the same bits elsewhere, and do not depend on what else is in the batch, are worth that
DYNAMIC_DB = 1.0


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
    """One plan that was evaluated: its float and dynamic layers, error, and ms, predicted or as the whole model was timed."""

    float_layers: tuple[str, ...]
    dynamic_layers: tuple[str, ...] = ()
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
    costs: from `faster.settle`, `costs.from_table` or a file. The same costs and batches find the same plan.
    ratio: the time of a plan's int8 graph over that of the static plan's, given the layers that are float, and those that are
        dynamic; None predicts.
    """

    plans: Plans
    batches: Sequence[Batch]
    costs: Costs
    ratio: Callable[[tuple[str, ...], tuple[str, ...], ir.Model], float] | None = None


def search(problem: Problem, goal: Goal, tell: Progress) -> Found:
    """Turn layers of the plan float or dynamic until it is accurate enough, or as accurate as its speed allows."""
    scores = _Scores(problem, goal)
    start = time.monotonic()
    first = scores.of(STATIC)
    allowed = _allowed(goal, start)
    quick = Choice(floats=frozenset(problem.costs.faster) & frozenset(problem.plans.layers))
    if quick != STATIC and allowed(len(scores.points)):
        scores.timed(scores.of(quick), first)
    enough = any(map(scores.reached, list(scores.points.values())))
    dynamic = STATIC.with_dynamic(problem.plans.dynamic)
    if dynamic != STATIC and not enough and allowed(len(scores.points)):
        scores.learn(dynamic, first)
        enough = scores.reached(_best(scores, first, scores.points.values()))
    base, moves = STATIC, list[_Move]()
    if not enough and allowed(len(scores.points)):
        base, moves = _moves(scores, first, dynamic)
    start_point = scores.of(base)
    collapsed = start_point.snr_db < COLLAPSED_DB
    takes = sum((3 if move.dynamic else 2) if collapsed else 1 for move in moves)
    announced = len(scores.points) + takes + (_halvings(len(moves)) if moves else 0)
    gains: list[_Gain] = []
    if moves:
        each = tell.each(moves, f"search: {start_point.snr_db:.1f} dB, up to {announced} evaluations", len(moves))
        gains = [_gain(scores, base, move) for move in each if allowed(len(scores.points))]
        fastest = min(first, start_point, key=lambda point: point.ms)
        _refine(scores, fastest, _ranked(base.with_floats(quick.floats), start_point, gains), allowed)
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
    """The plans that were looked at: {what was chosen for the layers: its point}.

    behind_ms: the ms that the plan with every layer dynamic took, over what was predicted for it; others have their share of it.
    """

    def __init__(self, problem: Problem, goal: Goal) -> None:
        self.problem, self.goal = problem, goal
        model = problem.plans.model
        self.outputs = list(map(graph.runner(model), problem.batches))
        self.squashed = any(graph.squashing(output) is not None for output in model.graph.outputs)
        self.inner = (
            list(map(graph.runner(graph.unsquashed(model)), problem.batches)) if self.squashed else self.outputs
        )
        self.points: dict[Choice, Point] = {}
        self.accepted: dict[Choice, bool] = {}
        self.behind_ms = 0.0

    def timed(self, point: Point, first: Point) -> Point:
        """The point with the time of its whole model, in the ms of the static plan."""
        choice = _choice(point)
        if not point.timed and choice != STATIC and self.problem.ratio is not None:
            int8 = self.problem.plans.int8(choice)
            ratio = self.problem.ratio(point.float_layers, point.dynamic_layers, int8)
            self.points[choice] = replace(point, ms=first.ms * ratio, timed=True)
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

    def of(self, choice: Choice) -> Point:
        if choice not in self.points:
            given = self.problem
            plan, int8 = given.plans.plan(choice), given.plans.int8(choice)
            found = drift.measure(zip(self.outputs, map(graph.runner(int8), given.batches), strict=True))
            noise = found
            if self.squashed:
                inner = graph.runner(graph.unsquashed(int8))
                noise = drift.measure(zip(self.inner, map(inner, given.batches), strict=True))
            share = sum(d.macs for d in plan.decisions if d.precision != "float") / max(
                1, sum(d.macs for d in plan.decisions)
            )
            could = sum(d.macs for d in plan.decisions if d.node in given.plans.dynamic)
            behind = sum(d.macs for d in plan.decisions if d.node in choice.dynamic) / max(1, could)
            self.points[choice] = Point(
                float_layers=given.plans.in_order(choice.floats),
                dynamic_layers=given.plans.in_order(choice.dynamic),
                snr_db=noise.worst_snr_db,
                ms=costs.predict(given.plans.model, plan, given.costs, given.plans.shapes) + behind * self.behind_ms,
                met=all(line.met for line in gate.limits(self.goal.budget, found, share, 0, 0)),
            )
        return self.points[choice]

    def accepts(self, point: Point) -> bool:
        """Whether a point meets the budget, and the caller's own measure where there is one."""
        if not point.met or self.goal.accepts is None:
            return point.met
        choice = _choice(point)
        if choice not in self.accepted:
            self.accepted[choice] = self.goal.accepts(graph.runner(self.problem.plans.int8(choice)))
        return self.accepted[choice]

    def most_ms(self, fastest: Point) -> float:
        """What accuracy may cost: a share of the fastest plan's time, and never more than FP32 takes, where that was timed."""
        most = (1 + self.goal.max_slower) * fastest.ms
        fp32 = self.problem.costs.fp32
        return most if fp32 is None else min(most, max(fastest.ms, fp32 * self.points[STATIC].ms))

    def reached(self, point: Point) -> bool:
        return point.snr_db >= self.goal.aim_snr_db and self.accepts(point)


def _choice(point: Point) -> Choice:
    return Choice(floats=frozenset(point.float_layers), dynamic=frozenset(point.dynamic_layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """A group of layers, and whether it turns dynamic instead of float."""

    group: frozenset[str]
    dynamic: bool = False

    def on(self, choice: Choice) -> Choice:
        return choice.with_dynamic(self.group) if self.dynamic else choice.with_floats(self.group)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Gain:
    """What a move takes off the noise, and adds to the ms."""

    move: _Move
    noise: float
    ms: float


def _moves(scores: _Scores, first: Point, dynamic: Choice) -> tuple[Choice, list[_Move]]:
    """The base, and what to try on it: groups in float, and dynamic ones where all of them help but are not worth their time."""
    plans = scores.problem.plans
    base = STATIC.with_dynamic(frozenset(_best(scores, first, scores.points.values()).dynamic_layers))
    moves = [_Move(group=group) for group in plans.groups()]
    found = scores.points.get(dynamic)
    if base == STATIC and found is not None and found.snr_db > first.snr_db + DYNAMIC_DB:
        moves += [_Move(group=group, dynamic=True) for group in plans.dynamic_groups()]
    return base, moves


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


def _gain(scores: _Scores, base: Choice, move: _Move) -> _Gain:
    before, after = scores.of(base), scores.of(move.on(base))
    noise = _noise(before.snr_db) - _noise(after.snr_db)
    if before.snr_db < COLLAPSED_DB:
        others = frozenset(scores.problem.plans.layers) - move.group
        noise = _noise(scores.of(base.with_floats(others)).snr_db)
        if move.dynamic:  # in float the group has none
            noise -= _noise(scores.of(move.on(base).with_floats(others)).snr_db)
    return _Gain(move=move, noise=noise, ms=after.ms - before.ms)


def _worst(layers: Sequence[str], gains: Sequence[_Gain]) -> tuple[tuple[str, ...], ...]:
    """The smallest groups that take most off the noise in float, worst first."""
    floats = [gain for gain in gains if not gain.move.dynamic]
    least = min((len(gain.move.group) for gain in floats), default=0)
    single = sorted((g for g in floats if len(g.move.group) == least and g.noise > 0), key=lambda gain: -gain.noise)
    return tuple(tuple(name for name in layers if name in gain.move.group) for gain in single[:NAMED])


def _ranked(start: Choice, before: Point, gains: Sequence[_Gain]) -> list[Choice]:
    """The plans with the first n moves for each n, by gain over price; a move that changes nothing is left out."""
    free = 1e-3 * before.ms  # what is cheaper than this costs nothing that can be measured
    helping = sorted((gain for gain in gains if gain.noise > 0), key=lambda gain: -gain.noise / max(gain.ms, free))
    prefixes: list[Choice] = []
    choice = start
    for gain in helping:
        wider = gain.move.on(choice)
        if wider != choice:
            choice = wider
            prefixes.append(choice)
    return prefixes


def _refine(scores: _Scores, fastest: Point, prefixes: Sequence[Choice], allowed: Callable[[int], bool]) -> None:
    """Score the first 1, 2, 4, ... moves until a plan is accurate enough or too slow, then between the last two."""

    def enough(size: int) -> bool:
        point = scores.of(prefixes[size - 1])
        return scores.reached(point) or (scores.accepts(point) and point.ms > most)

    most = scores.most_ms(fastest)
    low, high = 0, min(1, len(prefixes))
    while high and allowed(len(scores.points)) and not enough(high) and high < len(prefixes):
        low, high = high, min(2 * high, len(prefixes))
    while high - low > 1 and allowed(len(scores.points)):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)


def _choose(scores: _Scores, first: Point) -> Point:
    """Of the plans that meet the budget and are not too slow the one worth most; else the fastest that meets it; else the closest.

    worth = min(SNR, aim) - DB_PER_PERCENT · percent of time above the fastest - DYNAMIC_DB where a layer is dynamic
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
    most = scores.most_ms(fastest)

    def worth(point: Point) -> float:
        slower = point.ms / max(fastest.ms, 1e-9) - 1
        price = DB_PER_PERCENT * 100 * slower + (DYNAMIC_DB if point.dynamic_layers else 0.0)
        return min(point.snr_db, goal.aim_snr_db) - price

    quick = sorted((point for point in every if point.ms <= most), key=lambda each: -worth(each))
    accepted = next((point for point in (*quick, *every) if scores.accepts(point)), None)
    return accepted or max(every, key=lambda point: point.snr_db)


def _explained(problem: Problem, chosen: Point, first: Point) -> Plan:
    """The chosen plan; each layer that was turned float or dynamic says why."""
    plan = problem.plans.plan(_choice(chosen))
    quick = set(problem.costs.faster)
    reasons = {
        name: _why(precision, len(names), chosen, first)
        for precision, names in (("float", chosen.float_layers), ("dynamic", chosen.dynamic_layers))
        for name in names
    }
    reasons |= {name: "search: the model is faster with it in float" for name in chosen.float_layers if name in quick}
    decisions = (replace(each, reason=reasons.get(each.node, each.reason)) for each in plan.decisions)
    return replace(plan, decisions=tuple(decisions))


def _why(precision: str, layers: int, chosen: Point, first: Point) -> str:
    together = f", with {layers - 1} more" if layers > 1 else ""
    return f"search: {precision}{together} takes the outputs from {first.snr_db:.1f} to {chosen.snr_db:.1f} dB"
