"""Write ConvTranspose, which has no integer kernel, as Conv and a rearrangement of its channels (sub-pixel convolution).

ConvTranspose with stride = kernel = s (no padding, groups 1) writes each input pixel into an s x s tile of its own:

    y[n, m, s·i+a, s·j+b] = Σ_c x[n, c, i, j] W[c, m, a, b] + bias[m]

which is a 1x1 Conv to s² M channels, channel (a·s + b)·M + m, and DepthToSpace(blocksize=s, mode DCR).

Source: Shi et al. 2016, arXiv 1609.05158; Odena et al. 2016 for the equality.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.prepare import edit


def rewrite(model: ir.Model) -> int:
    return sum(_to_subpixel(model, node) for node in list(model.graph))


def _to_subpixel(model: ir.Model, node: ir.Node) -> bool:
    weight = graph.constant(node.inputs[1]) if node.op_type == "ConvTranspose" else None
    if weight is None or weight.ndim != 4:
        return False
    bias = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is None and len(node.inputs) > 2 and node.inputs[2] is not None:
        return False
    kernel = list(weight.shape[2:])
    given = {name: list(node.attributes.get_ints(name, default)) for name, default in _DEFAULTS.items()}
    plain = given["pads"] == [0] * 4 and given["output_padding"] == [0, 0] and given["dilations"] == [1, 1]
    square = kernel[0] == kernel[1] and list(node.attributes.get_ints("strides", [1, 1])) == kernel
    auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
    group = node.attributes.get_int("group", 1)
    if not (plain and square) or auto_pad != "NOTSET" or group != 1 or "output_shape" in node.attributes:
        return False
    block, channels = kernel[0], weight.shape[1]
    base = node.outputs[0].name
    # [C, M, a, b] -> [(a, b, M), C, 1, 1]
    taps = np.ascontiguousarray(weight.transpose(2, 3, 1, 0)).reshape(block * block * channels, weight.shape[0], 1, 1)
    inputs = [node.inputs[0], edit.initializer(model, f"{base}_subpixel_weight", taps)]
    if bias is not None:
        inputs.append(edit.initializer(model, f"{base}_subpixel_bias", np.tile(bias, block * block)))
    conv = ir.node("Conv", inputs, {"kernel_shape": [1, 1]}, name=node.name)
    conv.outputs[0].type = node.inputs[0].type if node.inputs[0] is not None else None
    shuffle = ir.node(
        "DepthToSpace", [conv.outputs[0]], {"blocksize": block, "mode": "DCR"}, name=f"{node.name}_subpixel"
    )
    edit.replace(model, [node], [conv, shuffle], node.outputs[0], shuffle.outputs[0])
    return True


_DEFAULTS = {"pads": [0] * 4, "output_padding": [0, 0], "dilations": [1, 1]}
