"""Fold padding into what reads it.

1. Pad(0) -> Conv          becomes   Conv(pads): the integer kernel pads with the zero point by itself, Pad has no integer kernel.
2. Pad(0) -> AveragePool   becomes   AveragePool(pads, count_include_pad), where the pool had no pads or counted them.
3. Pad(lowest) -> MaxPool, and Pad(0) -> MaxPool of what is not negative,   becomes   MaxPool(pads).
4. Pad by nothing goes.

Each reader of a Pad takes it if it can; the Pad stays for the others. Pads of a pool are smaller than its kernel: ONNX Runtime
asks for that.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.rules import common as rules

from exporter import graph, ops
from exporter.batches import Array
from exporter.prepare.rules import apply

LOWEST = float(np.finfo(np.float32).min)


def rewrite(model: ir.Model) -> int:
    matched = apply(model, (rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule))
    return matched + sum(_fold(node) for node in list(model.graph) if graph.op(node) == "Pad")


def _fold(pad: ir.Node) -> int:
    pads, value = _pads(pad), _value(pad)
    x, y = pad.inputs[0], pad.outputs[0]
    if pads is None or value is None or x is None or y.is_graph_output():
        return 0
    matched = 0
    for usage in list(y.uses()):
        reader = usage.node
        if not pads.any():
            reader.replace_input_with(usage.idx, x)
            matched += 1
        elif usage.idx == 0 and reader.graph is pad.graph and _takes(reader, pads, value, x):
            _give(reader, pads)
            reader.replace_input_with(0, x)
            matched += 1
    if matched and not y.uses() and pad.graph is not None:
        pad.graph.remove(pad, safe=True)
    return matched


def _pads(pad: ir.Node) -> Array | None:
    """int64 [2, rank]: what is added before and behind each axis; None where it is not known, or cuts."""
    x, given = pad.inputs[0], graph.constant(pad.inputs[1]) if len(pad.inputs) > 1 else None
    if given is None or pad.attributes.get_string("mode", "constant") != "constant" or (given < 0).any():
        return None
    if len(pad.inputs) <= 3 or pad.inputs[3] is None:
        return np.asarray(given, np.int64).reshape(2, -1)
    axes = graph.constant(pad.inputs[3])
    if axes is None or x is None or x.shape is None:
        return None
    pads = np.zeros((2, len(x.shape)), np.int64)
    pads[:, [int(axis) % len(x.shape) for axis in axes]] = given.reshape(2, -1)
    return pads


def _value(pad: ir.Node) -> float | None:
    """What is filled in; None where it is computed."""
    if len(pad.inputs) <= 2 or pad.inputs[2] is None:
        return 0.0
    value = graph.constant(pad.inputs[2])
    return float(value.reshape(())) if value is not None and value.size == 1 else None


def _takes(reader: ir.Node, pads: Array, value: float, x: ir.Value) -> bool:
    """Whether pads of the reader's own mean the same."""
    op_type = graph.op(reader)
    if (
        pads.shape[1] < 3
        or pads[:, :2].any()
        or reader.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    ):
        return False
    if op_type == "Conv":
        return value == 0
    kernel = reader.attributes.get_ints("kernel_shape", [])
    if op_type not in ("AveragePool", "MaxPool") or reader.attributes.get_int("ceil_mode", 0) != 0:
        return False
    if (pads[:, 2:] + _own(reader, pads) >= np.asarray(kernel)).any():
        return False
    if op_type == "AveragePool":
        counted = reader.attributes.get_int("count_include_pad", 0) != 0
        return value == 0 and (counted or not _own(reader, pads).any())
    maker = x.producer()
    low = value <= LOWEST or (value == 0 and maker is not None and ops.of(graph.op(maker)).not_negative)
    return low and len([each for each in reader.outputs if each.name]) == 1


def _own(reader: ir.Node, pads: Array) -> Array:
    """int64 [2, spatial axes]: the pads that the reader has."""
    return np.asarray(reader.attributes.get_ints("pads", [0] * (2 * (pads.shape[1] - 2))), np.int64).reshape(2, -1)


def _give(reader: ir.Node, pads: Array) -> None:
    total = (_own(reader, pads) + pads[:, 2:]).reshape(-1)
    reader.attributes["pads"] = ir.AttrInt64s("pads", [int(each) for each in total])
    reader.attributes.pop("auto_pad", None)
    if graph.op(reader) == "AveragePool":
        reader.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 1)
