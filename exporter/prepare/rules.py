"""Apply onnxscript's rewrite rules and say how many matched."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, RewriteRuleSet


def apply(model: ir.Model, rules: Sequence[RewriteRule], commute: bool = False) -> int:
    """Apply rules until none matches; with `commute`, also with the operands of Add and Mul swapped."""
    return int(RewriteRuleSet(rules, commute=commute).apply_to_model(model))
