"""Fold BatchNormalization and per-channel scale and shift into the layer before.

1. BatchNormalization ∘ Conv, ConvTranspose, Gemm   becomes   that layer with W' = W γ/√(σ²+ε), b' = (b - μ) γ/√(σ²+ε) + β.
2. Mul(c) ∘ Conv and Add(c) ∘ Conv with c a constant per output channel   become   Conv with W' = c W, b' = c b or b + c.
3. BatchNormalization that stands alone over [N, C, spatial...]   becomes   a depthwise 1x1 Conv: the same sum with an
   integer kernel, where BatchNormalization has none. One that reads a graph input stays: it would only round it once more.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.rules import common as rules

from exporter import graph
from exporter.batches import Array
from exporter.prepare import edit
from exporter.prepare.rules import apply

FUSE = (
    rules.fuse_batchnorm_into_conv_rule,
    rules.fuse_batchnorm_into_conv_transpose_rule,
    rules.fuse_batchnorm_into_gemm_rule,
)


def rewrite(model: ir.Model) -> int:
    matched = apply(model, FUSE)
    while any(_fold_affine(model, node) for node in list(model.graph) if graph.op(node) in ("Mul", "Add")):
        matched += 1
    return matched + sum(_to_depthwise(model, node) for node in list(model.graph))


def _fold_affine(model: ir.Model, node: ir.Node) -> bool:
    """Rule 2, for one Mul or Add."""
    pairs = ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0]))
    for value, other in pairs:
        conv = value.producer() if value is not None else None
        factor = graph.constant(other)
        if conv is None or value is None or graph.op(conv) != "Conv" or factor is None or factor.dtype != np.float32:
            continue
        weight = graph.constant(conv.inputs[1])
        bias = graph.constant(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else None
        has_bias = len(conv.inputs) > 2 and conv.inputs[2] is not None
        if weight is None or (has_bias and bias is None) or len(value.uses()) != 1 or value.is_graph_output():
            continue
        per_channel = _per_channel(factor, weight.shape[0], weight.ndim)
        if per_channel is None:
            continue
        if bias is None:
            bias = np.zeros(weight.shape[0], np.float32)
        if graph.op(node) == "Mul":
            weight = weight * per_channel.reshape(-1, *[1] * (weight.ndim - 1))
            bias = bias * per_channel
        else:
            bias = bias + per_channel
        base = conv.outputs[0].name
        inputs = [
            conv.inputs[0],
            edit.initializer(model, f"{base}_weight", weight),
            edit.initializer(model, f"{base}_bias", bias),
        ]
        folded = ir.Node("", "Conv", inputs, conv.attributes.values(), name=conv.name)
        edit.replace(model, [conv, node], [folded], node.outputs[0], folded.outputs[0])
        return True
    return False


def _per_channel(factor: Array, channels: int, rank: int) -> Array | None:
    """`factor` as [channels] if it broadcasts along axis 1 of a rank-`rank` tensor alone, else None."""
    if factor.size == 1 and factor.ndim <= rank:
        return np.full(channels, factor.reshape(()), np.float32)
    aligned = (1,) * (rank - factor.ndim) + factor.shape
    if len(aligned) == rank and aligned[1] == channels and factor.size == channels:
        return factor.reshape(channels)
    return None


def _to_depthwise(model: ir.Model, node: ir.Node) -> bool:
    """Rule 3, for one node."""
    if graph.op(node) != "BatchNormalization" or len([out for out in node.outputs if out.uses()]) > 1:
        return False
    x = node.inputs[0]
    scale, shift, mean, variance = (graph.constant(value) for value in node.inputs[1:5])
    if (
        x is None
        or x.producer() is None
        or x.shape is None
        or x.dtype != ir.DataType.FLOAT  # Conv has no kernel for double
        or len(x.shape) not in (3, 4, 5)
        or bool(node.attributes.get_int("training_mode", 0))
    ):
        return False
    if scale is None or shift is None or mean is None or variance is None:
        return False
    spatial = len(x.shape) - 2
    gain = scale / np.sqrt(variance + np.float32(node.attributes.get_float("epsilon", 1e-5)))
    base = node.outputs[0].name
    conv = ir.node(
        "Conv",
        [
            x,
            edit.initializer(model, f"{base}_weight", gain.reshape(-1, 1, *[1] * spatial).astype(np.float32)),
            edit.initializer(model, f"{base}_bias", (shift - mean * gain).astype(np.float32)),
        ],
        {"group": len(gain), "kernel_shape": [1] * spatial},
        name=node.name,
    )
    edit.replace(model, [node], [conv], node.outputs[0], conv.outputs[0])
    return True
