from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import exporter
from exporter import accept, graph, place, quantize
from exporter.calibrate import Range, Ranges
from exporter.errors import QuantizeError
from exporter.numerics.formats import FLOAT
from exporter.place import Plan
from exporter.recipe import Rule
from exporter.search.plans import Choice, Plans
from exporter.target import X86_VNNI
from tests.exporter import graphs

CHAIN = """(float[N,8] x) => (float[N,8] y) {
    [g0] a = Gemm(x, w0)
    [r0] b = Relu(a)
    [g1] c = Gemm(b, w1)
    [r1] d = Relu(c)
    [g2] e = Gemm(d, w2)
    [r2] f = Relu(e)
    [g3] y = Gemm(f, w3)
}"""
WEIGHTS = {f"w{n}": graphs.noise(n, 8, 8) for n in range(4)}
BATCH = {"x": graphs.noise(9, 16, 8)}
REAL = quantize._rewrite


def accepted(rules: Sequence[Rule] = (), ranges: Mapping[str, Range] | None = None) -> accept.Accepted:
    model = graphs.model(CHAIN, WEIGHTS)
    _, found = graphs.planned(model, BATCH)
    shapes = graph.shapes(model, BATCH)

    def decide(refused: Mapping[str, str], floats: Sequence[str]) -> Plan:
        return place.decide(model, X86_VNNI, rules, shapes, dict.fromkeys(floats, FLOAT), refused)

    its = Ranges(tensors={**found.tensors, **(ranges or {})}, batches=1, method="minmax")
    return accept.accepted(model, decide({}, ()), its, BATCH, decide)


def refusing(*bad: str, together: bool = False) -> Any:
    """A quantizer that refuses these nodes, with a message that names none."""

    def rewrite(model: ir.Model, plan: Plan, *rest: Any) -> ir.Model:
        if (all if together else any)(name in plan.int8 for name in bad):
            raise QuantizeError("ONNX Runtime's quantizer refused the graph", found="ValueError: no")
        return REAL(model, plan, *rest)

    return mock.patch.object(quantize, "_rewrite", side_effect=rewrite)


def floats(plan: Plan) -> list[str]:
    return [each.node for each in plan.decisions if each.precision == "float"]


def test_plan_that_the_quantizer_takes_is_tried_once() -> None:
    with refusing() as quantizer:
        found = accepted()
    assert quantizer.call_count == 1 and found.plan.refused == {} and floats(found.plan) == []


@pytest.mark.parametrize("bad", [("g2",), ("g0", "g3")])
def test_nodes_that_are_refused_turn_float_with_the_reason_and_others_do_not(bad: tuple[str, ...]) -> None:
    with refusing(*bad):
        found = accepted()
    assert [*found.plan.refused] == [*bad] and {*bad} <= {*floats(found.plan)}
    assert {"g0", "g1", "g2", "g3"} - {*bad} <= {*found.plan.int8}
    reason = next(each.reason for each in found.plan.decisions if each.node == bad[0])
    assert reason == "ONNX Runtime's quantizer refused the graph: found ValueError: no"
    graph.runner(found.int8)(BATCH)


def test_nodes_that_are_refused_only_together_lose_some_of_them() -> None:
    with refusing("g0", "g3", together=True):
        found = accepted()
    assert len({"g0", "g1", "g2", "g3"} & {*found.plan.int8}) >= 1 and found.plan.refused


def test_node_that_an_error_names_needs_no_search() -> None:
    def check(*_: object) -> None:
        if check.calls == 0:
            check.calls = 1
            raise QuantizeError("bias 'b'", found="1", node="g1")

    check.calls = 0
    with mock.patch.object(quantize, "_check_numbers", side_effect=check), refusing() as quantizer:
        found = accepted()
    assert quantizer.call_count == 2 and [*found.plan.refused] == ["g1"]


def test_rule_for_int8_does_not_bring_a_refused_node_back() -> None:
    with refusing("g1"):
        found = accepted([Rule(match="*", precision="int8", why="mine")])
    assert {"g1", "r1"} & {*found.plan.int8} == set() and {"g0", "g2", "g3"} <= {*found.plan.int8}


def test_graph_that_is_refused_whatever_is_float_has_nothing_in_integers() -> None:
    with refusing(*WEIGHTS, "g0", "g1", "g2", "g3"):
        found = accepted()
    assert (found.plan.int8, graph.to_bytes(found.int8)) == ((), graph.to_bytes(graphs.model(CHAIN, WEIGHTS)))


def test_values_too_small_for_a_scale_keep_their_nodes_float_and_zeros_do_not() -> None:
    found = accepted(ranges={"d": Range(low=0.0, high=1e-40, elements=1, masked=0)})
    assert "has no scale in float32" in found.plan.refused["g2"] and "g3" in found.plan.int8
    zeros = accepted(ranges={"d": Range(low=0.0, high=0.0, elements=1, masked=0)})
    assert zeros.plan.refused == {}


def test_refused_node_is_float_in_every_plan_that_a_search_makes() -> None:
    with refusing("g1"):
        found = accepted()
    model = graphs.model(CHAIN, WEIGHTS)
    shapes = graph.shapes(model, BATCH)
    plans = Plans(model, found.plan, found.int8, lambda plan: model, X86_VNNI, (), shapes)
    assert "g1" not in plans.layers
    for choice in (Choice(floats=frozenset({"g0"})), Choice(dynamic=frozenset({"g3"}))):
        assert "g1" in floats(plans.plan(choice)) and plans.plan(choice).refused == found.plan.refused


def test_export_of_a_model_with_a_refused_node_goes_on(tmp_path: Path) -> None:
    onnx.save(graphs.proto(CHAIN, WEIGHTS), tmp_path / "m.onnx")

    def batches(first: int, count: int) -> list[dict[str, graphs.Array]]:
        return [{"x": graphs.noise(first + n, 16, 8)} for n in range(count)]

    with refusing("g2"):
        report = exporter.export(
            exporter.from_onnx(tmp_path / "m.onnx"),
            exporter.load_recipe("portable"),
            batches(1, 6),
            batches(20, 2),
            tmp_path / "out",
        )
    assert report.met and any(each.node == "g2" for each in report.float_layers)
    assert "quantizer refused the graph" in (tmp_path / "out" / "plan.txt").read_text()


def test_layer_behind_a_tensor_without_a_range_is_float_and_others_are_not(tmp_path: Path) -> None:
    """h is a mask's constant throughout: nothing of it tells a range."""
    text = (
        "(float[N,8] x) => (float[N,8] y, float[N,8] z) { [g] y = Gemm(x, w, b)\n"
        " [m] m = Min(y, low)\n [h] z = Gemm(m, tiny, b) }"
    )
    weights = {"w": graphs.noise(0, 8, 8), "b": graphs.noise(1, 8), "low": np.float32(-2e30)}
    weights["tiny"] = graphs.noise(2, 8, 8) * np.float32(1e-30)
    onnx.save(graphs.proto(text, weights), tmp_path / "m.onnx")
    given = [{"x": graphs.noise(10 + n, 16, 8)} for n in range(8)]
    source, recipe = exporter.from_onnx(tmp_path / "m.onnx"), exporter.load_recipe("portable")
    exporter.export(source, recipe, given[:6], given[6:], tmp_path / "out", max_evaluations=0)
    plan = {line.split(" | ")[0]: line for line in (tmp_path / "out" / "plan.txt").read_text().splitlines()}
    assert "| int8 |" in plan["g"] and "no calibration batch has a value in m that tells its range" in plan["h"]
