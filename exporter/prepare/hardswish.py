"""Fuse decomposed hard-sigmoid and hard-swish.

1. clip(x + 3, 0, 6) / 6       becomes   HardSigmoid(x, alpha=1/6, beta=½)
2. x · clip(x + 3, 0, 6) / 6   becomes   HardSwish(x)

Source: Howard et al. 2019, arXiv 1905.02244, section 5.2.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.rules import common as rules


def rewrite(model: ir.Model) -> int:
    return int(rules.fuse_hardswish_rules().apply_to_model(model))
