"""From what the stages returned: the Report, the manifest, and the text files of the bundle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx
import onnxruntime

from exporter import data, graph
from exporter import recipe as recipes
from exporter.batches import Split
from exporter.bundle import Models, Recorded
from exporter.calibrate import Ranges
from exporter.calibrate.enough import Enough
from exporter.collect import Collected
from exporter.correct import Corrected
from exporter.place import Plan
from exporter.prepare import Prepared
from exporter.recipe import Recipe
from exporter.report import html
from exporter.report.value import FloatLayer, KernelCount, Node, Report
from exporter.shrink import Shrunk
from exporter.source import Source
from exporter.target import Target
from exporter.trace import Traced
from runtime import cpu, gate, memory
from runtime import manifest as manifests
from runtime.bench import measure
from runtime.bundle import load
from runtime.explain import ADDED
from runtime.kernels import Kernel
from runtime.manifest import Budget, Machine, Manifest


def make(
    source: Source,
    recipe: Recipe,
    traced: Traced,
    prepared: Prepared,
    split: Split,
    skipped: tuple[str, ...],
    plan: Plan,
    collected: Collected,
    enough: Enough,
    corrected: Corrected,
    shrunk: Shrunk,
    recorded: Recorded,
    models: Models,
) -> Report:
    """The report, without what only a machine and a moment can tell."""
    ort_bytes = len(models.phone.ort) if models.phone is not None else None
    ships = max(len(models.int8), ort_bytes or 0)  # a device may take either
    on_a_device = replace(_budget(recipe), max_ram_bytes=None)  # measured when the bundle is there, by timed()
    lines = tuple(gate.limits(on_a_device, recorded.drift, recorded.kernels.integer_macs, ships, None))
    return Report(
        name=source.name,
        recipe=recipe.name,
        target=recipe.target,
        traced_by=traced.exporter,
        proved=traced.sizes,
        rewrites=prepared.rewrites,
        calibration_batches=collected.ranges.batches,
        skipped=skipped,
        ranges_by=collected.ranges.method,
        enough=enough.sentence,
        coverage=enough.coverage,
        coverage_batches=enough.batches,
        random_data=split.random,
        repeated_batches=split.repeated,
        overlapping=split.overlapping,
        int8_nodes=len(plan.int8),
        float_nodes=len(plan.decisions) - len(plan.int8),
        float_layers=(*_planned_float(plan), *_ran_float(plan, recorded.kernels.kernels)),
        corrections=corrected.corrections,
        stored=shrunk.stored,
        kernels=_count(recorded.kernels.kernels),
        nodes=tuple(_nodes(plan, recorded.kernels.kernels)),
        integer_macs=recorded.kernels.integer_macs,
        macs=recorded.kernels.macs,
        drift=recorded.drift,
        fp32_bytes=len(models.fp32),
        int8_bytes=len(models.int8),
        ort_bytes=ort_bytes,
        ort_integer_macs=models.proof.ort_integer_macs if models.proof is not None else None,
        ort_batches=models.proof.batches if models.proof is not None else None,
        mobile=models.mobile,
        met=all(line.met for line in lines),
        lines=lines,
        ram_bytes=None,
        timing=None,
    )


def manifest(
    report: Report, recipe: Recipe, prepared: Prepared, target: Target, corrected: Corrected, recorded: Recorded
) -> Manifest:
    """The manifest, but for `files`."""
    return Manifest(
        name=report.name,
        target=target.name,
        inputs=graph.inputs(prepared.reference),
        outputs=graph.outputs(prepared.reference),
        files={},
        pair_rule=corrected.pair_rule,
        exact_on=_exact_on(corrected, recorded),
        recorded_on=Machine(machine=cpu.machine(), flags=cpu.flags()),
        session=target.session,
        budget=_budget(recipe),
        preprocessing=data.preprocessing(recipes.data(recipe), graph.inputs(prepared.reference)),
        versions=_versions(),
    )


def _exact_on(corrected: Corrected, recorded: Recorded) -> tuple[str, ...]:
    """This family of CPUs, where nothing depends on the order of a sum, and on x86 no kernel saturates."""
    here = cpu.machine()
    return (here,) if recorded.exact and (corrected.pair_rule or here != "x86_64") else ()


def files(report: Report, recipe: Recipe, plan: Plan, ranges: Ranges, models: Models) -> dict[str, bytes]:
    """{file: content} of a bundle, but for probe.npz and manifest.json."""
    phone = models.phone
    for_phones = {} if phone is None else {manifests.ORT: phone.ort, manifests.OPERATORS: phone.operators.encode()}
    return {
        manifests.FP32: models.fp32,
        manifests.INT8: models.int8,
        **for_phones,
        "recipe.toml": recipe.toml.encode(),
        "plan.txt": plan.to_text().encode(),
        "ranges.json": ranges.to_json().encode(),
        "report.json": report.to_json().encode(),
        "report.html": html.render(report, plan).encode(),
    }


def timed(report: Report, out: Path) -> Report:
    """The report with the shipped bundle's own time, and memory where a limit is on it: it is loaded as on a device."""
    bundle = load(out, threads=1)
    timing, limit = measure(bundle), bundle.manifest.budget.max_ram_bytes
    if limit is None:
        return replace(report, timing=timing)
    found = memory.peak_bytes(bundle)
    line = gate.line("max_ram_bytes", float(found), limit)
    return replace(report, timing=timing, ram_bytes=found, lines=(*report.lines, line), met=report.met and line.met)


def _planned_float(plan: Plan) -> Iterable[FloatLayer]:
    return (FloatLayer(node=d.node, op_type=d.op_type, macs=d.macs, reason=d.reason) for d in plan.float_layers)


def _ran_float(plan: Plan, kernels: Iterable[Kernel]) -> Iterable[FloatLayer]:
    """Layers that ran in float and are not in the plan as such: against it, or in a body that it does not look into."""
    planned = {d.node for d in plan.decisions}
    op_types = {d.node: d.op_type for d in plan.decisions if d.precision == "int8"}
    bodies = any(d.op_type in ("If", "Loop", "Scan") for d in plan.decisions)
    for kernel in kernels:
        node = ADDED.sub("", kernel.node)
        if kernel.macs and not kernel.integer and node in op_types:
            reason = f"planned int8, but ONNX Runtime ran {kernel.kernel} in {kernel.types}"
            yield FloatLayer(node=node, op_type=op_types[node], macs=kernel.macs, reason=reason)
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


def _versions() -> dict[str, str]:
    """Versions that decide what was made."""
    found = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    for name in ("torch", "numpy", "onnxscript", "packlight"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
