"""Fold a scalar factor around a product of two activations into the linear layer that makes its first factor.

1. a · (x W + b) M        becomes   (x (a W) + a b) M        a behind the product, as in attention's 1 / sqrt(d)
2. (a · (x W + b)) M      becomes   the same                 a behind the layer

a is a constant by which a Mul multiplies or a Div divides; nodes that only move values (Reshape, Transpose) may stand between. ONNX
Runtime takes the factor into a float product; behind the integer kernel it is a pass of its own over all scores, 3 % of a ViT-S.
The integer codes stay the same: the layer's scales take the factor.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter import graph, ops
from exporter.prepare import edit

CONSTANTS = {"Gemm": (1, 2), "MatMul": (1,)}  # inputs of a linear layer that take the factor


def rewrite(model: ir.Model) -> int:
    return sum(_fold(model, node) for node in list(model.graph) if graph.op(node) in ("Mul", "Div"))


def _fold(model: ir.Model, node: ir.Node) -> bool:
    x, factor = _scaled(node)
    layer = _layer(x) if x is not None else None
    if x is None or layer is None or not (graph.is_product(x.producer()) or _feeds_product(node.outputs[0])):
        return False
    for index in CONSTANTS[graph.op(layer)]:
        if index < len(layer.inputs) and layer.inputs[index] is not None:
            array = graph.constant(layer.inputs[index])
            assert array is not None
            name = f"{layer.name}_{('weight', 'bias')[index - 1]}"
            layer.replace_input_with(index, edit.initializer(model, name, array * np.float32(factor)))
    ir.convenience.replace_all_uses_with(node.outputs[0], x)
    model.graph.remove(node, safe=True)
    return True


def _scaled(node: ir.Node) -> tuple[ir.Value | None, float]:
    """The tensor that a Mul or Div scales, alone reading it, and the factor; None where it does something else."""
    places = (0, 1) if graph.op(node) == "Mul" else (0,)
    for index in places:
        x, array = node.inputs[index], graph.constant(node.inputs[1 - index])
        if x is None or x.shape is None or array is None or array.size != 1 or array.dtype != np.float32:
            continue
        value = float(array.reshape(()))
        alone = len(x.uses()) == 1 and not x.is_graph_output() and not node.outputs[0].is_graph_output()
        if alone and graph.constant(x) is None and array.ndim <= len(x.shape) and value:
            return x, value if graph.op(node) == "Mul" else 1 / value
    return None, 0.0


def _layer(value: ir.Value) -> ir.Node | None:
    """The linear layer with constant weight and bias that alone makes what is scaled."""
    node, inside = value.producer(), False
    while node is not None and not node.domain:
        if graph.op(node) in CONSTANTS and not graph.is_product(node):
            known = all(graph.constant(each) is not None for each in node.inputs[1:] if each is not None)
            return node if known else None
        if graph.op(node) not in ops.MOVES and (inside or not graph.is_product(node)):
            return None
        inside = inside or graph.is_product(node)
        before = node.inputs[0]
        if before is None or len(before.uses()) != 1 or before.is_graph_output():
            return None
        node = before.producer()
    return None


def _feeds_product(value: ir.Value) -> bool:
    """Whether all that reads a value, behind nodes that only move it, multiplies it with another activation."""
    readers = graph.consumers(value)
    return bool(readers) and all(
        graph.is_product(each)
        or (graph.op(each) in ops.MOVES and not each.outputs[0].is_graph_output() and _feeds_product(each.outputs[0]))
        for each in readers
    )
