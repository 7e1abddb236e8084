"""GPTQ of a graph: the inputs that its int8 layers see, and the codes that `numerics.gptq` finds for them.

x is a column of what Conv multiplies by its kernel (im2col), per group, in the kernel's order of K, so that the pair rule
is a bound: the second code of a pair may have what the first has left of it. H needs more inputs than K columns, and
not all: POSITIONS of them, spread over the batches and over each batch's positions.

H grows with K squared. Where that is more than HELD_BYTES, or WORK_BYTES while it is factored, H is cut to blocks along its
diagonal: neighbours in the kernel's order still make up for each other, and pairs are never cut. A layer whose blocks would have
fewer than LEAST_COLUMNS keeps the codes that it has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array, Batch
from exporter.correct import bias, layers, rounding
from exporter.numerics.gptq import WORK_BYTES, fit
from exporter.numerics.quantized import QuantizedTensor, per_channel
from exporter.place import Plan

POSITIONS = 8192  # inputs of a layer that make its H; or PER_COLUMN times K, if that is more
PER_COLUMN = 6
HELD_BYTES = 256 << 20  # of H at once, float32; layers beyond it wait for another pass over the batches
SLICE_BYTES = 64 << 20  # of inputs at once
LEAST_COLUMNS = 32
CHUNK = 1024  # inputs that are multiplied at once, as far as they are within SLICE_BYTES
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """What some columns of a layer's inputs are like: covariance float32 [groups, K, K], mean E[x] float64 [groups, K]."""

    covariance: Array
    mean: Array

    @property
    def second(self) -> Array:
        """E[x x'], float32 [groups, K, K]; infinite where float32 does not hold it."""
        mean = self.mean.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(self.covariance + mean[:, :, None] * mean[:, None, :])


def rounded(model: ir.Model, plan: Plan, batches: Sequence[Batch], *, pair_rule: bool) -> dict[str, QuantizedTensor]:
    """{weight initializer: its codes} of every int8 layer that saw inputs; the scale of a channel is that of `pairing.fit`.

    Args:
        model: the prepared graph.
        plan: which nodes are int8.
        batches: calibration batches, run once for every HELD_BYTES of H.
        pair_rule: whether the codes of layers whose kernel pairs must keep it.
    """
    found: dict[str, QuantizedTensor] = {}
    for part in _parts(model, plan):
        for layer, seen in zip(part, _observed(model, part, batches), strict=True):
            if not seen:
                continue
            node, array = layer.nodes[0], layer.array
            keep = pair_rule and not all(graph.is_depthwise(array.shape, _groups(each)) for each in layer.nodes)
            by_bias = all(map(bias.is_correctable, layer.nodes))
            blocks = [each.covariance if by_bias else each.second for each in seen]
            codes, scale = fit(rounding.in_kernel_order(node, array), blocks, keep)
            found[layer.name] = per_channel(
                rounding.from_kernel_order(node, codes, array.shape), scale, rounding.channel_axis(node)
            )
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """A weight and the nodes that read it, which sum over it in one order (`place` sees to that).

    ends: of the blocks of its H; empty where they would be too small.
    """

    name: str
    array: Array
    nodes: tuple[ir.Node, ...]
    ends: tuple[int, ...]

    @property
    def held_bytes(self) -> int:
        """Of its H."""
        sizes = np.diff((0, *self.ends)).astype(np.int64)
        return 4 * _groups(self.nodes[0]) * int((sizes**2).sum())

    @property
    def positions(self) -> int:
        """Inputs that make its H."""
        return max(POSITIONS, PER_COLUMN * int(np.diff((0, *self.ends)).max()))


