"""Write hard-sigmoid and hard-swish as HardSigmoid, which codes can be read as (quantize), and a product.

1. clip(x + 3, 0, 6) / 6       becomes   HardSigmoid(x, alpha=1/6, beta=½)
2. x · clip(x + 3, 0, 6) / 6   becomes   HardSwish(x)
3. HardSwish(x)                becomes   x · HardSigmoid(x, alpha=1/6, beta=½), as ONNX Runtime itself does at load

All for float32 alone: HardSigmoid has no kernel for double.

Source: Howard et al. 2019, arXiv 1905.02244, section 5.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.rules.common import _fuse_hardswish

from exporter import graph
from exporter.prepare import edit
from exporter.prepare.rules import apply


class _HardSwish(_fuse_hardswish.HardSwishFusion):
    def check(self, *context: Any, **values: Any) -> Any:
        return _is_float32(values["bias"]) and super().check(*context, **values)


class _HardSigmoid(_fuse_hardswish.HardSigmoidFusion):
    def check(self, *context: Any, **values: Any) -> Any:
        return _is_float32(values["bias"]) and super().check(*context, **values)


def _is_float32(value: ir.Value) -> bool:
    array = graph.constant(value)
    return array is not None and array.dtype == np.float32


RULES = tuple(
    fusion.rule()  # type: ignore[no-untyped-call]
    for fusion in (_HardSwish, _HardSigmoid, _fuse_hardswish.HardSwishFusionFromHardSigmoid)
)


def rewrite(model: ir.Model) -> int:
    fused = apply(model, RULES, commute=True)
    return fused + sum(_split(model, node) for node in list(model.graph) if graph.op(node) == "HardSwish")


def _split(model: ir.Model, node: ir.Node) -> bool:
    """Rule 3, for one node."""
    x = node.inputs[0]
    if x is None or x.dtype != ir.DataType.FLOAT:
        return False
    gate = ir.node("HardSigmoid", [x], {"alpha": 1 / 6, "beta": 0.5}, name=f"{node.name}_gate")
    product = ir.node("Mul", [x, gate.outputs[0]], name=node.name)
    gate.outputs[0].type, gate.outputs[0].shape = x.type, x.shape
    edit.replace(model, [node], [gate, product], node.outputs[0], product.outputs[0])
    return True
