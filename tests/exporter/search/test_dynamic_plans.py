"""exporter.search: layers that turn dynamic, where one range for all inputs is too coarse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from exporter import graph, place, quantize
from exporter.calibrate import distinguish, observe
from exporter.progress import Silent
from exporter.recipe import Rule
from exporter.search import Point, Problem, costs, search
from exporter.search.plans import Plans
from exporter.target import X86_VNNI
from tests.exporter import graphs
from tests.exporter.search.test_find import NO_LIMIT, problem

# The input of "far" reaches ten times as far in one batch as in the others: one range for all is too coarse
FAR = """(float[1,16] x) => (float[1,16] y) {
    [one] a = MatMul(x, w1)
    [two] b = Gemm(a, w2, c)
    [far] y = MatMul(b, w3)
}"""
CODES = {
    "w1": graphs.noise(1, 16, 16),
    "w2": graphs.noise(2, 16, 16),
    "w3": graphs.noise(3, 16, 16),
    "c": graphs.noise(4, 16),
}


def far(dynamic_ms: float) -> Problem:
    """Static layers take 1 ms, dynamic ones this."""
    model = graphs.model(FAR, CODES)
    batches = [{"x": graphs.noise(seed, 1, 16) * np.float32(100 if seed == 9 else 1)} for seed in range(10)]
    shapes = graph.shapes(model, batches[0])
    plan = place.decide(model, X86_VNNI, (), shapes)
    int8 = quantize.to_int8(model, plan, distinguish(model, observe(model, plan.tensors, batches).ranges))
    each = {name: costs.NodeCost(float_ms=3.0, int8_ms=1.0, dynamic_ms=dynamic_ms) for name in plan.int8}
    found = replace(
        costs.from_table(model, plan, X86_VNNI, shapes), nodes=each, quantize_ns=0.0, dequantize_ns=0.0, crossing_ns=0.0
    )
    plans = Plans(model, plan, int8, lambda _: model, X86_VNNI, (), shapes)
    return Problem(plans=plans, batches=batches[:8], costs=found)


def test_layers_are_dynamic_where_one_range_for_all_inputs_is_too_coarse() -> None:
    found = search(far(dynamic_ms=1.01), replace(NO_LIMIT, max_slower=0.05), Silent())
    assert found.first.snr_db < 20
    assert found.chosen.snr_db > 30
    assert (found.chosen.float_layers, found.chosen.dynamic_layers) == ((), ("one", "two", "far"))
    assert found.evaluations == 2
    assert graphs.precisions(found.plan) == {"one": "dynamic", "two": "dynamic", "far": "dynamic"}
    reason = found.plan.decisions[0].reason
    assert reason == (
        f"search: dynamic, with 2 more takes the outputs from {found.first.snr_db:.1f} to {found.chosen.snr_db:.1f} dB"
    )


def test_layers_stay_static_where_that_is_accurate_enough() -> None:
    found = search(far(dynamic_ms=0.1), replace(NO_LIMIT, aim_snr_db=-100.0), Silent())
    assert (found.chosen, found.evaluations) == (found.first, 1)


def test_some_layers_are_dynamic_where_all_of_them_take_too_long() -> None:
    given = far(dynamic_ms=1.01)
    found = search(given, replace(NO_LIMIT, aim_snr_db=1000.0, max_slower=0.007), Silent())
    assert found.first.snr_db < found.chosen.snr_db
    assert 1 <= len(found.chosen.dynamic_layers) <= 2
    assert found.chosen.ms <= 1.007 * found.first.ms
    assert any(len(point.dynamic_layers) == 3 and point.snr_db > 30 for point in found.points)
    assert found.evaluations <= 1.3 * found.announced


def test_dynamic_plan_counts_with_its_own_time_and_others_with_their_share_of_it() -> None:
    given, asked = far(dynamic_ms=1.01), list[tuple[str, ...]]()

    def ratio(point: Point, _: object) -> float:
        asked.append(point.dynamic_layers)
        return 1 + 0.5 * len(point.dynamic_layers)

    found = search(replace(given, ratio=ratio), replace(NO_LIMIT, max_slower=0.05), Silent())
    assert asked[0] == ("one", "two", "far")
    assert found.chosen == found.first
    timed = {len(point.dynamic_layers): point.ms for point in found.points if not point.float_layers}
    assert timed[3] == pytest.approx(7.5)
    assert timed[1] == pytest.approx(3.01 + (7.5 - 3.03) / 3)


def test_layer_that_a_rule_calls_float_or_int8_is_never_dynamic() -> None:
    rules = [
        Rule(match="bad", precision="int8", why="asked for"),
        Rule(match="one", precision="float", why="asked for"),
    ]
    given = problem(rules=rules, target=X86_VNNI)
    assert given.plans.dynamic == {"three", "four"}


def test_dynamic_layers_must_buy_a_decibel() -> None:
    given = far(dynamic_ms=1.0)
    static = search(given, replace(NO_LIMIT, aim_snr_db=-100.0), Silent()).chosen
    for more, layers in ((0.9, 0), (1.1, 3)):
        found = search(given, replace(NO_LIMIT, aim_snr_db=static.snr_db + more, max_slower=0.05), Silent())
        assert len(found.chosen.dynamic_layers) == layers
        assert max(point.snr_db for point in found.points) > 30
