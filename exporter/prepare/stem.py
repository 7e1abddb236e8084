"""Write the strided Conv that reads a picture as one of stride 1 over blocks of its positions.

With stride s, begin pads p and f = -p mod s, the Conv over x [N, C, H, W] is one over SpaceToDepth(x) [N, s·s·C, H/s, W/s]
(one axis shown; W is 0 where s·j + a - f is no tap of it):

    W'[m, (a, b, c), j, l] = W[m, c, s·j + a - f, ...],   a, b in 0..s-1,   j in 0..⌈(k + f) / s⌉ - 1

1. Conv(x, W)   becomes   Conv(SpaceToDepth(x), W') of stride 1, x a graph input: the begin pads are ⌈p / s⌉, and the end
   pads what gives as many outputs as before. SpaceToDepth has no integer kernel: it runs in float, before QuantizeLinear.
2. Left alone: sizes that are not fixed or not multiples of s, groups, dilations, auto_pad, strides other than 2 or 4, and a
   Conv that would multiply over a quarter more than with its channels filled (channels.py).

The integer Conv copies its input position by position: for an output of a 3x3 with 3 channels and stride 2 now 4 times 12 bytes,
not 9 times 3, of a 7x7 16 times, not 49. In turn it multiplies zeros, and the MACs of a report count them: 64/49 of that 7x7. A
rule that keeps the Conv float pays for them: 3.2 -> 4.5 ms. CPU ms at 224x224 with AVX512-VNNI and a 1x1 Conv behind, as found,
filled to four channels, and in blocks; then the multiplications in blocks over those of the filled:

    3 channels, stride 2: 7x7 -> 64    2.61  2.03  1.62    0.98
                          6x6 -> 32    1.60  1.39  0.75    0.75
                          5x5 -> 32    1.38  1.10  0.79    1.08
                          3x3 -> 32    1.02  0.63  0.63    1.33
                          3x3 -> 64    1.52  0.76  0.86    1.33
    3 channels, stride 4: 4x4 -> 96    0.50  0.44  0.31    0.75
                          7x7 -> 64    0.71  0.62  0.45    0.98
                          11x11 -> 64  1.00  1.04  1.08    1.59    with pads 2
                          11x11 -> 64  0.84  0.94  0.62    0.89    without pads
    1 channel, stride 2:  3x3 -> 32    0.82  0.61  0.49    0.44
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array
from exporter.prepare import channels, edit

STRIDES = (2, 4)
MOST = 1.25  # multiplications, of those with the channels filled


def rewrite(model: ir.Model) -> int:
    return sum(_to_blocks(model, node) for node in list(model.graph) if graph.op(node) == "Conv")


def _to_blocks(model: ir.Model, node: ir.Node) -> bool:
    x, w = node.inputs[:2]
    weight = graph.constant(w)
    if x is None or w is None or weight is None or weight.ndim != 4 or weight.dtype != np.float32:
        return False
    if not x.is_graph_input() or not graph.is_square(node):
        return False
    stride = node.attributes.get_ints("strides", [1, 1])[0]
    sizes = [] if x.shape is None else [size for size in x.shape[2:] if isinstance(size, int) and size % stride == 0]
    if stride not in STRIDES or len(sizes) != 2:
        return False
    pads = node.attributes.get_ints("pads", [0] * 4)
    blocks = _blocks(weight, stride, pads[:2])
    if blocks[0].size > MOST * channels.filled(weight.shape[1]) * weight[0, 0].size:
        return False
    begin, end = [-(-pad // stride) for pad in pads[:2]], []
    for i in (0, 1):
        outputs = (sizes[i] + pads[i] + pads[2 + i] - weight.shape[2 + i]) // stride + 1
        end.append(outputs + blocks.shape[2 + i] - 1 - begin[i] - sizes[i] // stride)
    split = ir.node("SpaceToDepth", [x], {"blocksize": stride}, name=f"{node.name}_blocks")
    split.outputs[0].type = x.type
    model.graph.insert_before(node, split)
    node.replace_input_with(0, split.outputs[0])
    node.replace_input_with(1, edit.initializer(model, f"{w.name}_blocks", blocks))
    for name, values in (("kernel_shape", blocks.shape[2:]), ("strides", (1, 1)), ("pads", (*begin, *end))):
        node.attributes.add(ir.AttrInt64s(name, [int(value) for value in values]))
    return True


def _blocks(weight: Array, stride: int, begin: Sequence[int]) -> Array:
    """W [M, C, kh, kw] as W' [M, (a, b, c), jh, jw], in SpaceToDepth's order of channels."""
    first = [-pad % stride for pad in begin]
    last = [-(before + size) % stride for before, size in zip(first, weight.shape[2:], strict=True)]
    whole = np.pad(weight, ((0, 0), (0, 0), *zip(first, last, strict=True)))
    outgoing, incoming, high, wide = whole.shape
    split = whole.reshape(outgoing, incoming, high // stride, stride, wide // stride, stride)
    blocks = split.transpose(0, 3, 5, 1, 2, 4).reshape(outgoing, -1, high // stride, wide // stride)
    return np.ascontiguousarray(blocks)
