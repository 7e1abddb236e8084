"""Fuse a decomposed layer normalization into one node.

1. (x - mean(x)) / √(mean((x - mean(x))²) + ε) · γ   over the last axis becomes   LayerNormalization(x, γ).
2. LayerNormalization(x, γ) + β, β constant          becomes   LayerNormalization(x, γ, β). A residual is no β.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import RewriteRule
from onnxscript.rewriter.rules.fusion import _layer_norm

from exporter import graph
from exporter.prepare import edit
from exporter.prepare.rules import apply


def _shifted(op: Any, x: Any, scale: Any, bias: Any) -> Any:
    return op.Add(op.LayerNormalization(x, scale, _outputs=["normalized"]), bias)


def _with_bias(op: Any, x: ir.Value, scale: ir.Value, bias: ir.Value, normalized: ir.Value) -> Any:
    node = normalized.producer()
    assert node is not None
    return op.LayerNormalization(x, scale, bias, **node.attributes)


def _is_bias(context: Any, scale: ir.Value, bias: ir.Value, **_: Any) -> bool:
    gain, shift = graph.constant(scale), graph.constant(bias)
    return gain is not None and shift is not None and gain.shape == shift.shape


RULES = (_layer_norm.layer_normalization_rules[0], RewriteRule(_shifted, _with_bias, _is_bias, name="LayerNormBias"))


def rewrite(model: ir.Model) -> int:
    for node in model.graph:
        if graph.op(node) == "ReduceMean":
            _spell_as_the_pattern_does(model, node)
    return apply(model, RULES, commute=True)


def _spell_as_the_pattern_does(model: ir.Model, mean: ir.Node) -> None:
    """onnxscript's pattern wants keepdims in writing, and the last axis as -1."""
    if "keepdims" not in mean.attributes:
        mean.attributes.add(ir.AttrInt64("keepdims", 1))
    x, axes = mean.inputs[0], graph.constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if x is not None and x.shape is not None and axes is not None and axes.tolist() == [len(x.shape) - 1]:
        mean.replace_input_with(1, edit.initializer(model, f"{mean.outputs[0].name}_axes", np.array([-1])))
