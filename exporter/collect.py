"""Calibration batches -> ranges, as the recipe asks: by engine and method, from the cache where it knows, here or on a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from exporter import accept, calibrate, cluster, flat, graph, optional, quantize
from exporter.batches import Array, Batch
from exporter.calibrate import Ranges, Statistics, auto, cache, enough, methods, statistics
from exporter.calibrate.auto import Chosen
from exporter.calibrate.enough import Enough, Watch
from exporter.calibrate.memory import Memory
from exporter.cluster import Cluster
from exporter.correct import bias
from exporter.numerics.quantized import Grid
from exporter.place import Plan
from exporter.progress import Progress
from exporter.recipe import Calibrate

PLAIN = "minmax"  # the method that clips nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What calibration found.

    plan: that which was given, or the next to it that can be quantized with these ranges (`accept`).
    ranges: cut to what readers tell apart. notes: {node: why its output has this range}, where the method chooses for each tensor.
    untried: why the method of the ranges was not chosen by its effect, where that was asked; else empty.
    statistics: of the calibration batches. means: {(layer input, channel_axis): E[x]}.
    """

    plan: Plan
    ranges: Ranges
    notes: Mapping[str, str]
    statistics: Statistics
    untried: str = ""

    @property
    def means(self) -> Mapping[tuple[str, int], Array]:
        return self.statistics.means


def collect(
    model: ir.Model,
    plan: Plan,
    asked: Calibrate,
    batches: Iterable[Batch],
    kept: Sequence[Batch],
    tell: Progress,
    there: Cluster | None,
    grids: Mapping[str, Grid],
    decide: accept.Place,
) -> Collected:
    """Observe the batches and choose every range.

    Args:
        model: the prepared graph.
        plan: says which tensors need ranges.
        asked: the recipe's [calibrate].
        batches: read once.
        kept: some of them, filled while they are read (`split.Split.kept`); "best" and "auto" compare outputs on these.
        tell: told what is being done.
        there: the workers to observe on, or None.
        grids: {tensor: codes that the file came with}, which it keeps.
        decide: places the nodes again, where some cannot be quantized.

    Raises:
        QuantizeError: nothing can be quantized.
        CalibrationError: see calibrate.observe; KeyboardInterrupt with what to tell about the batches that are kept.
    """
    found = _collected(model, plan, asked, batches, kept, tell, there, grids, decide)
    return replace(found, ranges=found.ranges.keeping(grids))


def _collected(
    model: ir.Model, plan: Plan, asked: Calibrate, batches: Iterable[Batch], kept: Sequence[Batch], tell: Progress,
    there: Cluster | None, grids: Mapping[str, Grid], decide: accept.Place,
) -> Collected:  # fmt: skip
    by_onnxruntime = asked.engine == "onnxruntime"
    if by_onnxruntime:
        batches = list(batches)  # read twice; ONNX Runtime keeps far more than these
    found = _observe(model, plan, asked, batches, tell, there)
    if untold := _flat(model, plan, found, grids, kept) | _untold(model, plan, found):
        plan, decide = decide(untold, ()), _without(untold, decide)
        same = {name: found.same[name] for name in plan.tensors}
        found = replace(found, same=same, tensors={seen: found.tensors[seen] for seen in same.values()})
        statistics.require_seen(found)
    if by_onnxruntime:
        ranges = quantize.ranges_by_onnxruntime(model, plan.tensors, batches, asked.method, asked.percentile)
        return _accepted(model, plan, calibrate.distinguish(model, ranges), found, kept, decide)
    if asked.method not in ("best", "auto"):
        ranges = methods.ranges(found, asked.method, asked.percentile)
        return _accepted(model, plan, calibrate.distinguish(model, ranges), found, kept, decide)
    tell.stage("choose the method of the ranges by its effect on the outputs")
    given = auto.candidates(model, found, asked.percentile)
    taken = accept.accepted(model, plan, given[PLAIN], kept[0], decide)

    def by_effect() -> Chosen:
        folds = auto.crossed(model, taken.int8, taken.plan.tensors, kept, asked.percentile)
        return auto.choose(taken.int8, given, folds, auto.EVALUATIONS if asked.method == "auto" else len(given))

    tried = optional.attempt(by_effect, None)
    if (chosen := tried.value) is None:
        return Collected(plan=taken.plan, ranges=given[PLAIN], notes={}, statistics=found, untried=tried.why)
    ranges = chosen.ranges if chosen.changed else given[chosen.best]
    return Collected(plan=taken.plan, ranges=ranges, notes=_notes(model, chosen), statistics=found)


