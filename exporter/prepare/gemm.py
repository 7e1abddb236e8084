"""Fuse a matrix product and its bias.

MatMul(x, W) + b with x of rank 2 and b constant, a number per column   becomes   Gemm(x, W, b): the bias is added in
int32 inside the integer kernel. A residual added to a product is no bias: as one, it would keep the layer float.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import RewriteRule

from exporter import graph
from exporter.prepare.rules import apply


def _plain(op: Any, x: Any, weight: Any, bias: Any) -> Any:
    return op.Add(op.MatMul(x, weight), bias)


def _transposed(op: Any, x: Any, weight: Any, bias: Any) -> Any:
    return op.Add(op.MatMul(x, op.Transpose(weight, perm=[1, 0])), bias)


def _rule(pattern: Any, transposed: int) -> RewriteRule:
    def gemm(op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value) -> Any:
        return op.Gemm(x, weight, bias, transB=transposed)

    def check(context: Any, x: ir.Value, weight: ir.Value, bias: ir.Value) -> bool:
        shift = graph.constant(bias)
        if x.shape is None or weight.shape is None or shift is None or len(x.shape) != 2 or len(weight.shape) != 2:
            return False
        if shift.dtype != np.float32:  # an int32 Gemm has no kernel
            return False
        columns = weight.shape[0 if transposed else 1]
        return shift.shape in ((columns,), (1, columns))

    return RewriteRule(pattern, gemm, check, name=f"Gemm{pattern.__name__}")


RULES = (_rule(_plain, 0), _rule(_transposed, 1))


def rewrite(model: ir.Model) -> int:
    return apply(model, RULES, commute=True)
