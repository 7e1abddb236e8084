"""Bias correction: take the mean that weight rounding adds to a layer's output out of its bias.

A layer y = W x + b runs as ŷ = Ŵ x + b with Ŵ the rounded weight. Its mean error is known before anything runs:

    E[ŷ - y] = (Ŵ - W) E[x]        so        b' = b - (Ŵ - W) E[x]

per output channel; for Conv, E[x] is the mean of an input channel over batches and positions and Ŵ - W is summed over
the kernel (padding is left out of the mean). A MatMul takes it from the constant that is added to its output.

Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array
from exporter.correct import layers
from exporter.numerics.quantized import QuantizedTensor, decode
from exporter.place import Plan
from exporter.prepare import edit


def channels(model: ir.Model, plan: Plan) -> tuple[tuple[str, int], ...]:
    """(tensor, channel_axis) of the layer inputs whose channel means the correction needs."""
    return tuple(dict.fromkeys(_channels(node, x) for node, x, _ in layers.weighted(model, plan)))


def correct(
    model: ir.Model, plan: Plan, means: Mapping[tuple[str, int], Array], weights: Mapping[str, QuantizedTensor]
) -> ir.Model:
    """A clone of the model with corrected biases.

    Args:
        model: the prepared graph.
        plan: which nodes are int8.
        means: {(layer input, channel_axis): float64 [channels]}, E[x] over the calibration batches.
        weights: {weight initializer: its codes}, Ŵ (`quantize.weights`).
    """
    corrected = model.clone()
    for node, x, weight in list(layers.weighted(corrected, plan)):
        exact, rounded = graph.constant(weight), weights.get(weight.name or "")
        if exact is None or rounded is None:
            continue
        shift = _mean_error(node, decode(rounded).astype(np.float64) - exact, means[_channels(node, x)])
        bias = _bias(node)
        if node.op_type != "MatMul" and (len(node.inputs) < 3 or node.inputs[2] is None):
            _set_input(node, 2, edit.initializer(corrected, f"{node.name}_bias", -shift.astype(np.float32)))
        elif bias is not None:
            reader, index, value = bias
            better = (value - shift.reshape(-1)).astype(np.float32).reshape(value.shape)
            _set_input(reader, index, edit.initializer(corrected, f"{node.name}_bias", better))
    return corrected


def is_correctable(node: ir.Node) -> bool:
    """Whether the layer has a bias that can be corrected, or a place for one."""
    return (node.op_type != "MatMul" and (len(node.inputs) < 3 or node.inputs[2] is None)) or _bias(node) is not None


def _channels(node: ir.Node, x: ir.Value) -> tuple[str, int]:
    return x.name or "", 1 if node.op_type == "Conv" else -1


def _mean_error(node: ir.Node, error: Array, mean: Array) -> Array:
    """(Ŵ - W) E[x], float64 [output channels]."""
    if node.op_type == "Conv":
        groups = node.attributes.get_int("group", 1)
        taps = error.reshape(error.shape[0], error.shape[1], -1).sum(axis=2)
        per_output = np.repeat(mean.reshape(groups, -1), error.shape[0] // groups, axis=0)
        return np.asarray((taps * per_output).sum(axis=1))
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return np.asarray(error @ mean if transposed else mean @ error)


def _bias(node: ir.Node) -> tuple[ir.Node, int, Array] | None:
    """Where the layer's bias is read: (node, input index, value); for MatMul the one Add of a constant behind it."""
    if node.op_type != "MatMul":
        value = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        return (node, 2, value) if value is not None else None
    readers = list(node.outputs[0].uses())
    add = readers[0].node if len(readers) == 1 else None
    if add is None or add.op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    index = 1 - readers[0].idx
    value = graph.constant(add.inputs[index])
    weight = graph.constant(node.inputs[1])
    columns = weight.shape[-1] if weight is not None else 0
    fits = value is not None and value.ndim > 0 and value.size == value.shape[-1] == columns
    return (add, index, value) if fits and value is not None else None


def _set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
