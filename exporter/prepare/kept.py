"""What a file's Q/DQ said (`taken`), in the graph behind all rewrites: which tensors and weights of int8 nodes have those codes.

Codes of weights are found again from the numbers (`lattice`): a BatchNormalization that is folded into a weight scales its
channels, a transposition moves them, and codes they stay.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array
from exporter.numerics.quantized import LARGEST, NOTHING, Grid, QuantizedTensor, per_channel
from exporter.prepare.taken import MOVERS, Taken

SAMPLED = 64  # elements of a channel that sort out most scales before all are looked at
NEAR = 1e-3  # of a code: float32 makes less of a product of three factors
SAME = 1e-5  # of a scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """What the rewritten graph has of them: {tensor: its uint8 codes}, {weight initializer: its codes}.

    anew: {weight initializer: the type of its codes in the file}, of those that no int8 codes per channel say.
    real: the file without Q/DQ, before any rewrite.
    """

    grids: Mapping[str, Grid]
    weights: Mapping[str, QuantizedTensor]
    anew: Mapping[str, str]
    real: ir.Model | None = None

    def __bool__(self) -> bool:
        return self is not NOTHING_KEPT


NOTHING_KEPT = Kept(grids={}, weights={}, anew={})


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What became of it, in a sentence, empty where there was nothing; notes: {node: what its weight and output have of it}."""

    sentence: str
    notes: Mapping[str, str]


def found(model: ir.Model, taken: Taken, real: ir.Model) -> Kept:
    """What is left of it in the graph behind all rewrites, which `real` was before them."""
    grids = _settled(model, taken.grids)
    codes = _weights(model, taken.scales)
    anew = {name: dtype for name, dtype in taken.types.items() if name in _layer_weights(model) and name not in codes}
    return Kept(grids=grids, weights=codes, anew=anew, real=real)


def told(model: ir.Model, int8: Collection[str], kept: Kept, rounded: Mapping[str, QuantizedTensor]) -> Told:
    """What the int8 nodes have of it.

    Args:
        model: the rewritten graph.
        int8: names of the nodes that are in integers.
        kept: of that graph.
        rounded: {weight initializer: its codes} of those that are not rounded to nearest.
    """
    if not kept or not int8:
        return Told(sentence="", notes={})
    notes: dict[str, list[str]] = {}
    same, moved, anew, ranges = set[str](), set[str](), dict[str, str](), set[str]()
    for node in [node for node in model.graph if node.name in int8]:
        said = notes.setdefault(node.name or "", [])
        name = node.inputs[1].name or "" if len(node.inputs) > 1 and node.inputs[1] is not None else ""
        if name in kept.weights and name in rounded:
            changed = int((kept.weights[name].codes != rounded[name].codes).sum())
            (moved if changed else same).add(name)
            share = f"{100 * changed / max(kept.weights[name].codes.size, 1):.2g} % of the file's weight codes"
            said.append(f"{share} moved for the pair rule" if changed else "weight codes of the file")
        elif name in kept.anew:
            anew[name] = kept.anew[name]
            said.append(f"weight rounded anew: the file has {anew[name]} codes, the kernel takes int8 per channel")
        ranges |= {value.name for value in (*graph.activations(node), *node.outputs) if value.name in kept.grids}  # type: ignore[misc]
        if any(value.name in kept.grids for value in node.outputs):
            said.append("scale of the file")
    parts = (
        [f"{_count(len(same) + len(moved), 'weight')}, {_count(len(ranges), 'range')}"] if kept.real is not None else []
    )
    if moved:
        parts.append(f"of {_count(len(moved), 'weight')} some codes moved for the pair rule")
    if anew:
        parts.append(f"{_count(len(anew), 'weight')} rounded anew from {', '.join(sorted(set(anew.values())))}")
    return Told(sentence="; ".join(parts), notes={name: "; ".join(said) for name, said in notes.items() if said})


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _settled(model: ir.Model, grids: Mapping[str, Grid]) -> dict[str, Grid]:
    """The grids that int8 nodes of the rewritten graph can have.

    1. A tensor that a mover makes or reads alone shares its grid.
    2. What a Relu or Clip makes: the layer before takes that along, so the codes end where it does. The zero point moves, and no
       multiple of the scale is lost; where the codes go further up than a Clip, the grid is not kept.
    """
    found = dict(grids)
    nodes = [node for node in model.graph if node.op_type in MOVERS - {"Clip"} and not node.domain]
    filled = {node for node in model.graph if node.op_type == "Pad" and _fills_zeros(node)}
    forth = [node for node in model.graph if node in filled or node in nodes]
    for node, forward in [*((node, True) for node in forth), *((node, False) for node in reversed(nodes))]:
        x, outputs = node.inputs[0], [value.name or "" for value in node.outputs]
        if x is None or not x.name:
            continue
        if forward and x.name in found:
            found |= {name: found[x.name] for name in outputs if name not in found}
        elif not forward and x.name not in found and len(outputs) == len(x.uses()) == 1 and outputs[0] in found:
            found[x.name] = found[outputs[0]]
    for node in model.graph:
        name = node.outputs[0].name or ""
        if node.op_type in ("Relu", "Clip") and name in found:
            within = _within(found[name], *_ends(node))
            if within is None:
                del found[name]
            else:
                found[name] = within
    return found


