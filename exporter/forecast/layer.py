"""The integer layers of a graph as ONNX Runtime runs it: which can clip on x86 without VNNI, and what they compute there.

A layer can clip when its activation is uint8, its weight int8, its kernel pairs, and the weight breaks the pair rule or is
itself computed. Sum and requantization, with acc in int32 and everything else in float32, in this order:

    QLinearConv           round(clip((acc + bias) · (x_scale · w_scale / y_scale), lowest - y_zp, highest - y_zp)) + y_zp
    QLinearMatMul         the same, no bias
    QGemm                 the same, (alpha · a_scale · b_scale) / y_scale; without y_scale (acc + C) · (alpha · a_scale · b_scale)
    MatMulIntegerToFloat  acc · (a_scale · b_scale) + bias
    MatMulInteger         acc

round is half to even. Source: ONNX Runtime's qlinearconv.cc, quantize_linear_matmul.cc, quant_gemm.cc,
dynamic_quantize_matmul.cc and mlas' MlasRequantizeOutput.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from exporter import graph, ops
from exporter.batches import Array
from exporter.forecast import kernel
from exporter.forecast.kernel import Pairs
from runtime.errors import PacklightError
from runtime.kernels import MOVED

# Kernels whose sums are followed: input 0 is the activation
FOLLOWED = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat")
# Kernels with such sums inside, which are not followed: weights [..., K, channels].
# DynamicQuantizeMatMul is, in the outermost graph, where it is taken apart before (walk).
INSIDE = ("DynamicQuantizeLSTM", "QAttention", "DynamicQuantizeMatMul")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A node whose sums can leave int16.

    rows: int8 [groups, channels, K] of a constant weight that is one matrix, else None; pairs: of each group.
    """

    node: onnx.NodeProto
    name: str
    rows: Array | None
    pairs: tuple[Pairs, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clips:
    """Of one run of a layer: pairs that break the rule, sums, how many of them clipped, the largest excess of a sum."""

    pairs: int = 0
    sums: int = 0
    clipped: int = 0
    worst: int = 0

    def __add__(self, other: Clips) -> Clips:
        return Clips(
            pairs=self.pairs + other.pairs,
            sums=self.sums + other.sums,
            clipped=self.clipped + other.clipped,
            worst=max(self.worst, other.worst),
        )


def can_clip(node: onnx.NodeProto, constants: Mapping[str, Array], dtypes: Mapping[str, np.dtype]) -> Layer | None:
    """The node as a Layer if its sums can leave int16.

    Args:
        constants: {initializer: array}; dtypes: of every tensor of the graph.

    Raises:
        PacklightError: it can clip in a way that is not followed.
    """
    _refuse_what_is_not_followed(node, constants, dtypes)
    if node.op_type not in FOLLOWED:
        return None
    a, b = (node.input[at] for at in _operands(node))
    # inside a branch or body a type may be unknown, and is then taken as one that can clip
    if dtypes.get(a, np.uint8) != np.uint8 or dtypes.get(b, np.int8) != np.int8:
        return None
    weight = constants.get(b)
    name = name_of(node)
    if weight is None:
        return Layer(node=node, name=name, rows=None, pairs=())
    if node.op_type == "QLinearConv" and _is_depthwise(node, weight):
        return None
    stacks = rows_of(node, weight)
    pairs = tuple(kernel.breaking(rows) for rows in stacks.reshape(-1, *stacks.shape[-2:]))
    if not any(len(each.first) for each in pairs):
        return None
    matrix = node.op_type == "QLinearConv" or weight.ndim == 2
    return Layer(node=node, name=name, rows=stacks if matrix else None, pairs=pairs if matrix else ())


def _is(node: onnx.NodeProto, dtypes: Mapping[str, np.dtype], first: type, second: type) -> bool:
    return dtypes.get(node.input[0]) == first and dtypes.get(node.input[1]) == second


def _is_depthwise(node: onnx.NodeProto, weight: Array) -> bool:
    return graph.is_depthwise(weight.shape, attribute(node, "group", 1))


def _refuse_what_is_not_followed(
    node: onnx.NodeProto, constants: Mapping[str, Array], dtypes: Mapping[str, np.dtype]
) -> None:
    where = f"{name_of(node)} ({node.op_type})"
    do = "keep this node float, or round its weight under the pair rule (target portable)"
    if node.op_type == "ConvInteger" and _is(node, dtypes, np.int8, np.uint8):
        # its kernel multiplies weight by activation, so that the activation takes the place of the int8 side
        raise PacklightError(
            where, found="int8 activations, uint8 weights", expected="a kernel that is followed", do=do
        )
    for at in ops.of(node.op_type).weights if node.op_type in INSIDE else ():
        weight = constants.get(node.input[at])
        if dtypes.get(node.input[at]) != np.int8:
            continue
        stacks = None if weight is None else np.moveaxis(weight, -1, -2).reshape(-1, weight.shape[-1], weight.shape[-2])
        if stacks is None or any(len(kernel.breaking(rows).first) for rows in stacks):
            raise PacklightError(
                where, found="weights that break the pair rule inside a kernel that is not followed", do=do
            )


def name_of(node: onnx.NodeProto) -> str:
    """The node's name in the file: ONNX Runtime adds a number to those whose layout it changes."""
    return re.sub(MOVED, "", node.name) or node.output[0]


def attribute(node: onnx.NodeProto, name: str, otherwise: int) -> int:
    return int(next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), otherwise))


