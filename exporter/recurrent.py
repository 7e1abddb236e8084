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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporter import bear, graph, place
from exporter.batches import Batch
from exporter.budget import Accepts
from exporter.numerics.formats import FLOAT, W8A8_DYNAMIC
from exporter.numerics.quantized import symmetric
from exporter.place import LSTM, Decision, Plan
from exporter.prepare import edit
from exporter.target import Target
from runtime import drift, gate
from runtime.drift import NOTHING_KNOWN, Drift, Ground
from runtime.manifest import Budget

DOMAIN, OPERATOR = "com.microsoft", "DynamicQuantizeLSTM"
WORTH_DB = 5.0
PAYS_FROM = 2 * 4 * 64 * 64  # elements of W and R in a direction


@dataclass(frozen=True, slots=True, kw_only=True)
class Laid:
    """The graph and the plan with the LSTM that became dynamic, and why others did not."""

    int8: ir.Model
    plan: Plan
    layers: tuple[str, ...]


def candidates(int8: ir.Model, plan: Plan, target: Target, left: Collection[str] = ()) -> tuple[str, ...]:
    """LSTM that are float in the plan and would be faster in integers on the target, without those that are to be left alone."""
    free = {d.node for d in plan.decisions if d.scheme == FLOAT} - set(left)
    return tuple(node.name or "" for node in int8.graph if node.name in free and _pays(node, target))


def improve(
    int8: ir.Model,
    plan: Plan,
    names: Sequence[str],
    expected: Sequence[Batch],
    batches: Sequence[Batch],
    aim_db: float,
    budget: Budget,
    accepts: Accepts | None = None,
    against: Mapping[str, Ground] = NOTHING_KNOWN,
) -> Laid:
    """Let LSTM be dynamic, as many as the outputs bear.

    Args:
        int8: the quantized graph, which is not changed, of the plan.
        names: `candidates`.
        expected: outputs of the FP32 graph on each batch.
        batches: calibration batches to compare on.
        aim_db: of the search. Outputs bear WORTH_DB less: half a decibel a percent is what a search pays, and these save tens.
        budget: limits on drift; outputs that are within them stay so.
        accepts: see `search.Goal`; where it refuses, the last are float again, one by one.
        against: what each output is held against.
    """
    if not names:
        return Laid(int8=int8, plan=plan, layers=())

    def made(chosen: Collection[str]) -> ir.Model:
        clone = int8.clone()
        lay(clone, chosen)
        return clone

    @cache
    def measured(chosen: tuple[str, ...]) -> Drift:
        return drift.measure(zip(expected, map(graph.runner(made(chosen)), batches), strict=True), against)

    def within(found: Drift) -> bool:
        return all(line.met for line in gate.limits(budget, found, 1.0, 0, 0))

    asked, alone = within(measured(())), dict[str, float]()

    def snr_db(chosen: Collection[str]) -> float:
        found = measured(tuple(chosen))
        if len(chosen) == 1:
            alone.update(dict.fromkeys(chosen, found.worst_snr_db))
        return found.worst_snr_db if not asked or within(found) else -math.inf

    borne = bear.most(names, snr_db, aim_db - WORTH_DB)
    layers = borne.chosen
    while layers and accepts is not None and not accepts(graph.runner(made(layers))):
        layers = layers[:-1]
    after = borne.after_db if layers == borne.chosen else snr_db(layers)
    more = f", and those of {len(layers) - 1} more," if len(layers) > 1 else ""
    reason = f"its products in integers{more} take the outputs from {borne.before_db:.1f} to {after:.1f} dB"
    refused = {name: f"its products in integers cost too much, SNR {db:.1f} dB" for name, db in alone.items()}

    def decided(each: Decision) -> Decision:
        if each.node in layers:
            return replace(each, scheme=W8A8_DYNAMIC, reason=reason)
        return replace(each, reason=f"{each.reason}; {refused[each.node]}") if each.node in refused else each

    decisions = tuple(map(decided, plan.decisions))
    return Laid(int8=made(layers), plan=replace(plan, decisions=decisions), layers=layers)


def is_in(model: ir.Model) -> bool:
    """Whether an LSTM of the graph is dynamic: its codes keep no pair rule."""
    return any(node.op_type == OPERATOR for node in model.graph)


def _pays(node: ir.Node, target: Target) -> bool:
    """Whether it is an LSTM that can be dynamic, and multiplies enough in a step: what is smaller is faster in float."""
    if node.op_type != LSTM or place.not_dynamic(node, target):
        return False
    weights = (graph.constant(value) for value in node.inputs[1:3])
    return sum(int(weight[0].size) for weight in weights if weight is not None) >= PAYS_FROM


def lay(changed: ir.Model, layers: Collection[str]) -> None:
    """Let the LSTM among these layers, for which `place.not_dynamic` has no reason, be dynamic; the graph is changed."""
    nodes = [node for node in changed.graph if node.name in layers and node.op_type == LSTM]
    if not nodes:
        return
    stored: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
    for node in nodes:
        for value in node.inputs[1:3]:
            if value is not None and value not in stored:
                stored[value] = _stored(changed, value)
        inputs: list[ir.Value | None] = [*node.inputs, *[None] * (8 - len(node.inputs))]
        w, r = (stored[value] for value in node.inputs[1:3] if value is not None)
        inputs[1], inputs[2] = w[0], r[0]
        attributes = [each for name, each in node.attributes.items() if name != "layout"]
        new = ir.Node(
            DOMAIN,
            OPERATOR,
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
