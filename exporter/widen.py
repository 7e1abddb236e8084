"""int8 graph whose every weight scale is one that biases can live with: dead channels, small activations, biases alone.

int32 biases have the scale of what they are added to, input_scale · weight_scale. Two small numbers have a product that float32
does not hold, and a weight next to nothing beside a bias that is something makes codes that int32 does not hold.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array
from exporter.errors import QuantizeError
from exporter.graph import DEQUANTIZE, QUANTIZE
from exporter.prepare import edit

INT32_LIMIT = 2**31 - 1
LEAST_SCALE = 2.0**-120  # of a bias: below 2^-126 float32 begins to lose numbers
BIAS_BITS = 22  # of the bias of a channel whose codes are all 0: it has its scale to itself


def biases(quantized: ir.Model, model: ir.Model) -> None:
    """Give the channels of Conv and Gemm a weight scale that their biases can live with; the graph is changed.

        bias_scale = input_scale · weight_scale >= LEAST_SCALE,        |bias| <= INT32_LIMIT · bias_scale

    Channels that training drove to 1e-30 and less have neither, nor have layers behind activations as small. Their codes become
    fewer, down to 0: what is lost is less than LEAST_SCALE a product, or than the last bit of the bias. A channel whose codes are
    all 0 is its bias, and has the scale that says it best. Where the layer's output is so small that the loss shows, it is refused.

    Raises:
        QuantizeError: names that layer.
    """
    real = {name: graph.constant(value) for name, value in model.graph.initializers.items()}
    sharing: dict[ir.Value, list[tuple[ir.Node, ir.Node, ir.Node]]] = {}
    for node in quantized.graph:
        if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2:
            weight, bias = (_constant_codes(value) for value in node.inputs[1:3])
            if weight is not None and bias is not None and weight.inputs[1] is not None:
                sharing.setdefault(weight.inputs[1], []).append((node, weight, bias))
    for value, readers in sharing.items():
        scale, weight = graph.constant(value), readers[0][1]
        codes = graph.constant(weight.inputs[0])
        if scale is None or codes is None or not scale.ndim:
            continue
        axis = weight.attributes.get_int("axis", 1)
        live = codes.any(axis=tuple(each for each in range(codes.ndim) if each != axis))
        before = scale.astype(np.float64)
        after = np.where(live, before, 0)
        biases = [(node, bias, real.get(edit.quantized_name(bias)), _input_scale(node)) for node, _, bias in readers]
        for _, _, exact, x_scale in biases:
            shift = np.zeros(len(scale)) if exact is None else np.abs(exact.reshape(-1).astype(np.float64))
            least = np.maximum(LEAST_SCALE, 1.0001 * shift / INT32_LIMIT) / x_scale
            own = np.where(shift > 0, shift / 2**BIAS_BITS / x_scale, before)
            after = np.maximum(after, np.where(live, least, np.maximum(own, least)))
        new = after.astype(np.float32)
        if (new == scale).all():
            continue
        for node, _, _, x_scale in biases:
            _require_bearable(node, (before < LEAST_SCALE / x_scale) & live, codes, axis)
        shape = [1] * codes.ndim
        shape[axis] = -1
        fewer = np.rint(codes * (before / np.maximum(new, before)).reshape(shape)).astype(np.int8)
        _set(weight.inputs[0], fewer)
        _set(value, new)
        for _, bias, exact, x_scale in biases:
            if exact is not None:
                bias_scale = (np.float32(x_scale) * new).astype(np.float32)
                _set(bias.inputs[1], bias_scale)
                whole = np.rint(exact.reshape(-1).astype(np.float64) / bias_scale)
                _set(bias.inputs[0], whole.astype(np.int32))


def _constant_codes(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of a constant that makes this value."""
    maker = value.producer() if value is not None else None
    of_codes = maker is not None and maker.op_type == DEQUANTIZE and graph.constant(maker.inputs[0]) is not None
    return maker if of_codes else None


def _scale_of(dequantize: ir.Node | None) -> float:
    scale = (
        graph.constant(dequantize.inputs[1])
        if dequantize is not None and dequantize.op_type in (QUANTIZE, DEQUANTIZE)
        else None
    )
    return float(scale.reshape(-1)[0]) if scale is not None else 0.0


def _input_scale(node: ir.Node) -> float:
    """The scale of what a layer reads, which the quantizer rounded."""
    return _scale_of(node.inputs[0].producer() if node.inputs[0] is not None else None) or 1.0


def _require_bearable(node: ir.Node, lost: Array, codes: Array, axis: int) -> None:
    """Refuse a layer of whose output half a code is less than what these channels lose: 127 · LEAST_SCALE · sqrt(K)."""
    readers = [usage.node for usage in node.outputs[0].uses() if usage.node.op_type == QUANTIZE]
    y_scale = _scale_of(readers[0]) if readers else 0.0
    columns = codes.size // max(1, codes.shape[axis])
    if lost.any() and 0 < y_scale < 2 * 127 * LEAST_SCALE * columns**0.5:
        raise QuantizeError(
            f"{node.op_type} {node.name}",
            found=f"products so small that float32 has no scale for them, an output scale of {y_scale:.3g}",
            expected="larger activations",
            node=node.name or "",
        )


def _set(value: ir.Value | None, array: Array) -> None:
    """Another array behind an initializer."""
    assert value is not None
    assert value.const_value is not None
    value.const_value = ir.tensor(array.reshape(tuple(value.const_value.shape.numpy())), name=value.name)
