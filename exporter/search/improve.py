"""The static plan and its corrections -> the plan that ships: costs from here, a file or the target's table; then the search."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from exporter import correct, graph, optional
from exporter.batches import Array, Batch, digest
from exporter.budget import MARGIN_DB, Accepts
from exporter.calibrate import Ranges, cache
from exporter.correct import GATES, Corrected, Opened
from exporter.errors import RecipeError
from exporter.gates import GATE
from exporter.graph import Shape
from exporter.numerics.formats import W8A8
from exporter.place import Plan
from exporter.progress import Progress
from exporter.recipe import Recipe
from exporter.search import costs as prices
from exporter.search import faster, memory
from exporter.search.costs import Costs
from exporter.search.find import Found, search
from exporter.search.plans import STATIC, Plans
from exporter.search.score import Goal, Point, Problem
from exporter.target import Target, is_here
from runtime import cpu, drift, gate
from runtime.drift import Ground
from runtime.manifest import Budget

FOLDER = "costs"  # beside calibration's, in the same cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What a search may take, and what it is given.

    costs: a cost table that another export wrote; None measures here, or predicts where the target is another CPU.
    max_evaluations: 0 is no search.
    """

    costs: Path | None = None
    max_evaluations: int | None = None
    max_minutes: float | None = None

    @property
    def only_static(self) -> bool:
        """Whether no other plan can ship: the first evaluation is of the static one."""
        return self.max_evaluations is not None and self.max_evaluations <= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Improved:
    """The plan that ships, its int8 graph and corrections, what the search looked at, and the costs it went by.

    corrected: as it was given, or of the graph with its gates open; its int8 graph is that of the plan it was made for.
    untimed: why nodes and models were not timed, where they were to be; else empty.
    """

    plan: Plan
    int8: ir.Model
    corrected: Corrected
    found: Found
    costs: Costs
    untimed: str = ""


