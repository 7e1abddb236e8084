"""Give every tensor a type and, where it can be known, a shape: a tensor without a type is one ORT's quantizer skips.

1. Stale shapes of inner tensors are dropped first: a rewrite may have changed what they described.
2. ONNX's shape inference fills them in, values of shape computations included.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes


def rewrite(model: ir.Model) -> int:
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    return int(passes.ShapeInferencePass(check_type=True, strict_mode=False, data_prop=True)(model).modified)
