"""export(): the stages in order. Each is a function from values to a value; you can stop after any and look."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from exporter import (
    already,
    batches,
    budget,
    bundle,
    cluster,
    collect,
    correct,
    data,
    graph,
    kinds,
    lint,
    meant,
    optional,
    place,
    prepare,
    products,
    recurrent,
    report,
    rulebook,
    search,
    shrink,
    target,
    trace,
    varies,
    weights,
)
from exporter import recipe as recipes
from exporter.batches import Batch
from exporter.budget import Evaluate
from exporter.cluster import Cluster
from exporter.meant import Options
from exporter.numerics.formats import FLOAT
from exporter.place import Plan
from exporter.prepare import kept
from exporter.progress import Progress, Silent
from exporter.recipe import Recipe, require_own_text
from exporter.report import Report
from exporter.source import Source
from exporter.split import Split
from runtime.manifest import Manifest


def export(
    source: Source | torch.nn.Module | str | Path,
    recipe: Recipe | str | Path,
    calibration: Any,
    heldout: Any = None,
    out: str | Path = "build/model",
    ort: bool = False,
    skip_bad: bool = False,
    progress: Progress | None = None,
    workers: str | None = None,
    evaluate: Evaluate | None = None,
    costs: str | Path | None = None,
    max_evaluations: int | None = None,
    max_minutes: float | None = None,
) -> Report:
    """Trace, calibrate, quantize, prove, and write a bundle.

    Args:
        source: `from_module`, `from_onnx`, `from_program`; of a bare module the first calibration batch is the example.
        recipe: `load_recipe("portable")`, or your own file; its name or path will do.
        calibration: batches whose ranges are taken: an iterable of {input: array}, tuples or tensors, a DataLoader, or
            a path or URL of arrays, pictures, text or tables (docs/data.md). Read once.
        heldout: other batches, on which drift is measured; without them every fourth calibration batch is kept apart.
        out: the bundle's folder; written at the end, at once.
        ort: write model.int8.ort for phones too, and prove that it runs as the .onnx file does.
        skip_bad: leave out and count pictures that do not decode, where else they are refused.
        progress: told what is being done.
        workers: a Dask scheduler, "tcp://host:port", or "local:N" for N processes here; the bundle has the same bytes.
        evaluate: a function run -> {metric: value} on data of its own, where run maps a batch to outputs; the report has its
            metrics, and the budget may limit how far they drop.
        costs: a cost table, costs.json of another export of this model, in the place of timing nodes here.
        max_evaluations, max_minutes: caps on the search for a plan; 0 evaluations is none.

    Raises:
        TraceError, CalibrationError, RecipeError, QuantizeError, BundleError: see each stage; RunError of graph, where ONNX Runtime
            refuses a rewritten graph. What the caller's own iterables raise is passed on as it is. Nothing is written
            then, unless it came while the finished bundle was timed.
    """
    tell = progress or Silent()
    place_of_it = bundle.require_place(out)
    recipe = meant.recipe(recipe)
    options = Options(
        ort=ort, skip_bad=skip_bad, progress=progress, workers=workers, evaluate=evaluate, costs=costs,
        max_evaluations=max_evaluations, max_minutes=max_minutes,
    )  # fmt: skip
    meant.require_apart(heldout, calibration)
    meant.require_options(options)
    with contextlib.nullcontext() if workers is None else cluster.connect(workers, tell.note) as there:
        return _export(source, recipe, calibration, heldout, place_of_it, options, there)


def _export(
    given: Any, recipe: Recipe, calibration: Any, heldout: Any, out: Path, options: Options, there: Cluster | None
) -> Report:
    ort, skip_bad = options.ort, options.skip_bad
    tell = options.progress or Silent()
    evaluate = None if options.evaluate is None else optional.callers(options.evaluate)
    caps = search.Caps(
        costs=None if options.costs is None else Path(options.costs),
        max_evaluations=options.max_evaluations,
        max_minutes=options.max_minutes,
    )
    asked = recipes.data(recipe)
    data.require(calibration, "calibration", asked)
    if heldout is not None:
        data.require(heldout, "heldout", asked)
    cpu = target.by_name(recipe.target)
    require_own_text(recipe)
    drops = recipes.drops(recipe, evaluate)
    taken = meant.source(given, calibration)
    source, calibration = taken.source, taken.calibration

    tell.stage("trace the model and prove the graph")
    traced = trace.to_onnx(source)
    inputs = graph.inputs(traced.model)
    first = data.stream(calibration, inputs, "calibration", asked, skip_bad=skip_bad)
    second = None if heldout is None else data.stream(heldout, inputs, "heldout", asked, skip_bad=skip_bad)
    loose, filled = traced.exporter == "onnx", graph.recurs(traced.model)
    split = Split(first, second, inputs, graph.optional(traced.model), loose, filled)
    settled, defaults = graph.settled(graph.renamed_axes(traced.model, split.tensors), split.given)
    split.fill(defaults)
    spare = {name: value for name, value in defaults.items() if name not in split.given}
    if evaluate is not None and spare:
        evaluate = _given(evaluate, spare)

    tell.stage("rewrite the graph so that it quantizes well")
    prepared = prepare.to_quantizable(settled, split.first, traced.given)
    if prepared.kept and already.is_whole(prepared.reference, cpu):
        prepared = prepared.as_given(split.first)

    if ort or there is not None:
        weights.require_bytes(prepared.reference, "--ort" if ort else "--cluster")

    accepts = None
    if drops and evaluate is not None:  # before calibration: a metric that it does not return is refused
        tell.stage("evaluate FP32 by the model's own metrics")
        accepts = budget.acceptable(drops, evaluate, graph.runner(prepared.reference))

    tell.stage("decide what runs in integers")
    shapes = graph.shapes(prepared.model, split.first)
    timed_here = optional.attempt(partial(kinds.on, cpu, prepared.model, shapes, caps.costs), cpu)
    cpu = timed_here.value
    plan = place.decide(prepared.model, cpu, recipe.rules, shapes)

    def decide(refused: Mapping[str, str], floats: Sequence[str]) -> Plan:
        return place.decide(prepared.model, cpu, recipe.rules, shapes, dict.fromkeys(floats, FLOAT), refused)

    samples = partial(batches.samples, tensors=inputs)
    seen = tell.each(split.calibration(), "calibrate", split.total, samples)
    found = collect.collect(
        prepared.model, plan, recipe.calibrate, seen, split.kept, tell, there, prepared.kept.grids, decide
    )
    plan = found.plan

    tell.stage("quantize, and keep the corrections that help")
    corrected = correct.improve(
        prepared.model, plan, found.ranges, found.means, cpu, split.kept, kept=prepared.kept.weights
    )

    few = search.compared(split.kept, plan)
    expected = list(map(graph.runner(prepared.truth), few))
    against, inner = varies.grounds(prepared.model, expected, few), varies.of_read(prepared.model, few)
    ruled = rulebook.given(prepared.model, recipe.rules, FLOAT)
    recurrences = recurrent.candidates(corrected.int8, plan, cpu, ruled)
    if recurrences:
        tell.stage("let LSTM run in integers, as many as the outputs bear")
    limits, aim_db = search.limits(recipe), recipe.search.aim_snr_db
    laid = optional.attempt(
        partial(recurrent.improve, corrected.int8, plan, recurrences, expected, few, aim_db, limits, accepts, against),
        recurrent.Laid(int8=corrected.int8, plan=plan, layers=()),
    )
    plan, corrected = laid.value.plan, replace(corrected, int8=laid.value.int8)
    open_gates = partial(
        correct.open_gates, prepared.model, ranges=found.ranges, means=found.means, target=cpu, shapes=shapes, batches=split.kept,
    )  # fmt: skip
    searched = optional.attempt(
        partial(
            search.improve, prepared.model, prepared.reference, plan, corrected.ranges, corrected.means, corrected, cpu, recipe,
            shapes, few, accepts, caps, tell, None if prepared.kept else open_gates, truth=prepared.truth,
        ),
        None,
    )  # fmt: skip
    better = searched.value or search.unsearched(
        prepared.model, plan, corrected, cpu, recipe, shapes, expected, few, against
    )
    corrected = better.corrected
    integer = {*better.plan.int8, *better.plan.dynamic}
    paired = {each.node: str(each) for each in corrected.paired if each.node in integer}
    plan = better.plan.told().noted(found.notes).noted(paired)
    from_file = kept.told(prepared.model, plan.int8, prepared.kept, corrected.rounded)
    plan = plan.noted(from_file.notes)

    left = {*ruled, *better.found.chosen.float_layers}
    floor_db = -math.inf if recipe.budget.min_snr_db is None else recipe.budget.min_snr_db + budget.MARGIN_DB
    shrunk = optional.attempt(
        partial(shrink.weights, better.int8, expected, few, left, floor_db=floor_db, against=against),
        shrink.Shrunk(int8=better.int8, stored=(), before_db=None, after_db=None),
    )
    plan = plan.noted(shrunk.value.notes)
    corrected = replace(corrected, pair_rule=corrected.pair_rule and not recurrent.is_in(shrunk.value.int8))

    signed = optional.attempt(partial(products.ready, shrunk.value.int8, cpu), (shrunk.value.int8, cpu))
    int8, cpu = signed.value
    lint.require_sound(int8, cpu, better.plan.given)
    from_int8 = already.judge(int8, better.plan, cpu)
    plan = plan.noted(from_int8.notes)
    corrected = replace(corrected, pair_rule=corrected.pair_rule and from_int8.pair_rule)
    prepared = replace(prepared, reference=graph.with_defaults(prepared.reference, spare))
    fp32, shipped = graph.to_bytes(prepared.reference), graph.to_bytes(graph.with_defaults(int8, spare))
    watch = collect.watch(prepared.model, plan, found)
    unseen = tell.each(watch.through(split.heldout()), "measure drift", split.total_heldout, samples)
    seen, unseen = (
        ({name: value for name, value in batch.items() if name not in spare} for batch in some)
        for some in (few, unseen)
    )
    read = None
    if graph.selections(prepared.model)[0]:
        real, whole = (graph.with_read(graph.with_defaults(each, spare)) for each in (prepared.model, int8))
        read = graph.to_bytes(real), graph.to_bytes(whole)
    looked, against = read or (fp32, shipped), against | inner
    elsewhere = partial(cluster.total, there, *looked, cpu.session, against=against) if there is not None else None
    recorded = bundle.record(fp32, shipped, unseen, cpu.session, recipe.probe, elsewhere, against, read, tuple(seen))

    tell.stage("write the phone's file, and prove that it is the same model" if ort else "write the report")
    models = bundle.models(fp32, shipped, recorded.probes, cpu, ort=ort)
    left_out = data.skipped(first, second)
    judged = optional.attempt(partial(collect.judge, prepared.model, found, watch), None)
    enough = judged.value or collect.unjudged(judged.why)
    untried = {
        "timing of kinds of node": timed_here.why,
        "choice of ranges": found.untried,
        "LSTM in integers": laid.why,
        "timing": better.untimed,
        "search": searched.why,
        "weights stored as codes": shrunk.why,
        "signed codes of products": signed.why,
        "look at held-out values": watch.untried or judged.why,
        "what accelerators take": models.unjudged,
    }
    work = report.Work(
        name=source.name,
        notes=(*taken.notes, *split.notes),
        recipe=recipe,
        target=cpu,
        traced=traced,
        prepared=prepared,
        split=split,
        skipped=left_out,
        plan=plan,
        collected=found,
        enough=enough,
        corrected=corrected,
        better=better,
        shrunk=shrunk.value,
        recorded=recorded,
        models=models,
        untried={step: why for step, why in untried.items() if why},
        kept="; ".join(filter(None, (from_file.sentence, from_int8.sentence))),
    )
    made = report.make(work)

    tell.stage("write the bundle, load it, time it")
    timed: Report | None = None
    chosen_here = caps.costs is None and target.is_here(cpu)

    def judge(folder: Path, complete: Manifest) -> tuple[Manifest, Mapping[str, bytes]]:
        nonlocal timed
        timed = report.timed(made, folder, recipe, drops, evaluate, better.found, chosen_here)
        lasting = report.lasting(made, timed)
        return replace(complete, verdict=report.verdict(lasting, recorded)), report.pages(lasting, plan)

    bundle.write(out, report.manifest(made, work), recorded.probes, report.files(work), judge)
    assert timed is not None
    return timed


def _given(evaluate: Evaluate, defaults: Batch) -> Evaluate:
    """The same evaluation of a model that has no defaults of its own."""
    return lambda run: evaluate(lambda batch: run({**defaults, **batch}))
