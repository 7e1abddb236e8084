"""Fuse a matrix product and its bias.

1. MatMul(x, W) + b with x of rank 2 and b constant, a number per column   becomes   Gemm(x, W, b): the bias is added in
   int32 inside the integer kernel. A residual added to a product is no bias: as one, it would keep the layer float.
2. A bias of Gemm that is [1, N], or one number for all columns, becomes [N]: ONNX Runtime's quantizer takes no other.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import RewriteRule

from exporter import graph
from exporter.batches import Array
from exporter.prepare import edit
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
        return per_column(shift, weight.shape[0 if transposed else 1], 2) is not None

    return RewriteRule(pattern, gemm, check, name=f"Gemm{pattern.__name__}")


RULES = (_rule(_plain, 0), _rule(_transposed, 1))


def rewrite(model: ir.Model) -> int:
    return apply(model, RULES, commute=True) + sum(map(partial(_flatten, model), list(model.graph)))


def per_column(bias: Array, columns: int | ir.SymbolicDim, rank: int) -> Array | None:
    """What a constant adds to each column of a tensor of that rank, [columns]; None where it adds otherwise, or makes axes."""
    if not isinstance(columns, int) or bias.ndim > rank or bias.size not in (1, columns):
        return None
    if bias.size != math.prod(bias.shape[-1:]):  # it varies along another axis
        return None
    return np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), columns))


def _flatten(model: ir.Model, node: ir.Node) -> bool:
    """Rule 2."""
    if node.op_type != "Gemm" or node.domain or len(node.inputs) < 3:
        return False
    bias, weight = graph.constant(node.inputs[2]), node.inputs[1]
    if bias is None or weight is None or weight.shape is None:
        return False
    columns = weight.shape[0 if node.attributes.get_int("transB", 0) else 1]
    flat = per_column(bias, columns, 2)
    if flat is None or flat.shape == bias.shape:
        return False
    node.replace_input_with(2, edit.initializer(model, f"{node.name}_bias", flat))
    return True
