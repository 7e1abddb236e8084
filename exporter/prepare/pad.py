"""Fold zero padding into the layer that reads it.

Pad(0) -> Conv   becomes   Conv(pads): the integer kernel pads with the zero point by itself, Pad has no integer kernel.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.rules import common as rules

from exporter.prepare.rules import apply


def rewrite(model: ir.Model) -> int:
    return apply(model, (rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule))
