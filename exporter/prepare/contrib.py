"""Write what ONNX Runtime's optimizer has fused as ONNX's own operators again: these have integer kernels, and it fuses them anew.

1. FusedConv and FusedGemm            become   Conv (+ Z) and Gemm, and the activation behind.
2. FusedMatMul, TransposeMatMul       become   MatMul of transposed factors, times alpha.
3. BiasGelu, FastGelu, Gelu, QuickGelu   become   Add and Gelu; QuickGelu(x) is x · Sigmoid(alpha x).
4. SkipLayerNormalization             becomes  the sum of what it skips, and LayerNormalization.
5. Attention                          becomes  MatMul + bias, Split and MultiHeadAttention: its weights are a layer's again.
6. Operators of com.microsoft.nchwc   become   ONNX's: their tensors are NCHW again, their weights in ONNX's order. They run on
   one kind of CPU, and a bundle that holds one is refused.

What has no such equal (a past state, a mask of two ends) stays as it is, float. Source: onnxruntime/docs/ContribOperators.md, and
core/optimizer/nchwc_transformer.cc for the order of blocked weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedOpsetsPass

from exporter import graph
from exporter.batches import Array
from exporter.prepare import edit

MICROSOFT, NCHWC = "com.microsoft", "com.microsoft.nchwc"
EPSILON = 1e-12  # of SkipLayerNormalization, where it says none
CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
POOL = ("auto_pad", "ceil_mode", "count_include_pad", "dilations", "kernel_shape", "pads", "strides")


def rewrite(model: ir.Model) -> int:
    nodes = [node for each in model.graphs() for node in each if node.domain in (MICROSOFT, NCHWC)]
    matched = sum(_unfuse(model, node) for node in nodes)
    RemoveUnusedOpsetsPass()(model)
    return matched


class _Sketch:
    """The nodes that take the place of one, in order."""

    def __init__(self, model: ir.Model, old: ir.Node) -> None:
        self.old, self.nodes = old, list[ir.Node]()
        self._model, self._name = model, old.name or old.outputs[0].name or old.op_type

    def add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, object] | None = None,
        outputs: int = 1,
        domain: str = "",
    ) -> ir.Node:
        name = self._name if op_type in ("Conv", "Gemm", "MatMul") else f"{self._name}_{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, inputs, attributes, name=name, num_outputs=outputs, domain=domain)  # type: ignore[arg-type]
        for value in node.outputs:
            value.name = edit.free_name(self._model, f"{self._name}_{op_type}_{len(self.nodes)}_{value.index()}")
        self.nodes.append(node)
        return node

    def value(self, op_type: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        return self.add(op_type, inputs, attributes).outputs[0]

    def constant(self, array: Array | np.float32, name: str) -> ir.Value:
        return edit.initializer(self._model, f"{self._name}_{name}", np.asarray(array))

    def kept(self, names: Sequence[str]) -> dict[str, object]:
        return {name: self.old.attributes[name].value for name in names if name in self.old.attributes}

    def number(self, name: str, otherwise: float) -> float:
        return self.old.attributes.get_float(name, otherwise)

    def given(self, index: int) -> ir.Value | None:
        return self.old.inputs[index] if index < len(self.old.inputs) else None


def _unfuse(model: ir.Model, node: ir.Node) -> bool:
    write = (NCHWC_WRITERS if node.domain == NCHWC else WRITERS).get(node.op_type)
    sketch = _Sketch(model, node)
    made = write(sketch) if write is not None else None
    if made is None or node.graph is None:
        return False
    pairs = [(before, after) for before, after in zip(node.outputs, made, strict=False) if after is not None]
    old, new = [before for before, _ in pairs], [after for _, after in pairs]
    if any(value.uses() or value.is_graph_output() for value in node.outputs if value not in old):
        return False
    names = [value.name for value in old]
    for before, after in zip(old, new, strict=True):
        after.type, after.shape = before.type, before.shape
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], sketch.nodes, old, new)
    for after, name in zip(new, names, strict=True):
        after.name = name
    return True


def _activated(s: _Sketch, x: ir.Value, name: str, parameters: Sequence[float]) -> ir.Value | None:
    """activation(x); the parameters are in the order of the operator's schema."""
    numbers = [float(each) for each in parameters]
    if name in ("", "Relu", "Tanh", "Sigmoid"):
        return s.value(name, x) if name else x
    if name == "LeakyRelu":
        return s.value(name, x, alpha=numbers[0] if numbers else 0.01)
    if name == "HardSigmoid" and len(numbers) == 2:
        return s.value(name, x, alpha=numbers[0], beta=numbers[1])
    if name == "Clip" and len(numbers) == 2:
        low, high = (s.constant(np.float32(each), end) for each, end in zip(numbers, ("min", "max"), strict=True))
        return s.value(name, x, low, high)
    return None


