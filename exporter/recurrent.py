"""LSTM in dynamic int8: products of inputs and of state with codes of the weights, for as many LSTM as the outputs bear.

    LSTM(x, W, R, B)    becomes    DynamicQuantizeLSTM(x, Ŵ, R̂, B)

ONNX's LSTM has no form with Q/DQ that ONNX Runtime runs in integers; this operator of its own does. It finds the range of x over
all steps and that of the state at each, rounds both, and multiplies in integers; biases, gates and the cell state stay real
numbers. Codes of W and R [directions, 4 hidden, in] are symmetric, a scale a row, and lie transposed:

    Ŵ = rint(W / scale), scale = max|row| / 127

On x86 with VNNI an LSTM of 256 units takes a third of its float time, one of 64 nine tenths, one of 32 more than it. Which LSTM
the outputs bear is asked of them (`bear`): in a speaker encoder of three the last two leave 30 dB, the first alone 1.4.

Source: ONNX Runtime's DynamicQuantizeLSTM (com.microsoft 1), dynamic_quantize_lstm.cc; its quantize_dynamic makes the same node.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporter import bear, graph, place
from exporter.batches import Batch
from exporter.budget import Accepts
from exporter.place import Plan
from exporter.prepare import edit
from exporter.qparams import symmetric
from exporter.target import Target
from runtime import drift

LSTM, DOMAIN = "LSTM", "com.microsoft"
PAYS_FROM = 2 * 4 * 64 * 64  # elements of W and R in a direction


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """The graph and the plan with the LSTM that became dynamic."""

    int8: ir.Model
    plan: Plan
    layers: tuple[str, ...]


def improve(
    int8: ir.Model,
    plan: Plan,
    target: Target,
    expected: Sequence[Batch],
    batches: Sequence[Batch],
    left: Collection[str] = (),
    floor_db: float = -math.inf,
    accepts: Accepts | None = None,
) -> Laid:
    """Let LSTM be dynamic where that is faster on the target, as many as the outputs bear.

    Args:
        int8: the quantized graph, which is not changed, of the plan.
        expected: outputs of the FP32 graph on each batch.
        batches: calibration batches to compare on.
        left: nodes that stay float, for instance because a rule says so.
        floor_db: see `bear.most`.
        accepts: see `search.Goal`.
    """
    free = {d.node for d in plan.decisions if d.precision == "float"} - set(left)
    names = [node.name or "" for node in int8.graph if node.name in free and _pays(node, target)]
    if not names:
        return Laid(int8=int8, plan=plan, layers=())

    def made(chosen: Collection[str]) -> ir.Model:
        clone = int8.clone()
        lay(clone, chosen)
        return clone

    def snr_db(chosen: Collection[str]) -> float:
        pairs = zip(expected, map(graph.runner(made(chosen)), batches), strict=True)
        return drift.measure(pairs).worst_snr_db

    borne = bear.most(names, snr_db, floor_db=floor_db)
    found = made(borne.chosen)
    if not borne.chosen or (accepts is not None and not accepts(graph.runner(found))):
        return Laid(int8=int8, plan=plan, layers=())
    more = f", and those of {len(borne.chosen) - 1} more," if len(borne.chosen) > 1 else ""
    reason = f"its products in integers{more} take the outputs from {borne.before_db:.1f} to {borne.after_db:.1f} dB"
    decisions = (
        replace(d, precision="dynamic", reason=reason) if d.node in borne.chosen else d for d in plan.decisions
    )
    return Laid(int8=found, plan=replace(plan, decisions=tuple(decisions)), layers=borne.chosen)


def _pays(node: ir.Node, target: Target) -> bool:
    """Whether it is an LSTM that can be dynamic, and multiplies enough in a step: what is smaller is faster in float."""
    if node.op_type != LSTM or place.not_dynamic(node, target):
        return False
    weights = (graph.constant(value) for value in node.inputs[1:3])
    return sum(int(weight[0].size) for weight in weights if weight is not None) >= PAYS_FROM


def lay(changed: ir.Model, layers: Collection[str]) -> None:
    """Let the LSTM among these layers, for which `place.not_dynamic` has no reason, be dynamic; the graph is changed."""
    stored: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    for node in [node for node in changed.graph if node.name in layers and node.op_type == LSTM]:
        for value in node.inputs[1:3]:
            if value is not None and value not in stored:
                stored[value] = _stored(changed, value)
        inputs: list[ir.Value | None] = [*node.inputs, *[None] * (8 - len(node.inputs))]
        w, r = (stored[value] for value in node.inputs[1:3] if value is not None)
        inputs[1], inputs[2] = w[0], r[0]
        attributes = [each for name, each in node.attributes.items() if name != "layout"]
        new = ir.Node(
            DOMAIN,
            "DynamicQuantizeLSTM",
            [*inputs, *w[1:], *r[1:]],
            attributes,
            num_outputs=len(node.outputs),
            name=node.name,
        )
        for before, after in zip(node.outputs, new.outputs, strict=True):
            after.type, after.shape = before.type, before.shape
        names = [value.name for value in node.outputs]
        ir.convenience.replace_nodes_and_values(changed.graph, node, [node], [new], node.outputs, new.outputs)
        for value, name in zip(new.outputs, names, strict=True):
            value.name = name
        changed.graph.opset_imports.setdefault(DOMAIN, 1)
    RemoveUnusedNodesPass()(changed)


def _stored(model: ir.Model, value: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes int8 [directions, in, 4 hidden], scales float32 and zero points int8 [directions, 4 hidden] of W or R."""
    weight = graph.constant(value)
    assert weight is not None
    codes, scale = symmetric(weight, (2,))
    arrays = {
        "turned": np.ascontiguousarray(codes.transpose(0, 2, 1)),
        "scale": scale[:, :, 0],
        "zero_point": np.zeros(scale.shape[:2], np.int8),
    }
    turned, scales, zero = (edit.initializer(model, f"{value.name}_dynamic_{key}", arrays[key]) for key in arrays)
    return turned, scales, zero
