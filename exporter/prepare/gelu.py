"""Fuse a decomposed GELU into one node (ONNX Gelu-20), in the orders of factors that exporters write.

1. x · ½ · (1 + erf(x / √2)), with x/√2 or x·(1/√2)                 becomes   Gelu(x)
2. x · ½ · (1 + tanh(√(2/π) · (x + 0.044715 x³)))                   becomes   Gelu(x, approximate="tanh")

Source: Hendrycks and Gimpel 2016, arXiv 1606.08415.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule

from exporter.prepare.rules import apply

Gate = Callable[[Any, Any], Any]


def _erf_of_quotient(op: Any, x: Any) -> Any:
    return op.Erf(op.Div(x, math.sqrt(2)))


def _erf_of_product(op: Any, x: Any) -> Any:
    return op.Erf(op.Mul(x, math.sqrt(0.5)))


def _tanh_of_power(op: Any, x: Any) -> Any:
    return op.Tanh(op.Mul(op.Add(x, op.Mul(op.Pow(x, 3.0), 0.044715)), math.sqrt(2 / math.pi)))


def _tanh_of_products(op: Any, x: Any) -> Any:
    cube = op.Mul(op.Mul(x, x), x)
    return op.Tanh(op.Mul(op.Add(x, op.Mul(cube, 0.044715)), math.sqrt(2 / math.pi)))


def _half_first(op: Any, x: Any, gate: Any) -> Any:
    return op.Mul(op.Mul(x, 0.5), gate)


def _half_inside(op: Any, x: Any, gate: Any) -> Any:
    return op.Mul(x, op.Mul(gate, 0.5))


def _half_last(op: Any, x: Any, gate: Any) -> Any:
    return op.Mul(op.Mul(x, gate), 0.5)


def _rule(gate: Gate, product: Callable[[Any, Any, Any], Any], approximate: str) -> RewriteRule:
    def pattern(op: Any, x: Any) -> Any:
        return product(op, x, op.Add(gate(op, x), 1.0))

    def gelu(op: Any, x: ir.Value) -> Any:
        return op.Gelu(x, approximate=approximate)

    return RewriteRule(pattern, gelu, name=f"Gelu{gate.__name__}{product.__name__}")


RULES = tuple(
    _rule(gate, product, approximate)
    for gate, approximate in (
        (_erf_of_quotient, "none"),
        (_erf_of_product, "none"),
        (_tanh_of_power, "tanh"),
        (_tanh_of_products, "tanh"),
    )
    for product in (_half_first, _half_inside, _half_last)
)


def rewrite(model: ir.Model) -> int:
    return apply(model, RULES, commute=True)
