"""The cheapest plan that is accurate enough: measured error against ms, layers turned float or dynamic where that buys most.

    gain(g)  = noise(base) - noise(base with g float)         noise = 10^(-SNR / 10) of the worst output, on calibration batches,
                                                              what a last Softmax or Sigmoid reads in its place
    price(g) = ms(base with g float) - ms(base)               `costs.predict`; the cut places what stands around g anew

0. Layers that make the model faster in float (`Costs.faster`) are float, unless that misses the budget. So are the products of two
   activations, where the accuracy that this buys is worth their time.
1. Where the static plan does not reach the aim, that with every layer dynamic that may be is evaluated, and timed as a whole. The
   better of the two is the base; if it is the static one, though the other is more accurate, dynamic groups are tried too.
2. Each group of neighbouring layers is turned float by itself; the int8 graph of that plan runs, and gives its gain.
3. Groups are ranked by gain over price.
4. Plans are scored jointly, for gains of single groups do not add up: the first 1, 2, 4, ... groups of the rank, then by
   halves between the last plan that does not reach the aim and the first that does. The same for the first layers of the graph:
   what they round goes through all the others, and float neighbours need no crossing between them.
5. The base is tried with its gates open (`correct.open_gates`), and so is the best plan in the end: scales per channel of what
   HardSwish and SiLU make. All corrections are found anew for such a plan, so there are two at most.
6. Where the plan has collapsed (SNR below COLLAPSED_DB) the noise of everything else hides what one group does. Then a
   group's gain is the noise of the plan in which it alone is as in the base, and all else float.
7. What kernels take by themselves leaves out what a change of layout costs their neighbours. So the plan that seems best is
   timed as a whole beside the static one, where the target is this machine, and counts with that time; then the next.

The number of evaluations is known beforehand but for the halving, and what they take by the first of them: both are told.

Source: sensitivity by one layer at a time, Cai et al. 2020, arXiv 2001.00281, section 3; greedy by gain over cost is the
classic bound of the knapsack.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from exporter import optional
from exporter.correct import Opened
from exporter.numerics.formats import FLOAT, W8A8_DYNAMIC, Scheme
from exporter.place import Plan
from exporter.progress import Progress
from exporter.search import costs
from exporter.search.memory import Memory
from exporter.search.plans import STATIC, Choice
from exporter.search.score import DYNAMIC_DB, Goal, Point, Problem, Scores, choice_of

COLLAPSED_DB = 12.0
NAMED = 3  # groups that are told
MOST_TIMED = 4  # plans that are timed as a whole
USUALLY_TIMED = 4  # of them, for what is announced
EARLY_STEPS = 8  # of the layers in float from the first one on
FURTHER = 4  # around the plan that seems best, one evaluation for so many before it
DB_PER_PERCENT = 0.5  # of the outputs' SNR, that a percent of time must buy


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The chosen plan, and every plan that was looked at on the way.

    first: the static plan. accepted: whether the chosen one meets the budget; reached: and the aim.
    opened: the chosen plan's int8 graph and corrections, where its gates are open. capped: whether a cap ended the search.
    worst: the groups of layers in which most of the static plan's noise arises.
    announced: evaluations that were announced, all counted; evaluations: those there were.
    announced_seconds, seconds: elapsed time of the search and of the whole models that it times, as announced and as it was.
    """

    plan: Plan
    opened: Opened | None
    first: Point
    chosen: Point
    accepted: bool
    reached: bool
    capped: bool
    worst: tuple[tuple[str, ...], ...]
    points: tuple[Point, ...]
    announced: int
    evaluations: int
    announced_seconds: float
    seconds: float


