"""Write a mean over all spatial axes as GlobalAveragePool, which has an integer kernel; ReduceMean has none.

1. ReduceMean over axes 2.. of [N, C, spatial...], keepdims=1   becomes   GlobalAveragePool.
2. the same with keepdims=0                                     becomes   GlobalAveragePool -> Squeeze.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.prepare import edit


def rewrite(model: ir.Model) -> int:
    return sum(_to_pool(model, node) for node in list(model.graph))


def _to_pool(model: ir.Model, node: ir.Node) -> bool:
    x = node.inputs[0] if node.op_type == "ReduceMean" else None
    axes = graph.constant(node.inputs[1]) if x is not None and len(node.inputs) > 1 else None
    if x is None or axes is None or x.shape is None or len(x.shape) < 3:
        return False
    rank = len(x.shape)
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
