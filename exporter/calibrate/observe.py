"""One streaming pass: statistics of every tensor that int8 nodes touch, batch by batch, and nothing of a batch is kept.

Batches are looked at in chunks of CHUNK, cut by their number. A chunk's statistics depend on its batches alone, not on
the thread, process or machine that made them: every batch is run by itself, on one thread, and several are under way at once.

What is looked at (`representatives`):

1. a node that only moves values (Reshape, Transpose) has the statistics of what it moves;
2. a tensor that only a Relu or Clip reads is seen through it: f(clip(x)) = f(x), see `domain`. The two then stay fused, and
   the tensor that is quantized is the one that the statistics are of.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from exporter import graph, ops
from exporter.batches import Array, Batch
from exporter.calibrate import statistics
from exporter.calibrate.fold import cut, fold
from exporter.calibrate.histogram import Counter
from exporter.calibrate.statistics import ChannelStatistics, Statistics, TensorStatistics
from exporter.errors import CalibrationError
from runtime import session
from runtime.errors import BundleError

CHUNK = 8  # batches; their inputs are held at once
WORKERS = 4  # batches under way at once at most: each holds its tensors
# An attention mask adds -3.4e38 (float32's lowest), half of it, or as much above: at most MASKS such values are a mask, and not
# numbers of a network
SATURATING, MASKS = 1e30, 4

Key = tuple[str, int]
ObserveChunk = Callable[[Sequence[Batch], int], Statistics]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """One tensor in one batch; low > high where no value counts."""

    low: float
    high: float
    elements: int
    masked: int


def observe(
    model: ir.Model,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    channels: Sequence[Key] = (),
    histograms: bool = False,
    optimize: bool = True,
) -> Statistics:
    """Run the FP32 graph on every batch and take statistics of each named tensor.

        low = min over batches of min(x), high = max over batches of max(x), over the x with |x| < SATURATING

    Where more than MASKS different values reach SATURATING they are numbers, and count. Shapes may differ from batch to batch, and
    a tensor may be empty in some. Peak memory is a chunk of batches, and the tensors of the few that are under way.

    Args:
        model: the prepared graph.
        tensors: names of float32 tensors of the graph, inputs included.
        batches: checked batches (`exporter.batches.read`); read once.
        channels: (tensor, channel_axis) whose mean per channel is wanted too.
        histograms: whether to count values (`methods.needs_histograms`); it takes up to as long as the run itself.
        optimize: False runs the graph as it is written, as ONNX Runtime's calibrators do: slower, and the last bits of a
            range are then theirs.

    Raises:
        CalibrationError: NaN or infinity (names batch, tensor and the node that made it), a batch the graph refuses, no
            batches, a tensor that held no value in any batch.
    """
    return gather(observer(model, tensors, channels, histograms, optimize), batches)


def gather(look: ObserveChunk, batches: Iterable[Batch]) -> Statistics:
    """The statistics of all batches, by a function that makes those of a chunk; raises as `observe`."""
    found = whole(look(chunk, first) for first, chunk in cut(batches, CHUNK))
    statistics.require_seen(found)
    return found


def whole(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of all batches, from those of parts, in order; a tensor may have held no value in any.

    Raises:
        CalibrationError: no batches.
    """
    found = fold(parts, statistics.merge, lambda each: -(-each.batches // CHUNK))
    if found is None:
        raise CalibrationError("calibration: no batches", found="an empty iterable", expected="at least one batch")
    return found


def observer(
    model: ir.Model,
    tensors: Sequence[str],
    channels: Sequence[Key] = (),
    histograms: bool = False,
    optimize: bool = True,
) -> ObserveChunk:
    """A function (batches of a chunk, number of the first) -> their statistics. The session is made here, once.

    Raises:
        CalibrationError: ONNX Runtime refuses the graph. The function: NaN or infinity, a batch the graph refuses; of
            several bad batches the first.
    """
    same = representatives(model, tensors)
    names = tuple(dict.fromkeys(same.values()))
    inputs = {value.name for value in model.graph.inputs}
    wanted = [name for name in dict.fromkeys((*names, *(name for name, _ in channels))) if name not in inputs]
    run = _runner(model, wanted, optimize) if wanted or not inputs.issuperset(tensors) else None
    pool = ThreadPoolExecutor(max(1, min(WORKERS, CHUNK, _cores())))
    scratch = threading.local()

    def look(chunk: Sequence[Batch], first: int) -> Statistics:
        counters = {name: (threading.Lock(), Counter()) for name in names} if histograms else {}

        def one(batch: Batch, number: int) -> tuple[dict[str, _Seen], dict[Key, tuple[Array, int]]]:
            values: dict[str, Array] = dict(batch)
            if run is not None:
                try:
                    values |= run(batch)
                except graph.RunError as error:
                    raise CalibrationError(
                        f"calibration batch {number}: ONNX Runtime cannot run it",
                        found=str(error),
                        expected="shapes the model accepts",
                        batch=number,
                    ) from error
            if not hasattr(scratch, "rooms"):
                scratch.rooms = Counter.scratch()
            seen = {}
            for name in names:
                flat = values[name].reshape(-1)
                seen[name], counted = _range(flat, name, number, model, batch)
                if counters and counted.size:
                    lock, counter = counters[name]
                    with lock:
                        counter.add(counted, seen[name].low, seen[name].high, scratch.rooms)
            return seen, {key: _channel_sums(values[key[0]], key[1]) for key in channels}

        found = list(pool.map(one, chunk, range(first, first + len(chunk))))
        return _statistics(found, first, same, names, channels, {name: c for name, (_, c) in counters.items()})

    return look


def representatives(model: ir.Model, tensors: Sequence[str]) -> dict[str, str]:
    """{tensor: the tensor whose statistics stand for it}, itself in most cases."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    inputs = {value.name for value in model.graph.inputs}
    found: dict[str, str] = {}
    for name in tensors:
        value = values.get(name)
        while value is not None:
            following = _moved(value) or _clipped(value)
            if following is None or (following.name not in values and following.name not in inputs):
                break
            value = following if following.name in values else None
            found[name] = following.name or ""
        found.setdefault(name, name)
    return found


def _moved(value: ir.Value) -> ir.Value | None:
    """What a node that only moves values reads to make this one."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in ops.MOVES:
        return None
    source = node.inputs[0]
    return source if source is not None and source.dtype == ir.DataType.FLOAT else None


def _clipped(value: ir.Value) -> ir.Value | None:
    """What the Relu or Clip that alone reads this tensor makes of it; a Clip's bounds must be constants around 0.

    None behind weights with NaN or infinity, which Relu and Clip would hide.
    """
    uses, maker = value.uses(), value.producer()
    weights = [graph.constant(each) for each in maker.inputs] if maker is not None else []
    if any(array is not None and array.dtype.kind == "f" and not np.isfinite(array).all() for array in weights):
        return None
    if len(uses) != 1 or value.is_graph_output():
        return None
    (usage,) = uses
    node = usage.node
    if node.domain or usage.idx or node.op_type not in ("Relu", "Clip") or node.graph is not value.graph:
        return None
    for index, sign in ((1, 1), (2, -1)):
        bound = node.inputs[index] if len(node.inputs) > index else None
        array = graph.constant(bound)
        if bound is not None and (array is None or float(array.reshape(())) * sign > 0):
            return None
    return node.outputs[0]


def _runner(model: ir.Model, wanted: Sequence[str], optimize: bool) -> Callable[[Batch], dict[str, Array]]:
    """Runs the whole graph on one thread and returns the wanted tensors, in the memory where ONNX Runtime made them."""
    names = list(dict.fromkeys((*wanted, *(value.name or "" for value in model.graph.outputs))))
    try:
        opened = session.open_session(graph.to_bytes(graph.with_outputs(model, names)), threads=1, optimize=optimize)
    except BundleError as error:
        raise CalibrationError("calibration: ONNX Runtime refuses the graph", found=str(error)) from error
    inputs = [value.name for value in opened.get_inputs()]

    def run(batch: Batch) -> dict[str, Array]:
        try:
            given = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(batch[name])) for name in inputs}
            made = opened.run_with_ort_values(names, given)
            return dict(zip(wanted, map(_view, made[: len(wanted)]), strict=True))
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise graph.RunError(str(error).splitlines()[0][:300]) from error

    return run


