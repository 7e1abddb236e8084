"""The layers that corrections work on: those in integer kernels, with a weight that is known now."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from exporter import graph
from exporter.place import Plan


def weighted(model: ir.Model, plan: Plan) -> Iterator[tuple[ir.Node, ir.Value, ir.Value]]:
    """(node, x, W) of each static or dynamic Conv, Gemm and MatMul with a constant weight, in graph order."""
    integer = {*plan.int8, *plan.dynamic}
    for node in model.graph:
        if node.name in integer and node.op_type in ("Conv", "Gemm", "MatMul"):
            x, weight = node.inputs[:2]
            if x is not None and weight is not None and graph.constant(weight) is not None:
                yield node, x, weight
