"""Make the graph's outputs tensors of their own, as ONNX Runtime's quantizer wants them.

1. An output listed twice is listed once: outputs are told apart by their names.
2. A graph input that is an output too, and read by nodes, is read through an Identity: the quantizer would put its codes
   between the input and the output, which have one name. Input and output keep that name.
"""

from __future__ import annotations

import onnx_ir as ir

from exporter.prepare import edit


def rewrite(model: ir.Model) -> int:
    listed = list(model.graph.outputs)
    once = list(dict.fromkeys(listed))
    if len(once) < len(listed):
        model.graph.outputs[:] = once
    return len(listed) - len(once) + sum(_read_through_identity(model, value) for value in once)


def _read_through_identity(model: ir.Model, value: ir.Value) -> bool:
    """Rule 2, for one output."""
    uses = list(value.uses())
    if not value.is_graph_input() or value.is_initializer() or not uses:
        return False
    if all(usage.node.op_type == "Identity" and not usage.node.domain for usage in uses):
        return False
    name = edit.free_name(model, f"{value.name}_read")
    identity = ir.node("Identity", [value], name=name)
    read = identity.outputs[0]
    read.name, read.type, read.shape = name, value.type, value.shape
    for usage in uses:
        usage.node.replace_input_with(usage.idx, read)
    model.graph.insert_before(model.graph[0], identity)
    return True
