"""A file whose layers are in integers already: whether it ships as it is, and what is to be said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from exporter import graph, lint, ops
from exporter.place import Plan
from exporter.target import Target

LAYERS = tuple(name for name in ops.LAYERS if ops.of(name).kernel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What `lint` finds in integer nodes of the file: notes {node: finding}; whether all keep the pair rule; a sentence."""

    notes: Mapping[str, str]
    pair_rule: bool
    sentence: str


def is_whole(model: ir.Model, target: Target) -> bool:
    """Whether every layer is between Q/DQ, in types that the target computes in integers, with its weight as codes.

    The pair rule is not asked for: keeping it would change codes that the file was made with.
    """
    layers = [node for node in model.graph if node.op_type in LAYERS and not node.domain]
    found = [each for each in lint.check(model, target) if each.severity == "error" and each.rule != lint.PAIRS]
    return bool(layers) and all(map(_has_codes, layers)) and not found


def _has_codes(layer: ir.Node) -> bool:
    """Whether a layer's weight is codes and its input is; a product of two activations has no weight."""
    weight = layer.inputs[1].producer() if layer.inputs[1] is not None else None
    if graph.constant(layer.inputs[1]) is not None:
        return False
    codes = weight is not None and weight.op_type == graph.DEQUANTIZE and graph.constant(weight.inputs[0]) is not None
    return graph.in_integers(layer) and codes if codes else _is_product(layer)


def _is_product(layer: ir.Node) -> bool:
    """Whether neither factor comes from constants alone."""
    return layer.op_type == "MatMul" and not any(value is None or _is_constant(value) for value in layer.inputs)


def _is_constant(value: ir.Value) -> bool:
    maker = value.producer()
    if maker is None:
        return not value.is_graph_input() or value.is_initializer()
    return all(each is None or _is_constant(each) for each in maker.inputs)


def judge(model: ir.Model, plan: Plan, target: Target) -> Judged:
    """What is to be said of the nodes that the file has in integers.

    Args:
        model: the int8 graph that ships.
        plan: of it.
        target: that it is meant for.
    """
    given = set(plan.given)
    if not given:
        return Judged(notes={}, pair_rule=True, sentence="")
    found = [each for each in lint.check(model, target) if each.node in given and each.severity == "error"]
    broken = any(each.node in given and each.rule == lint.PAIRS for each in lint.check(model))
    count = sum(d.node in given and d.op_type not in graph.CROSSINGS for d in plan.decisions)
    parts = [f"{count} node{'s' * (count != 1)} in integers as they are"] if count else []
    parts += [f"{rule}: {text}" for rule, text in {each.rule: each.message for each in found}.items()]
    notes = {each.node: f"{each.rule}: found {each.found}" for each in found}
    return Judged(notes=notes, pair_rule=not broken, sentence="; ".join(parts))
