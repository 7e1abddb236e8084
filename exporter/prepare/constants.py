"""Fold what does not depend on the inputs, so that a weight is an initializer where its node reads it.

1. Functions are inlined; Constant nodes become initializers.
2. A node whose inputs are all constant is computed now, unless its result is larger than every weight; one that makes a large
   tensor of a small one (ConstantOfShape, Expand, Tile) only where that has SMALL elements at most, for it would be in the file.
   Identity, Dropout and no-op Cast, Expand, Transpose go, and so do x + 0, x - 0, x · 1, x / 1 with constants of any shape: a step
   that changes nothing would round once more.
   An Identity over a shared initializer is the case that leaves Conv nodes float in ONNX Runtime's quantizer.
3. Adjacent Relu and Clip become one; Min and Max with constants become Clip.
4. What nothing reads is removed.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common as passes
from onnxscript.rewriter.rules import common as rules

from exporter import graph
from exporter.prepare.rules import apply

SMALL = 262_144  # elements that may be stored whatever the weights' size: 1 MB in float32

NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1}
SIMPLIFY = (
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.reshape_reshape_rule,
    rules.dropout_inference_rule,
    rules.dropout_zero_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.successive_clip_relu_rule,
    rules.successive_clip_rule,
    rules.successive_relu_clip_rule,
    rules.successive_relu_rule,
    rules.min_max_rule,
    rules.max_min_rule,
)


def rewrite(model: ir.Model) -> int:
    modified = [
        pass_(model).modified
        for pass_ in (
            passes.InlinePass(),
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        )
    ]
    # onnxscript's own limit is 8192 elements: a tied embedding, transposed, would not be the constant it is
    sizes = [value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None]
    limit = max([SMALL, *sizes])
    onnxscript.optimizer.fold_constants(
        model, onnx_shape_inference=True, input_size_limit=limit, output_size_limit=limit, should_fold=_may_fold
    )
    matched = apply(model, SIMPLIFY)
    modified += [
        pass_(model).modified
        for pass_ in (
            passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        )
    ]
    return matched + sum(modified) + sum(_drop_identity(model, node) for node in list(model.graph))


def _may_fold(node: ir.Node) -> bool | None:
    """Whether a node of constants is computed; None leaves it to onnxscript, which computes first and then looks at the size."""
    if graph.op(node) not in ("ConstantOfShape", "Expand", "Tile"):
        return None
    given = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    # of the shape that is asked for, or how often there is what is repeated
    elements = math.prod(max(1, int(size)) for size in given[-1].numpy().reshape(-1))
    if graph.op(node) == "ConstantOfShape":
        return elements <= SMALL
    if graph.op(node) == "Tile":
        elements *= given[0].size
    return None if elements <= max(SMALL, given[0].size) else False


def _passed(node: ir.Node) -> ir.Value | None:
    """What an Identity, or a step by a neutral constant that leaves the shape as it is, gives on unchanged."""
    if graph.op(node) == "Identity":
        return node.inputs[0]
    if (neutral := NEUTRAL.get(graph.op(node))) is None:
        return None
    sides = [*zip(node.inputs, reversed(node.inputs), strict=True)][: 2 if graph.op(node) in ("Add", "Mul") else 1]
    for x, other in sides:
        constant = graph.constant(other)
        if (
            x is None
            or x.shape is None
            or constant is None
            or constant.dtype != np.float32
            or graph.constant(x) is not None
        ):
            continue
        padded = (1,) * (len(x.shape) - constant.ndim) + constant.shape
        fits = constant.ndim <= len(x.shape) and all(a in (1, b) for a, b in zip(padded, x.shape, strict=True))
        if fits and constant.size and (constant == neutral).all():
            return x
    return None


def _drop_identity(model: ir.Model, node: ir.Node) -> bool:
    """Rule 2 for one Identity. One that joins two ends of the graph stays: each end has a name of its own."""
    x, y = _passed(node), node.outputs[0]
    is_output = y.is_graph_output()
    if x is None or (is_output and (x.is_graph_input() or x.is_graph_output() or x.is_initializer())):
        return False
    ir.convenience.replace_all_uses_with(y, x, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    if is_output:
        x.name, x.type, x.shape = y.name, y.type, y.shape
    return True
