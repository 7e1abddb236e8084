"""Open gates: HardSwish and SiLU let the scales of smoothing through, for one small integer kernel more.

x · gate(x) is no f with f(x / s) = f(x) / s, so scales end there (`moves`), and all channels of what it makes share one scale of
codes. Those of small values are rounded to 0 together: rounding these tensors of PP-LCNet alone leaves 20 dB, with a scale a
channel 49. But of x' = x / s

    HardSwish   x · clip(alpha x + beta, 0, 1) = s · x' clip(alpha s x' + beta, 0, 1)
    SiLU        x · Sigmoid(x)                 = s · x' Sigmoid(s x')

and a line with a slope per channel is a depthwise Conv of one weight a channel. So Clip(Conv(x), 0, 1) stands for an int8
HardSigmoid, where the Clip is no kernel but the saturation of codes, and Sigmoid(Conv(x)) for a Sigmoid; smoothing does the rest.
The Conv takes 0.15 ns an element on x86 with VNNI, where the product takes 0.2. In float it would take longer than what it
stands for: float gates stay closed.

Source: the move is SmoothQuant's (`smooth`). HardSwish: Howard et al. 2019, arXiv 1905.02244, section 5.2.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from exporter import gates, graph
from exporter.batches import Array, Batch
from exporter.calibrate import Range, Ranges, intervals
from exporter.correct import choose, moves
from exporter.correct.choose import Corrected
from exporter.graph import Shape
from exporter.numerics.formats import W8A8
from exporter.place import Decision, Plan
from exporter.prepare import edit
from exporter.target import Target

GATES = (gates.GATE, "Sigmoid")
REASON = "a slope per channel, so that smoothing goes through"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opened:
    """A plan whose gates are open, and its corrected int8 graph. names: of the gates, in graph order."""

    names: tuple[str, ...]
    plan: Plan
    corrected: Corrected


@dataclass(frozen=True, slots=True, kw_only=True)
class _Line:
    """The Conv of an open gate, and the tensors that it and the gate read and make. clips: whether the gate is a Clip now."""

    node: str
    x: str
    line: str
    gate: str
    clips: bool


def improve(
    model: ir.Model,
    plan: Plan,
    ranges: Ranges,
    means: Mapping[tuple[str, int], Array],
    target: Target,
    shapes: Mapping[str, Shape],
    batches: Sequence[Batch],
) -> Opened | None:
    """Open the int8 gates of a plan, and correct what comes of it.

    Args:
        model, ranges, means, target, batches: as for `choose.improve`.
        plan: any that places the nodes of the prepared graph.
        shapes: of its tensors on one batch.

    Returns:
        None where no scale would go through a gate, or smoothing does not help.

    Raises:
        QuantizeError: see `choose.improve`.
    """
    names = _useful(model, plan, shapes) if target.depthwise else ()
    if not names:
        return None
    wider, lines = _open(model, names, shapes)
    tensors, more = dict(ranges.tensors), dict(means)
    for each in lines.values():
        unit = Range(low=0.0, high=1.0, elements=ranges.tensors[each.x].elements, masked=0)
        tensors |= {each.line: unit, each.gate: unit} if each.clips else {each.line: ranges.tensors[each.x]}
        # of bias correction, which has nothing to do where each weight has a scale of its own
        more.setdefault((each.x, 1), np.zeros(shapes[each.x][1]))
    opened = _placed(plan, lines, shapes)
    corrected = choose.improve(wider, opened, replace(ranges, tensors=tensors), more, target, batches, intervals(model))
    return None if corrected.moved is None else Opened(names=names, plan=opened, corrected=corrected)


def _useful(model: ir.Model, plan: Plan, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """The gates that scales go through once they are open, in graph order."""
    int8 = set(plan.int8)
    candidates = tuple(node.name or "" for node in model.graph if node.name in int8 and _is_swish(node, int8, shapes))
    if not candidates:
        return ()
    wider, lines = _open(model, candidates, shapes)
    slots = moves.find(wider, {**shapes, **{each.line: shapes[each.x] for each in lines.values()}})
    by_channel = {name for name, its in slots.of.items() if name in shapes and its.shape == (1, shapes[name][1], 1, 1)}
    return tuple(name for name in candidates if lines[name].x in by_channel)


def _is_swish(node: ir.Node, int8: Collection[str | None], shapes: Mapping[str, Shape]) -> bool:
    """Whether a node is the gate of an int8 product x · gate(x), x [N, C, H, W], and of nothing else."""
    x = node.inputs[0] if node.op_type in GATES else None
    if x is None or len(shapes.get(x.name or "", ())) != 4:
        return False
    readers = graph.consumers(node.outputs[0])
    return (
        len(readers) == 1
        and readers[0].op_type == "Mul"
        and readers[0].name in int8
        and set(readers[0].inputs) == {x, node.outputs[0]}
    )


def _open(model: ir.Model, names: Collection[str], shapes: Mapping[str, Shape]) -> tuple[ir.Model, dict[str, _Line]]:
    """A clone with lines before the gates, which are Clip where they were HardSigmoid, and {gate: its line}."""
    clone = model.clone()
    lines: dict[str, _Line] = {}
    for node in [node for node in clone.graph if node.name in names]:
        x, y, name = node.inputs[0], node.outputs[0], node.name or ""
        assert x is not None
        clips = node.op_type == gates.GATE
        alpha, beta = gates.parameters(node) if clips else (1.0, 0.0)
        channels = shapes[x.name or ""][1]
        slope = edit.initializer(clone, f"{name}_slope", np.full((channels, 1, 1, 1), alpha, np.float32))
        offset = edit.initializer(clone, f"{name}_offset", np.full(channels, beta, np.float32))
        its = edit.unused(f"{name}_line", {each.name for each in clone.graph})
        conv = ir.node("Conv", [x, slope, offset], {"group": channels, "kernel_shape": [1, 1]}, name=its)
        line = conv.outputs[0]
        line.name, line.type, line.shape = edit.free_name(clone, f"{y.name}_line"), x.type, x.shape
        lines[name] = _Line(node=its, x=x.name or "", line=line.name, gate=y.name or "", clips=clips)
        if clips:
            ends = [edit.initializer(clone, f"{name}_{end}", np.array(end, np.float32)) for end in (0, 1)]
            clip = ir.node("Clip", [line, *ends], name=name)
            edit.replace(clone, [node], [conv, clip], y, clip.outputs[0])
        else:
            clone.graph.insert_before(node, conv)
            node.replace_input_with(0, line)
    return clone, lines


def _placed(plan: Plan, lines: Mapping[str, _Line], shapes: Mapping[str, Shape]) -> Plan:
    """The plan of the graph with lines, which are in integers like their gates."""
    decisions: list[Decision] = []
    for each in plan.decisions:
        line = lines.get(each.node)
        if line is None:
            decisions.append(each)
            continue
        macs = math.prod(shapes[line.x])
        decisions.append(Decision(node=line.node, op_type="Conv", scheme=W8A8, reason=REASON, macs=macs))
        decisions.append(replace(each, op_type="Clip", reason="folds into the layer before it") if line.clips else each)
    tensors = (*plan.tensors, *(each.line for each in lines.values()))
    return replace(plan, decisions=tuple(decisions), tensors=tensors)