def _activation_of(s: _Sketch, x: ir.Value) -> ir.Value | None:
    attributes = s.old.attributes
    return _activated(
        s, x, attributes.get_string("activation", "") or "", attributes.get_floats("activation_params", [])
    )


Made = Sequence[ir.Value | None] | None


def _conv(s: _Sketch) -> Made:
    y = s.add("Conv", [value for value in s.old.inputs[:3] if value is not None], s.kept(CONV)).outputs[0]
    z = s.given(3)
    return _one(_activation_of(s, y if z is None else s.value("Add", y, z)))


def _one(value: ir.Value | None) -> Made:
    return None if value is None else [value]


def _gemm(s: _Sketch) -> Made:
    y = s.add("Gemm", s.old.inputs, s.kept(("alpha", "beta", "transA", "transB"))).outputs[0]
    attributes = s.old.attributes
    given = [attributes[name].as_float() for name in ("activation_alpha", "activation_beta") if name in attributes]
    return _one(_activated(s, y, attributes.get_string("activation", "") or "", given))


def _matmul(s: _Sketch) -> Made:
    attributes = s.old.attributes
    if attributes.get_int("transBatchA", 0) or attributes.get_int("transBatchB", 0):
        return None
    factors: list[ir.Value] = []
    for factor, name in zip(s.old.inputs, ("transA", "transB"), strict=True):
        assert factor is not None
        if attributes.get_int(name, 0):
            if factor.shape is None:
                return None
            axes = list(range(len(factor.shape)))
            factor = s.value("Transpose", factor, perm=[*axes[:-2], *axes[-2:][::-1]]) if len(axes) > 1 else factor
        factors.append(factor)
    y = s.value("MatMul", *factors)
    alpha = s.number("alpha", 1.0)
    return [y if alpha == 1.0 else s.value("Mul", y, s.constant(np.float32(alpha), "alpha"))]


def _gelu(s: _Sketch) -> Made:
    x, bias = s.given(0), s.given(1)
    approximate = "tanh" if s.old.op_type == "FastGelu" else "none"
    return [s.value("Gelu", x if bias is None else s.value("Add", x, bias), approximate=approximate)]


def _quick_gelu(s: _Sketch) -> Made:
    x, alpha = s.given(0), s.constant(np.float32(s.number("alpha", 1.702)), "alpha")
    return [s.value("Mul", x, s.value("Sigmoid", s.value("Mul", x, alpha)))]


def _skip_layernorm(s: _Sketch) -> Made:
    x, skip, scale, shift, bias = (s.given(index) for index in range(5))
    total = s.value("Add", x, skip)
    total = total if bias is None else s.value("Add", total, bias)
    inputs = [total, scale] if shift is None else [total, scale, shift]
    normal = s.add("LayerNormalization", inputs, {"axis": -1, "epsilon": s.number("epsilon", EPSILON)})
    return [normal.outputs[0], None, None, total]


