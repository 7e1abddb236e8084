"""One int8 layer as ONNX, and the codes it must give by integer arithmetic: what any CPU's kernel is held against.

    acc = Σ (x - x_zero) · w  in int64
    y = clip(rint(float32(acc) · float32(x_scale · w_scale / y_scale)) + y_zero)

and the codes of a kernel that adds products in pairs in int16 (vpmaddubsw), over the positions k of K:

    acc = Σ clip(x[2k] · w[2k] + x[2k+1] · w[2k+1], -2¹⁵, 2¹⁵ - 1) - x_zero · Σ w

K runs over (kernel position, channel of the group) for Conv, and along the rows of B for MatMul and Gemm.

Source: ONNX QLinearConv-10; ONNX Runtime's MlasRequantizeOutput, which rounds float32(acc) · scale once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from runtime.session import NO_ENTRIES
from tests import devices

Array = np.ndarray[Any, Any]
X_SCALE = np.float32(0.02)
OPSET = 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """model: ONNX with input x and output y. x: codes. weight: as the model has it. y: by exact integers; paired: in int16."""

    model: bytes
    x: Array
    weight: Array
    y: Array
    paired: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """The sums of a layer, output channels last, int64: exact, and with pairs of products in int16."""

    exact: Array
    paired: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How a Conv moves: each number holds for every spatial axis."""

    groups: int = 1
    stride: int = 1
    dilation: int = 1
    pad: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """How codes stand for reals. per_channel: a scale for each output channel of the weight, whose zero point is 0."""

    x_zero: int = 128
    per_channel: bool = True


def conv(x: Array, weight: Array, window: Window, codes: Codes) -> Layer:
    """QDQ Conv, which ONNX Runtime makes QLinearConv. x [N, C, ...], weight [M, C/groups, ...]."""
    axes = weight.ndim - 2
    node = helper.make_node(
        "Conv",
        ["x_real", "w_real"],
        ["y_real"],
        group=window.groups,
        strides=[window.stride] * axes,
        dilations=[window.dilation] * axes,
        pads=[window.pad] * 2 * axes,
    )
    rows = np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    pieces = zip(_patches(x, weight, window, codes.x_zero), np.split(rows, window.groups), strict=True)
    parts = [_sums(patches, part.T, codes) for patches, part in pieces]
    exact, paired = (np.concatenate([getattr(part, name) for part in parts], -1) for name in ("exact", "paired"))
    return _codes_out(node, x, weight, Sums(exact=exact, paired=paired), codes, weight_axis=0, channels_last=False)


def gemm(x: Array, weight: Array, codes: Codes, *, trans_b: bool) -> Layer:
    """QDQ Gemm, which ONNX Runtime makes QGemm. x [M, K], weight [K, N]; the file has it as [N, K] with trans_b."""
    node = helper.make_node("Gemm", ["x_real", "w_real"], ["y_real"], transB=int(trans_b))
    stored = np.ascontiguousarray(weight.T) if trans_b else weight
    return _codes_out(node, x, stored, _sums(x, weight, codes), codes, weight_axis=0 if trans_b else 1)


def matmul(x: Array, weight: Array, codes: Codes) -> Layer:
    """QDQ MatMul, which ONNX Runtime makes QLinearMatMul. x [..., M, K], weight [K, N]."""
    node = helper.make_node("MatMul", ["x_real", "w_real"], ["y_real"])
    return _codes_out(node, x, weight, _sums(x, weight, codes), codes, weight_axis=1)


def matmul_to_float(x: Array, weight: Array, codes: Codes) -> Layer:
    """MatMul of two DequantizeLinear, which ONNX Runtime makes MatMulIntegerToFloat. x [..., M, K], weight [K, N]."""
    node = helper.make_node("MatMul", ["x_real", "w_real"], ["y"])
    scale = _weight_scale(weight.shape[1] if codes.per_channel else None)
    sums = _sums(x, weight, codes)
    y, paired = (each.astype(np.float32) * (X_SCALE * scale) for each in (sums.exact, sums.paired))
    nodes, constants = _dequantized(x, weight, scale, codes, weight_axis=1)
    return Layer(model=_model([*nodes, node], constants, x, y), x=x, weight=weight, y=y, paired=paired)


def matmul_integer(x: Array, weight: Array, codes: Codes) -> Layer:
    """MatMulInteger: int32 sums and nothing behind them. x [..., M, K], weight [K, N]."""
    node = helper.make_node("MatMulInteger", ["x", "w", "x_zero"], ["y"])
    constants = {"w": weight, "x_zero": np.array(codes.x_zero, x.dtype)}
    sums = _sums(x, weight, codes)
    y, paired = sums.exact.astype(np.int32), sums.paired.astype(np.int32)
    return Layer(model=_model([node], constants, x, y), x=x, weight=weight, y=y, paired=paired)


