"""From what the stages returned: the Report, the manifest, and the text files of the bundle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx
import onnxruntime

from exporter import data, graph, optional, weights
from exporter import recipe as recipes
from exporter.budget import Drop, Evaluate, metrics
from exporter.bundle import Recorded
from exporter.calibrate.enough import Enough
from exporter.correct import Corrected
from exporter.place import Plan
from exporter.prepare import Prepared
from exporter.recipe import Recipe
from exporter.report import html
from exporter.report.value import FloatLayer, KernelCount, Node, Report, Searched, Took
from exporter.report.work import Work
from exporter.search import Found, Improved
from runtime import cpu, gate, memory
from runtime import manifest as manifests
from runtime.bench import CPU_SECONDS, Timing, measure
from runtime.bundle import load
from runtime.drift import Drift, OutputDrift
from runtime.explain import ADDED
from runtime.exported import Exported, Line, Measured
from runtime.judged import Judged
from runtime.kernels import Kernel
from runtime.manifest import Budget, Machine, Manifest
from runtime.session import open_session

NOT_COVERED = "calibration data do not cover held-out data"
FAR_SHARE, FAR_BEYOND = 0.1, 1.0  # of held-out values outside a range, and how far in its widths
LEAST_TOP1, FEWEST = 0.5, 8  # of so many held-out batches at least
# Where no limit on speed was asked for and this machine is the target: int8 over FP32 at least, which leaves room for the noise of
# medians in turn; of models whose FP32 takes so many ms, for of smaller ones Q/DQ and a call's own microseconds are timed
LEAST_SPEEDUP, LEAST_MS = 0.95, 0.2
FAR_BELOW_DB = 10.0  # of what the same plan reached on calibration data: ten times the error


def make(work: Work) -> Report:
    """The report, without what only a machine and a moment can tell."""
    ort_bytes = len(work.models.phone.ort) if work.models.phone is not None else None
    ships = max(weights.size(work.models.int8), ort_bytes or 0)  # a device may take either
    on_a_device = replace(_budget(work.recipe), max_ram_bytes=None)  # measured when the bundle is there, by timed()
    asked = gate.limits(on_a_device, work.recorded.drift, work.recorded.kernels.integer_macs, ships, None)
    promised_db = min(work.recorded.promised_db, work.recipe.search.aim_snr_db)
    lines = (*asked, *_unvaried(work.split.alike), *_uncovered(work.enough, work.recorded.drift, promised_db))
    return Report(
        name=work.name,
        recipe=work.recipe.name,
        target=work.recipe.target,
        traced_by=work.traced.exporter,
        proved=work.traced.sizes,
        notes=(*work.notes, *work.traced.notes, *_beside_given(work.prepared)),
        rewrites=work.prepared.rewrites,
        calibration_batches=work.collected.ranges.batches,
        skipped=work.skipped,
        ranges_by=work.collected.ranges.method,
        enough=work.enough.sentence,
        coverage=work.enough.coverage,
        coverage_batches=work.enough.batches,
        random_data=work.split.random,
        repeated_batches=work.split.repeated,
        overlapping=work.split.overlapping,
        int8_nodes=len(work.plan.int8),
        dynamic_nodes=len(work.plan.dynamic),
        float_nodes=len(work.plan.decisions) - len(work.plan.int8) - len(work.plan.dynamic),
        float_layers=(*_planned_float(work.plan), *_ran_float(work.plan, work.recorded.kernels.kernels)),
        corrections=work.corrected.corrections,
        untried=work.untried,
        search=_searched(work.recipe, work.better),
        stored=work.shrunk.stored,
        kernels=_count(work.recorded.kernels.kernels),
        nodes=tuple(_nodes(work.plan, work.recorded.kernels.kernels)),
        integer_macs=work.recorded.kernels.integer_macs,
        macs=work.recorded.kernels.macs,
        drift=work.recorded.drift,
        fp32_bytes=weights.size(work.models.fp32),
        int8_bytes=weights.size(work.models.int8),
        ort_bytes=ort_bytes,
        ort_integer_macs=work.models.proof.ort_integer_macs if work.models.proof is not None else None,
        ort_batches=work.models.proof.batches if work.models.proof is not None else None,
        mobile=work.models.mobile,
        met=all(line.met for line in lines),
        lines=lines,
        ram_bytes=None,
        timing=None,
        search_took=None,
        scores={},
        kept=work.kept,
    )


def manifest(report: Report, work: Work) -> Manifest:
    """The manifest, but for `files` and `verdict`."""
    shipped = {output.name for output in work.prepared.reference.graph.outputs}
    return Manifest(
        name=report.name,
        target=work.target.name,
        inputs=graph.inputs(work.prepared.reference),
        outputs=graph.outputs(work.prepared.reference),
        files={},
        pair_rule=work.corrected.pair_rule,
        exact_on=_exact_on(work.corrected, work.recorded),
        recorded_on=Machine(machine=cpu.machine(), flags=cpu.flags()),
        session=work.target.session,
        budget=_budget(work.recipe),
        judged={output.name: _judged(output) for output in work.recorded.drift.outputs if output.name in shipped},
        preprocessing=data.preprocessing(recipes.data(work.recipe), graph.inputs(work.prepared.reference)),
        versions=versions(),
    )


def verdict(report: Report, recorded: Recorded) -> Exported:
    """What travels of the export's verdict: of a `lasting` report, without what only that machine and moment can tell."""
    return Exported(
        met=report.met,
        lines=report.lines,
        batches=report.drift.batches,
        outputs={
            output.name: Measured(**{field.name: getattr(output, field.name) for field in fields(Measured)})
            for output in report.drift.outputs
        },
        probe=recorded.numbers,
        hardest=recorded.hardest,
    )