class _Held(np.ndarray):
    """An array over memory of an OrtValue, which lives as long as the array or a view of it."""

    owner: object


def _view(value: ort.OrtValue) -> Array:
    """The float32 tensor without a copy: `OrtValue.numpy()` makes one, and the pages for it."""
    shape = value.shape()
    if math.prod(shape) == 0:
        return np.zeros(shape, np.float32)
    memory = (ctypes.c_float * math.prod(shape)).from_address(value.data_ptr())
    held = np.frombuffer(memory, np.float32).reshape(shape).view(_Held)
    held.owner = value
    return held


def _range(values: Array, name: str, number: int, model: ir.Model, batch: Batch) -> tuple[_Seen, Array]:
    """What one tensor held in one batch, and the values that count."""
    if values.size == 0:
        return _Seen(low=math.inf, high=-math.inf, elements=0, masked=0), values
    low, high = float(values.min()), float(values.max())
    if not math.isfinite(low) or not math.isfinite(high):  # a NaN anywhere makes both NaN
        maker = _maker(model, name, batch)
        first = f"{maker.op_type} {maker.name!r} makes the first in {maker.outputs[0].name!r}: " if maker else ""
        raise CalibrationError(
            f"calibration batch {number}: tensor {name!r}",
            found="NaN" if np.isnan(values).any() else "infinity",
            expected="finite numbers",
            do=f"{first}look at this batch; if the model is meant to make infinities here, keep the node float with a rule",
            tensor=name,
            batch=number,
        )
    if low > -SATURATING and high < SATURATING:
        return _Seen(low=low, high=high, elements=values.size, masked=0), values
    masked = np.abs(values) >= SATURATING
    if np.unique(values[masked]).size > MASKS:
        return _Seen(low=low, high=high, elements=values.size, masked=0), values
    rest = values[~masked]
    ends = (float(rest.min()), float(rest.max())) if rest.size else (math.inf, -math.inf)
    return _Seen(low=ends[0], high=ends[1], elements=values.size, masked=values.size - rest.size), rest


