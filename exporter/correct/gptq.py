"""GPTQ: round each column of a weight to make up for the errors of the columns before it.

A layer y = W x makes the error (W - Ŵ) x. Over the calibration inputs its square is, for each output channel,

    E[((w - ŵ) x)²] = e' H e        with        e = w - ŵ,   H = E[x x'],

and not Σ e² as rounding to nearest takes it: inputs that go together can make up for each other. With A lower
triangular and H + λ I = A' A, that is |A e|², and its j-th term knows e_1 .. e_j only. So the columns are rounded in turn,
each to the code that makes its own term smallest,

    code_j = round((w_j + Σ_{i<j} A_ji e_i / A_jj) / scale).

That is what updating all later columns by the inverse of H after each comes to (Babai's nearest plane: Chen et al. 2025,
arXiv 2507.18553), without an inverse. λ = DAMPING times the mean of H's diagonal keeps Σ e² in sight, for H is from few
inputs. Where the layer has a bias that `bias` can correct, H is the covariance of x, for the error's mean is the bias's to
take.

x is a column of what Conv multiplies by its kernel (im2col), per group, in the kernel's order of K, so that the pair rule
is a bound: the second code of a pair may have what the first has left of it. H needs more inputs than K columns, and
not all: POSITIONS of them, spread over the batches and over each batch's positions.

Source: Frantar et al. 2022, arXiv 2210.17323.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array, Batch
from exporter.correct import bias, layers, rounding
from exporter.place import Plan
from exporter.qparams import LARGEST, PAIR_LIMIT, Rounded

POSITIONS = 8192  # inputs of a layer that make its H; or PER_COLUMN times K, if that is more
PER_COLUMN = 6
DAMPING = 0.03
BLOCK = 32  # columns whose effect on all later ones is one matrix product
HELD_BYTES = 256 << 20  # of H at once; layers beyond it wait for another pass over the batches
CHUNK = 1024  # inputs that are multiplied at once
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """What a layer's inputs are like: second E[x x'] float32 [groups, K, K], mean E[x] float64 [groups, K]."""

    second: Array
    mean: Array

    @property
    def covariance(self) -> Array:
        return np.asarray(self.second - self.mean[:, :, None] * self.mean[:, None, :])


def rounded(model: ir.Model, plan: Plan, batches: Sequence[Batch], *, pair_rule: bool) -> dict[str, Rounded]:
    """{weight initializer: its codes} of every int8 layer; the scale of a channel is that of `rounding.fit`.

    Args:
        model: the prepared graph.
        plan: which nodes are int8.
        batches: calibration batches, run once for every HELD_BYTES of H.
        pair_rule: whether the codes of layers whose kernel pairs must keep it.
    """
    found: dict[str, Rounded] = {}
    for part in _parts(model, plan):
        for layer, seen in zip(part, _observed(model, part, batches), strict=True):
            if seen is None:
                continue
            node, array = layer.nodes[0], layer.array
            keep = pair_rule and not all(graph.is_depthwise(array.shape, _groups(each)) for each in layer.nodes)
            second = seen.covariance if all(map(bias.is_correctable, layer.nodes)) else seen.second
            codes, scale = fit(rounding.in_kernel_order(node, array), second, keep)
            found[layer.name] = Rounded(
                codes=rounding.from_kernel_order(node, codes, array.shape),
                scale=scale,
                channel_axis=rounding.channel_axis(node),
            )
    return found


def fit(rows: Array, second: Array, pair_rule: bool) -> tuple[Array, Array]:
    """Codes and scales of a weight.

    Args:
        rows: float32 [channels, K] in the kernel's order; the channels of a group stand together.
        second: H, [groups, K, K].
        pair_rule: whether the codes must keep it.

    Returns:
        codes int8 [channels, K] in -127..127, scale float32 [channels]. No channel has more of e' (H + λ I) e than the
        codes of `rounding.fit`, which it has instead if it had.
    """
    groups, columns, _ = second.shape
    plain, scale = rounding.fit(rows, pair_rule)
    shape = (groups, len(rows) // groups, columns)
    weight, unit = rows.reshape(shape).astype(np.float64), scale.reshape(shape[:2]).astype(np.float64)
    factor = _factor(second)
    codes = _nearest_plane(weight, factor, unit, pair_rule)
    nearest = plain.reshape(shape).astype(np.float64)
    worse = _error(weight, codes, unit, factor) > _error(weight, nearest, unit, factor)
    codes[worse] = nearest[worse]
    return codes.reshape(rows.shape).astype(np.int8), scale


def _factor(second: Array) -> Array:
    """A, lower triangular with H + λ I = A' A, float64 [groups, K, K]; I for a group that has seen nothing."""
    damped = np.array(second, np.float64)
    diagonal = np.arange(damped.shape[1])
    mean = damped[:, diagonal, diagonal].mean(axis=1, keepdims=True)
    damped[:, diagonal, diagonal] += np.where(mean > 0, DAMPING * mean, 1)
    return np.linalg.cholesky(damped[:, ::-1, ::-1])[:, ::-1, ::-1].transpose(0, 2, 1)


