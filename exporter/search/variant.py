"""The int8 graph of another plan, from one that exists: its scales and its codes, and no run of the quantizer.

A search asks for dozens of plans; ONNX Runtime's quantizer takes seconds for each. What it decides by numbers (scales, zero
points, codes) does not depend on which other nodes are int8, so it is read from one int8 graph and laid around the nodes of
another plan. The plan that is chosen goes through the quantizer: these graphs only measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporter.graph import DEQUANTIZE, QUANTIZE
from exporter.place import FLOAT_OUTPUT, SHAPE_READERS, Plan
from exporter.prepare import edit


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The QuantizeLinear and DequantizeLinear of a tensor: what they read beside it. codes: of a constant, else None."""

    scale: ir.TensorProtocol
    zero_point: ir.TensorProtocol | None
    codes: ir.TensorProtocol | None
    axis: int | None


def pairs(quantized: ir.Model) -> dict[str, Pair]:
    """{tensor of the prepared graph: its pair} of an int8 graph from `quantize.to_int8`."""
    found: dict[str, Pair] = {}
    for node in quantized.graph:
        if node.op_type != DEQUANTIZE:
            continue
        source, scale, *zero = node.inputs
        if source is None or scale is None or scale.const_value is None:
            continue
        maker = source.producer()
        if source.const_value is not None:
            name = edit.quantized_name(node)
        elif maker is not None and maker.op_type == QUANTIZE and maker.inputs[0] is not None:
            real, rounded = maker.inputs[0], node.outputs[0]
            name = (rounded if rounded.is_graph_output() else real).name or ""
        else:
            continue
        found[name] = Pair(
            scale=scale.const_value,
            zero_point=zero[0].const_value if zero and zero[0] is not None else None,
            codes=source.const_value,
            axis=node.attributes.get_int("axis") if "axis" in node.attributes else None,
        )
    return found


def of(model: ir.Model, plan: Plan, known: Mapping[str, Pair]) -> ir.Model:
    """The prepared graph with Q/DQ where the plan has them.

    Args:
        model: the prepared graph, which is not changed.
        plan: int8 only where the plan behind `known` is.
        known: `pairs` of that plan's int8 graph.
    """
    clone = model.clone()
    int8: set[str | None] = {*plan.int8}
    nodes = list(clone.graph)
    folded = {node for node in nodes if node.name in int8 and _folds(node, int8)}
    values = [value for node in nodes for value in node.outputs]
    values += [*clone.graph.inputs, *clone.graph.initializers.values()]
    for value in dict.fromkeys(values):
        pair = known.get(value.name or "")
        if pair is not None:
            _lay(clone, value, pair, int8, folded)
    return clone


def _folds(node: ir.Node, int8: set[str | None]) -> bool:
    """Whether a Relu or Clip is the saturation of the QuantizeLinear behind it: what it reads is not rounded by itself."""
    maker = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    return node.op_type in ("Relu", "Clip") and maker is not None and maker.name in int8


def _lay(model: ir.Model, value: ir.Value, pair: Pair, int8: set[str | None], folded: set[ir.Node]) -> None:
    uses = [usage for usage in value.uses() if usage.node not in folded]
    if not uses and not value.is_graph_output():
        return
    maker = value.producer()
    makes_codes = maker is not None and maker.name in int8 and maker.op_type not in FLOAT_OUTPUT
    ours = [u for u in uses if u.node.name in int8]
    theirs = [u for u in uses if u.node.name not in int8 and u.node.op_type not in SHAPE_READERS] if makes_codes else []
    output = makes_codes and value.is_graph_output()
    if not ours and not theirs and not output:
        return
    axis = {} if pair.axis is None else {"axis": pair.axis}
    scale, zero = _constant(model, f"{value.name}_scale", pair.scale), None
    if pair.zero_point is not None:
        zero = _constant(model, f"{value.name}_zero_point", pair.zero_point)
    if pair.codes is not None:
        codes = _constant(model, f"{value.name}_codes", pair.codes)
        made = [ir.node(DEQUANTIZE, [codes, scale, zero][: 3 if zero is not None else 2], axis)]
        model.graph.insert_before(next(iter(model.graph)), made)
    else:
        quantize = ir.node(QUANTIZE, [value, scale, zero], axis)
        made = [quantize, ir.node(DEQUANTIZE, [quantize.outputs[0], scale, zero], axis)]
        if maker is None:
            model.graph.insert_before(next(iter(model.graph)), made)
        else:
            model.graph.insert_after(maker, made)
    rounded = made[-1].outputs[0]
    rounded.name = f"{value.name}_rounded"
    rounded.type, rounded.shape = value.type, value.shape
    for usage in (*ours, *theirs):
        usage.node.replace_input_with(usage.idx, rounded)
    if output:
        name = value.name
        model.graph.outputs[model.graph.outputs.index(value)] = rounded
        value.name, rounded.name = f"{name}_real", name


def _constant(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.val(name, tensor.dtype, list(tensor.shape.numpy()), const_value=tensor)
    model.graph.register_initializer(value)
    return value