def rows_of(node: onnx.NodeProto, weight: Array) -> Array:
    """[groups, channels, K] of Conv's weight, [..., channels, K] of another, K in the order in which the kernel sums."""
    if node.op_type == "QLinearConv":
        groups = attribute(node, "group", 1)
        return np.moveaxis(weight, 1, -1).reshape(groups, weight.shape[0] // groups, -1)
    transposed = node.op_type == "QGemm" and attribute(node, "transB", 0)
    return weight if transposed else np.moveaxis(np.atleast_2d(weight.T).T, -1, -2)


def run(layer: Layer, inputs: Sequence[Array | None], saturates: bool) -> tuple[Array, Clips]:
    """The layer's output on a CPU that saturates, or on one that does not.

    Args:
        inputs: the node's, None where it has none.
    """
    operands = [*inputs, *[None] * (9 - len(inputs))]
    if layer.node.op_type == "QLinearConv":
        return _conv(layer, operands, saturates)
    return _matmul(layer, operands, saturates)


def _conv(layer: Layer, inputs: Sequence[Array | None], saturates: bool) -> tuple[Array, Clips]:
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias = inputs
    assert x is not None
    assert w is not None
    zero_x, zero_w, zero_y = (_scalar(each) for each in (x_zero, w_zero, y_zero))
    scale = _scale(layer, x_scale, 0) * _scale(layer, w_scale, 1) / _scale(layer, y_scale, 0)
    rows = rows_of(layer.node, w) if layer.rows is None else layer.rows
    pairs = layer.pairs or tuple(
        kernel.breaking(each if not _is_depthwise(layer.node, w) else each[:0]) for each in rows
    )
    last = bool(attribute(layer.node, "channels_last", 0))
    strides, dilations, pads = _window(layer.node, w.shape[2:], (x.shape[1:-1] if last else x.shape[2:]))
    padded = np.pad(x if last else np.moveaxis(x, 1, -1), ((0, 0), *pads, (0, 0)), constant_values=zero_x)
    seen = kernel.patches(padded, w.shape[2:], strides, dilations)
    rank, groups = w.ndim - 2, len(rows)
    places = seen.shape[: rank + 1]
    y = np.empty((*places, w.shape[0]), np.uint8)
    clips = Clips(pairs=sum(len(each.first) for each in pairs))
    for group in range(groups):
        channels = slice(group * rows.shape[1], (group + 1) * rows.shape[1])
        reads = seen[..., group * w.shape[1] : (group + 1) * w.shape[1]]
        step = max(1, (1 << 25) // max(1, rows.shape[2] * int(np.prod(places[2:]))))  # rows of 32 MB of codes at a time
        for image in range(places[0]):
            for top in range(0, places[1], step):
                block = reads[image, top : top + step]
                codes = np.ascontiguousarray(block).reshape(-1, rows.shape[2])
                acc, found = _sums(codes, rows[group], pairs[group], zero_x, zero_w, saturates)
                if bias is not None:
                    acc = acc + bias[channels]
                out = requantize(acc, scale if scale.size == 1 else scale[channels], zero_y)
                y[image, top : top + step, ..., channels] = out.reshape(*block.shape[:rank], -1)
                clips += found
    return (y if last else np.ascontiguousarray(np.moveaxis(y, -1, 1))), clips


def _operands(node: onnx.NodeProto) -> tuple[int, int]:
    """The positions of its activation and its weight."""
    return 0, ops.of(node.op_type).weights[0]


def _matmul(layer: Layer, inputs: Sequence[Array | None], saturates: bool) -> tuple[Array, Clips]:
    node = layer.node
    a, b = (inputs[at] for at in _operands(node))
    assert a is not None
    assert b is not None
    a_zero, b_zero = {
        "MatMulInteger": (inputs[2], inputs[3]),
        "MatMulIntegerToFloat": (inputs[4], inputs[5]),
    }.get(node.op_type, (inputs[2], inputs[5]))
    if node.op_type == "QGemm" and attribute(node, "transA", 0):
        a = a.T
    rows = rows_of(node, b)
    zeros = [0 if each is None else each.astype(np.int32) for each in (a_zero, b_zero)]
    left = np.atleast_2d(a)
    acc, clips = _products(layer, left, rows, _one(layer, zeros[0]), _columns(layer, zeros[1]), saturates)
    acc = acc[..., 0, :] if a.ndim == 1 else acc
    acc = acc[..., 0] if b.ndim == 1 else acc
    return _finish(layer, acc, inputs), clips


def _products(layer: Layer, a: Array, rows: Array, a_zero: int, b_zero: Array, saturates: bool) -> tuple[Array, Clips]:
    """[..., M, N] of a [..., M, K] and rows [..., N, K], matrix by matrix."""
    if rows.ndim == 2:
        pairs = layer.pairs[0] if layer.pairs else kernel.breaking(rows)
        acc, clips = _sums(a.reshape(-1, a.shape[-1]), rows, pairs, a_zero, b_zero, saturates)
        return acc.reshape(*a.shape[:-1], -1), clips + Clips(pairs=len(pairs.first))
    batch = np.broadcast_shapes(a.shape[:-2], rows.shape[:-2])
    lefts = np.broadcast_to(a, batch + a.shape[-2:])
    rights = np.broadcast_to(rows, batch + rows.shape[-2:])
    acc, clips = np.empty((*batch, a.shape[-2], rows.shape[-2]), np.int32), Clips()
    for at in np.ndindex(batch):
        pairs = kernel.breaking(rights[at])
        acc[at], found = _sums(lefts[at], rights[at], pairs, a_zero, b_zero, saturates)
        clips += found + Clips(pairs=len(pairs.first))
    return acc, clips


def _sums(
    codes: Array, rows: Array, pairs: Pairs, a_zero: int, b_zero: Array | int, saturates: bool
) -> tuple[Array, Clips]:
    """Σ (a - a_zero)(b - b_zero), less what saturation takes, as int32 [positions, channels]."""
    acc = kernel.exact_sums(codes, rows) - a_zero * rows.sum(axis=1, dtype=np.int32)
    if np.any(b_zero):
        acc -= b_zero * (codes.sum(axis=1, dtype=np.int32)[:, None] - a_zero * codes.shape[1])
    if not saturates:
        return acc, Clips()
    found = kernel.excess(codes, pairs, len(rows))
    worst = int(np.abs(found.excess).max(initial=0))
    return acc - found.excess, Clips(sums=acc.size, clipped=found.clipped, worst=worst)


def _finish(layer: Layer, acc: Array, inputs: Sequence[Array | None]) -> Array:
    """From the accumulator to the node's output."""
    node = layer.node
    if node.op_type == "MatMulInteger":
        return acc
    if node.op_type == "MatMulIntegerToFloat":
        a_scale, b_scale, bias = inputs[2], inputs[3], inputs[6]
        real = acc.astype(np.float32) * (_scale(layer, a_scale, 0) * _scale(layer, b_scale, 1))
        return np.asarray(real if bias is None else real + bias)
    if node.op_type == "QLinearMatMul":
        products = _scale(layer, inputs[1], 0) * _scale(layer, inputs[4], 1)
        return requantize(acc, products / _scale(layer, inputs[6], 0), _scalar(inputs[7]))
    alpha = next((each.f for each in node.attribute if each.name == "alpha"), 1.0)
    products = np.float32(alpha) * _scale(layer, inputs[1], 0) * _scale(layer, inputs[4], 1)
    acc = acc if inputs[6] is None else acc + inputs[6]
    if inputs[7] is None:
        return np.asarray(acc.astype(np.float32) * products)
    return requantize(acc, products / _scale(layer, inputs[7], 0), _scalar(inputs[8]))


def requantize(acc: Array, scale: Array, zero_point: int) -> Array:
    """round(clip(acc · scale, -zero_point, 255 - zero_point)) + zero_point as uint8, in float32, half to even.

    Args:
        acc: int32 [..., channels].
        scale: float32, [] or [1] or [channels].
    """
    real = acc.astype(np.int32).astype(np.float32) * scale
    return np.asarray(
        np.rint(np.clip(real, np.float32(-zero_point), np.float32(255 - zero_point))) + zero_point, np.uint8
    )


def _scalar(value: Array | None) -> int:
    """A zero point; a weight's may come once a channel, and is then the same for all."""
    return 0 if value is None else int(value.reshape(-1)[0])


def _one(layer: Layer, value: Array | int) -> int:
    if np.size(value) != 1:
        raise _odd(layer, "a zero point of its activation for each row", "one")
    return int(np.reshape(value, ()))


def _columns(layer: Layer, value: Array | int) -> Array:
    if np.ndim(value) > 1:
        raise _odd(layer, f"a zero point of its weight of shape {list(np.shape(value))}", "one, or one a column")
    return np.reshape(value, -1)


def _scale(layer: Layer, value: Array | None, rank: int) -> Array:
    """A scale of float32 [] or, where the kernel allows it, [columns]."""
    assert value is not None
    if value.ndim > max(rank, 1) or (rank == 0 and value.size != 1):
        raise _odd(layer, f"a scale of shape {list(value.shape)}", "one, or one a column of the weight")
    return np.asarray(value.reshape(()) if value.size == 1 else value, np.float32)


def _odd(layer: Layer, found: str, expected: str) -> PacklightError:
    return PacklightError(
        f"{layer.name} ({layer.node.op_type}) cannot be forecast",
        found=found,
        expected=expected,
        do="run it on such a CPU, or quantize its weight again under target portable",
    )


Sizes = tuple[int, ...]


def _window(node: onnx.NodeProto, size: Sizes, image: Sizes) -> tuple[Sizes, Sizes, tuple[tuple[int, int], ...]]:
    """(strides, dilations, (begin, end) of each axis' padding) of a Conv with a kernel of `size` on an image."""
    given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    strides = tuple(given.get("strides") or [1] * len(size))
    dilations = tuple(given.get("dilations") or [1] * len(size))
    auto = (given.get("auto_pad") or b"NOTSET").decode()
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        reach = (d * (k - 1) + 1 for k, d in zip(size, dilations, strict=True))
        total = [max(0, (-(-n // s) - 1) * s + r - n) for n, s, r in zip(image, strides, reach, strict=True)]
        small, large = [n // 2 for n in total], [n - n // 2 for n in total]
        sides = (small, large) if auto == "SAME_UPPER" else (large, small)
    else:
        pads = [0] * 2 * len(size) if auto == "VALID" else list(given.get("pads") or [0] * 2 * len(size))
        sides = (pads[: len(size)], pads[len(size) :])
    return strides, dilations, tuple(zip(*sides, strict=True))
