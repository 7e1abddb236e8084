"""What of each output varies from input to input, and which parts of it are judged by themselves.

A part is what a Concat laid into the output, or a group of channels that varies GAP times less than all others: scores of 0..1
beside boxes of 0..640 vanish in the SNR of both together. docs/drift.md says how a part is judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter import graph, ops
from exporter.batches import Array, Batch
from runtime import drift
from runtime.drift import WHOLE, Ground, fitted, inside
from runtime.judged import Judged, Part

GAP = 10.0  # between the parts' rms: 20 dB, which the SNR of both together hides
LEAST_SHARE = 1 / 16  # of the channels: a few that hardly ever say anything are no part
MOST_CHANNELS, MOST_PARTS = 4096, 64
MOST_ELEMENTS = 1 << 20  # of a constant part: 8 MB, which travels to the workers of a cluster


def grounds(model: ir.Model, outputs: Sequence[Mapping[str, Array]], batches: Sequence[Batch]) -> dict[str, Ground]:
    """{output: what its drift is held against}.

    Args:
        model: a float graph.
        outputs: its outputs on each batch; the batches.
    """
    found = {}
    sets = graph.selections(model)[1]
    for value in model.graph.outputs:
        name = value.name or ""
        arrays = [np.asarray(each[name]) for each in outputs if name in each]
        if not arrays:
            continue
        if value in sets or len({array.ndim for array in arrays}) > 1:
            found[name] = Ground(judged=_set(arrays, batches))
            continue
        if arrays[0].dtype.kind != "f":
            found[name] = Ground(judged=Judged(by="equal"))
            continue
        fixed = _constant(arrays, batches)
        parts = () if fixed is None else (WHOLE, *_parts(value, arrays, fixed))
        found[name] = Ground(judged=Judged(by="reals", parts=parts), constant=fixed)
    return found


def of_read(model: ir.Model, batches: Sequence[Batch]) -> dict[str, Ground]:
    """The same of what nodes that select read (`graph.with_read`); empty where none selects."""
    if not (names := graph.selections(model)[0]):
        return {}
    inner = graph.with_read(model)
    return {
        name: each
        for name, each in grounds(inner, list(map(graph.runner(inner), batches)), batches).items()
        if name in names
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moving:
    """Some elements of an output, what is not counted of them as signal, and by which factor the rest is."""

    output: str
    part: Part
    constant: Array
    factor: float = 1.0

    def of(self, outputs: Mapping[str, Array]) -> Array:
        array = outputs[self.output]
        where = inside(self.part, array.shape)
        return array[:0] if where is None else array[where]

    def varying(self, outputs: Mapping[str, Array]) -> Array:
        array = outputs[self.output]
        return math.sqrt(self.factor) * self.of({self.output: array - fitted(self.constant, array.shape)})


def moving(against: Mapping[str, Ground], outputs: Sequence[Mapping[str, Array]]) -> list[Moving]:
    """What `Drift.worst_snr_db` weighs: outputs of real numbers, and what varies in their parts; all where none varies."""
    every = [Moving(output=name, part=WHOLE, constant=np.asarray(0.0)) for name in against]
    reals = [each for each in every if against[each.output].judged.by == "reals"] or every
    found = drift.measure(((each, each) for each in outputs), against)
    parts = [each for each in reals if not _named(found, each.output).constant]
    factor = 10 ** (drift.HIDDEN_DB / 10)
    for output in (_named(found, each.output) for each in reals):
        fixed = against[output.name].constant
        if fixed is not None:
            moves = (each.part for each in output.parts if each.varying_db is not None)
            parts += [Moving(output=output.name, part=part, constant=fixed, factor=factor) for part in moves]
    return parts or reals


def _named(found: drift.Drift, name: str) -> drift.OutputDrift:
    return next(each for each in found.outputs if each.name == name)


def _set(arrays: Sequence[Array], batches: Sequence[Batch]) -> Judged:
    """Its items lie along the axis whose size depends on the data; else along the last but one of three or more, or the last."""
    shapes = [array.shape for array in arrays if array.ndim == arrays[0].ndim]
    rank = len(shapes[0])
    batched = rank > 1 and all(shape[0] in _rows(batch) for shape, batch in zip(shapes, batches, strict=False))
    changing = [axis for axis in range(batched, rank) if len({shape[axis] for shape in shapes}) > 1]
    axis = changing[0] if changing else max(0, rank - 2 if rank > 2 else rank - 1 if batched else 0)
    return Judged(by="set", axis=axis, batched=batched)


def _constant(arrays: Sequence[Array], batches: Sequence[Batch]) -> Array | None:
    """Means over the samples, of each element; along axes of changing size and rows of a batch too. None: of one number each."""
    ranks = {array.ndim for array in arrays}
    if len(ranks) > 1:
        every = np.concatenate([_finite(array).reshape(-1) for array in arrays])
        return np.asarray(every.mean()) if every.size > 1 else None
    shapes = [array.shape for array in arrays]
    changing = {axis for axis in range(ranks.pop()) if len({shape[axis] for shape in shapes}) > 1}
    if shapes[0] and all(shape[0] in _rows(batch) for shape, batch in zip(shapes, batches, strict=True)):
        changing.add(0)
    left = {axis: size for axis, size in enumerate(shapes[0]) if axis not in changing}
    while math.prod(left.values()) > MOST_ELEMENTS:
        del left[max(left, key=left.__getitem__)]
    axes = tuple(axis for axis in range(len(shapes[0])) if axis not in left)
    count = sum(math.prod(shape[axis] for axis in axes) for shape in shapes)
    if count < 2:
        return None
    sums = np.sum([_finite(array).sum(axis=axes, keepdims=True) for array in arrays], axis=0)
    return np.asarray(sums / count)


def _rows(batch: Batch) -> set[int]:
    return {array.shape[0] for array in batch.values() if array.ndim}


def _finite(array: Array) -> Array:
    return np.nan_to_num(array.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _parts(value: ir.Value, arrays: Sequence[Array], constant: Array) -> tuple[Part, ...]:
    laid = _laid(value, arrays[0].shape)
    if graph.squashing(value) is not None:  # all of 0..1, and a class that is hardly ever likely is no part
        return laid
    return tuple(dict.fromkeys([*laid, *_groups(arrays, constant)]))


def _groups(arrays: Sequence[Array], constant: Array) -> Iterator[Part]:
    """Two groups of channels, along the axis where the gap between what varies in them is widest."""
    widest, chosen = GAP, None
    for axis in range(1, arrays[0].ndim):
        channels = {array.shape[axis] if array.ndim == arrays[0].ndim else 0 for array in arrays}
        if len(channels) > 1 or not 1 < (size := channels.pop()) <= MOST_CHANNELS:
            continue
        rms = np.sqrt(sum(_squares(array, constant, axis) for array in arrays))
        least = drift.NOTHING_VARIES * rms.max()  # a channel without meaning beside the others, if with numbers
        order = [int(channel) for channel in np.argsort(rms, kind="stable") if rms[channel] > least]
        for at in range(1, len(order)):
            gap = rms[order[at]] / rms[order[at - 1]]
            if gap > widest and min(at, len(order) - at) >= LEAST_SHARE * size:
                widest, chosen = gap, (axis, sorted(order[:at]), sorted(order[at:]))
    if chosen is not None:
        axis, *groups = chosen
        yield from (Part(axis=axis, runs=_runs(group)) for group in groups)


def _squares(array: Array, constant: Array, axis: int) -> Array:
    others = tuple(each for each in range(array.ndim) if each != axis)
    return np.asarray(np.square(_finite(array) - fitted(constant, array.shape)).sum(axis=others))


def _runs(indices: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Whole numbers in order, as (start, stop) of those that follow each other."""
    starts = [each for each in indices if each - 1 not in set(indices)]
    stops = [each + 1 for each in indices if each + 1 not in set(indices)]
    return tuple(zip(starts, stops, strict=True))