def _error(weight: Array, codes: Array, unit: Array, factor: Array) -> Array:
    """e' A' A e, [groups, channels of a group]."""
    error = weight - codes * unit[:, :, None]
    return np.asarray(np.square(error @ factor.transpose(0, 2, 1)).sum(axis=2))


def _nearest_plane(weight: Array, factor: Array, unit: Array, pair_rule: bool) -> Array:
    """The codes, float64 [groups, channels of a group, K]."""
    columns = weight.shape[2]
    effect = factor / np.einsum("gkk->gk", factor)[:, :, None]  # A_ji / A_jj
    exact = np.ascontiguousarray(weight.transpose(0, 2, 1))
    wanted, codes = exact.copy(), np.empty_like(exact)
    for first in range(0, columns, BLOCK):
        stop = min(first + BLOCK, columns)
        for j in range(first, stop):
            low, high = _left(codes[:, j - 1]) if pair_rule and j % 2 else (-LARGEST, LARGEST)
            codes[:, j] = np.clip(np.rint(wanted[:, j] / unit), low, high)
            error = exact[:, j] - codes[:, j] * unit
            wanted[:, j + 1 : stop] += effect[:, j + 1 : stop, j, None] * error[:, None]
        errors = exact[:, first:stop] - codes[:, first:stop] * unit[:, None]
        wanted[:, stop:] += effect[:, stop:, first:stop] @ errors
    return codes.transpose(0, 2, 1)


def _left(neighbour: Array) -> tuple[Array, Array]:
    """The codes that may stand beside a code: lowest, highest."""
    left = np.minimum(PAIR_LIMIT - np.abs(neighbour), LARGEST)
    return np.where(neighbour < 0, -left, -LARGEST), np.where(neighbour > 0, left, LARGEST)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """A weight and the nodes that read it, which sum over it in one order (`place` sees to that)."""

    name: str
    array: Array
    nodes: tuple[ir.Node, ...]

    @property
    def columns(self) -> int:
        return int(rounding.in_kernel_order(self.nodes[0], self.array).shape[1])


def _parts(model: ir.Model, plan: Plan) -> Iterator[list[_Layer]]:
    """The layers in graph order, in parts whose H are held at once."""
    readers: dict[str, list[ir.Node]] = {}
    arrays: dict[str, Array] = {}
    for node, _, weight in layers.weighted(model, plan):
        array, name = graph.constant(weight), weight.name or ""
        if array is not None:
            readers.setdefault(name, []).append(node)
            arrays[name] = array
    part: list[_Layer] = []
    held = 0
    for name, nodes in readers.items():
        layer = _Layer(name=name, array=arrays[name], nodes=tuple(nodes))
        size = 4 * _groups(nodes[0]) * layer.columns**2
        if part and held + size > HELD_BYTES:
            yield part
            part, held = [], 0
        part.append(layer)
        held += size
    if part:
        yield part


def _groups(node: ir.Node) -> int:
    return node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1


