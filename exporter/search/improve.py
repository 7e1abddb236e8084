"""The static plan and its corrections -> the plan that ships: costs from here, a file or the target's table; then the search."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from exporter import correct
from exporter.batches import Array, Batch
from exporter.budget import MARGIN_DB, Accepts
from exporter.calibrate import Ranges, cache
from exporter.correct import Corrected
from exporter.errors import RecipeError
from exporter.gates import GATE
from exporter.graph import Shape
from exporter.place import Plan
from exporter.progress import Progress
from exporter.recipe import Recipe
from exporter.search import costs as prices
from exporter.search import faster
from exporter.search.costs import Costs
from exporter.search.find import Found, Goal, Problem, search
from exporter.search.plans import STATIC, Plans
from exporter.target import Target, of
from runtime import cpu
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
    """The plan that ships, its int8 graph, what the search looked at, and the costs it went by."""

    plan: Plan
    int8: ir.Model
    found: Found
    costs: Costs


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

    Raises:
        RecipeError: the cost table cannot be read, or is of another graph.
    """
    plain = corrected.int8
    if any(each.op_type == GATE and each.precision == "int8" for each in plan.decisions):
        plain = correct.under(model, plan, ranges, means, corrected, gates_on_codes=False)
    source = partial(correct.source, model, means=means, corrected=corrected)
    plans = Plans(model, plan, plain, source, target, recipe.rules, shapes)
    place = _place(model, plan, batches[0], caps.only_static)
    costs = _costs(plans, corrected.int8, reference, batches[0], target, caps, place, tell)
    timed = dict(costs.timed)

    def ratio(float_layers: tuple[str, ...], dynamic_layers: tuple[str, ...], other: ir.Model) -> float:
        name = prices.name_of(float_layers, dynamic_layers)
        if name not in timed:
            timed[name] = faster.ratio(corrected.int8, other, batches[0], target)
        return timed[name]

    measuring = caps.costs is None and costs.measured
    problem = Problem(plans=plans, batches=batches, costs=costs, ratio=ratio if measuring or timed else None)
    try:
        found = search(problem, _goal(recipe, accepts, caps), tell)
    finally:
        costs = replace(costs, timed=timed)
        if measuring:
            _remember(costs, place)
    same = (found.plan.int8, found.plan.dynamic) == (plan.int8, plan.dynamic)
    int8 = corrected.int8 if same else correct.under(model, found.plan, ranges, means, corrected)
    return Improved(plan=found.plan, int8=int8, found=found, costs=costs)


def _goal(recipe: Recipe, accepts: Accepts | None, caps: Caps) -> Goal:
    """The recipe's limits on drift, with a margin: they are judged on other batches in the end."""
    asked = recipe.budget
    least = None if asked.min_snr_db is None else asked.min_snr_db + MARGIN_DB
    drift = Budget(
        min_snr_db=least,
        min_cosine=asked.min_cosine,
        max_abs=asked.max_abs,
        min_same_top1=asked.min_same_top1,
        min_integer_macs=asked.min_integer_macs,
    )
    return Goal(
        budget=drift,
        aim_snr_db=recipe.search.aim_snr_db,
        max_slower=recipe.search.max_slower,
        accepts=accepts,
        max_evaluations=caps.max_evaluations,
        max_minutes=caps.max_minutes,
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
    if target.name != of(cpu.read()).name:
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
    if place is None:
        return
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=place.parent, delete=False) as file:
            file.write(costs.to_json())
        os.replace(file.name, place)


def _place(model: ir.Model, plan: Plan, batch: Batch, only_static: bool) -> Path | None:
    """Where the costs of this graph, plan and size of batch on this CPU are remembered; None where the cache is off.

    only_static: without the times of whole models, which nothing reads then.
    """
    folder = cache.place()
    if folder is None:
        return None
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
    return folder.parent / FOLDER / f"{key}.json"
