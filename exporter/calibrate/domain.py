"""Cut a range down to the part that its readers can tell apart.

Where every reader of a tensor is a function that saturates, values beyond its knee give the same result as the knee,
and codes spent on them are lost. The cut is exact: f(clip(x, low, high)) = f(x).

1. HardSigmoid(x) is 0 for x <= -beta/alpha and 1 for x >= (1 - beta)/alpha:     both ends
2. x · HardSigmoid(x), HardSwish among them, is 0 for x <= -beta/alpha:          low = max(low, -beta/alpha)
3. Relu(x) = 0 for x <= 0; Clip(x, a, b) is constant outside [a, b]:             as far as 0 stays inside

A graph output is read by the user, who can tell everything apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from exporter import graph
from exporter.calibrate.ranges import Range, Ranges

Interval = tuple[float, float]
EVERYTHING: Interval = (-math.inf, math.inf)


def distinguish(model: ir.Model, ranges: Ranges) -> Ranges:
    """The same ranges, each cut to the union of what its readers distinguish. Ranges that nothing cuts are kept."""
    seen = intervals(model)
    tensors = {name: _cut(found, seen.get(name, EVERYTHING)) for name, found in ranges.tensors.items()}
    return replace(ranges, tensors=tensors)


def intervals(model: ir.Model) -> Mapping[str, Interval]:
    """{tensor: the smallest interval outside of which no reader sees a difference}, of what nodes make."""
    return {value.name: _seen(value) for node in model.graph for value in node.outputs if value.name}


def _cut(found: Range, seen: Interval) -> Range:
    low, high = max(found.low, seen[0]), min(found.high, seen[1])
    return replace(found, low=low, high=high) if low <= high else found


def _seen(value: ir.Value) -> Interval:
    readers = graph.consumers(value)
    if value.is_graph_output() or not readers:
        return EVERYTHING
    knees = [_knees(node, value) for node in readers]
    return min(low for low, _ in knees), max(high for _, high in knees)


def _knees(node: ir.Node, value: ir.Value) -> Interval:
    if node.op_type == "Mul" and (gate := _gate(node, value)) is not None:
        return _knees(gate, value)[0], math.inf
    if node.inputs[0] is not value or sum(other is value for other in node.inputs) > 1:
        return EVERYTHING
    if node.op_type == "HardSwish":
        return -3.0, math.inf
    if node.op_type == "HardSigmoid":
        alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
        return (-beta / alpha, (1 - beta) / alpha) if alpha > 0 else EVERYTHING
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type == "Clip":
        bounds = [graph.constant(node.inputs[i]) if len(node.inputs) > i else None for i in (1, 2)]
        given = [len(node.inputs) > i and node.inputs[i] is not None for i in (1, 2)]
        low = -math.inf if bounds[0] is None else min(float(bounds[0].reshape(())), 0.0)
        high = math.inf if bounds[1] is None else max(float(bounds[1].reshape(())), 0.0)
        return EVERYTHING if any(g and b is None for g, b in zip(given, bounds, strict=True)) else (low, high)
    return EVERYTHING


def _gate(product: ir.Node, value: ir.Value) -> ir.Node | None:
    """The HardSigmoid of `value` that `product` multiplies `value` by."""
    others = [other.producer() for other in product.inputs if other is not None and other is not value]
    gate = others[0] if len(others) == 1 else None
    return gate if gate is not None and gate.op_type == "HardSigmoid" and gate.inputs[0] is value else None
