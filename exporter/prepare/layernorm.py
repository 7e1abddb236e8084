"""Fuse a decomposed layer normalization into one node.

1. (x - mean(x)) / √(mean((x - mean(x))²) + ε) · γ   over the last axis becomes   LayerNormalization(x, γ).
2. LayerNormalization(x, γ) + β   becomes   LayerNormalization(x, γ, β).
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.rules.fusion import _layer_norm

from exporter.prepare.rules import apply


def rewrite(model: ir.Model) -> int:
    return apply(model, _layer_norm.layer_normalization_rules)
