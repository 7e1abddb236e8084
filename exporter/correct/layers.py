"""The layers that corrections work on: int8, with a weight that is known now."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from exporter import graph
from exporter.place import Plan


def weighted(model: ir.Model, plan: Plan) -> Iterator[tuple[ir.Node, ir.Value, ir.Value]]:
    """(node, x, W) of each int8 Conv, Gemm and MatMul with a constant weight, in graph order."""
    int8 = set(plan.int8)
    for node in model.graph:
        if node.name in int8 and node.op_type in ("Conv", "Gemm", "MatMul"):
            x, weight = node.inputs[:2]
            if x is not None and weight is not None and graph.constant(weight) is not None:
                yield node, x, weight
