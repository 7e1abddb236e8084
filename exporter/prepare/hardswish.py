"""Fuse decomposed hard-sigmoid and hard-swish.

1. clip(x + 3, 0, 6) / 6       becomes   HardSigmoid(x, alpha=1/6, beta=½)
2. x · clip(x + 3, 0, 6) / 6   becomes   HardSwish(x)

Both for float32 alone: HardSigmoid has no kernel for double.

Source: Howard et al. 2019, arXiv 1905.02244, section 5.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.rules.common import _fuse_hardswish

from exporter import graph
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
    return apply(model, RULES, commute=True)
