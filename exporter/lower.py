"""Schemes -> nodes: the lowering of each scheme that ONNX Runtime's quantizer does not know. graph + Plan -> graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

import onnx_ir as ir

from exporter import dynamic, weight_only
from exporter.numerics.formats import W8A8_DYNAMIC, W8A32, Scheme
from exporter.numerics.quantized import QuantizedTensor
from exporter.place import Plan

# (graph that is changed, prepared graph, names of layers, {weight: its codes})
Lay = Callable[[ir.Model, ir.Model, Collection[str], Mapping[str, QuantizedTensor]], None]
LOWERINGS: Mapping[Scheme, Lay] = MappingProxyType({W8A8_DYNAMIC: dynamic.lay, W8A32: weight_only.lay})


def lay(changed: ir.Model, model: ir.Model, plan: Plan, weights: Mapping[str, QuantizedTensor]) -> None:
    """Lay the plan's layers of these schemes, one scheme after the other; the graph is changed.

    Args:
        changed: the prepared graph, with or without Q/DQ around its int8 nodes; all other layers are float in it.
        model: the prepared graph.
        plan: a scheme for each node.
        weights: {weight of the prepared graph: its codes}; a scheme takes those that are of its format.
    """
    for scheme, lower in LOWERINGS.items():
        lower(changed, model, plan.of(scheme), weights)