def _untold(model: ir.Model, plan: Plan, found: Statistics) -> dict[str, str]:
    """{int8 node: why it is float} of those that touch a tensor of which no batch showed a value that counts."""
    why: dict[str, str] = {}
    int8 = {*plan.int8}
    for node in model.graph if found.unseen else ():
        for value in (*graph.activations(node), *node.outputs) if node.name in int8 else ():
            if value.name in found.unseen:
                why[node.name or ""] = f"no calibration batch has a value in {value.name} that tells its range"
    return why


def _flat(
    model: ir.Model, plan: Plan, found: Statistics, grids: Mapping[str, Grid], kept: Sequence[Batch]
) -> dict[str, str]:
    """The same of those whose codes would hold nothing of what varies in an input or an output; codes of the file's own stay."""
    ends = {name: (found.of(name).low, found.of(name).high) for name in found.same if name not in grids}
    none: dict[str, str] = {}
    return optional.attempt(lambda: flat.nodes(model, ends, frozenset(plan.int8), kept), none).value


def _without(untold: Mapping[str, str], decide: accept.Place) -> accept.Place:
    return lambda refused, floats: decide({**untold, **refused}, floats)


def _accepted(
    model: ir.Model, plan: Plan, ranges: Ranges, found: Statistics, kept: Sequence[Batch], decide: accept.Place
) -> Collected:
    taken = accept.accepted(model, plan, ranges, kept[0], decide)
    return Collected(plan=taken.plan, ranges=ranges, notes={}, statistics=found)


def watch(model: ir.Model, plan: Plan, collected: Collected) -> Watch:
    """What looks at held-out batches as they pass, at the tensors whose ranges were observed; it chooses nothing."""
    tensors = [name for name in plan.tensors if name in collected.ranges.tensors]
    return Watch(calibrate.observer(model, tensors, (), histograms=True))


def judge(model: ir.Model, collected: Collected, seen: Watch) -> Enough:
    """Whether the calibration data were enough, by themselves and beside the held-out batches."""
    return enough.judge(collected.statistics, seen.found, collected.ranges, model)


def unjudged(why: str) -> Enough:
    """Where that could not be said."""
    return Enough(
        curves=(), coverage=(), batches=0, sentence=f"whether more data would change anything is not known: {why}"
    )


def _notes(model: ir.Model, chosen: Chosen) -> dict[str, str]:
    """{node: the method of its output's range}, where it is not the best single one."""
    method_of = {each.tensor: each for each in chosen.choices if each.method != chosen.best}
    return {
        node.name or "": f"range by {each.method}, {each.gain_db:+.2f} dB"
        for node in model.graph
        for value in node.outputs
        if (each := method_of.get(value.name or "")) is not None
    }


def _observe(
    model: ir.Model, plan: Plan, asked: Calibrate, batches: Iterable[Batch], tell: Progress, there: Cluster | None
) -> Statistics:
    """Statistics of the calibration batches; what an interrupted run has seen is not run again."""
    channels = bias.channels(model, plan)
    histograms = asked.engine == "packlight" and methods.needs_histograms(asked.method)
    cpus = there.cpus if there is not None else ()
    run = cache.run_key(model, plan.tensors, channels, histograms, asked.model_dump(mode="json"), cpus)
    memory = Memory(run, cache.place(), tell.note)
    try:
        if there is not None:
            return cluster.observe(there, model, plan.tensors, batches, channels, histograms, memory)
        return memory.gather(calibrate.observer(model, plan.tensors, channels, histograms), batches)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(memory.interrupted()) from None
