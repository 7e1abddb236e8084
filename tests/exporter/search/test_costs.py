"""exporter.search.costs: what nodes take, measured or predicted, written and read again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from exporter import dynamic, graph, place, quantize
from exporter.calibrate import observe
from exporter.errors import RecipeError
from exporter.numerics.formats import FLOAT, W8A8_DYNAMIC
from exporter.recipe import Rule
from exporter.search import costs
from exporter.target import PORTABLE, X86_VNNI
from tests import models
from tests.exporter import graphs, stages

MODEL = "residual"


def measured() -> costs.Costs:
    model, plan = stages.prepared(MODEL).model, stages.plan(MODEL)
    batch = next(models.batches(MODEL, 0, 1))
    int8 = quantize.to_int8(model, plan, observe(model, plan.tensors, [batch]).ranges)
    return costs.measure(model, plan, int8, batch, X86_VNNI, shapes(), runs=3)


def shapes() -> dict[str, tuple[int, ...]]:
    return graph.shapes(stages.prepared(MODEL).model, next(models.batches(MODEL, 0, 1)))


def test_every_int8_layer_was_timed_in_float_and_in_int8() -> None:
    found = measured()
    layers = [d.node for d in stages.plan(MODEL).decisions if d.macs and d.precision == "int8"]
    assert layers
    assert all(found.nodes[layer].float_ms > 0 and found.nodes[layer].int8_ms > 0 for layer in layers)
    assert found.measured
    assert "onnxruntime" in found.where


def test_dynamic_layers_were_timed_with_what_finds_their_ranges() -> None:
    model, plan = stages.prepared("transformer").model, stages.plan("transformer")
    batch = next(models.batches("transformer", 0, 1))
    sizes = graph.shapes(model, batch)
    int8 = quantize.to_int8(model, plan, observe(model, plan.tensors, [batch]).ranges)
    names = [d.node for d in plan.decisions if d.op_type == "Gemm" and d.precision == "int8"]
    laid = model.clone()
    dynamic.lay(laid, model, names, {})
    found = costs.measure(model, plan, int8, batch, X86_VNNI, sizes, laid, runs=3)
    assert {name for name, each in found.nodes.items() if each.dynamic_ms > 0} == set(names)
    products = [d.node for d in plan.decisions if d.op_type == "MatMul"]
    other = place.decide(
        model, X86_VNNI, (), sizes, dict.fromkeys(names, W8A8_DYNAMIC) | dict.fromkeys(products, FLOAT)
    )
    floats = sum(each.float_ms for name, each in found.nodes.items() if name not in names)
    assert costs.predict(model, other, found, sizes) == pytest.approx(
        floats + sum(found.nodes[name].dynamic_ms for name in names)
    )


def test_dynamic_layer_that_was_not_timed_takes_what_the_static_one_takes() -> None:
    model, plan = stages.prepared("transformer").model, stages.plan("transformer")
    sizes = graph.shapes(model, next(models.batches("transformer", 0, 1)))
    names = [d.node for d in plan.decisions if d.op_type == "Gemm" and d.precision == "int8"]
    known = costs.from_table(model, plan, X86_VNNI, sizes)
    unknown = replace(known, nodes={name: replace(each, dynamic_ms=0.0) for name, each in known.nodes.items()})
    products = [d.node for d in plan.decisions if d.op_type == "MatMul"]
    other = place.decide(
        model, X86_VNNI, (), sizes, dict.fromkeys(names, W8A8_DYNAMIC) | dict.fromkeys(products, FLOAT)
    )
    floats = sum(each.float_ms for name, each in known.nodes.items() if name not in names)
    static = sum(known.nodes[name].int8_ms for name in names)
    assert costs.predict(model, other, unknown, sizes) == pytest.approx(floats + static)
    assert costs.predict(model, other, known, sizes) > floats + static


def test_predicted_dynamic_layer_is_the_static_one_and_a_share_of_finding_and_rounding_its_input() -> None:
    text = "(float[64,32] x) => (float[64,16] y, float[64,16] z) { [one] y = MatMul(x, v) [two] z = Gemm(x, w) }"
    model = graphs.model(text, {"v": graphs.noise(1, 32, 16), "w": graphs.noise(2, 32, 16)})
    sizes = graph.shapes(model, {"x": graphs.noise(0, 64, 32)})
    plan = place.decide(model, X86_VNNI, (), sizes)
    found = costs.from_table(model, plan, X86_VNNI, sizes)
    rounding = (X86_VNNI.range_ns + X86_VNNI.quantize_ns) * 64 * 32 + X86_VNNI.crossing_ns
    for each in found.nodes.values():
        assert each.dynamic_ms == pytest.approx(each.int8_ms + rounding / 2 / 1e6)
    both = place.decide(model, X86_VNNI, (), sizes, dict.fromkeys(("one", "two"), W8A8_DYNAMIC))
    more = costs.predict(model, both, found, sizes) - costs.predict(model, plan, found, sizes)
    assert more == pytest.approx(X86_VNNI.range_ns * 64 * 32 / 1e6)


def test_costs_are_read_as_they_were_written() -> None:
    model = stages.prepared(MODEL).model
    found = measured()
    assert costs.read(found.to_json(), model, stages.plan(MODEL), X86_VNNI, "costs.json") == found


def test_costs_of_another_graph_are_refused() -> None:
    with pytest.raises(RecipeError, match="the costs of another graph"):
        costs.read(
            measured().to_json(),
            stages.prepared("transformer").model,
            stages.plan("transformer"),
            X86_VNNI,
            "costs.json",
        )


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 9}', '{"format": 3, "nodes": {"a": 1}}'])
def test_what_is_no_cost_table_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected a cost table"):
        costs.read(text, stages.prepared(MODEL).model, stages.plan(MODEL), X86_VNNI, "costs.json")


def test_predicted_ms_is_nodes_and_crossings_as_the_plan_has_them() -> None:
    model, plan = stages.prepared(MODEL).model, stages.plan(MODEL)
    found = costs.from_table(model, plan, X86_VNNI, shapes())
    assert not found.measured
    assert "predicted" in found.where
    layers = [d.node for d in plan.decisions if d.macs and d.precision == "int8"]
    everything = [Rule(match="*", precision="float", why="test")]
    floats = place.decide(model, X86_VNNI, everything, shapes())
    in_float = costs.predict(model, floats, found, shapes())
    assert in_float == pytest.approx(sum(each.float_ms for each in found.nodes.values()))
    assert costs.predict(model, plan, found, shapes()) < in_float
    assert sum(found.nodes[layer].int8_ms for layer in layers) < costs.predict(model, plan, found, shapes())


def test_tables_numbers_are_plain_json() -> None:
    given = json.loads(costs.from_table(stages.prepared(MODEL).model, stages.plan(MODEL), X86_VNNI, shapes()).to_json())
    assert given["format"] == costs.FORMAT
    assert {*given["nodes"]} == {*stages.plan(MODEL).int8}


def test_costs_of_another_target_or_of_a_plan_with_fewer_int8_nodes_are_refused() -> None:
    model, plan = stages.prepared(MODEL).model, stages.plan(MODEL)
    text = costs.from_table(model, plan, X86_VNNI, shapes()).to_json()
    with pytest.raises(RecipeError, match="the costs of another plan, for x86-vnni"):
        costs.read(text, model, plan, PORTABLE, "costs.json")
    layers = [d.node for d in plan.decisions if d.macs and d.precision == "int8"]
    fewer = place.decide(model, X86_VNNI, (), shapes(), {layers[0]: FLOAT})
    other = costs.from_table(model, fewer, X86_VNNI, shapes()).to_json()
    with pytest.raises(RecipeError, match="the costs of another plan"):
        costs.read(other, model, plan, X86_VNNI, "costs.json")
