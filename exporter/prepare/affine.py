"""Fold a scalar affine step into the Conv that read it: every step left alone would round once more.

1. Conv(a · x, W)         becomes   Conv(x, a · W)
2. Conv(a · x + b, W)     becomes   Conv(x + b / a, a · W)
3. Conv(x + b, W)         becomes   Conv(x, W) with bias + b · Σ W, where nothing is padded: a border is 0, not b

a and b are single constants, a != 0, and nothing but Conv reads the step (the affine blocks of PP-LCNetV3).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array
from exporter.prepare import edit


def rewrite(model: ir.Model) -> int:
    products = sum(_fold_product(model, node) for node in list(model.graph) if graph.op(node) == "Mul")
    return products + sum(_fold_sum(model, node) for node in list(model.graph) if graph.op(node) == "Add")


def _fold_product(model: ir.Model, node: ir.Node) -> bool:
    """Rules 1 and 2, for one Mul."""
    x, factor = _scalar(node)
    step, readers = node, graph.consumers(node.outputs[0])
    if x is None or factor == 0 or node.outputs[0].is_graph_output():
        return False
    constant = 0.0
    if len(readers) == 1 and graph.op(readers[0]) == "Add":
        step = readers[0]
        y, constant = _scalar(step)
        if y is None:
            return False
    convs = _convs(step)
    if not convs:
        return False
    for conv in convs:
        _set(model, conv, 1, _constant(conv, 1) * np.float32(factor))
    if step is node:
        ir.convenience.replace_all_uses_with(node.outputs[0], x)
    else:
        shifted = edit.initializer(model, f"{step.name}_over_factor", np.array(constant / factor, np.float32))
        step.replace_input_with(0, x)
        step.replace_input_with(1, shifted)
    model.graph.remove(node, safe=True)
    return True


def _fold_sum(model: ir.Model, node: ir.Node) -> bool:
    """Rule 3, for one Add."""
    x, constant = _scalar(node)
    convs = _convs(node) if x is not None else ()
    if x is None or not convs or any(map(_pads, convs)):
        return False
    for conv in convs:
        weight = _constant(conv, 1)
        added = np.float32(constant) * weight.reshape(len(weight), -1).sum(axis=1)
        has_bias = len(conv.inputs) > 2 and conv.inputs[2] is not None
        if not has_bias:
            conv.resize_inputs(3)
        _set(model, conv, 2, _constant(conv, 2) + added if has_bias else added)
    ir.convenience.replace_all_uses_with(node.outputs[0], x)
    model.graph.remove(node, safe=True)
    return True


def _scalar(node: ir.Node) -> tuple[ir.Value | None, float]:
    """The tensor and the one float32 constant that a Mul or Add combines; None where it is something else."""
    for x, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        array = graph.constant(other)
        if array is None or array.size != 1 or array.dtype != np.float32 or x is None or x.shape is None:
            continue
        if graph.constant(x) is None and array.ndim <= len(x.shape):
            return x, float(array.reshape(()))
    return None, 0.0


def _convs(node: ir.Node) -> tuple[ir.Node, ...]:
    """The readers of a node's output, where all are Conv that read it as data and have constant weight and bias."""
    value, readers = node.outputs[0], graph.consumers(node.outputs[0])
    plain = not value.is_graph_output() and all(
        graph.op(reader) == "Conv"
        and reader.graph is node.graph
        and reader.inputs[0] is value
        and all(graph.constant(each) is not None for each in reader.inputs[1:] if each is not None)
        for reader in readers
    )
    return readers if plain else ()


def _pads(conv: ir.Node) -> bool:
    return any(conv.attributes.get_ints("pads", [0])) or conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"


def _constant(conv: ir.Node, index: int) -> Array:
    array = graph.constant(conv.inputs[index])
    assert array is not None
    return array


def _set(model: ir.Model, conv: ir.Node, index: int, array: Array) -> None:
    conv.replace_input_with(index, edit.initializer(model, f"{conv.name}_{('weight', 'bias')[index - 1]}", array))
