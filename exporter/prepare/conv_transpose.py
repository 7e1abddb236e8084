"""Write ConvTranspose, which has no integer kernel, as Conv and a rearrangement of its channels (sub-pixel convolution).

With stride s, the output at s·i + a is a sum over t = ⌈k/s⌉ taps, those that are a apart from a multiple of s (one axis
shown; W is 0 beyond k):

    y[n, m, s·i + a] = Σ_c Σ_j x[n, c, i - j] W[c, m, s·j + a] + bias[m],   j in 0..t-1

1. ConvTranspose   becomes   Conv -> DepthToSpace(blocksize=s, mode DCR) -> Slice: the Conv has kernel t, pads t-1, and
   channel (a·s + b)·M + m; Slice cuts off what pads took from the output. Where nothing is cut there is no Slice.
2. With s = 1 it is a Conv with the kernel turned round, and pads that leave nothing to cut.
3. Left alone: groups, dilations, two different strides, auto_pad, output_shape, a weight or bias made at run time.

Source: Shi et al. 2016, arXiv 1609.05158; Dumoulin and Visin 2016, arXiv 1603.07285, for the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array
from exporter.prepare import edit

TO_THE_END = np.iinfo(np.int64).max


def rewrite(model: ir.Model) -> int:
    return sum(_to_subpixel(model, node) for node in list(model.graph))


def _to_subpixel(model: ir.Model, node: ir.Node) -> bool:
    weight = graph.constant(node.inputs[1]) if graph.op(node) == "ConvTranspose" else None
    if weight is None or weight.ndim != 4 or not graph.is_square(node) or "output_shape" in node.attributes:
        return False
    bias = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is None and len(node.inputs) > 2 and node.inputs[2] is not None:
        return False
    stride = node.attributes.get_ints("strides", [1, 1])[0]
    kernel = weight.shape[2:]
    taps = [-(-size // stride) for size in kernel]
    pads, more = node.attributes.get_ints("pads", [0] * 4), node.attributes.get_ints("output_padding", [0, 0])
    # what the full output of the Conv has before and behind the wanted one, on each axis
    before = list(pads[:2])
    behind = [stride * taps[i] - kernel[i] + pads[2 + i] - more[i] for i in (0, 1)]
    if min(behind) < 0 or (stride == 1 and max(*before, *behind) > min(taps) - 1):
        return False
    conv_pads = [size - 1 for size in taps] * 2
    if stride == 1:
        conv_pads = [pad - cut for pad, cut in zip(conv_pads, (*before, *behind), strict=True)]
        before = behind = [0, 0]
    base = node.outputs[0].name
    inputs = [node.inputs[0], edit.initializer(model, f"{base}_subpixel_weight", _phases(weight, stride, taps))]
    if bias is not None:
        inputs.append(edit.initializer(model, f"{base}_subpixel_bias", np.tile(bias, stride * stride)))
    new = [ir.node("Conv", inputs, {"kernel_shape": taps, "pads": conv_pads}, name=node.name)]
    if stride > 1:
        shuffled = ir.node(
            "DepthToSpace", [new[-1].outputs[0]], {"blocksize": stride, "mode": "DCR"}, name=f"{node.name}_subpixel"
        )
        new.append(shuffled)
    if any(before) or any(behind):
        cut = {"starts": before, "ends": [-end if end else TO_THE_END for end in behind], "axes": [2, 3]}
        bounds = [edit.initializer(model, f"{base}_{name}", np.array(values, np.int64)) for name, values in cut.items()]
        new.append(ir.node("Slice", [new[-1].outputs[0], *bounds], name=f"{node.name}_cut"))
    for each in new:
        each.outputs[0].type = node.outputs[0].type
    edit.replace(model, [node], new, node.outputs[0], new[-1].outputs[0])
    return True


def _phases(weight: Array, stride: int, taps: Sequence[int]) -> Array:
    """W [C, M, kh, kw] as the Conv's [(a, b, m), C, th, tw]: taps a stride apart together, turned round."""
    incoming, outgoing, high, wide = weight.shape
    whole = np.zeros((incoming, outgoing, stride * taps[0], stride * taps[1]), weight.dtype)
    whole[:, :, :high, :wide] = weight
    split = whole.reshape(incoming, outgoing, taps[0], stride, taps[1], stride)[:, :, ::-1, :, ::-1, :]
    phases = split.transpose(3, 5, 1, 0, 2, 4)
    return np.ascontiguousarray(phases).reshape(stride * stride * outgoing, incoming, *taps)
