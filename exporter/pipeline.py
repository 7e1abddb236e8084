"""export(): the stages in order. Each is a function from values to a value; you can stop after any and look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporter import batches, bundle, calibrate, correct, data, graph, lint, place, prepare, report, target, trace
from exporter import recipe as recipes
from exporter.correct import bias
from exporter.progress import Progress, Silent
from exporter.recipe import Recipe, require_own_text
from exporter.report import Report
from exporter.source import Source


def export(
    source: Source,
    recipe: Recipe,
    calibration: Any,
    heldout: Any = None,
    out: str | Path = "build/model",
    ort: bool = False,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Trace, calibrate, quantize, prove, and write a bundle.

    Args:
        source: `from_module`, `from_onnx`, `from_program`.
        recipe: `load_recipe("portable")`, or your own file.
        calibration: batches whose ranges are taken: an iterable of {input: array}, tuples or tensors, a DataLoader, or
            a path or URL of arrays, pictures, text or tables (docs/data.md). Read once.
        heldout: other batches, on which drift is measured; without them every fourth calibration batch is kept apart.
        out: the bundle's folder; written at the end, at once.
        ort: write model.int8.ort for phones too, and prove that it runs as the .onnx file does.
        skip_bad: leave out and count pictures that do not decode, where else they are refused.
        progress: told what is being done.

    Raises:
        TraceError, CalibrationError, RecipeError, QuantizeError, BundleError: see each stage; RunError of graph, where ONNX Runtime
            refuses a rewritten graph. What the caller's own iterables raise is passed on as it is. Nothing is written
            then, unless it came while the finished bundle was timed.
    """
    tell = progress or Silent()
    out = Path(out)
    bundle.require_place(out)
    asked = recipes.data(recipe)
    data.require(calibration, "calibration", asked)
    if heldout is not None:
        data.require(heldout, "heldout", asked)
    cpu = target.by_name(recipe.target)
    require_own_text(recipe)

    tell.stage("trace the model and prove the graph")
    traced = trace.to_onnx(source)
    inputs = graph.inputs(traced.model)
    seen = data.stream(calibration, inputs, "calibration", asked, skip_bad=skip_bad)
    unseen = None if heldout is None else data.stream(heldout, inputs, "heldout", asked, skip_bad=skip_bad)
    split = batches.split(seen, unseen, inputs)

    tell.stage("rewrite the graph so that it quantizes well")
    prepared = prepare.to_quantizable(traced.model, split.first)

    tell.stage("decide what runs in integers")
    plan = place.decide(prepared.model, cpu, recipe.rules, graph.shapes(prepared.model, split.first))

    seen = tell.each(split.calibration(), "calibrate", split.total)
    observed = calibrate.observe(prepared.model, plan.tensors, seen, bias.channels(prepared.model, plan))
    ranges = calibrate.distinguish(prepared.model, observed.ranges)

    tell.stage("quantize, and keep the corrections that help")
    corrected = correct.improve(prepared.model, plan, ranges, observed.means, cpu, split.kept)
    plan = plan.noted({paired.node: str(paired) for paired in corrected.paired})

    lint.require_sound(corrected.int8, cpu)
    fp32, int8 = graph.to_bytes(prepared.reference), graph.to_bytes(corrected.int8)
    unseen = tell.each(split.heldout(), "measure drift on held-out batches")
    recorded = bundle.record(fp32, int8, unseen, cpu.session, recipe.probe)

    tell.stage("write the phone's file, and prove that it is the same model" if ort else "write the report")
    models = bundle.models(fp32, int8, recorded.probes, cpu, ort=ort)
    made = report.make(source, recipe, traced, prepared, split, plan, ranges, corrected, recorded, models)

    tell.stage("write the bundle, load it, time it")
    files = report.files(made, recipe, plan, ranges, models)
    bundle.write(out, report.manifest(made, recipe, prepared, cpu, corrected, recorded), recorded.probes, files)
    return report.timed(made, out)