def _judged(output: OutputDrift) -> Judged:
    """How a device judges an output: as the export did, what varies in each part as held-out batches had it."""
    return Judged(
        by=output.by, axis=output.axis, batched=output.batched, parts=tuple(each.part for each in output.parts)
    )


def _unvaried(alike: str) -> Iterable[Line]:
    """An unmet line where all data are alike: what was measured on them says nothing about others."""
    if alike:
        yield Line(what="different samples", found=1.0, limit=2.0, met=False, cause=f"{alike}: give real data")


def _uncovered(enough: Enough, drift: Drift, promised_db: float) -> Iterable[Line]:
    """An unmet line where held-out data are of another kind than what was calibrated: drift on them says nothing about other data.

    That a few values lie a little outside is bad luck; a tenth of them by a whole range, or together with clipping that costs
    more than rounding half of the classes, or ten times the error that calibration data promised, is not.

    promised_db: SNR on calibration data, as far as it was asked for.
    """
    far = [
        each for each in enough.coverage if each.uncovered and each.outside >= FAR_SHARE and each.beyond >= FAR_BEYOND
    ]
    if far:
        worst = max(far, key=lambda each: each.outside)
        said = (
            f"{100 * worst.outside:.0f} % of its values lie outside, by up to {100 * worst.beyond:.0f} % of the range"
        )
        yield Line(
            what=f"covered {worst.tensor}",
            found=1 - worst.outside,
            limit=1 - FAR_SHARE,
            met=False,
            cause=f"{NOT_COVERED}: {said}",
        )
    if not any(each.uncovered for each in enough.coverage) or drift.batches < FEWEST:
        return
    if drift.worst_snr_db < promised_db - FAR_BELOW_DB:
        said = f"{promised_db:.1f} dB on calibration data"
        yield Line(
            what="worst SNR, dB", found=drift.worst_snr_db, limit=promised_db - FAR_BELOW_DB, met=False,
            cause=f"{NOT_COVERED}: {said}",
        )  # fmt: skip
    for output in drift.outputs:
        if output.same_top1 is not None and output.same_top1 <= LEAST_TOP1:
            yield Line(
                what=f"same_top1 {output.name}", found=output.same_top1, limit=LEAST_TOP1, met=False, cause=NOT_COVERED
            )