def search(
    problem: Problem,
    goal: Goal,
    tell: Progress,
    memory: Memory | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Turn layers of the plan float or dynamic until it is accurate enough, or as accurate as its speed allows.

    memory: what a search of the same problem and goal has found out before, and where this one keeps what it does.
    clock: elapsed seconds, for the cap on minutes, and for what is announced.
    """
    start = clock()
    tell.stage("search for a plan")
    scores = Scores(problem, goal, memory or Memory(), clock)
    first = scores.of(STATIC)
    in_time = _in_time(goal, clock, start)
    allowed = _allowed(goal, scores, in_time)
    quick = Choice(floats=frozenset(problem.costs.faster) & frozenset(problem.plans.layers))
    if quick != STATIC and allowed():
        scores.timed(scores.of(quick), first)
    enough = any(map(scores.reached, list(scores.points.values())))
    apart = quick.with_floats(problem.plans.products)
    if problem.plans.products and not enough and allowed() and scores.of(apart).snr_db > first.snr_db:
        scores.timed(scores.of(apart), first)
    dynamic = STATIC.with_dynamic(problem.plans.dynamic)
    if dynamic != STATIC and not enough and allowed():
        scores.learn(dynamic, first)
        enough = scores.reached(_best(scores, first, scores.points.values()))
    if not enough and allowed():
        _open(scores, first, tell)
        enough = scores.reached(_best(scores, first, scores.points.values()))
    base, moves = STATIC, list[_Move]()
    if not enough and allowed():
        base, moves = _moves(scores, first, (STATIC, quick, apart), dynamic)
        if moves:
            scores.of(moves[0].on(base))  # the first of many: it tells what the others will take
    price = _price(scores, base, moves, clock() - start)
    gains: list[_Gain] = []
    if moves:
        fastest = _fastest(scores, first, scores.points.values())
        steps = _tried(scores, base, moves, gains, fastest, allowed)
        left = price.evaluations - len(scores.points)
        for _ in tell.each(steps, f"search: {price}", left):
            pass
    chosen = _timed(scores, first, in_time, tell)
    closed = _best(scores, first, _closed(scores))
    if moves and choice_of(closed) not in (STATIC, quick, base) and not scores.reached(closed) and allowed():
        share = len(scores.points) // FURTHER
        for _ in tell.each(
            _further(scores, first, closed, share, allowed), "search: around the plan that seems best", share
        ):
            pass
        chosen = _timed(scores, first, in_time, tell)
    if moves and allowed():
        _open(scores, first, tell)
        chosen = _timed(scores, first, in_time, tell)
    return Found(
        plan=_explained(scores, chosen, first),
        opened=scores.openings.get(choice_of(chosen)),
        first=first,
        chosen=chosen,
        accepted=scores.accepts(chosen),
        reached=scores.reached(chosen),
        capped=not scores.reached(chosen) and not allowed(),
        worst=_worst(problem.plans.layers, gains),
        points=tuple(scores.points.values()),
        announced=price.evaluations,
        evaluations=len(scores.points),
        announced_seconds=price.seconds,
        seconds=clock() - start,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Price:
    """What a search will take, all counted: evaluations, and elapsed seconds; known: evaluations that were made before."""

    evaluations: int
    known: int
    seconds: float

    def __str__(self) -> str:
        known = f" ({self.known} known)" if self.known else ""
        return f"{self.evaluations} evaluations{known}, {minutes(self.seconds)}"


def minutes(seconds: float) -> str:
    """ "40 s", "3.5 min": to be read at a glance."""
    if seconds < 1:
        return "under 1 s"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _price(scores: Scores, base: Choice, moves: Sequence[_Move], spent: float) -> _Price:
    """Of every move by itself, of the usual number of joint scores, and of timing the plans that seem best."""
    if not moves:
        return _Price(evaluations=len(scores.points), known=0, seconds=spent)
    goal, memory = scores.goal, scores.memory
    singles = dict.fromkeys(choice for move in moves for choice in _needed(scores, base, move))
    done, new = len(scores.points), [choice for choice in singles if choice not in scores.points]
    joint = _usual_joint_scores(sum(not unit <= base.floats for unit in scores.problem.plans.units()))
    count = done + len(new) + joint + any(scores.openings.values())
    if goal.max_evaluations is not None:
        count = max(done, min(count, goal.max_evaluations))
    known = sum(scores.name(choice) in memory for choice in new[: count - done])
    timed = scores.problem.costs.timed.keys() - {costs.name_of(scores.problem.costs.faster)}  # they are not timed again
    timing = max(0, USUALLY_TIMED - len(timed)) * scores.problem.ratio_seconds if scores.problem.ratio else 0.0
    seconds = spent + (count - done - known) * memory.mean_seconds() + timing + scores.opening_seconds
    if goal.max_minutes is not None:
        seconds = min(seconds, max(60 * goal.max_minutes, spent))
    return _Price(evaluations=count, known=known, seconds=seconds)


def _usual_joint_scores(units: int) -> int:
    """The first 1, 2, 4, ... of the rank and half as many halves, of which one or two are known; and those of the first layers."""
    return max(0, 3 * units.bit_length() // 2 - 2) + min(units // 2, EARLY_STEPS // 2)


def _tried(
    scores: Scores,
    base: Choice,
    moves: Sequence[_Move],
    gains: list[_Gain],
    fastest: Point,
    allowed: Callable[[], bool],
) -> Iterator[int]:
    """Every move by itself, which adds to `gains`, then moves together. An item for each evaluation: how many there have been."""

    def work() -> Iterator[None]:
        for move in moves:
            if allowed():
                gains.append(_gain(scores, base, move))
            yield
        yield from _refine(scores, fastest, _ranked(base, scores.of(base), gains), allowed)
        yield from _early(scores, base, fastest, allowed)

    seen = len(scores.points)
    for _ in chain(work(), (None,)):
        yield from range(seen, len(scores.points))
        seen = len(scores.points)


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


def _further(scores: Scores, first: Point, chosen: Point, share: int, allowed: Callable[[], bool]) -> Iterator[int]:
    """The cheapest layers, each by itself and then together, on the plan that seems best: without its noise others can be heard."""
    base, start, fastest = choice_of(chosen), len(scores.points), _fastest(scores, first, scores.points.values())

    def within() -> bool:
        return allowed() and len(scores.points) < start + share

    units = [unit for unit in scores.problem.plans.units() if not unit <= base.floats]
    cheap = sorted(units, key=lambda unit: scores.predicted_ms(base.with_floats(unit)))
    gains: list[_Gain] = []
    for unit in cheap[: 3 * share // 4]:
        if within():
            gains.append(_gain(scores, base, _Move(group=unit)))
            yield len(scores.points) - start
    for _ in _refine(scores, fastest, _ranked(base, chosen, gains), within):
        yield len(scores.points) - start


def _moves(scores: Scores, first: Point, static: Sequence[Choice], dynamic: Choice) -> tuple[Choice, list[_Move]]:
    """The base, and what to try on it: groups in float, and dynamic ones where all of them help but are not worth their time."""
    plans = scores.problem.plans
    start = choice_of(_best(scores, first, [scores.points[each] for each in static if each in scores.points]))
    base = start.with_dynamic(frozenset(_best(scores, first, _closed(scores)).dynamic_layers))
    moves = [_Move(group=group) for group in plans.groups() if not group <= base.floats]
    found = scores.points.get(dynamic)
    if base == start and found is not None and found.snr_db > first.snr_db + DYNAMIC_DB:
        moves += [_Move(group=group, dynamic=True) for group in plans.dynamic_groups()]
    return base, moves


def _open(scores: Scores, first: Point, tell: Progress) -> None:
    """Look at the best plan with its gates open, and time it if it is more accurate so."""
    closed = _best(scores, first, _closed(scores))
    if scores.problem.open is None or scores.reached(closed):
        return
    tell.stage("smooth through HardSwish and SiLU")
    tried = optional.attempt(lambda: scores.opened(closed), None)  # a plan without it is there
    if tried.why:
        tell.note(f"gates stay closed: {tried.why}")
    opened = tried.value
    if opened is not None and opened.snr_db > closed.snr_db:
        scores.timed(opened, first)


def _closed(scores: Scores) -> list[Point]:
    return [point for point in scores.points.values() if not point.opened]


def _in_time(goal: Goal, clock: Callable[[], float], start: float) -> Callable[[], bool]:
    """Whether the minutes are not over."""
    return lambda: goal.max_minutes is None or clock() - start <= 60 * goal.max_minutes


def _allowed(goal: Goal, scores: Scores, in_time: Callable[[], bool]) -> Callable[[], bool]:
    """Whether one more evaluation is within the caps."""
    most = math.inf if goal.max_evaluations is None else goal.max_evaluations
    return lambda: in_time() and len(scores.points) < most


def _noise(snr_db: float) -> float:
    return 10 ** (-snr_db / 10) if snr_db > -math.inf else math.inf


def _needed(scores: Scores, base: Choice, move: _Move) -> list[Choice]:
    """The plans that tell what a move gains: it alone on the base; where that has collapsed, all else float but it."""
    if scores.of(base).snr_db >= COLLAPSED_DB:
        return [move.on(base)]
    others = frozenset(scores.problem.plans.layers) - move.group
    alone = base.with_floats(others)
    return [move.on(base), alone, *([move.on(base).with_floats(others)] if move.dynamic else [])]


def _gain(scores: Scores, base: Choice, move: _Move) -> _Gain:
    before = scores.of(base)
    after, *alone = map(scores.of, _needed(scores, base, move))
    noise = _noise(before.snr_db) - _noise(after.snr_db)
    if alone:  # in float the group has no noise
        noise = _noise(alone[0].snr_db) - (_noise(alone[1].snr_db) if move.dynamic else 0.0)
    return _Gain(move=move, noise=noise, ms=after.ms - before.ms)


def _worst(layers: Sequence[str], gains: Sequence[_Gain]) -> tuple[tuple[str, ...], ...]:
    """The smallest groups that take most off the noise in float, worst first."""
    floats = [gain for gain in gains if not gain.move.dynamic]
    least = min((len(gain.move.group) for gain in floats), default=0)
    single = sorted((g for g in floats if len(g.move.group) == least and g.noise > 0), key=lambda gain: -gain.noise)
    return tuple(tuple(name for name in layers if name in gain.move.group) for gain in single[:NAMED])


def _ranked(base: Choice, before: Point, gains: Sequence[_Gain]) -> list[Choice]:
    """The plans with the first n moves for each n, by gain over price; a move that changes nothing is left out."""
    free = 1e-3 * before.ms  # what is cheaper than this costs nothing that can be measured
    helping = sorted((gain for gain in gains if gain.noise > 0), key=lambda gain: -gain.noise / max(gain.ms, free))
    prefixes: list[Choice] = []
    choice = base
    for gain in helping:
        wider = gain.move.on(choice)
        if wider != choice:
            choice = wider
            prefixes.append(choice)
    return prefixes


def _early(scores: Scores, base: Choice, fastest: Point, allowed: Callable[[], bool]) -> Iterator[None]:
    """Score the first eighth of the layers in float, two eighths, ... until a plan is too slow; then either side of the best."""
    plans, units = [base], scores.problem.plans.units()
    for unit in units[:-1]:
        plans.append(plans[-1].with_floats(unit))
    step = math.ceil(len(units) / EARLY_STEPS)
    sizes = [size for size in range(step, len(plans), step) if plans[size] != base]
    tried = [scores.of(base)]
    for size in sizes:
        if not allowed():
            break
        tried.append(scores.of(plans[size]))
        yield
        if scores.reached(tried[-1]) or scores.too_slow(tried[-1], fastest):
            break
    best = choice_of(_best(scores, fastest, tried))
    if best != base:
        for size in (plans.index(best) - step // 2, plans.index(best) + step // 2):
            if allowed() and size < len(plans):
                scores.of(plans[size])
                yield


def _refine(scores: Scores, fastest: Point, prefixes: Sequence[Choice], allowed: Callable[[], bool]) -> Iterator[None]:
    """Score the first 1, 2, 4, ... moves until a plan is accurate enough or too slow, then between the last two."""

    def enough(size: int) -> bool:
        point = scores.of(prefixes[size - 1])
        return scores.reached(point) or (scores.accepts(point) and scores.too_slow(point, fastest))

    low, high = 0, min(1, len(prefixes))
    while high and allowed() and not enough(high) and high < len(prefixes):
        low, high = high, min(2 * high, len(prefixes))
        yield
    while high - low > 1 and allowed():
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
        yield


def _timed(scores: Scores, first: Point, in_time: Callable[[], bool], tell: Progress) -> Point:
    """The plan that is worth most, by the times of whole models where the target is here.

    Of the plans that meet the budget and are not too slow the one worth most; else the fastest that meets it; else the closest.

    worth = min(SNR, aim) - DB_PER_PERCENT · percent of time above the fastest - DYNAMIC_DB where a layer is dynamic
    """
    if scores.problem.ratio is not None and len(scores.points) > 1:
        tell.stage("time the plans that seem best")
    for number in range(MOST_TIMED):
        best = _best(scores, first, scores.points.values())
        if number and not in_time():  # one is always timed: a profile is not enough to ship by
            break
        if scores.settled(best):
            return best
        scores.timed(best, first)
    return _best(scores, first, filter(scores.settled, scores.points.values()))


def _fastest(scores: Scores, first: Point, points: Iterable[Point]) -> Point:
    return min((*_some_int8(scores, points), first), key=lambda point: (point.ms, -point.snr_db))


def _some_int8(scores: Scores, points: Iterable[Point]) -> list[Point]:
    """Those that have a layer in integers, as a plan must."""
    return [point for point in points if len(point.float_layers) < len(scores.problem.plans.layers)]


def _best(scores: Scores, first: Point, points: Iterable[Point]) -> Point:
    goal = scores.goal
    every = sorted(_some_int8(scores, points), key=lambda point: (point.ms, -point.snr_db)) or [first]
    fastest = _fastest(scores, first, every)

    def worth(point: Point) -> float:
        slower = scores.hoped_ms(point, fastest) / max(fastest.ms, 1e-9) - 1
        price = DB_PER_PERCENT * 100 * slower + (DYNAMIC_DB if point.dynamic_layers else 0.0)
        return min(point.snr_db, goal.aim_snr_db) - price

    quick = sorted((point for point in every if not scores.too_slow(point, fastest)), key=lambda each: -worth(each))
    accepted = next((point for point in (*quick, *every) if scores.accepts(point)), None)
    return accepted or max(every, key=lambda point: point.snr_db)


def _explained(scores: Scores, chosen: Point, first: Point) -> Plan:
    """The chosen plan; each layer that was turned float or dynamic says why."""
    plan = scores.plan(choice_of(chosen))
    quick = set(scores.problem.costs.faster)
    reasons = {
        name: _why(scheme, len(names), chosen, first)
        for scheme, names in ((FLOAT, chosen.float_layers), (W8A8_DYNAMIC, chosen.dynamic_layers))
        for name in names
    }
    reasons |= {name: "search: the model is faster with it in float" for name in chosen.float_layers if name in quick}
    decisions = (replace(each, reason=reasons.get(each.node, each.reason)) for each in plan.decisions)
    return replace(plan, decisions=tuple(decisions))


def _why(scheme: Scheme, layers: int, chosen: Point, first: Point) -> str:
    together = f", with {layers - 1} more" if layers > 1 else ""
    return f"search: {scheme}{together} takes the outputs from {first.snr_db:.1f} to {chosen.snr_db:.1f} dB"