def _maker(model: ir.Model, name: str, batch: Batch) -> ir.Node | None:
    """The first node, in graph order, that made NaN or infinity on the way to a tensor; None where it cannot be told."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    ancestors: set[ir.Node] = set()
    waiting = [values[name].producer()] if name in values else []
    while waiting:
        node = waiting.pop()
        if node is not None and node not in ancestors:
            ancestors.add(node)
            waiting += [value.producer() for value in node.inputs if value is not None]
    nodes = [node for node in model.graph if node in ancestors]
    floats = [v.name for node in nodes for v in node.outputs if v.name and v.dtype == ir.DataType.FLOAT]
    try:
        opened = session.open_session(graph.to_bytes(graph.with_outputs(model, floats)), optimize=False)
        made = opened.run(floats, {value.name: batch[value.name] for value in opened.get_inputs()})
    except Exception:  # the error that is being told is the other one
        return None
    bad = {each for each, array in zip(floats, made, strict=True) if not np.isfinite(array).all()}
    return next((node for node in nodes if any(value.name in bad for value in node.outputs)), None)


def _channel_sums(values: Array, axis: int) -> tuple[Array, int]:
    """float64 [channels] sums over all other axes, and how many values each is of.

    Positions behind the channels are added pairwise in float32, the rest in float64.
    """
    at = axis % values.ndim
    outer, count, inner = math.prod(values.shape[:at]), values.shape[at], math.prod(values.shape[at + 1 :])
    if outer * inner == 0:
        return np.zeros(count), 0
    flat = np.asarray(values).reshape(outer, count, inner)
    with np.errstate(over="ignore"):
        sums = (flat.sum(axis=2) if inner > 1 else flat[:, :, 0]).sum(axis=0, dtype=np.float64)
    if not (np.abs(sums) < SATURATING).all():
        rest = np.where(np.abs(flat) < SATURATING, flat, np.float32(0))
        sums = rest.sum(axis=(0, 2), dtype=np.float64)
    return sums, outer * inner


def _statistics(
    found: Sequence[tuple[Mapping[str, _Seen], Mapping[Key, tuple[Array, int]]]],
    first: int,
    same: Mapping[str, str],
    names: Sequence[str],
    channels: Sequence[Key],
    counters: Mapping[str, Counter],
) -> Statistics:
    stop = first + len(found)
    segments = (np.arange(first, stop) >> statistics.segment_shift(stop)) - (first >> statistics.segment_shift(stop))
    tensors = {}
    for name in names:
        each = [seen[name] for seen, _ in found]
        low, high = min(one.low for one in each), max(one.high for one in each)
        lows, highs = np.full(segments[-1] + 1, math.inf), np.full(segments[-1] + 1, -math.inf)
        np.minimum.at(lows, segments, [one.low for one in each])
        np.maximum.at(highs, segments, [one.high for one in each])
        tensors[name] = TensorStatistics(
            low=low,
            high=high,
            elements=sum(one.elements for one in each),
            masked=sum(one.masked for one in each),
            average_low=statistics.average([one.low for one in each if one.low <= one.high]),
            average_high=statistics.average([one.high for one in each if one.low <= one.high]),
            lows=lows,
            highs=highs,
            histogram=counters[name].result() if counters and low <= high else None,
        )
    return Statistics(
        first=first,
        stop=stop,
        batches=len(found),
        same=dict(same),
        tensors=tensors,
        channels={key: _sums([sums[key] for _, sums in found]) for key in channels},
    )


def _sums(parts: Sequence[tuple[Array, int]]) -> ChannelStatistics:
    """The sums of a chunk, added in the order of its batches."""
    full = [part for part in parts if part[1]] or parts[:1]
    total = full[0][0]
    for sums, _ in full[1:]:
        total = total + sums
    return statistics.exact_sums(total, sum(count for _, count in full))


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count() or 1