def _exact_on(corrected: Corrected, recorded: Recorded) -> tuple[str, ...]:
    """This family of CPUs, where nothing depends on the order of a sum, and on x86 no kernel saturates."""
    here = cpu.machine()
    return (here,) if recorded.exact and (corrected.pair_rule or here != "x86_64") else ()


def files(work: Work) -> dict[str, bytes]:
    """{file: content} of a bundle, but for probe.npz, manifest.json and the report."""
    models = work.models
    phone = models.phone
    for_phones = {} if phone is None else {manifests.ORT: phone.ort, manifests.OPERATORS: phone.operators.encode()}
    return {
        manifests.FP32: models.fp32,
        manifests.INT8: models.int8,
        **for_phones,
        "recipe.toml": work.recipe.toml.encode(),
        "plan.txt": work.plan.to_text().encode(),
        "ranges.json": work.corrected.ranges.to_json().encode(),
        "costs.json": work.better.costs.to_json().encode(),
    }


def pages(report: Report, plan: Plan) -> dict[str, bytes]:
    """{file: content} of the report's two forms in a bundle."""
    return {"report.json": report.to_json().encode(), "report.html": html.render(report, plan).encode()}


def timed(
    report: Report, out: Path, recipe: Recipe, drops: Sequence[Drop], evaluate: Evaluate | None, found: Found,
    chosen_here: bool = False,
) -> Report:  # fmt: skip
    """The report with what the search took here, and what the shipped bundle does, as on a device: its time, memory where a

    limit is on it, metrics. chosen_here: this machine is the target, and the plan was chosen by times taken here: a bundle that is
    slower than FP32 is not met.
    """
    bundle = load(out, threads=1)
    time, most = partial(measure, bundle, clock=CPU_SECONDS), recipe.budget.max_ram_bytes
    # a limit on speed is judged, or there is no report
    timed = optional.attempt(time, None) if recipe.budget.min_speedup is None else optional.Tried(value=time())
    timing, untried = timed.value, {**report.untried, **({"timing of the bundle": timed.why} if timed.why else {})}
    lines = list(report.lines)
    ram = None if most is None else memory.peak_bytes(bundle)
    if most is not None and ram is not None:
        lines.append(gate.line("max_ram_bytes", float(ram), most))
    if recipe.budget.min_speedup is not None and timing is not None and timing.ratio is not None:
        lines.append(gate.line("speedup", timing.ratio, recipe.budget.min_speedup))
    elif chosen_here and timing is not None and (ratio := _slower(report, timing)) is not None:
        lines.append(gate.line("speedup", ratio, LEAST_SPEEDUP, "slower than FP32: no plan that was tried is faster"))
    scores = {} if evaluate is None else _scores(out, evaluate)
    for drop in drops:
        fp32, int8 = scores[drop.metric]
        lines.append(Line(what=str(drop), found=int8, limit=drop.least(fp32), met=drop.allows(fp32, int8)))
    met = all(line.met for line in lines)
    took = Took(announced_seconds=found.announced_seconds, seconds=found.seconds)
    return replace(
        report,
        timing=timing,
        untried=untried,
        search_took=took,
        ram_bytes=ram,
        scores=scores,
        lines=tuple(lines),
        met=met,
    )


def _slower(report: Report, timing: Timing) -> float | None:
    """int8 over FP32, where it is slower beyond noise, in a model that has anything in int8 and takes long enough to tell."""
    if timing.ratio is None or timing.fp32_ms is None or not (report.int8_nodes or report.dynamic_nodes):
        return None
    return timing.ratio if timing.ratio < LEAST_SPEEDUP and timing.fp32_ms >= LEAST_MS else None


def lasting(report: Report, timed: Report) -> Report:
    """The report as the bundle has it: what `timed` judged, without the times, memory and metrics by which it did."""
    here = (replace(line, found=None) for line in timed.lines[len(report.lines) :])
    return replace(report, lines=(*report.lines, *here), met=timed.met)


