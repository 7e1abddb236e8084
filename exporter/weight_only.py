"""Weights in int8 blocks along K, activations and products in float32 (W8A32). graph + layers -> graph.

    y = x W + b    becomes    y = x DequantizeLinear(Ŵ, scales, axis = K, block_size) + b

ONNX Runtime fuses the two into MatMulNBits, which reads a quarter of W's bytes; where it does not, the real weight is made in
every run. By default that kernel rounds x to int8 in blocks of its own as it runs; the session entry
session.qdq_matmulnbits_accuracy_level = 1 keeps float32. Drift is measured as the bundle runs, so it holds that too.

Source: ONNX DequantizeLinear-21; ONNX Runtime's DQMatMulToMatMulNBits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array
from exporter.numerics.formats import W8A32, PerBlock
from exporter.numerics.quantized import QuantizedTensor, encode
from exporter.prepare import edit
from exporter.target import Target

OPSET, IR_VERSION = 21, 10  # the first whose DequantizeLinear has blocks
CHANGED = "GroupNormalization"  # the operator that means something else from that opset on


def refusal(node: ir.Node, target: Target) -> str:
    """Why a layer's weight cannot be stored in blocks; empty where it can."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return "blocks of weights are for MatMul and Gemm only"
    weight = graph.constant(node.inputs[1])
    if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
        return "blocks are of a constant float32 matrix"
    if node.op_type == "Gemm" and not _is_plain(node):
        return "its alpha, beta or transA is not 1, 1, 0"
    rows, size = _by_input(node, weight).shape[0], _block().size
    if rows % size:
        return f"its {rows} inputs are no multiple of {size}"
    if node.graph is not None and any(each.op_type == CHANGED for each in node.graph):
        return f"{CHANGED} is another operator from opset {OPSET} on"
    return ""


def lay(changed: ir.Model, model: ir.Model, layers: Collection[str], weights: Mapping[str, QuantizedTensor]) -> None:
    """Let layers of a graph have such weights; the graph is changed.

    Args:
        changed: the prepared graph, with or without Q/DQ around other nodes, in which these layers are float.
        model: the prepared graph: it names each layer's weight.
        layers: names of nodes for which `refusal` has no reason.
        weights: {weight of the prepared graph: its codes}; those of this format are taken, others are rounded to nearest.
    """
    named = {node.name: node.inputs[1].name or "" for node in model.graph if node.name in layers and node.inputs[1]}
    if not named:
        return
    changed.opset_imports[""] = max(changed.opset_imports[""], OPSET)
    changed.ir_version = max(changed.ir_version, IR_VERSION)
    for node in [node for node in changed.graph if node.name in named]:
        weight = graph.constant(node.inputs[1])
        assert weight is not None
        known = weights.get(named[node.name])
        fits = known is not None and known.format == W8A32.weights
        _replace(changed, node, known if known is not None and fits else encode(_by_input(node, weight), W8A32.weights))


def _replace(model: ir.Model, node: ir.Node, weight: QuantizedTensor) -> None:
    name, block = node.name, _block()
    codes, scale = (
        edit.initializer(model, f"{name}_weight_{part}", array)
        for part, array in (("blocks", weight.codes), ("block_scales", weight.scale))
    )
    real = ir.node(
        "DequantizeLinear", [codes, scale], {"axis": block.axis, "block_size": block.size}, name=f"{name}_dynamic_real"
    )
    product = ir.node("MatMul", [node.inputs[0], real.outputs[0]], name=name)
    new = [real, product]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        new.append(ir.node("Add", [product.outputs[0], node.inputs[2]], name=f"{name}_dynamic_bias"))
    for each in new[:-1]:
        each.outputs[0].name = edit.free_name(model, f"{each.name}_output")
    before = node.outputs[0]
    edit.replace(model, [node], new, before, new[-1].outputs[0])


def _block() -> PerBlock:
    tile = W8A32.weights.tile
    assert isinstance(tile, PerBlock)
    return tile


def _is_plain(node: ir.Node) -> bool:
    factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    return factors == [1.0, 1.0] and not node.attributes.get_int("transA", 0)


def _by_input(node: ir.Node, weight: Array) -> Array:
    """The weight as [K, N]."""
    turned = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return np.ascontiguousarray(weight.T) if turned else weight
