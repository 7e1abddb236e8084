"""Take a constant out of tensors that vary by little about it: 300 ± 0.1 at an input, 288 ± 0.1 at an output.

1. Conv(x, W, b)      becomes   Conv(x - c, W, b + c · Σ W)     x an input of the graph, nothing padded
   Gemm(x, W, b)      becomes   Gemm(x - c, W, b + c · Σ W)
2. y = Conv(x, W, b)  becomes   y = Conv(x, W, b - c) + c       y an output of the graph that nobody else reads
   y = Gemm(x, W, b)  becomes   y = Gemm(x, W, b - c) + c

c is the middle of what the tensor holds in one batch. Equal up to float32 whatever c is, and as c lies between the smallest and the
largest value, the codes of x - c are never coarser than those of x. The Sub and the Add are float (`exporter.flat`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter import flat, graph, ops
from exporter.batches import Array, Batch
from exporter.prepare import edit


def rewrite(model: ir.Model, batch: Batch) -> int:
    """Rewrite a graph with shapes; how many tensors lost their constant on `batch`."""
    ends = [*_inputs(model), *(value for value in model.graph.outputs if _biased(value.producer()))]
    ends = [value for value in ends if value.dtype == ir.DataType.FLOAT]
    if not ends:
        return 0
    made = [value.name or "" for value in ends if value.producer() is not None]
    held = {**batch, **(graph.runner(graph.with_outputs(model, made))(batch) if made else {})}
    count = 0
    for value in ends:
        middle = _middle(held[value.name or ""])
        if middle is not None:
            count += _out_of_input(model, value, middle) or _out_of_output(model, value, middle)
    return count


def _inputs(model: ir.Model) -> list[ir.Value]:
    """The graph's inputs, and what nodes that only move values make of them."""
    found = list(model.graph.inputs)
    for value in found:
        found += [
            node.outputs[0]
            for node in graph.consumers(value)
            if graph.op(node) in ops.MOVES and node.inputs[0] is value and not node.outputs[0].is_graph_output()
        ]
    return found


def _middle(values: Array) -> np.float32 | None:
    if not values.size or not np.isfinite(values).all():
        return None
    its = float(values.min()), float(values.max())
    return np.float32(sum(its) / 2) if flat.is_flat(its, its) else None


def _out_of_input(model: ir.Model, value: ir.Value, middle: np.float32) -> bool:
    """Rule 1, for every layer that bears it."""
    layers = [node for node in graph.consumers(value) if node.inputs[0] is value and _bears(node)]
    if not layers or value.is_graph_output():
        return False
    constant = edit.initializer(model, f"{value.name}_middle", np.asarray(middle))
    step = ir.node("Sub", [value, constant], name=_node_name(model, f"{value.name}_about_0"))
    made = step.outputs[0]
    made.name = edit.free_name(model, f"{value.name}_about_0")
    made.type, made.shape = value.type, value.shape
    for layer in layers:
        weight = graph.constant(layer.inputs[1])
        assert weight is not None
        sums = _rows(layer, weight).astype(np.float64).sum(axis=1)
        _add_to_bias(model, layer, middle * sums)
        layer.replace_input_with(0, made)
    model.graph.insert_before(layers[0], step)
    model.graph.sort()
    return True


def _out_of_output(model: ir.Model, value: ir.Value, middle: np.float32) -> bool:
    """Rule 2."""
    layer = value.producer()
    if layer is None or not _biased(layer) or not value.is_graph_output() or graph.consumers(value):
        return False
    weight = graph.constant(layer.inputs[1])
    assert weight is not None
    _add_to_bias(model, layer, np.full(len(_rows(layer, weight)), -float(middle)))
    constant = edit.initializer(model, f"{value.name}_middle", np.asarray(middle))
    around = edit.free_name(model, f"{value.name}_about_0")
    step = ir.node("Add", [value, constant], name=_node_name(model, f"{value.name}_plus_middle"))
    end, name = step.outputs[0], value.name
    end.type, end.shape = value.type, value.shape
    model.graph.insert_after(layer, step)
    model.graph.outputs[model.graph.outputs.index(value)] = end
    value.name, end.name = around, name
    return True


def _bears(node: ir.Node) -> bool:
    """Whether a constant of its input is one of its bias."""
    pads = any(node.attributes.get_ints("pads", [0])) or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
    return _biased(node) and not pads


def _biased(node: ir.Node | None) -> bool:
    """A layer with a constant weight and a bias of one number a channel, or none."""
    if node is None or graph.op(node) not in ("Conv", "Gemm") or graph.constant(node.inputs[1]) is None:
        return False
    plain = graph.op(node) == "Conv" or (
        node.attributes.get_float("alpha", 1.0) == 1.0
        and node.attributes.get_float("beta", 1.0) == 1.0
        and not node.attributes.get_int("transA", 0)
    )
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = graph.constant(given)
    return plain and (given is None or (bias is not None and bias.ndim == 1))


def _rows(layer: ir.Node, weight: Array) -> Array:
    """[output channels, what each sums]"""
    if graph.op(layer) == "Gemm" and not layer.attributes.get_int("transB", 0):
        weight = weight.T
    return weight.reshape(len(weight), -1)


def _add_to_bias(model: ir.Model, layer: ir.Node, shift: Array) -> None:
    bias = graph.constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
    if len(layer.inputs) < 3:
        layer.resize_inputs(3)
    whole = shift if bias is None else bias.astype(np.float64) + shift
    layer.replace_input_with(2, edit.initializer(model, f"{layer.name}_bias", whole.astype(np.float32)))


def _node_name(model: ir.Model, name: str) -> str:
    return edit.unused(name, {node.name for node in model.graph})
