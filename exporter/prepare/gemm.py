"""Fuse a matrix product and its bias.

MatMul(x, W) + b with x of rank 2   becomes   Gemm(x, W, b): the bias is added in int32 inside the integer kernel.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.rules import common as rules

from exporter.prepare.rules import apply


def rewrite(model: ir.Model) -> int:
    return apply(model, (rules.matmul_add_to_gemm_rule, rules.transpose_b_matmul_add_to_gemm_rule))