def _laid(value: ir.Value, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """What the inputs of a Concat became in an output that only moves what it made."""
    moves: list[ir.Node] = []
    node = value.producer()
    while (
        node is not None and (node.op_type in ops.MOVES or ops.of(node.op_type).in_place) and node.inputs[0] is not None
    ):
        moves.append(node)
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Concat" or not 2 <= len(node.inputs) <= MOST_PARTS:
        return ()
    labels = _labels(node, math.prod(shape))
    for move in reversed(moves):
        labels = None if labels is None else _moved(labels, move, shape if move is moves[0] else None)
    if labels is None or labels.shape != shape:
        return ()
    for axis in range(1, len(shape)):
        line = labels[tuple(slice(None) if each == axis else 0 for each in range(len(shape)))]
        if (labels == line.reshape([-1 if each == axis else 1 for each in range(len(shape))])).all():
            members = (np.flatnonzero(line == label).tolist() for label in range(len(node.inputs)))
            return tuple(Part(axis=axis, runs=_runs(each)) for each in members if each)
    return ()


def _labels(node: ir.Node, elements: int) -> Array | None:
    """Which input each element of a Concat's output is from; None where sizes are not known."""
    whole = node.outputs[0].shape
    if whole is None or not elements:
        return None
    axis = node.attributes.get_int("axis", 0) % len(whole)
    sizes = _solved(
        [value.shape[axis] if value is not None and value.shape is not None else None for value in node.inputs]
    )
    if sizes is None and isinstance(together := whole[axis], int):
        known = [value.shape[axis] if value is not None and value.shape is not None else None for value in node.inputs]
        sizes = _solved(known, together)
    if sizes is None:
        return None
    shape = [sum(sizes) if at == axis else size for at, size in enumerate(whole)]
    unknown = [at for at, size in enumerate(shape) if not isinstance(size, int)]
    known_elements = math.prod(size for size in shape if isinstance(size, int))
    if len(unknown) > 1 or not known_elements or elements % known_elements:
        return None
    full = [size if isinstance(size, int) else elements // known_elements for size in shape]
    if math.prod(full) != elements:
        return None
    line = np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)
    return np.broadcast_to(line.reshape([-1 if at == axis else 1 for at in range(len(full))]), full)


def _solved(sizes: Sequence[object], total: int | None = None) -> list[int] | None:
    """The sizes, of which one may be unknown where the total is not."""
    known = [size if isinstance(size, int) else None for size in sizes]
    missing = known.count(None)
    if missing > (total is not None):
        return None
    rest = (total or 0) - sum(size for size in known if size is not None)
    return [rest if size is None else size for size in known] if rest >= 0 or not missing else None


def _moved(labels: Array, node: ir.Node, shape: tuple[int, ...] | None) -> Array | None:
    """The labels behind a node that moves elements; shape: of its output, where that was seen."""
    if ops.of(node.op_type).in_place:
        return labels
    if node.op_type == "Transpose":
        return labels.transpose(node.attributes.get_ints("perm", list(range(labels.ndim))[::-1]))
    if shape is None:
        said = node.outputs[0].shape
        if said is None or sum(not isinstance(size, int) for size in said) > 1:
            return None
        shape = tuple(size if isinstance(size, int) else -1 for size in said)
    try:
        return labels.reshape(shape)
    except ValueError:
        return None