def _observed(model: ir.Model, part: Sequence[_Layer], batches: Sequence[Batch]) -> list[Moments | None]:
    """The moments of each layer's inputs, None for one that saw none. One run of FP32 over the batches."""
    reads = [
        (node, node.inputs[0].name or "", i) for i, each in enumerate(part) for node in each.nodes if node.inputs[0]
    ]
    given = {value.name for value in model.graph.inputs}
    wanted = [name for name in dict.fromkeys(name for _, name, _ in reads) if name not in given]
    run = graph.runner(graph.with_outputs(model, wanted)) if wanted else None
    most = [math.ceil(max(POSITIONS, PER_COLUMN * each.columns) / len(batches)) for each in part]
    sums = [_Sums() for _ in part]
    for number, batch in enumerate(batches):
        made = {**batch, **(run(batch) if run is not None else {})}
        for node, name, i in reads:
            sums[i].add(columns(node, made[name], part[i].array.shape, most[i], number))
    return [each.result() for each in sums]


class _Sums:
    """Sums of x x' and x over inputs that come in parts; the parts are held until they make a matrix worth multiplying."""

    def __init__(self) -> None:
        self.parts: list[Array] = []
        self.count = self.waiting = 0
        self.second: Array | None = None
        self.mean: Array | None = None

    def add(self, inputs: Array) -> None:
        self.parts.append(inputs)
        self.waiting += inputs.shape[1]
        if self.waiting >= CHUNK:
            self._multiply()

    def result(self) -> Moments | None:
        self._multiply()
        if self.second is None or self.mean is None:
            return None
        return Moments(second=self.second / np.float32(self.count), mean=self.mean / self.count)

    def _multiply(self) -> None:
        if not self.waiting:
            return
        inputs = np.concatenate(self.parts, axis=1)
        second, mean = inputs.transpose(0, 2, 1) @ inputs, inputs.sum(axis=1, dtype=np.float64)
        self.second = second if self.second is None else np.add(self.second, second, out=self.second)
        self.mean = mean if self.mean is None else self.mean + mean
        self.count += self.waiting
        self.parts, self.waiting = [], 0


def columns(node: ir.Node, x: Array, weight: tuple[int, ...], most: int, number: int) -> Array:
    """What the layer multiplies by its rows: float32 [groups, count <= most, K], in the kernel's order of K.

    Args:
        node: Conv, Gemm or MatMul.
        x: its first input, in one batch.
        weight: the shape of its weight.
        most: positions are numbers frac(i · golden ratio) of their count, which lie evenly wherever one stops; all of them
            if there are no more.
        number: of the batch: another sends the sequence to other positions.
    """
    if node.op_type != "Conv":
        flat = x.reshape(-1, x.shape[-1])
        return flat[None, _spread(len(flat), most, number)]
    kernel, axes = weight[2:], len(weight) - 2
    strides, dilations = (node.attributes.get_ints(name, [1] * axes) for name in ("strides", "dilations"))
    pads = _pads(node, x.shape[2:], kernel, strides, dilations)
    padded = np.pad(x, [(0, 0), (0, 0), *pads])
    reach = [dilation * (size - 1) for dilation, size in zip(dilations, kernel, strict=True)]
    counts = [(size - r - 1) // stride + 1 for size, r, stride in zip(padded.shape[2:], reach, strides, strict=True)]
    at = np.unravel_index(_spread(len(x) * math.prod(counts), most, number), (len(x), *counts))
    corner = [place * stride for place, stride in zip(at[1:], strides, strict=True)]
    taps = []
    for tap in np.ndindex(*kernel):
        places = [c + t * dilation for c, t, dilation in zip(corner, tap, dilations, strict=True)]
        taps.append(padded[(at[0], slice(None), *places)])
    groups = _groups(node)
    found = np.stack(taps, axis=1).reshape(len(at[0]), len(taps), groups, -1)
    return np.ascontiguousarray(found.transpose(2, 0, 1, 3)).reshape(groups, len(at[0]), -1)


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
