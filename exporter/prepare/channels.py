"""Fill the channels of a picture up to a multiple of four, where a Conv reads them.

    Conv(x, W)   becomes   Conv(Pad(x), W with zeros),   x a graph input of C channels, C not a multiple of 4

The integer Conv copies its input position by position, all channels of one at a time: four bytes are one word and take half
the time of three (3x3, 3 -> 32 at 112x112: 0.57 ms and 0.28 with AVX512-VNNI; 0.31 in float).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.prepare import edit

WORD = 4


def rewrite(model: ir.Model) -> int:
    return sum(_fill(model, node) for node in list(model.graph) if node.op_type == "Conv")


def _fill(model: ir.Model, node: ir.Node) -> bool:
    x, w = node.inputs[:2]
    weight = graph.constant(w)
    if x is None or w is None or weight is None or weight.ndim != 4 or weight.dtype != np.float32:
        return False
    missing = -weight.shape[1] % WORD
    if not x.is_graph_input() or not missing or node.attributes.get_int("group", 1) != 1:
        return False
    ends = edit.initializer(model, f"{node.name}_pads", np.array([0, 0, 0, 0, 0, missing, 0, 0]))
    pad = ir.node("Pad", [x, ends], name=f"{node.name}_pad")
    pad.outputs[0].type = x.type
    filled = np.pad(weight, ((0, 0), (0, missing), (0, 0), (0, 0)))
    model.graph.insert_before(node, pad)
    node.replace_input_with(0, pad.outputs[0])
    node.replace_input_with(1, edit.initializer(model, f"{w.name}_filled", filled))
    return True
