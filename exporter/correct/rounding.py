"""Weights of a graph under the pair rule (`numerics.pairing`), in their kernels' order; and what the rule did to them.

Neighbours are positions (2k, 2k+1) of the sum over K: for Conv (kernel position, channel of the group), for MatMul and Gemm
along the rows of B. Depthwise Conv has a kernel of its own that does not pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array
from exporter.correct import layers
from exporter.numerics.pairing import fit, full_scale, keep
from exporter.numerics.quantized import QuantizedTensor, per_channel
from exporter.place import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """What the pair rule did to one layer's weight.

    broken: share, 0..1, of its pairs that nearest full-range codes would break; 0.0 is a layer that never needed the rule.
    nearest_db, kept_db: SNR of the weight, 10 log10(Σ w² / Σ (w - code · scale)²), with these codes and with ours.
    """

    node: str
    broken: float
    nearest_db: float
    kept_db: float

    def __str__(self) -> str:
        if not self.broken:
            return "pair rule: no pair breaks it"
        share = f"{100 * self.broken:.2g} % of pairs would break it"
        return f"pair rule: {share}; weight SNR {self.nearest_db:.1f} -> {self.kept_db:.1f} dB"


def under_pair_rule(model: ir.Model, plan: Plan) -> tuple[Mapping[str, QuantizedTensor], tuple[Paired, ...]]:
    """{weight initializer: its codes} of each int8 layer whose kernel pairs, and what that cost or won."""
    rounded = _fitted(paired_layers(model, plan), True)
    return rounded, effects(model, plan, rounded)


def kept(
    model: ir.Model, plan: Plan, codes: Mapping[str, QuantizedTensor], *, pair_rule: bool
) -> tuple[dict[str, QuantizedTensor], dict[str, QuantizedTensor]]:
    """Codes that weights came with, of int8 layers: as they are to begin with, and those of them that nothing may change.

    Where the rule is asked for, pairs that break it share their excess at the scale that they have: such codes are a beginning.
    """
    read = {weight.name or "": node for node, _, weight in layers.weighted(model, plan)}
    paired = {weight.name for _, weight in paired_layers(model, plan)} if pair_rule else set()
    first = {name: each for name, each in codes.items() if name in read}
    firm = dict(first)
    for name, each in first.items():
        if name in paired and breaks_pair_rule(read[name], each.codes):
            rows = keep(in_kernel_order(read[name], each.codes).astype(np.int32)).astype(np.int8)
            first[name] = replace(each, codes=from_kernel_order(read[name], rows, each.codes.shape))
            del firm[name]
    return first, firm


def at_best_scale(model: ir.Model, plan: Plan, *, pair_rule: bool) -> dict[str, QuantizedTensor]:
    """{weight initializer: its codes} of every int8 layer, by `fit`; with pair_rule those whose kernel pairs keep it."""
    kept = _fitted(paired_layers(model, plan) if pair_rule else [], True)
    every = [(node, weight) for node, _, weight in layers.weighted(model, plan)]
    found = kept | _fitted([(node, weight) for node, weight in every if weight.name not in kept], False)
    return {name: found[name] for name in dict.fromkeys(weight.name or "" for _, weight in every)}


def _fitted(given: Iterable[tuple[ir.Node, ir.Value]], pair_rule: bool) -> dict[str, QuantizedTensor]:
    rounded: dict[str, QuantizedTensor] = {}
    for node, value in given:
        name, weight = value.name or "", graph.constant(value)
        if weight is None or name in rounded:  # shared by two layers: place lets one axis only be its channels
            continue
        codes, scale = fit(in_kernel_order(node, weight), pair_rule)
        rounded[name] = per_channel(from_kernel_order(node, codes, weight.shape), scale, channel_axis(node))
    return rounded


def effects(model: ir.Model, plan: Plan, rounded: Mapping[str, QuantizedTensor]) -> tuple[Paired, ...]:
    """What the pair rule did to each layer whose kernel pairs, by the codes it got; a shared weight counts at its first."""
    first = {value.name or "": (node, value) for node, value in reversed(paired_layers(model, plan))}
    return tuple(
        _effect(node.name or "", in_kernel_order(node, weight), in_kernel_order(node, found.codes), found.scale)
        for name, (node, value) in reversed(first.items())
        if (weight := graph.constant(value)) is not None and (found := rounded.get(name)) is not None
    )


def _effect(node: str, rows: Array, codes: Array, scale: Array) -> Paired:
    unit = full_scale(rows)
    nearest = np.rint(rows / unit[:, None])
    pairs = (rows.shape[1] // 2) * len(rows)
    moved = (keep(nearest) != nearest)[:, : rows.shape[1] // 2 * 2].reshape(len(rows), -1, 2).any(axis=2)
    return Paired(
        node=node,
        broken=float(moved.sum()) / max(pairs, 1),
        nearest_db=_snr_db(rows, nearest * unit[:, None]),
        kept_db=_snr_db(rows, codes * scale[:, None]),
    )


def _snr_db(exact: Array, rounded: Array) -> float:
    signal, noise = (float((each.astype(np.float64) ** 2).sum()) for each in (exact, exact - rounded))
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def paired_layers(model: ir.Model, plan: Plan) -> list[tuple[ir.Node, ir.Value]]:
    """(node, W) of the layers whose kernel adds pairs of products in int16: all but depthwise Conv."""
    return [(node, weight) for node, _, weight in layers.weighted(model, plan) if not is_depthwise(node, weight)]


def is_depthwise(node: ir.Node, weight: ir.Value) -> bool:
    array = graph.constant(weight)
    groups = node.attributes.get_int("group", 1)
    return node.op_type == "Conv" and array is not None and graph.is_depthwise(array.shape, groups)


def breaks_pair_rule(node: ir.Node, codes: Array) -> bool:
    """Whether a layer's codes, in the weight's own shape, could saturate in its kernel."""
    rows = in_kernel_order(node, codes).astype(np.int32)
    return bool((keep(rows) != rows).any())


def in_kernel_order(node: ir.Node, weight: Array) -> Array:
    """[channels, K] in the order in which the node's kernel sums."""
    if node.op_type == "Conv":
        return np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)
    return weight if channel_axis(node) == 0 else weight.T


def from_kernel_order(node: ir.Node, rows: Array, shape: tuple[int, ...]) -> Array:
    if node.op_type == "Conv":
        return np.ascontiguousarray(np.moveaxis(rows.reshape(shape[0], *shape[2:], shape[1]), -1, 1))
    return np.ascontiguousarray(rows if channel_axis(node) == 0 else rows.T)


def channel_axis(node: ir.Node) -> int:
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return 0 if node.op_type == "Conv" else 1