def between_floats(layer: Layer) -> Layer:
    """The same layer of codes with QuantizeLinear before it and DequantizeLinear behind it, as it is inside a model."""
    model = onnx.load_from_string(layer.model)
    graph = model.graph
    constant = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    for node in graph.node:
        node.input[:] = ["x_code" if name == "x" else name for name in node.input]
        node.output[:] = ["y_code" if name == "y" else name for name in node.output]
    graph.node.insert(0, helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_code"]))
    graph.node.append(helper.make_node("DequantizeLinear", ["y_code", "y_scale", "y_zero"], ["y"]))
    for end in (graph.input[0], graph.output[0]):
        end.type.tensor_type.elem_type = onnx.TensorProto.FLOAT

    def real(code: Array, name: str) -> Array:
        zero = constant[f"{name}_zero"].astype(np.float32)
        return np.asarray((code.astype(np.float32) - zero) * constant[f"{name}_scale"])

    y, paired = real(layer.y, "y"), real(layer.paired, "y")
    model_bytes = bytes(model.SerializeToString())
    return Layer(model=model_bytes, x=real(layer.x, "x"), weight=layer.weight, y=y, paired=paired)


def outputs(
    device: str, layers: Mapping[str, Layer], folder: Path, entries: Mapping[str, str] = NO_ENTRIES
) -> dict[str, Array]:
    """y of each layer on the device, all in one run of the guest, in sessions with these entries."""
    given, found = folder / f"{device}-given.npz", folder / f"{device}-found.npz"
    models = {f"model {name}": np.frombuffer(layer.model, np.uint8) for name, layer in layers.items()}
    np.savez(given, **models, **{f"x {name}": layer.x for name, layer in layers.items()})
    devices.run(device, RUN, str(given), str(found), json.dumps(dict(entries)))
    with np.load(found) as arrays:
        return {name: arrays[name] for name in layers}


RUN = """
import json, sys
import numpy as np
from runtime.session import open_session
given, found = np.load(sys.argv[1]), {}
for key in given.files:
    kind, _, name = key.partition(" ")
    if kind == "model":
        session = open_session(given[key].tobytes(), threads=1, entries=json.loads(sys.argv[3]))
        found[name] = session.run(None, {"x": given["x " + name]})[0]
np.savez(sys.argv[2], **found)
"""


def _sums(x: Array, weight: Array, codes: Codes) -> Sums:
    """x [..., K], weight [K, N] -> [..., N]."""
    wide, columns = x.astype(np.int64), weight.astype(np.int64)
    zero = codes.x_zero * columns.sum(axis=0)
    products = wide[..., None] * columns
    products = np.pad(products, [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2), (0, 0)])
    pairs = np.clip(products[..., 0::2, :] + products[..., 1::2, :], -(2**15), 2**15 - 1)
    return Sums(exact=wide @ columns - zero, paired=pairs.sum(axis=-2) - zero)


def _patches(x: Array, weight: Array, window: Window, x_zero: int) -> Array:
    """What a Conv multiplies by its kernel at each place: [N, C, ...] -> [groups, N, ..., K], as many axes as there are."""
    axes = tuple(range(2, weight.ndim))
    padded = np.pad(x, [(0, 0), (0, 0), *[(window.pad, window.pad)] * len(axes)], constant_values=x_zero)
    spans = [(size - 1) * window.dilation + 1 for size in weight.shape[2:]]
    views = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=axes)
    strides, dilations = ([slice(None, None, step)] * len(axes) for step in (window.stride, window.dilation))
    views = views[(slice(None), slice(None), *strides, *dilations)]
    batch, _, *places = views.shape[: 2 + len(axes)]
    views = views.reshape(batch, window.groups, weight.shape[1], *places, -1)
    views = np.moveaxis(np.moveaxis(views, 1, 0), 2, -1)  # [groups, N, ..., kernel position, channel]
    return views.reshape(window.groups, batch, *places, -1)


def _codes_out(
    node: onnx.NodeProto,
    x: Array,
    weight: Array,
    sums: Sums,
    codes: Codes,
    *,
    weight_axis: int,
    channels_last: bool = True,
) -> Layer:
    """The layer between DequantizeLinear and QuantizeLinear; y_scale spreads the exact sums over all codes."""
    scale = _weight_scale(weight.shape[weight_axis] if codes.per_channel else None)
    y_scale = np.float32(max(np.abs(sums.exact * scale).max(), 1) * X_SCALE / 127)
    limits, y_zero = np.iinfo(x.dtype), 128 if x.dtype == np.uint8 else 0

    def coded(acc: Array) -> Array:
        y = np.rint(acc.astype(np.float32) * (X_SCALE * scale / y_scale)) + np.float32(y_zero)
        y = np.clip(y, limits.min, limits.max).astype(x.dtype)
        return y if channels_last else np.ascontiguousarray(np.moveaxis(y, -1, 1))

    y, paired = coded(sums.exact), coded(sums.paired)
    nodes, constants = _dequantized(x, weight, scale, codes, weight_axis)
    constants |= {"y_scale": y_scale, "y_zero": np.array(y_zero, x.dtype)}
    nodes += [node, helper.make_node("QuantizeLinear", ["y_real", "y_scale", "y_zero"], ["y"])]
    return Layer(model=_model(nodes, constants, x, y), x=x, weight=weight, y=y, paired=paired)


def _weight_scale(channels: int | None) -> Array:
    """Scales that differ from channel to channel, float32 [channels] or []."""
    if channels is None:
        return np.array(0.003, np.float32)
    return np.geomspace(0.002, 0.004, channels, dtype=np.float32)


def _dequantized(
    x: Array, weight: Array, scale: Array, codes: Codes, weight_axis: int
) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    """x_real and w_real from codes: nodes and constants."""
    constants = {
        "x_scale": np.asarray(X_SCALE),
        "x_zero": np.array(codes.x_zero, x.dtype),
        "w": weight,
        "w_scale": scale,
        "w_zero": np.zeros(scale.shape, weight.dtype),
    }
    axis = {"axis": weight_axis} if scale.ndim else {}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["x_real"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_real"], **axis),
    ]
    return nodes, constants


def _model(nodes: list[onnx.NodeProto], constants: Mapping[str, Array], x: Array, y: Array) -> bytes:
    ends = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in (("x", x), ("y", y))
    ]
    values = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], values)
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10).SerializeToString()
    )