def blocks(columns: int, groups: int) -> tuple[int, ...]:
    """Where the blocks of H end, in columns: one, or the fewest within the budgets, and all but the last of an even size."""
    most = min(math.isqrt(WORK_BYTES // 8), HELD_BYTES // (4 * groups * columns))
    if columns <= most:
        return (columns,)
    if most < LEAST_COLUMNS:
        return ()
    size = -(-columns // -(-columns // (most // 2 * 2)) // 2) * 2
    return (*range(size, columns, size), columns)


def _parts(model: ir.Model, plan: Plan) -> Iterator[list[_Layer]]:
    """The layers in graph order, in parts whose H are held at once."""
    readers: dict[str, list[ir.Node]] = {}
    arrays: dict[str, Array] = {}
    for node, _, weight in layers.weighted(model, plan):
        array, name = graph.constant(weight), weight.name or ""
        if array is not None and array.size:
            readers.setdefault(name, []).append(node)
            arrays[name] = array
    part: list[_Layer] = []
    held = 0
    for name, nodes in readers.items():
        columns = rounding.in_kernel_order(nodes[0], arrays[name]).shape[1]
        layer = _Layer(
            name=name, array=arrays[name], nodes=tuple(nodes), ends=blocks(columns, max(map(_groups, nodes)))
        )
        if not layer.ends:
            continue
        if part and held + layer.held_bytes > HELD_BYTES:
            yield part
            part, held = [], 0
        part.append(layer)
        held += layer.held_bytes
    if part:
        yield part


def _groups(node: ir.Node) -> int:
    return node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1


def _observed(model: ir.Model, part: Sequence[_Layer], batches: Sequence[Batch]) -> list[list[Moments]]:
    """The moments of each layer's inputs, of its blocks; none of one that saw none. One run of FP32 over the batches."""
    reads = [
        (node, node.inputs[0].name or "", i) for i, each in enumerate(part) for node in each.nodes if node.inputs[0]
    ]
    given = {value.name for value in model.graph.inputs}
    wanted = [name for name in dict.fromkeys(name for _, name, _ in reads) if name not in given]
    run = graph.runner(graph.with_outputs(model, wanted)) if wanted else None
    most = [math.ceil(each.positions / len(batches)) for each in part]
    sums = [_Sums(each.ends) for each in part]
    for number, batch in enumerate(batches):
        made = {**batch, **(run(batch) if run is not None else {})}
        for node, name, i in reads:
            for inputs in columns(node, made[name], part[i].array.shape, most[i], number):
                sums[i].add(inputs)
    return [each.result() for each in sums]


class _Sums:
    """Sums of (x - E[x])(x - E[x])' and x over inputs that come in parts, which are held until they are worth multiplying.

    Each part is taken about its own mean: of x x' float32 keeps nothing that is small beside E[x]². Two of n and m inputs with
    means that differ by d make one by  S = S_n + S_m + d d' n m / (n + m)  (Chan, Golub and LeVeque 1979).
    """

    def __init__(self, ends: Sequence[int]) -> None:
        self.at = [slice(*each) for each in zip((0, *ends), ends, strict=False)]
        self.parts: list[Array] = []
        self.count = self.waiting = 0
        self.sums: list[Array] = []
        self.mean: Array | None = None

    def add(self, inputs: Array) -> None:
        self.parts.append(inputs)
        self.waiting += inputs.shape[1]
        if self.waiting >= CHUNK or sum(each.nbytes for each in self.parts) >= SLICE_BYTES:
            self._multiply()

    def result(self) -> list[Moments]:
        self._multiply()
        if self.mean is None:
            return []
        return [
            Moments(covariance=sums / np.float32(self.count), mean=self.mean[:, at])
            for sums, at in zip(self.sums, self.at, strict=True)
        ]

    def _multiply(self) -> None:
        if not self.waiting:
            return
        inputs = np.concatenate(self.parts, axis=1)
        mean = inputs.mean(axis=1, dtype=np.float64)
        inputs -= mean[:, None].astype(np.float32)
        weight = self.count * self.waiting / (self.count + self.waiting)
        moved = np.zeros_like(mean) if self.mean is None else mean - self.mean
        left, right = (weight * moved).astype(np.float32), moved.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # `_factor` says what becomes of it
            for number, at in enumerate(self.at):
                part = inputs[:, :, at]
                sums = part.transpose(0, 2, 1) @ part
                if self.mean is None:
                    self.sums.append(sums)
                else:
                    sums += left[:, at, None] * right[:, None, at]
                    self.sums[number] += sums
        self.count += self.waiting
        self.mean = mean if self.mean is None else self.mean + moved * (self.waiting / self.count)
        self.parts, self.waiting = [], 0


def columns(node: ir.Node, x: Array, weight: tuple[int, ...], most: int, number: int) -> Iterator[Array]:
    """What the layer multiplies by its rows: float32 [groups, positions, K], in the kernel's order of K, SLICE_BYTES at once.

    Args:
        node: Conv, Gemm or MatMul.
        x: its first input, in one batch; nothing comes of one without elements.
        weight: the shape of its weight.
        most: positions are numbers frac(i · golden ratio) of their count, which lie evenly wherever one stops; all of them
            if there are no more.
        number: of the batch: another sends the sequence to other positions.
    """
    if not x.size:
        return
    if node.op_type != "Conv":
        flat = x.reshape(-1, x.shape[-1])
        for at in _sliced(_spread(len(flat), most, number), flat.shape[1]):
            yield flat[None, at]
        return
    kernel, axes, groups = weight[2:], len(weight) - 2, _groups(node)
    strides, dilations = (node.attributes.get_ints(name, [1] * axes) for name in ("strides", "dilations"))
    pads = _pads(node, x.shape[2:], kernel, strides, dilations)
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    reach = [dilation * (size - 1) + 1 for dilation, size in zip(dilations, kernel, strict=True)]
    windows: Any = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
    windows = windows[(..., *(slice(None, None, dilation) for dilation in dilations))]
    counts = [(size - 1) // stride + 1 for size, stride in zip(windows.shape[2 : 2 + axes], strides, strict=True)]
    for at in _sliced(_spread(len(x) * math.prod(counts), most, number), x.shape[1] * math.prod(kernel)):
        first, *places = np.unravel_index(at, (len(x), *counts))
        corner = [place * stride for place, stride in zip(places, strides, strict=True)]
        found = windows[(first, slice(None), *corner)].reshape(len(at), groups, weight[1], -1)
        yield np.ascontiguousarray(found.transpose(1, 0, 3, 2)).reshape(groups, len(at), -1)


def _sliced(positions: Array, values: int) -> Iterator[Array]:
    """The positions, as many at once as have SLICE_BYTES of so many values each."""
    step = max(1, SLICE_BYTES // (4 * values))
    for first in range(0, len(positions), step):
        yield positions[first : first + step]


def _spread(count: int, most: int, number: int) -> Array:
    if count <= most:
        return np.arange(count)
    return np.unique(((np.arange(most) + number * most) * GOLDEN % 1 * count).astype(np.int64))


def _pads(
    node: ir.Node, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) on each axis, also where Conv is told auto_pad."""
    auto, axes = node.attributes.get_string("auto_pad", "NOTSET"), len(kernel)
    if auto == "NOTSET":
        pads = node.attributes.get_ints("pads", [0] * (2 * axes))
        return list(zip(pads[:axes], pads[axes:], strict=True))
    if auto == "VALID":
        return [(0, 0)] * axes
    total = [
        max((math.ceil(size / stride) - 1) * stride + dilation * (k - 1) + 1 - size, 0)
        for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    less = [(each // 2, each - each // 2) for each in total]
    return less if auto == "SAME_UPPER" else [(after, before) for before, after in less]
