"""Give the graph's inputs and outputs the form that ONNX Runtime's quantizer can work with. Their names stay.

1. An output listed twice is listed once: outputs are told apart by their names.
2. A graph input that is an output too, and read by nodes, is read through an Identity: the quantizer would put its codes
   between the input and the output, which have one name.
3. Where an input or output x stands beside another called x_scale or the like, x is read or made through an Identity:
   x_scale is what the quantizer calls the scale of x.
4. An output that is an initializer is made by an Identity over it: nodes that read it may take its codes instead.
"""

from __future__ import annotations

import onnx_ir as ir

from exporter import graph
from exporter.prepare import edit


def rewrite(model: ir.Model) -> int:
    listed = list(model.graph.outputs)
    once = list(dict.fromkeys(listed))
    if len(once) < len(listed):
        model.graph.outputs[:] = once
    ends = dict.fromkeys([*model.graph.inputs, *once])
    claimed = {stem for value in ends for stem in edit.stems(value.name)}
    matched = len(listed) - len(once)
    for value in ends:
        if value.is_initializer() and not value.is_graph_input():
            _copy_out(model, value)
            matched += 1
        elif value.is_graph_input() and (value in once or value.name in claimed):
            matched += _read_through_identity(model, value)
        elif value.name in claimed:
            matched += _make_through_identity(model, value)
    return matched


def _read_through_identity(model: ir.Model, value: ir.Value) -> bool:
    """Rules 2 and 3, for one input."""
    uses = list(value.uses())
    if all(_is_identity(usage.node) for usage in uses):
        return False
    read = _identity(value, edit.free_name(model, f"{value.name}_read"))
    for usage in uses:
        usage.node.replace_input_with(usage.idx, read.outputs[0])
    model.graph.insert_before(model.graph[0], read)
    return True


def _make_through_identity(model: ir.Model, value: ir.Value) -> bool:
    """Rule 3, for one output."""
    maker, name = value.producer(), value.name
    if maker is None or name is None or _is_identity(maker):
        return False
    value.name = edit.free_name(model, f"{name}_made")
    copied = _identity(value, name)
    model.graph.outputs[model.graph.outputs.index(value)] = copied.outputs[0]
    model.graph.insert_after(maker, copied)
    return True


def _copy_out(model: ir.Model, value: ir.Value) -> None:
    """Rule 4."""
    name = value.name or ""
    value.name = edit.free_name(model, f"{name}_value")
    copied = _identity(value, name)
    model.graph.outputs[model.graph.outputs.index(value)] = copied.outputs[0]
    model.graph.append(copied)


def _identity(value: ir.Value, name: str) -> ir.Node:
    identity = ir.node("Identity", [value], name=name)
    made = identity.outputs[0]
    made.name, made.type, made.shape = name, value.type, value.shape
    return identity


def _is_identity(node: ir.Node) -> bool:
    return graph.op(node) == "Identity"