def _fills_zeros(pad: ir.Node) -> bool:
    value = pad.inputs[2] if len(pad.inputs) > 2 else None
    fill = graph.constant(value)
    return pad.attributes.get_string("mode", "constant") == "constant" and (
        value is None or (fill is not None and not fill.any())
    )


def _ends(node: ir.Node) -> tuple[float, float]:
    """Between which values a Relu or Clip leaves its input."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    bounds = [graph.constant(value) for value in node.inputs[1:3]]
    ends = [None if bound is None else float(bound.reshape(-1)[0]) for bound in bounds] + [None, None]
    return -np.inf if ends[0] is None else ends[0], np.inf if ends[1] is None else ends[1]


def _within(grid: Grid, low: float, high: float) -> Grid | None:
    if grid.low < low - grid.scale / 2:
        grid = replace(grid, zero_point=max(0, round(-low / grid.scale)))
    return grid if grid.high <= high + grid.scale / 2 else None


def _weights(model: ir.Model, scales: Array) -> dict[str, QuantizedTensor]:
    """{weight initializer: the codes that its numbers are}, of each layer whose weight they are."""
    read = _layer_weights(model)
    tried = {name: lattice(weight, axis, scales) for name, (weight, axis) in read.items()}
    return {name: codes for name, codes in tried.items() if codes is not None}


def _layer_weights(model: ir.Model) -> dict[str, tuple[Array, int]]:
    """{weight initializer: (its numbers, the axis of its channels)}."""
    found: dict[str, tuple[Array, int]] = {}
    for node in model.graph:
        value = node.inputs[1] if node.op_type in ("Conv", "Gemm", "MatMul") else None
        weight = graph.constant(value)
        if value is not None and value.name and weight is not None and weight.ndim > 1 and weight.dtype == np.float32:
            rows = node.op_type == "Conv" or node.attributes.get_int("transB", 0) == 1
            found.setdefault(value.name, (weight, 0 if rows else weight.ndim - 1))
    return found


def lattice(weight: Array, channel_axis: int, scales: Array) -> QuantizedTensor | None:
    """The codes of a weight whose channels hold whole multiples, at most 128, of one number each; None where one does not.

        |w / s - rint(w / s)| < NEAR        with s = max|w| / m,  m = 1..128

    Of several s one of `scales` is taken, else the largest. The code -128 becomes -127.

    Args:
        weight: float32 [...].
        channel_axis: of the channels.
        scales: float32 ascending, that channels may have.
    """
    rows = np.moveaxis(weight, channel_axis, 0).reshape(weight.shape[channel_axis], -1)
    if not rows.size or not np.isfinite(rows).all():
        return None
    largest = np.abs(rows).max(axis=1).astype(np.float64)
    empty = largest <= NOTHING
    multiples = np.arange(1, 129)
    units = np.where(empty, 1.0, largest)[:, None] / multiples
    sample = rows[:, :: max(1, rows.shape[1] // SAMPLED)].astype(np.float64)
    fits = np.stack([_whole(sample, units[:, i]) for i in range(len(multiples))], axis=1)
    known, nearest = _known(units, scales)
    order = np.where(fits, multiples + 1000 * ~known, np.inf)
    scale, codes = np.ones(len(rows), np.float32), np.zeros(rows.shape, np.int8)
    left = np.flatnonzero(~empty)
    while left.size:
        best = order[left].argmin(axis=1)
        if not np.isfinite(order[left, best]).all():
            return None
        unit = np.where(known[left, best], nearest[left, best], units[left, best])
        whole = _whole(rows[left], unit)
        done = left[whole]
        scale[done] = unit[whole]
        found = np.rint(rows[done] / unit[whole, None])
        codes[done] = np.clip(found, -LARGEST, LARGEST).astype(np.int8)
        order[left[~whole], best[~whole]] = np.inf
        left = left[~whole]
    moved = (rows.shape[0], *np.delete(weight.shape, channel_axis))
    return per_channel(np.ascontiguousarray(np.moveaxis(codes.reshape(moved), 0, channel_axis)), scale, channel_axis)


def _whole(rows: Array, unit: Array) -> Array:
    """Whether all of each row are whole multiples of its unit, bool [channels]."""
    multiple = rows / unit[:, None]
    return np.asarray((np.abs(multiple - np.rint(multiple)) < NEAR).all(axis=1))


def _known(units: Array, scales: Array) -> tuple[Array, Array]:
    """Whether each unit is one of the scales, and the scale that is nearest to it."""
    if not scales.size:
        return np.zeros(units.shape, bool), units
    at = np.searchsorted(scales, units)
    below, above = scales[np.maximum(at - 1, 0)], scales[np.minimum(at, len(scales) - 1)]
    nearest = np.where(np.abs(below - units) < np.abs(above - units), below, above).astype(np.float64)
    return np.abs(nearest - units) < SAME * units, nearest