def _attention(s: _Sketch) -> Made:
    x, weight, bias, mask, past, added = (s.given(index) for index in range(6))
    attributes, array = s.old.attributes, graph.constant(weight)
    heads = attributes.get_int("num_heads", 0)
    ends = mask is not None and (mask.shape is None or len(mask.shape) not in (1, 2))
    if array is None or array.ndim != 2 or past is not None or len(s.old.inputs) > 6 or ends or not heads:
        return None
    if mask is not None and mask.shape is not None and len(mask.shape) == 1 and not _is_lengths(x, mask):
        return None
    sizes = list(attributes.get_ints("qkv_hidden_sizes", [array.shape[1] // 3] * 3))
    y = s.value("MatMul", x, weight)
    y = y if bias is None else s.value("Add", y, bias)
    parts = s.add("Split", [y, s.constant(np.array(sizes, np.int64), "sizes")], {"axis": 2}, outputs=3).outputs
    kept = s.kept(("num_heads", "scale", "mask_filter_value", "unidirectional"))
    inputs = [*parts, None, mask, added] if mask is not None or added is not None else [*parts]
    return [s.add("MultiHeadAttention", inputs, kept, domain=MICROSOFT).outputs[0]]


def _is_lengths(x: ir.Value | None, mask: ir.Value) -> bool:
    """Whether a mask of one axis has a number a sample: its length. With two it has ends, which are not read there."""
    samples, numbers = (
        value.shape[0] if value is not None and value.shape is not None else None for value in (x, mask)
    )
    return samples == numbers and (isinstance(samples, int) or (samples is not None and bool(samples.value)))


WRITERS: Mapping[str, Callable[[_Sketch], Made]] = {
    "FusedConv": _conv,
    "FusedGemm": _gemm,
    "FusedMatMul": _matmul,
    "TransposeMatMul": _matmul,
    "Gelu": _gelu,
    "BiasGelu": _gelu,
    "FastGelu": _gelu,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_layernorm,
    "Attention": _attention,
}


@cache
def block() -> int:
    """How many channels stand together in this CPU's blocked tensors: ReorderInput of two positions is asked."""
    x = ir.val("x", ir.DataType.FLOAT, [1, 64, 1, 2])
    node = ir.node("ReorderInput", [x], domain=NCHWC)
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    made = ir.Graph([x], [node.outputs[0]], nodes=[node], name="block", opset_imports={"": 20, NCHWC: 1})
    run = graph.runner(ir.Model(made, ir_version=8))
    laid = run({"x": np.arange(128, dtype=np.float32).reshape(1, 64, 1, 2)})["y"].reshape(-1)
    return int(np.flatnonzero(laid == 1.0)[0])


def _plain_weight(weight: Array, depthwise: bool) -> Array:
    """A blocked weight in ONNX's order, [O, I, ...].

    In memory it is [O/b, I/b, ..., b of I, b of O]; [O/b, I, ..., b of O] where it is depthwise or reads fewer than b channels.
    """
    out, into, *kernel = weight.shape
    b = block()
    if depthwise or into < b:
        laid = weight.reshape(out // b, into, *kernel, b)
        return np.ascontiguousarray(np.moveaxis(laid, -1, 1)).reshape(weight.shape)
    laid = weight.reshape(out // b, into // b, *kernel, b, b)  # [O/b, I/b, kernel, bi, bo]
    return np.ascontiguousarray(np.moveaxis(laid, (-1, -2), (1, 3))).reshape(weight.shape)


def _blocked_conv(s: _Sketch) -> Made:
    x, weight, bias, z = (s.given(index) for index in range(4))
    array = graph.constant(weight)
    if array is None:
        return None
    attributes = s.kept(CONV)
    depthwise = s.old.attributes.get_int("group", 1) > 1 and array.shape[1] == 1
    if depthwise:
        attributes["group"] = array.shape[0]
    plain = s.constant(_plain_weight(array, depthwise), "weight")
    y = s.add("Conv", [x, plain] if bias is None else [x, plain, bias], attributes).outputs[0]
    return _one(_activation_of(s, y if z is None else s.value("Add", y, z)))


def _into_blocks(s: _Sketch) -> Made:
    """Channels are filled with zeros to a multiple of the block."""
    x = s.given(0)
    if x is None or x.shape is None:
        return None
    last = s.old.attributes.get_int("channels_last", 0)
    rank = len(x.shape)
    channels = x.shape[-1 if last else 1]
    if not isinstance(channels, int):
        return None
    y = s.value("Transpose", x, perm=[0, rank - 1, *range(1, rank - 1)]) if last else x
    missing = -channels % block()
    if missing:
        pads = np.zeros(2 * rank, np.int64)
        pads[rank + 1] = missing
        y = s.value("Pad", y, s.constant(pads, "pads"))
    return [y if y is not x else s.value("Identity", x)]


def _out_of_blocks(s: _Sketch) -> Made:
    x = s.given(0)
    channels = s.old.attributes.get_int("channels", 0)
    if x is None or x.shape is None or not channels:
        return None
    rank = len(x.shape)
    ends = [
        s.constant(np.array([each], np.int64), name) for each, name in ((0, "start"), (channels, "end"), (1, "axis"))
    ]
    y = x if x.shape[1] == channels else s.value("Slice", x, *ends)
    if s.old.attributes.get_int("channels_last", 0):
        y = s.value("Transpose", y, perm=[0, *range(2, rank), 1])
    return [y if y is not x else s.value("Identity", x)]


def _blocked_pool(s: _Sketch) -> Made:
    return [s.add(s.old.op_type, s.old.inputs, s.kept(POOL)).outputs[0]]


def _blocked_upsample(s: _Sketch) -> Made:
    attributes = s.old.attributes
    scales = s.constant(np.array(attributes.get_ints("scales", []), np.float32), "scales")
    mode = attributes.get_string("mode", "nearest")
    how = attributes.get_string("coordinate_transformation_mode", "asymmetric")
    rounded = {"nearest_mode": "floor"} if mode == "nearest" else {}
    resize = {"mode": mode, "coordinate_transformation_mode": how, **rounded}
    return [s.add("Resize", [s.given(0), None, scales], resize).outputs[0]]


NCHWC_WRITERS: Mapping[str, Callable[[_Sketch], Made]] = {
    "Conv": _blocked_conv,
    "ReorderInput": _into_blocks,
    "ReorderOutput": _out_of_blocks,
    "MaxPool": _blocked_pool,
    "AveragePool": _blocked_pool,
    "GlobalMaxPool": _blocked_pool,
    "GlobalAveragePool": _blocked_pool,
    "Upsample": _blocked_upsample,
}
