"""Write means as the nodes that have a good integer kernel.

1. ReduceMean over axes 2.. of [N, C, spatial...], keepdims=1   becomes   GlobalAveragePool.
2. the same with keepdims=0                                     becomes   GlobalAveragePool -> Squeeze.
   Rank 3 is [N, C, length] where a Conv made it, else [batch, tokens, features], whose means stay.
3. AveragePool whose windows all divide by their full size, between other layers of a CNN   becomes   a depthwise Conv
   with weights 1/size: QLinearAveragePool takes some twenty times as long, and ONNX Runtime uses it wherever the pool
   stands between DequantizeLinear and QuantizeLinear, planned or not.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter import graph, ops
from exporter.prepare import edit

# what stands before or behind a pool that works on codes; a pool among float nodes is left to its float kernel
AROUND_A_POOL = frozenset({"Conv", "Relu", "Clip", "Concat", "MaxPool"})


def rewrite(model: ir.Model) -> int:
    return sum(_to_pool(model, node) or _to_depthwise(model, node) for node in list(model.graph))


def _to_pool(model: ir.Model, node: ir.Node) -> bool:
    x = node.inputs[0] if graph.op(node) == "ReduceMean" else None
    axes = graph.constant(node.inputs[1]) if x is not None and len(node.inputs) > 1 else None
    if x is None or axes is None or x.shape is None or len(x.shape) < 3 or x.dtype != ir.DataType.FLOAT:
        return False
    rank = len(x.shape)
    if rank == 3 and not _is_of_a_conv(x):
        return False
    if sorted(int(axis) % rank for axis in axes) != list(range(2, rank)):
        return False
    pool = ir.node("GlobalAveragePool", [x], name=node.name)
    pooled, new = pool.outputs[0], [pool]
    if not node.attributes.get_int("keepdims", 1):
        squeeze = ir.node("Squeeze", [pooled, edit.initializer(model, f"{node.name}_axes", np.arange(2, rank))])
        pooled, new = squeeze.outputs[0], [pool, squeeze]
        pool.outputs[0].type = x.type
    edit.replace(model, [node], new, node.outputs[0], pooled)
    return True


def _is_of_a_conv(x: ir.Value | None) -> bool:
    """Whether a Conv made it, with nothing behind but what works element by element or pools."""
    maker = x.producer() if x is not None else None
    while maker is not None and ops.of(graph.op(maker)).channels and maker.inputs:
        x = maker.inputs[0]
        maker = x.producer() if x is not None else None
    return maker is not None and graph.op(maker) == "Conv"


def _to_depthwise(model: ir.Model, node: ir.Node) -> bool:
    """Rule 3, for one node."""
    x = node.inputs[0] if graph.op(node) == "AveragePool" else None
    if x is None or x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[1], int):
        return False
    if x.dtype != ir.DataType.FLOAT:
        return False
    attributes = node.attributes
    padded = any(attributes.get_ints("pads", [0])) and not attributes.get_int("count_include_pad", 0)
    uneven = attributes.get_int("ceil_mode", 0) == 1 or attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
    dilated = set(attributes.get_ints("dilations", [1])) != {1}
    makers = [x.producer()] if x.producer() is not None else []
    neighbours = {graph.op(each) for each in (*makers, *graph.consumers(node.outputs[0])) if each is not None}
    if padded or uneven or dilated or not neighbours & AROUND_A_POOL:
        return False
    channels, kernel = x.shape[1], attributes.get_ints("kernel_shape", [])
    weight = np.full((channels, 1, *kernel), 1 / np.prod(kernel), np.float32)
    kept = {
        name: list(attributes.get_ints(name, [])) for name in ("kernel_shape", "strides", "pads") if name in attributes
    }
    conv = ir.node(
        "Conv", [x, edit.initializer(model, f"{node.name}_mean", weight)], {**kept, "group": channels}, name=node.name
    )
    edit.replace(model, [node], [conv], node.outputs[0], conv.outputs[0])
    return True
