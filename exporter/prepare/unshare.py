"""Give each role of an initializer its own copy, so that one node's scale is not forced on another.

1. A bias (input 2 of Conv, ConvTranspose, Gemm) is quantized with the scale of its node's input: each node gets a copy.
2. A weight read in two roles (another op_type, input or transposition, hence another channel axis) gets a copy per role.
   Nodes that read it in the same role go on sharing it: an unrolled recurrent cell keeps one weight.
"""

from __future__ import annotations

from collections import defaultdict

import onnx_ir as ir

from exporter import graph, ops
from exporter.prepare import edit

LAYERS = tuple(name for name in ops.LAYERS if name not in ops.RECURRENT)


def rewrite(model: ir.Model) -> int:
    copies = 0
    for value in list(model.graph.initializers.values()):
        array = graph.constant(value)
        roles: dict[object, list[tuple[ir.Node, int]]] = defaultdict(list)
        for usage in value.uses():
            roles[_role(usage.node, usage.idx)].append((usage.node, usage.idx))
        layered = any(graph.op(node) in LAYERS for readers in roles.values() for node, _ in readers)
        if array is None or array.dtype.kind != "f" or len(roles) < 2 or not layered:
            continue
        for readers in list(roles.values())[1:]:
            copy = edit.initializer(model, f"{value.name}_copy", array)
            for node, index in readers:
                node.replace_input_with(index, copy)
            copies += 1
    return copies


def _role(node: ir.Node, index: int) -> object:
    if graph.op(node) in ("Conv", "ConvTranspose", "Gemm") and index == 2:
        return (node.name, index)
    transposed = node.attributes.get_int("transB", 0) if graph.op(node) == "Gemm" else 0
    return (graph.op(node), index, transposed) if graph.op(node) in LAYERS else "elsewhere"