def improve(
    model: ir.Model,
    reference: ir.Model,
    plan: Plan,
    ranges: Ranges,
    means: Mapping[tuple[str, int], Array],
    corrected: Corrected,
    target: Target,
    recipe: Recipe,
    shapes: Mapping[str, Shape],
    batches: Sequence[Batch],
    accepts: Accepts | None,
    caps: Caps,
    tell: Progress,
    open_gates: Callable[[Plan], Opened | None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    truth: ir.Model | None = None,
) -> Improved:
    """Search as the recipe asks, and quantize under the plan that was found.

    Args:
        model, plan, ranges, means, corrected: what `correct.improve` was given, and gave.
        reference: the FP32 graph that ships, and that no plan should be slower than.
        target, recipe, shapes: as the plan was decided with.
        batches: calibration batches.
        accepts: see `Goal`.
        caps: on the search.
        tell: told what is being done.
        open_gates: `correct.open_gates` of a plan.
        clock: elapsed seconds.
        truth: see `Problem`.

    Raises:
        RecipeError: the cost table cannot be read, or is of another graph.
    """
    start, plain = clock(), corrected.int8
    gates = {each.op_type for each in plan.decisions if each.op_type in GATES and each.scheme == W8A8}
    if GATE in gates:
        plain = correct.under(model, plan, ranges, means, corrected, gates_on_codes=False)
    source = partial(correct.source, model, means=means, corrected=corrected)
    plans = Plans(model, plan, plain, source, target, recipe.rules, shapes)
    folder = cache.place()
    home = None if folder is None else folder.parent
    place = _place(home, model, plan, batches[0], caps.only_static)
    price = partial(_costs, plans, corrected.int8, reference, batches[0], target, caps, place, tell)
    priced = optional.attempt(price, None)
    costs = priced.value or prices.from_table(model, plan, target, shapes)
    goal = _goal(recipe, accepts, caps, clock() - start)
    timed, untimed = dict(costs.timed), set[str]()
    measuring, here = caps.costs is None and costs.measured, is_here(target) and not priced.why

    def ratio(point: Point, other: ir.Model) -> float | None:
        name = prices.name_of(point.float_layers, point.dynamic_layers, bool(point.opened))
        if name not in timed and not here:
            untimed.add(name)
            return None
        if name not in timed:
            if caps.costs is not None and timed.keys() == costs.timed.keys():
                tell.note(
                    f"{caps.costs} has no time of a plan: it is timed on this machine, which is {target.name}, too"
                )
            timed[name] = faster.ratio(corrected.int8, other, batches[0], target)
            if measuring:
                _remember(replace(costs, timed=timed), place)
        return timed[name]

    problem = Problem(
        plans=plans,
        batches=batches,
        costs=costs,
        ratio=ratio if measuring or timed else None,
        ratio_seconds=faster.takes_seconds(prices.predict(model, plan, costs, shapes)) if here else 0.0,
        open=open_gates if gates else None,
        truth=truth,
    )
    parts = _evaluated(plans, plain, source(plan), means, batches, target, recipe, goal)
    parts = parts if truth is None else chain(parts, [graph.to_bytes(truth)])
    known = memory.at(home, parts, tell.note)
    try:
        found = search(problem, goal, tell, known, clock)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(known.interrupted()) from None
    if untimed:
        plural = "s" if len(untimed) > 1 else ""
        tell.note(
            f"{caps.costs} has no time of {len(untimed)} plan{plural}, and this machine is not {target.name}: predicted"
        )
    costs = replace(costs, timed=timed)
    if found.opened is not None:
        made = found.opened.corrected
        return Improved(plan=found.plan, int8=made.int8, corrected=made, found=found, costs=costs, untimed=priced.why)
    same = (found.plan.int8, found.plan.dynamic) == (plan.int8, plan.dynamic)
    int8 = corrected.int8 if same else correct.under(model, found.plan, ranges, means, corrected)
    return Improved(plan=found.plan, int8=int8, corrected=corrected, found=found, costs=costs, untimed=priced.why)


def unsearched(
    model: ir.Model, plan: Plan, corrected: Corrected, target: Target, recipe: Recipe, shapes: Mapping[str, Shape],
    expected: Sequence[Batch], batches: Sequence[Batch], against: Mapping[str, Ground],
) -> Improved:  # fmt: skip
    """The static plan as it is, where the search could not be done: its error where it runs, and ms by the target's table.

    Args:
        expected: outputs of the FP32 graph on each of the batches; against: what their drift is held against.
        others: see `improve`.
    """
    costs = prices.from_table(model, plan, target, shapes)

    def measured() -> drift.Drift:
        return drift.measure(zip(expected, map(graph.runner(corrected.int8), batches), strict=True), against)

    seen = optional.attempt(measured, None).value
    snr_db = -math.inf if seen is None else seen.worst_snr_db
    asked = replace(limits(recipe), min_integer_macs=recipe.budget.min_integer_macs)
    met = seen is not None and all(line.met for line in gate.limits(asked, seen, plan.integer_share, 0, 0))
    point = Point(float_layers=(), snr_db=snr_db, ms=prices.predict(model, plan, costs, shapes), met=met)
    found = Found(
        plan=plan, opened=None, first=point, chosen=point, accepted=met, reached=met and snr_db >= recipe.search.aim_snr_db,
        capped=False, worst=(), points=(point,), announced=1, evaluations=1, announced_seconds=0.0, seconds=0.0,
    )  # fmt: skip
    return Improved(plan=plan, int8=corrected.int8, corrected=corrected, found=found, costs=costs)


def limits(recipe: Recipe) -> Budget:
    """The recipe's limits on drift, that on SNR with a margin: they are judged on other batches in the end."""
    asked = recipe.budget
    least = None if asked.min_snr_db is None else asked.min_snr_db + MARGIN_DB
    return Budget(
        min_snr_db=least, min_cosine=asked.min_cosine, max_abs=asked.max_abs, min_same_top1=asked.min_same_top1
    )


def _goal(recipe: Recipe, accepts: Accepts | None, caps: Caps, spent_seconds: float) -> Goal:
    """What the recipe asks. spent_seconds: of the minutes, by timing."""
    return Goal(
        budget=replace(limits(recipe), min_integer_macs=recipe.budget.min_integer_macs),
        aim_snr_db=recipe.search.aim_snr_db,
        max_slower=recipe.search.max_slower,
        accepts=accepts,
        max_evaluations=caps.max_evaluations,
        max_minutes=None if caps.max_minutes is None else caps.max_minutes - spent_seconds / 60,
    )


def _costs(
    plans: Plans, int8: ir.Model, reference: ir.Model, batch: Batch, target: Target, caps: Caps,
    place: Path | None, tell: Progress,
) -> Costs:  # fmt: skip
    """From the file; measured, if this machine is the target, and remembered, so that the next export finds the same plan."""
    model, plan = plans.model, plans.static
    if (given := caps.costs) is not None:
        try:
            text = given.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError("--costs", found=f"{given}: {error}", expected="a cost table") from error
        return prices.read(text, model, plan, target, f"--costs {given}")
    if not is_here(target):
        return prices.from_table(model, plan, target, plans.shapes)
    if place is not None:
        with contextlib.suppress(OSError, UnicodeDecodeError, RecipeError):
            return prices.read(place.read_text(encoding="utf-8"), model, plan, target, str(place))
    tell.stage("time every node in float and in int8")
    dynamic = plans.int8(STATIC.with_dynamic(plans.dynamic)) if plans.dynamic else None
    measured = prices.measure(model, plan, int8, batch, target, plans.shapes, dynamic)
    if caps.only_static:
        measured = prices.settled(measured, ())
        _remember(measured, place)
        return measured
    fp32 = faster.fp32_ratio(int8, reference, batch, target)
    measured = faster.settle(plans, measured, fp32, faster.beside(plans, batch, target), tell)
    _remember(measured, place)
    return measured


def _remember(costs: Costs, place: Path | None) -> None:
    if place is not None:
        with contextlib.suppress(OSError):
            cache.put(place, costs.to_json().encode())


def _evaluated(
    plans: Plans, int8: ir.Model, source: ir.Model, means: Mapping[tuple[str, int], Array], batches: Sequence[Batch],
    target: Target, recipe: Recipe, goal: Goal,
) -> Iterator[bytes]:  # fmt: skip
    """What the evaluations of a search depend on, besides what `memory.key` knows."""
    asked = {
        "target": target.name,
        "budget": [(field.name, getattr(goal.budget, field.name)) for field in fields(goal.budget)],
        "rules": [rule.model_dump(mode="json") for rule in recipe.rules],
        "means": [(list(key), digest({"": means[key]})) for key in sorted(means)],
        "batches": list(map(digest, batches)),
        "plan": plans.static.to_text(),
    }
    yield json.dumps(asked, sort_keys=True).encode()
    yield from map(graph.to_bytes, (plans.model, int8, source))


def _place(home: Path | None, model: ir.Model, plan: Plan, batch: Batch, only_static: bool) -> Path | None:
    """Where the costs of this graph, plan and size of batch on this CPU are remembered; None where the cache is off.

    only_static: without the times of whole models, which nothing reads then.
    """
    if home is None:
        return None
    cache.evict(home / FOLDER, memory.LIMIT_BYTES, memory.SUFFIX)
    sizes = str(sorted((name, array.shape) for name, array in batch.items()))
    said = (
        str(only_static),
        prices.fingerprint(model),
        plan.to_text(),
        sizes,
        cpu.name(),
        cache.kind_of_cpu(),
        ort.__version__,
    )
    key = hashlib.sha256("\0".join(said).encode()).hexdigest()
    return home / FOLDER / (key + memory.SUFFIX)
