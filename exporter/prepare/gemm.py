"""Fuse a matrix product and its bias.

1. MatMul(x, W) + b with x of rank 2 and b constant, a number per column   becomes   Gemm(x, W, b): the bias is added in
   int32 inside the integer kernel. A residual added to a product is no bias: as one, it would keep the layer float.
2. alpha and beta of Gemm go into its constant weight and bias, a bias that is computed becomes an Add behind it, and A that is
   read transposed a Transpose before it: the integer kernel takes none of these.
3. A bias of Gemm that is [1, N], or one number for all columns, becomes [N]: ONNX Runtime's quantizer takes no other.
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
    matched = apply(model, RULES, commute=True)
    for rule in (_plainer, _flatten):
        matched += sum(map(partial(rule, model), list(model.graph)))
    return matched


def per_column(bias: Array, columns: int | ir.SymbolicDim, rank: int) -> Array | None:
    """What a constant adds to each column of a tensor of that rank, [columns]; None where it adds otherwise, or makes axes."""
    if not isinstance(columns, int) or bias.ndim > rank or bias.size not in (1, columns):
        return None
    if bias.size != math.prod(bias.shape[-1:]):  # it varies along another axis
        return None
    return np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), columns))


def _plainer(model: ir.Model, node: ir.Node) -> bool:
    """Rule 2."""
    if node.op_type != "Gemm" or node.domain:
        return False
    x, weight = node.inputs[0], graph.constant(node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    shift = graph.constant(bias)
    alpha, beta = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    turned, computed = node.attributes.get_int("transA", 0) == 1, bias is not None and shift is None
    if weight is None or x is None or weight.dtype != np.float32 or not (alpha != 1 or beta != 1 or turned or computed):
        return False
    new, y, inputs = [], node.outputs[0], [x, node.inputs[1]]
    if turned:
        new.append(ir.node("Transpose", [x], {"perm": [1, 0]}, name=f"{node.name}_turned"))
        inputs[0] = new[0].outputs[0]
    if alpha != 1:
        inputs[1] = edit.initializer(model, f"{node.name}_weight", weight * np.float32(alpha))
    if shift is not None:
        inputs.append(bias if beta == 1 else edit.initializer(model, f"{node.name}_bias", shift * np.float32(beta)))
    attributes = {"transB": node.attributes.get_int("transB", 0)}
    new.append(ir.node("Gemm", inputs, attributes, name=f"{node.name}_plain"))
    if computed:
        if beta != 1:
            factor = edit.initializer(model, f"{node.name}_beta", np.array(beta, np.float32))
            new.append(ir.node("Mul", [bias, factor], name=f"{node.name}_scaled"))
            bias = new[-1].outputs[0]
        layer = next(each for each in new if each.op_type == "Gemm")
        new.append(ir.node("Add", [layer.outputs[0], bias], name=f"{node.name}_biased"))
    for each in new[:-1]:
        each.outputs[0].name, each.outputs[0].type = edit.free_name(model, each.name or ""), y.type
    edit.replace(model, [node], new, y, new[-1].outputs[0])
    return True


def _flatten(model: ir.Model, node: ir.Node) -> bool:
    """Rule 3."""
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
