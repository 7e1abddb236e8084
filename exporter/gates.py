"""HardSigmoid without a kernel: the codes of x, read by another scale and zero point, are the codes of HardSigmoid(x).

ONNX Runtime has no integer kernel for it. But it is linear between two knees and constant outside, as codes are, which
saturate: where they do so at the knees nothing has to run, and where x goes on they are clipped, by a kernel that takes a
seventh of what a table takes and rounds nothing. So HardSwish, x · HardSigmoid(x), is a Clip of codes and an integer product.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporter import graph
from exporter.calibrate import Ranges
from exporter.prepare import edit

GATE = "HardSigmoid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """How codes of x are read as HardSigmoid(x): clip(code, first, last), then (code - zero_point) · scale."""

    first: int
    last: int
    scale: float
    zero_point: int


def on_codes(scale: float, zero_point: int, alpha: float, beta: float) -> Read | None:
    """HardSigmoid(x) = clip(alpha · x + beta, 0, 1) of x = (code - zero_point) · scale, read from the codes of x themselves.

        off, on = zero_point + rint(-beta / alpha / scale), zero_point + rint((1 - beta) / alpha / scale)
        HardSigmoid(x) ≈ clip((code - off) / (on - off), 0, 1)

    The knees move to the nearest codes, x by no more than scale/2, which is x's own rounding. It is exactly 0 below and 1 above.

    Args:
        scale, zero_point: of x, uint8 codes.
        alpha, beta: float, alpha > 0, 0 <= beta <= 1.

    Returns:
        None where uint8 codes cannot say it: `off` is below code 0, or both knees are one code.
    """
    off = zero_point + round(-beta / alpha / scale)
    on = zero_point + round((1 - beta) / alpha / scale)
    if not 0 <= off < on:
        return None
    return Read(first=off, last=min(on, 255), scale=1 / (on - off) if on <= 255 else alpha * scale, zero_point=off)


def parameters(node: ir.Node) -> tuple[float, float]:
    """alpha and beta of a HardSigmoid."""
    return node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)


def widen(model: ir.Model, int8: Collection[str], ranges: Ranges) -> Ranges:
    """The ranges as `read` needs them: x reaches down to where HardSigmoid(x) is 0, and HardSigmoid(x) fills [0, 1].

    Where x goes on above, its upper knee lies between two codes and moves to one (`on_codes`). A scale of which the knee is a
    multiple must be a larger one, which was no better: -2.3 to +1.3 dB over five methods of ranges, -0.4 on average on PP-LCNet,
    and where few codes lie between the knees it grows much: PP-OCR's detector fell from
    12.4 to 6.6 dB by one scale 1.2 times as large.

    Args:
        model: the prepared graph.
        int8: the names of its int8 nodes.
        ranges: of the tensors that they touch.
    """
    tensors, kept = dict(ranges.tensors), dict(ranges.kept)
    for node in model.graph:
        if node.op_type != GATE or node.name not in int8:
            continue
        alpha, beta = parameters(node)
        x, y = (value.name or "" for value in (node.inputs[0], node.outputs[0]) if value is not None)
        tensors[x] = replace(tensors[x], low=min(tensors[x].low, -beta / alpha), high=max(tensors[x].high, 0.0))
        tensors[y] = replace(tensors[y], low=0.0, high=1.0)
        kept.pop(x, None)
        kept.pop(y, None)
    return replace(ranges, tensors=tensors, kept=kept)


def read(quantized: ir.Model, int8: Collection[str]) -> None:
    """Let codes of x stand for HardSigmoid(x), at every int8 HardSigmoid of the graph, which is changed.

    codes -> DequantizeLinear -> HardSigmoid -> QuantizeLinear -> DequantizeLinear   becomes   codes -> Clip -> DequantizeLinear

    and no Clip where the codes saturate at the knees by themselves. Where uint8 codes cannot say it (`on_codes`), all stays.

    Args:
        quantized: an int8 graph of `quantize.to_int8` without gates_on_codes.
        int8: the names of its int8 nodes.
    """
    for node in [node for node in quantized.graph if node.op_type == GATE and node.name in int8]:
        value, readers = node.inputs[0], [usage.node for usage in node.outputs[0].uses()]
        maker = value.producer() if value is not None else None
        if (
            maker is None
            or maker.op_type != "DequantizeLinear"
            or {each.op_type for each in readers} != {"QuantizeLinear"}
        ):
            continue
        codes, scale, zero_point = maker.inputs[0], graph.constant(maker.inputs[1]), graph.constant(maker.inputs[2])
        found = on_codes(float(scale), int(zero_point), *parameters(node)) if codes is not None else None  # type: ignore[arg-type]
        if found is None:
            continue
        if (found.first, found.last) != (0, 255):
            codes = _clipped(quantized, node, codes, found)
        settings = [
            edit.initializer(quantized, f"{node.outputs[0].name}_read_{name}", array)
            for name, array in (
                ("scale", np.array(found.scale, np.float32)),
                ("zero_point", np.array(found.zero_point, np.uint8)),
            )
        ]
        for usage in [usage for quantize in readers for usage in quantize.outputs[0].uses()]:
            usage.node.replace_input_with(usage.idx, codes)
            if usage.node.op_type == "DequantizeLinear":
                for index, setting in enumerate(settings, start=1):
                    usage.node.replace_input_with(index, setting)
    RemoveUnusedNodesPass()(quantized)


def _clipped(quantized: ir.Model, gate: ir.Node, codes: ir.Value | None, found: Read) -> ir.Value:
    """The codes behind a Clip that takes the gate's name."""
    name = gate.outputs[0].name
    ends = [
        edit.initializer(quantized, f"{name}_{end}", np.array(code, np.uint8))
        for end, code in (("first", found.first), ("last", found.last))
    ]
    clip = ir.node("Clip", [codes, *ends], name=gate.name)
    clipped = clip.outputs[0]
    clipped.name = edit.free_name(quantized, f"{name}_clipped")
    clipped.dtype, clipped.shape = ir.DataType.UINT8, gate.outputs[0].shape
    quantized.graph.insert_after(gate, clip)
    return clipped


def refusal(node: ir.Node, movers: Collection[str]) -> str:
    """Why a gate cannot read its input's codes; empty where it can. movers: op_types that leave codes as they are."""
    alpha, beta = parameters(node)
    if alpha <= 0 or not 0 <= beta <= 1:
        return "it falls, or saturates on one side of 0 only"
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if producer is not None and producer.op_type in movers:
        return f"a {producer.op_type} made its input, whose codes have another tensor's range"
    return ""
