"""Smoothing: channels of large activations are made smaller, and the weights that read them larger.

All channels of a tensor share one scale of codes, so one channel of large values leaves few codes to the others, while each
output channel of a weight has a scale of its own. A scale s_j per channel moves from one to the other (`moves`):

    x'_j = x_j / s_j,   W'_ij = W_ij s_j,        s_j = max|x_j|^ALPHA / max_i|W_ij|^(1 - ALPHA)

over all int8 layers that read x_j. Weights of depthwise Conv do not count in it: each of its rows reads one channel, and its
codes stay what they are. Where no others read, s_j = max|x_j|. Scales of a chain of tensors are then multiplied by one
number, so that its largest value stays as large as it was; none is below LEAST of the largest.

Source: Xiao et al. 2023, arXiv 2211.10438, equation 4. Cross-layer equalization (Nagel et al. 2019, arXiv 1906.04721) is the
same move with s from the weights on both sides. Here weights that make a tensor have a scale per channel already, which any s
leaves with the codes that they had: only what the tensor holds is at stake.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array, Batch
from exporter.calibrate import Interval, Range, Ranges
from exporter.calibrate.domain import EVERYTHING
from exporter.correct import layers, moves, rounding
from exporter.correct.slots import FIXED, Slots, scaled
from exporter.place import FLOAT_OUTPUT, Plan

ALPHA = 0.5
LEAST = 0.01  # a scale over the largest of its chain: a channel that held next to nothing may hold more tomorrow


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moved:
    """Scales that move through the prepared graph: float64 > 0 [slots.count], 1 for FIXED."""

    slots: Slots
    scales: Array

    def graph(self, model: ir.Model) -> ir.Model:
        """The prepared graph with the scales moved."""
        return scaled(model, self.slots, self.scales)

    def means(self, means: Mapping[tuple[str, int], Array]) -> dict[tuple[str, int], Array]:
        """E[x'] = E[x] / s, of the layer inputs of `bias.channels`."""
        of = self.slots.of
        return {
            key: mean / self.scales[of[key[0]].reshape(-1)] if key[0] in of else mean for key, mean in means.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ends:
    """low, high: {tensor: smallest and largest value of each slot}, in the shape of the tensor's slots."""

    low: Mapping[str, Array]
    high: Mapping[str, Array]


def find(
    model: ir.Model,
    plan: Plan,
    ranges: Ranges,
    told_apart: Mapping[str, Interval],
    seen: Sequence[Batch],
    unseen: Sequence[Batch],
) -> tuple[Moved, Ranges] | None:
    """The scales that smooth the tensors that are rounded, and the ranges that go with them; None where nothing can move.

    Args:
        model: the prepared graph.
        plan: which nodes are int8.
        ranges: of the prepared graph's tensors.
        told_apart: `calibrate.intervals`, outside of which no reader sees a difference: no scale need reach there.
        seen: calibration batches from which the scales are taken.
        unseen: others, which count in the ranges too: those of the prepared graph have seen them.
    """
    if not seen:
        return None
    slots = moves.find(model, graph.shapes(model, seen[0]))
    names = [name for name in _rounded(model, plan) if name in slots.of]
    if not names:
        return None
    first, rest = (_ends(model, slots, names, part, told_apart) for part in (seen, unseen))
    scales = _scales(slots, _largest(slots, first), _weights(model, plan, slots))
    return Moved(slots=slots, scales=scales), _moved(ranges, slots, scales, _both(first, rest))


def fewest_values(model: ir.Model, plan: Plan, batches: Sequence[Batch]) -> int:
    """How many values a channel has in the batches, in the tensor where it has fewest: by these its largest is known."""
    shapes = graph.shapes(model, batches[0])
    slots = moves.find(model, shapes)
    sizes = [
        math.prod(shapes[name]) // max(1, slots.of[name].size)
        for name in _rounded(model, plan)
        if name in slots.of and name in shapes
    ]
    return min(sizes, default=0) * len(batches)


def scale(largest: Array, weight: Array, alpha: float = ALPHA) -> Array:
    """s = largest^alpha / weight^(1 - alpha), float64; largest where weight is 0; NaN where largest is 0.

    Args:
        largest: max|x_j|, float64 >= 0 [slots].
        weight: max|W_ij| over all i and layers, float64 >= 0 [slots].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where(weight > 0, largest**alpha / weight ** (1 - alpha), largest)
    return np.where(largest > 0, found, np.nan)


def _scales(slots: Slots, largest: Array, weight: Array) -> Array:
    found, scales = scale(largest, weight), np.ones(slots.count)
    for chain in np.unique(slots.chain[FIXED + 1 :]):
        its = np.flatnonzero(slots.chain == chain)
        its = its[its != FIXED]
        wanted, values = found[its], largest[its]
        if np.isnan(wanted).all():
            continue
        # of a channel that held nothing nobody knows what it may hold: it is taken for an ordinary one
        bounded = np.maximum(np.nan_to_num(wanted, nan=np.nanmedian(wanted)), LEAST * np.nanmax(wanted))
        scales[its] = bounded * (values / bounded).max() / values.max()
    return scales


def _rounded(model: ir.Model, plan: Plan) -> list[str]:
    """The tensors whose codes an int8 node reads or makes."""
    int8 = set(plan.int8)
    found = [
        value.name
        for node in model.graph
        if node.name in int8
        for value in (*graph.activations(node), *(node.outputs if node.op_type not in FLOAT_OUTPUT else ()))
    ]
    return [name for name in dict.fromkeys(found) if name]


def _ends(
    model: ir.Model, slots: Slots, names: Sequence[str], batches: Sequence[Batch], told_apart: Mapping[str, Interval]
) -> Ends:
    low = {name: np.full(slots.of[name].shape, np.inf) for name in names}
    high = {name: -low[name] for name in names}
    run = graph.runner(graph.with_outputs(model, names))
    for batch in batches:
        for name, value in run(batch).items():
            if value.size:
                value = np.clip(value, *told_apart.get(name, EVERYTHING))
                axes = tuple(axis for axis, size in enumerate(slots.of[name].shape) if size == 1)
                low[name] = np.minimum(low[name], value.min(axis=axes, keepdims=True))
                high[name] = np.maximum(high[name], value.max(axis=axes, keepdims=True))
    return Ends(low=low, high=high)


def _both(a: Ends, b: Ends) -> Ends:
    return Ends(
        low={name: np.minimum(low, b.low[name]) for name, low in a.low.items()},
        high={name: np.maximum(high, b.high[name]) for name, high in a.high.items()},
    )


def _largest(slots: Slots, ends: Ends) -> Array:
    """max|x_j| of every slot over all tensors that hold it; 0 where none is rounded."""
    found = np.zeros(slots.count)
    for name, low in ends.low.items():
        np.maximum.at(found, slots.of[name], np.maximum(-low, ends.high[name]))
    return found


def _weights(model: ir.Model, plan: Plan, slots: Slots) -> Array:
    """max|W_ij| of every slot over the int8 layers that read it; 0 where only depthwise Conv do."""
    found = np.zeros(slots.count)
    read = {node.name: (node, weight) for node, _, weight in layers.weighted(model, plan)}
    for taken in slots.taken:
        node, value = read.get(taken.layer, (None, None)) if taken.layer else (None, None)
        weight = graph.constant(value)
        if node is not None and value is not None and weight is not None and not rounding.is_depthwise(node, value):
            np.maximum.at(found, np.broadcast_to(taken.times, weight.shape), np.abs(weight))
    return found


def _moved(ranges: Ranges, slots: Slots, scales: Array, ends: Ends) -> Ranges:
    """Each end as far beyond or within the smallest (largest) value as the method put it before."""
    tensors = dict(ranges.tensors)
    for name, low in ends.low.items():
        by, high = scales[slots.of[name]], ends.high[name]
        before: Range = tensors[name]
        tensors[name] = replace(before, low=before.low * _growth(-low, by), high=before.high * _growth(high, by))
    return replace(ranges, tensors=tensors)


def _growth(ends: Array, by: Array) -> float:
    """max(x / s) / max(x), of ends that lie beyond 0; 1 where none does."""
    before, after = float(ends.max()), float((ends / by).max())
    return after / before if before > 0 else 1.0