def _scores(out: Path, evaluate: Evaluate) -> dict[str, tuple[float, float]]:
    """{metric: (FP32, int8)}, of the bundle as it was written."""
    fp32 = open_session(out / manifests.FP32)
    names = [output.name for output in fp32.get_outputs()]
    reference = metrics(evaluate, lambda batch: dict(zip(names, fp32.run(names, dict(batch)), strict=True)))
    candidate = metrics(evaluate, load(out).run)
    return {metric: (value, candidate[metric]) for metric, value in reference.items() if metric in candidate}


def _beside_given(prepared: Prepared) -> Iterable[str]:
    if prepared.given_db is not None:
        yield f"the file's own precision gives {prepared.given_db:.1f} dB beside it"


def _searched(recipe: Recipe, better: Improved) -> Searched:
    found = better.found
    return Searched(
        aim_snr_db=recipe.search.aim_snr_db,
        max_slower=recipe.search.max_slower,
        accepted=found.accepted,
        reached=found.reached,
        capped=found.capped,
        worst=found.worst,
        first=found.first,
        chosen=found.chosen,
        points=found.points,
        announced=found.announced,
        evaluations=found.evaluations,
        costs=better.costs.where,
        fp32_ms=None if better.costs.fp32 is None else better.costs.fp32 * found.first.ms,
    )


def _planned_float(plan: Plan) -> Iterable[FloatLayer]:
    return (FloatLayer(node=d.node, op_type=d.op_type, macs=d.macs, reason=d.reason) for d in plan.float_layers)


def _ran_float(plan: Plan, kernels: Iterable[Kernel]) -> Iterable[FloatLayer]:
    """Layers that ran in float and are not in the plan as such: against it, or in a body that it does not look into."""
    planned = {d.node for d in plan.decisions}
    integer = {d.node: d for d in plan.decisions if d.scheme.in_integers}
    bodies = any(d.op_type in ("If", "Loop", "Scan") for d in plan.decisions)
    for kernel in kernels:
        node = ADDED.sub("", kernel.node)
        if kernel.macs and not kernel.integer and node in integer:
            reason = f"planned {integer[node].scheme}, but ONNX Runtime ran {kernel.kernel} in {kernel.types}"
            yield FloatLayer(node=node, op_type=integer[node].op_type, macs=kernel.macs, reason=reason)
        elif bodies and kernel.macs and not kernel.integer and node not in planned:
            reason = "inside a branch or loop body, which is not quantized"
            yield FloatLayer(node=node, op_type=kernel.kernel, macs=kernel.macs, reason=reason)


def _nodes(plan: Plan, kernels: Iterable[Kernel]) -> Iterable[Node]:
    planned = {decision.node: decision for decision in plan.decisions}
    for kernel in kernels:
        line = planned.get(ADDED.sub("", kernel.node))
        yield Node(
            node=kernel.node,
            kernel=kernel.kernel,
            types=kernel.types,
            macs=kernel.macs,
            integer=kernel.integer,
            precision=line.precision if line else "",
            reason=line.reason if line else "",
        )


def _budget(recipe: Recipe) -> Budget:
    return Budget(**{field.name: getattr(recipe.budget, field.name) for field in fields(Budget)})


def _count(kernels: Iterable[Kernel]) -> tuple[KernelCount, ...]:
    """Nodes by kernel and types, most MACs first."""
    nodes: dict[tuple[str, str, bool], list[int]] = defaultdict(list)
    for kernel in kernels:
        nodes[kernel.kernel, kernel.types, kernel.integer].append(kernel.macs)
    counts = [
        KernelCount(kernel=name, types=types, nodes=len(macs), macs=sum(macs), integer=integer)
        for (name, types, integer), macs in nodes.items()
    ]
    return tuple(sorted(counts, key=lambda count: (-count.macs, -count.nodes, count.kernel, count.types)))


def versions() -> dict[str, str]:
    """Versions that decide what was made."""
    found = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    for name in ("torch", "numpy", "onnxscript", "packlight"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
