"""Give every node a name of its own, and take out what must not travel in a file.

1. Doc strings and metadata (stack traces, source paths, module scopes of the tracer) are removed.
2. A node without a name, or with a name already taken, is called after its first output.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes


def rewrite(model: ir.Model) -> int:
    modified = passes.ClearMetadataAndDocStringPass()(model).modified
    modified |= passes.NameFixPass()(model).modified
    model.producer_name, model.producer_version = "packlight", ""
    taken: set[str] = set()
    for node in model.graph:
        if not node.name or node.name in taken:
            base = node.outputs[0].name or node.op_type
            node.name = next(
                name for name in (base, *(f"{base}_{i}" for i in range(len(taken) + 1))) if name not in taken
            )
            modified = True
        taken.add(node.name)
    return int(modified)
