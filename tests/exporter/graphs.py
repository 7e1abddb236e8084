"""Graphs written by hand in ONNX's text form, for what needs no torch, and what tests ask of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper

from exporter import graph, place, proof
from exporter.calibrate import Ranges, observe
from exporter.place import Plan
from exporter.recipe import Rule
from exporter.target import X86_VNNI, Target

Array = NDArray[Any]


def proto(text: str, weights: Mapping[str, Any] | None = None, opset: int = 20) -> onnx.ModelProto:
    """`(float[N,4] x) => (float[N,4] y) { [node] y = Relu(x) }` and {initializer: array} as a checked model."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    arrays = {name: np.asarray(value) for name, value in (weights or {}).items()}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    onnx.checker.check_model(inferred)
    return inferred


def model(text: str, weights: Mapping[str, Any] | None = None, opset: int = 20) -> ir.Model:
    return ir.serde.deserialize_model(proto(text, weights, opset))


def noise(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def op_types(of: ir.Model) -> list[str]:
    return [node.op_type for node in of.graph]


def node(of: ir.Model, name: str) -> ir.Node:
    return next(each for each in of.graph if each.name == name)


def rewritten(
    before: ir.Model, rewrite: Callable[[ir.Model], int], *batches: Mapping[str, Array]
) -> tuple[ir.Model, int]:
    """A rewritten clone, proved equal on each batch, and how often the rewrite matched."""
    after = before.clone()
    matched = rewrite(after)
    for batch in batches:
        assert proof.difference(graph.runner(before)(batch), graph.runner(after)(batch)) == ""
    onnx.checker.check_model(ir.serde.serialize_model(after))
    return after, matched


def planned(
    of: ir.Model, *batches: Mapping[str, Array], target: Target = X86_VNNI, **rules: str
) -> tuple[Plan, Ranges]:
    """The plan, and the ranges over `batches`; rules as op_type="float"."""
    given = tuple(Rule(match=match, precision=precision, why="test") for match, precision in rules.items())  # type: ignore[arg-type]
    plan = place.decide(of, target, given, graph.shapes(of, batches[0]))
    return plan, observe(of, plan.tensors, iter(batches)).ranges


def precisions(plan: Plan) -> dict[str, str]:
    return {decision.node: decision.precision for decision in plan.decisions}
