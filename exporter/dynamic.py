"""Layers in dynamic int8: each input's own range gives its codes, and no calibration does. graph + layers + codes -> graph.

    y = x W + b    becomes    codes, s, z = DynamicQuantizeLinear(x)
                              y = Cast(MatMulInteger(codes, Ŵ, z)) · (s · w_scale) + b

x and y are real numbers. Layers that read one tensor share its codes. At load ONNX Runtime fuses all of it into one kernel,
DynamicQuantizeMatMul, or behind a shared DynamicQuantizeLinear into MatMulIntegerToFloat. It costs a pass over x that finds
its least and largest value, and gives each input a scale of its own: where a few inputs reach ten times as far as the others,
one scale for all leaves those few codes. The scale is of the whole tensor, so what a batch holds besides changes the codes.

ONNX Runtime's quantize_dynamic is not called, for it takes no codes of ours, and these were fitted: GPTQ, the scale search and the
pair rule hold for a dynamic layer as for a static one. Where codes are rounded to nearest it has the same bits.

Source: ONNX DynamicQuantizeLinear-11, MatMulInteger-10; ONNX Runtime's dynamic_quantize_matmul.cc.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporter import graph, recurrent
from exporter.batches import Array
from exporter.numerics.quantized import QuantizedTensor, nearest, per_channel
from exporter.place import LSTM
from exporter.prepare import edit

PRODUCT = "MatMulInteger"
# what stands behind the name of a weight to name its codes, [K, N]: as the weight lies, or from a Gemm with transB
AS_IT_IS, TURNED = "_dynamic", "_dynamic_turned"


def lay(changed: ir.Model, model: ir.Model, layers: Collection[str], weights: Mapping[str, QuantizedTensor]) -> None:
    """Let layers of a graph be dynamic; the graph is changed.

    Args:
        changed: the prepared graph, with or without Q/DQ around other nodes, in which these layers are float.
        model: the prepared graph: it names each layer's weight.
        layers: names of MatMul, Gemm and LSTM (`recurrent.lay`) nodes for which `place.not_dynamic` has no reason.
        weights: {weight of the prepared graph: its codes}; one that is not there is rounded to nearest.
    """
    if not layers:
        return
    recurrent.lay(changed, layers)
    products = [node for node in model.graph if node.name in layers and node.op_type != LSTM]
    if not products:
        return
    named = {node.name: node.inputs[1].name or "" for node in products if node.inputs[1]}
    inputs: dict[ir.Value, ir.Node] = {}
    stored: dict[str, tuple[ir.Value, ir.Value]] = {}
    for node in [node for node in changed.graph if node.name in named]:
        x, weight = node.inputs[0], graph.constant(node.inputs[1])
        assert x is not None
        assert weight is not None
        name, turned = named[node.name], is_turned(node)
        key = name + (TURNED if turned else AS_IT_IS)
        if key not in stored:
            rounded = weights.get(name) or nearest(weight, 0 if turned else 1)
            codes = np.ascontiguousarray(rounded.codes.T) if turned else rounded.codes
            value = edit.initializer(changed, key, codes)
            stored[key] = value, edit.initializer(changed, f"{value.name}_scale", np.asarray(rounded.scale, np.float32))
        if x not in inputs:
            inputs[x] = _codes_of(changed, x, node)
            changed.graph.insert_before(node, inputs[x])
        _replace(changed, node, inputs[x], *stored[key])
    RemoveUnusedNodesPass()(changed)


def weights(laid: ir.Model) -> dict[str, QuantizedTensor]:
    """{weight of the prepared graph: its codes and scales}, of a graph's dynamic layers."""
    found: dict[str, QuantizedTensor] = {}
    for name, codes, scale in _stored(laid):
        if name.endswith(TURNED):
            found[name.removesuffix(TURNED)] = per_channel(codes.T, scale, 0)
        elif name.endswith(AS_IT_IS):
            found[name.removesuffix(AS_IT_IS)] = per_channel(codes, scale, 1)
    return found


def is_turned(node: ir.Node) -> bool:
    """Whether a layer's weight is [N, K]: a Gemm's with transB."""
    return node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1


def _stored(laid: ir.Model) -> Iterator[tuple[str, Array, Array]]:
    """(name, codes, scales) of what each MatMulInteger multiplies by."""
    for node in laid.graph:
        weight = node.inputs[1] if node.op_type == PRODUCT else None
        if weight is None or weight.name is None:
            continue
        codes = graph.constant(weight)
        scale = graph.constant(laid.graph.initializers.get(f"{weight.name}_scale"))
        if codes is not None and scale is not None:
            yield weight.name, codes, scale


def _codes_of(model: ir.Model, x: ir.Value, reader: ir.Node) -> ir.Node:
    """The node that finds the range of x and rounds it. Its time is counted with the layer that reads it first."""
    node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name=f"{reader.name}_dynamic_codes")
    types = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
    for value, part, dtype in zip(node.outputs, ("codes", "scale", "zero_point"), types, strict=True):
        value.name, value.dtype = edit.free_name(model, f"{x.name}_dynamic_{part}"), dtype
        value.shape = x.shape if part == "codes" else ir.Shape([])
    return node


def _replace(model: ir.Model, node: ir.Node, codes: ir.Node, weight: ir.Value, scale: ir.Value) -> None:
    x_codes, x_scale, x_zero = codes.outputs
    before, name = node.outputs[0], node.name
    product = ir.node(PRODUCT, [x_codes, weight, x_zero], name=name)
    cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{name}_dynamic_cast")
    scales = ir.node("Mul", [x_scale, scale], name=f"{name}_dynamic_scale")
    real = ir.node("Mul", [cast.outputs[0], scales.outputs[0]], name=f"{name}_dynamic_real")
    new = [product, cast, scales, real]
    bias = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is not None:
        new.append(ir.node("Add", [real.outputs[0], node.inputs[2]], name=f"{name}_dynamic_bias"))
    for each, part in zip(new, ("sums", "cast", "scales", "real", "biased"), strict=False):
        value = each.outputs[0]
        value.name = edit.free_name(model, f"{before.name}_dynamic_{part}")
        value.shape = scale.shape if each is scales else before.shape
        value.dtype = ir.DataType.INT32 if each is product else ir.DataType.FLOAT
    edit.replace(model, [node], new, before, new[-1].outputs[0])
