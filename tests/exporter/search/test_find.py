"""exporter.search: the cheapest plan that is accurate enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir
import pytest

from exporter import graph, place, quantize
from exporter.budget import Run
from exporter.calibrate import distinguish, observe
from exporter.progress import Silent
from exporter.recipe import Rule
from exporter.search import Goal, Point, Problem, compared, costs, frontier, minutes, search
from exporter.search.memory import Memory
from exporter.search.plans import Choice, Plans
from exporter.target import X86_VNNI, Target
from runtime.manifest import Budget
from tests.exporter import graphs

T = TypeVar("T")

# Four layers; the weight of "bad" has one giant value a channel, so its other values round to nothing
CHAIN = """(float[1,16] x) => (float[1,16] y) {
    [one] a = MatMul(x, w1)
    [norm1] an = LayerNormalization(a, g, b)
    [bad] c = MatMul(an, w2)
    [norm2] cn = LayerNormalization(c, g, b)
    [three] d = MatMul(cn, w3)
    [norm3] dn = LayerNormalization(d, g, b)
    [four] y = MatMul(dn, w4)
}"""
BAD = graphs.noise(2, 16, 16)
BAD[0] *= 300
WEIGHTS = {
    "w1": graphs.noise(1, 16, 16), "w2": BAD, "w3": graphs.noise(3, 16, 16), "w4": graphs.noise(4, 16, 16),
    "g": np.ones(16, np.float32), "b": np.zeros(16, np.float32),
}  # fmt: skip
NO_LIMIT = Goal(budget=Budget(), aim_snr_db=30.0, max_slower=10.0)


WITHOUT_DYNAMIC = replace(X86_VNNI, dynamic=())


def problem(flat: bool = True, rules: Sequence[Rule] = (), target: Target = WITHOUT_DYNAMIC) -> Problem:
    model = graphs.model(CHAIN, WEIGHTS)
    batches = [{"x": graphs.noise(seed, 1, 16)} for seed in range(8)]
    shapes = graph.shapes(model, batches[0])
    plan = place.decide(model, target, rules, shapes)
    int8 = quantize.to_int8(model, plan, distinguish(model, observe(model, plan.tensors, batches).ranges))
    found = costs.from_table(model, plan, target, shapes)
    if flat:
        layers = {d.node for d in plan.decisions if d.macs}
        each = {
            name: costs.NodeCost(
                float_ms=1.04 * (name in layers), int8_ms=1.0 * (name in layers), dynamic_ms=1.01 * (name in layers)
            )
            for name in found.nodes
        }
        found = replace(found, nodes=each, quantize_ns=0.0, dequantize_ns=0.0, crossing_ns=0.0)
    return Problem(plans=Plans(model, plan, int8, lambda _: model, target, rules, shapes), batches=batches, costs=found)


def test_layer_that_rounding_ruins_is_the_one_that_turns_float() -> None:
    given = problem()
    before = search(given, replace(NO_LIMIT, aim_snr_db=-100.0), Silent()).chosen
    found = search(given, replace(NO_LIMIT, aim_snr_db=before.snr_db + 3), Silent())
    assert found.chosen.float_layers == ("bad",)
    assert found.chosen.snr_db > before.snr_db + 3
    reasons = {d.node: d.reason for d in found.plan.decisions}
    assert graphs.precisions(found.plan)["bad"] == "float"
    assert reasons["bad"].startswith("search: float takes the outputs from")


def test_plan_that_is_accurate_enough_is_evaluated_once_and_kept() -> None:
    given = problem()
    found = search(given, replace(NO_LIMIT, aim_snr_db=-100.0), Silent())
    assert (found.evaluations, found.announced) == (1, 1)
    assert found.plan == given.plans.static
    assert found.chosen.float_layers == ()


def test_accuracy_is_bought_no_dearer_than_the_limit_on_time() -> None:
    given = problem()
    for slower, layers in ((0.0, 0), (0.015, 1), (0.025, 2)):
        found = search(given, replace(NO_LIMIT, aim_snr_db=1000.0, max_slower=slower), Silent())
        assert found.chosen.ms <= (1 + slower) * 4.0
        assert len(found.chosen.float_layers) == layers


def test_time_that_buys_less_than_half_a_decibel_a_percent_is_not_spent() -> None:
    given = problem()
    dear = {name: replace(each, float_ms=4.0 * each.int8_ms) for name, each in given.costs.nodes.items()}
    given = replace(given, costs=replace(given.costs, nodes=dear))
    found = search(given, replace(NO_LIMIT, aim_snr_db=1000.0), Silent())
    assert any(point.snr_db > found.first.snr_db + 3 for point in found.points)
    assert found.chosen == found.first


def test_budget_is_met_even_where_that_is_slower_than_the_limit_on_time() -> None:
    given = problem()
    plain = search(given, replace(NO_LIMIT, aim_snr_db=-100.0), Silent()).chosen
    budget = Budget(min_snr_db=plain.snr_db + 3)
    found = search(given, replace(NO_LIMIT, budget=budget, aim_snr_db=-100.0, max_slower=0.0), Silent())
    assert found.chosen.met
    assert found.chosen.snr_db >= plain.snr_db + 3
    assert found.chosen.ms > plain.ms


def test_budget_that_no_plan_meets_gives_the_closest() -> None:
    found = search(problem(), replace(NO_LIMIT, budget=Budget(min_cosine=1.0), max_slower=0.0), Silent())
    some_int8 = [point for point in found.points if len(point.float_layers) < 4]
    assert found.chosen == max(some_int8, key=lambda point: point.snr_db)
    assert not found.reached


def test_measure_of_the_callers_own_decides_with_the_budget() -> None:
    given = problem()
    x = given.batches[0]
    expected = graph.runner(given.plans.model)(x)["y"]

    def close(run: Run) -> bool:
        return float(np.abs(run(x)["y"] - expected).max()) < 0.1

    loose = search(given, replace(NO_LIMIT, aim_snr_db=-100.0), Silent())
    strict = search(given, replace(NO_LIMIT, aim_snr_db=-100.0, accepts=close), Silent())
    assert loose.chosen.float_layers == ()
    assert "bad" in strict.chosen.float_layers
    assert strict.reached


def test_same_costs_find_the_same_plan() -> None:
    goal = replace(NO_LIMIT, max_slower=0.3)
    first, second = (search(problem(flat=False), goal, Silent()) for _ in range(2))
    assert first.plan == second.plan
    assert first.points == second.points


def test_no_more_evaluations_than_allowed() -> None:
    for most in (1, 3, 6):
        found = search(problem(), replace(NO_LIMIT, aim_snr_db=1000.0, max_evaluations=most), Silent())
        assert found.evaluations == found.announced == most
        assert found.capped


def test_first_layers_are_tried_together() -> None:
    tried = {point.float_layers for point in search(problem(), replace(NO_LIMIT, aim_snr_db=1000.0), Silent()).points}
    assert {("one",), ("one", "bad"), ("one", "bad", "three")} <= tried


def test_layers_are_tried_on_the_plan_that_seems_best_a_quarter_as_many_as_before() -> None:
    told = Told()
    goal = replace(NO_LIMIT, aim_snr_db=1000.0, max_slower=0.06)
    found = search(problem(), goal, told)
    further = [each for each in told.said if each.startswith("search: around")]
    assert found.chosen != found.first
    assert len(further) == 1
    assert found.evaluations <= 1.25 * (found.announced + 1)


def test_plan_with_more_float_layers_counts_with_what_one_that_was_timed_took_over_its_prediction() -> None:
    goal = replace(NO_LIMIT, aim_snr_db=1000.0, max_slower=0.3)
    one = {"one"}
    given = replace(problem(), ratio=lambda point, _: 1.2 if one <= set(point.float_layers) else 1.0)
    found = search(given, goal, Silent())
    assert any(point.timed and one <= set(point.float_layers) for point in found.points)
    assert "one" not in found.chosen.float_layers
    dear = [p for p in found.points if not p.timed and p.float_layers == ("one",)]
    assert all(point.ms < 4.2 for point in dear)  # it has fewer layers than what was timed


@pytest.mark.parametrize(("macs", "batches"), [(1, 64), (500_000_000, 32), (2_000_000_000, 16)])
def test_plans_are_compared_on_as_many_batches_as_are_quick(macs: int, batches: int) -> None:
    plan = problem().plans.static
    plan = replace(plan, decisions=(replace(plan.decisions[0], macs=macs),))
    kept = [{"x": graphs.noise(seed, 1, 16)} for seed in range(64)]
    assert compared(kept, plan) == kept[:batches]
    assert compared(kept[:8], plan) == kept[:8]


@dataclass
class Told(Silent):
    """The stages, and the bars with their totals and how many items came."""

    said: list[str] = field(default_factory=list)

    def stage(self, text: str) -> None:
        self.said.append(text)

    def each(
        self, items: Iterable[T], text: str, total: int | None = None, samples: Callable[[T], int] | None = None
    ) -> Iterator[T]:
        every = list(items)
        self.said.append(f"{text}: {len(every)} of {total}")
        yield from every


def slow(given: Problem, now: list[float], seconds: float) -> Problem:
    """A plan takes so long to build."""
    build = given.plans.int8

    def int8(choice: Choice) -> ir.Model:
        now[0] += seconds
        return build(choice)

    given.plans.int8 = int8  # type: ignore[method-assign]
    return given


def test_search_is_priced_by_its_first_evaluations_within_30_percent() -> None:
    now, told = [0.0], Told()
    goal = replace(NO_LIMIT, aim_snr_db=1000.0)
    found = search(slow(problem(), now, 10.0), goal, told, clock=lambda: now[0])
    assert (found.announced_seconds, found.seconds) == (
        10.0 * found.announced,
        10.0 * found.evaluations,
    )
    assert 0.7 <= found.evaluations / found.announced <= 1.3
    assert told.said[0] == "search for a plan"
    assert told.said[1].startswith(f"search: {found.announced} evaluations, {minutes(found.announced_seconds)}: ")
    assert told.said[1].endswith(f": {found.evaluations - 2} of {found.announced - 2}")  # those that told the price


def test_price_has_the_whole_models_that_are_timed_and_the_cap_on_minutes() -> None:
    goal = replace(NO_LIMIT, aim_snr_db=1000.0)
    now = [0.0]
    given = replace(slow(problem(), now, 10.0), ratio=lambda point, _: 1.5, ratio_seconds=100.0)
    found = search(given, goal, Silent(), clock=lambda: now[0])
    assert found.announced_seconds == 10.0 * found.announced + 400.0
    now = [0.0]
    capped = search(slow(problem(), now, 10.0), replace(goal, max_minutes=1.0), Silent(), clock=lambda: now[0])
    assert capped.announced_seconds == 60.0
    assert capped.evaluations == 7
    assert capped.capped


def test_no_plan_is_timed_after_the_minutes_are_over_but_the_one_that_seems_best() -> None:
    now, asked = [0.0], list[tuple[str, ...]]()

    def ratio(point: Point, _: object) -> float:
        asked.append(point.float_layers)
        return 3.0

    given = replace(slow(problem(), now, 20.0), ratio=ratio)
    found = search(given, replace(NO_LIMIT, aim_snr_db=1000.0, max_minutes=1.0), Silent(), clock=lambda: now[0])
    assert len(asked) == 1
    assert found.chosen == found.first


def test_search_that_was_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    path, goal = tmp_path / "search.json", replace(NO_LIMIT, aim_snr_db=1000.0, max_slower=0.03)
    whole = search(problem(), goal, Silent())
    for most in (1, 3, 8):
        short = search(problem(), replace(goal, max_evaluations=most), Silent(), Memory(path))
        assert short.evaluations == most
    built = [0.0]
    again = search(slow(problem(), built, 1.0), goal, Silent(), Memory(path))
    assert built[0] == whole.evaluations - 8
    assert again.plan.to_text() == whole.plan.to_text()
    assert (again.points, again.announced) == (whole.points, whole.announced)
    built = [0.0]
    search(slow(problem(), built, 1.0), goal, told := Told(), Memory(path))
    assert built[0] == 0
    assert "known)" in told.said[1]


def test_plan_that_could_not_be_timed_counts_as_predicted() -> None:
    given = replace(problem(), ratio=lambda point, _: None)
    goal = replace(NO_LIMIT, aim_snr_db=1000.0, max_slower=0.025)
    found = search(given, goal, Silent())
    assert found.chosen == search(problem(), goal, Silent()).chosen
    assert not found.chosen.timed


def test_frontier_is_faster_to_slower_and_each_point_more_accurate() -> None:
    found = search(problem(), replace(NO_LIMIT, aim_snr_db=1000.0), Silent())
    best = frontier(found.points)
    assert [point.ms for point in best] == sorted(point.ms for point in best)
    assert [point.snr_db for point in best] == sorted(point.snr_db for point in best)
    assert all(any(p.ms <= q.ms and p.snr_db >= q.snr_db for p in best) for q in found.points)


@pytest.mark.parametrize("faster", ["one", "four"])
def test_layer_that_was_proved_faster_in_float_turns_float(faster: str) -> None:
    given = problem()
    nodes = {**given.costs.nodes, faster: costs.NodeCost(float_ms=0.5, int8_ms=1.0)}
    quick = costs.settled(replace(given.costs, nodes=nodes), (faster,))
    found = search(replace(given, costs=quick), replace(NO_LIMIT, aim_snr_db=-100.0), Silent())
    assert found.chosen.float_layers == (faster,)
    assert found.chosen.ms == pytest.approx(3.5)


def test_plan_that_is_slower_than_predicted_counts_with_its_own_time() -> None:
    given = problem()
    goal = replace(NO_LIMIT, aim_snr_db=1000.0, max_slower=0.025)
    predicted = search(given, goal, Silent()).chosen
    assert len(predicted.float_layers) == 2
    asked: list[tuple[str, ...]] = []

    def ratio(point: Point, _: object) -> float:
        asked.append(point.float_layers)
        return 1.5 if len(point.float_layers) > 1 else 1.01

    found = search(replace(given, ratio=ratio), goal, Silent())
    assert set(predicted.float_layers) <= set(asked[0])  # and one more, which may be faster than predicted
    assert len(asked) <= 8
    assert found.chosen.float_layers == ("bad",)
    assert found.chosen.timed
    assert found.chosen.ms == pytest.approx(4.04)
    never = search(replace(given, ratio=lambda point, _: 2.0), goal, Silent())
    assert never.chosen.float_layers == ()


def test_layer_that_only_seemed_faster_stays_int8() -> None:
    given = problem()
    nodes = {**given.costs.nodes, "one": costs.NodeCost(float_ms=0.5, int8_ms=1.0)}
    settled = costs.settled(replace(given.costs, nodes=nodes), ())
    assert settled.nodes["one"].float_ms == 1.0
    found = search(replace(given, costs=settled), replace(NO_LIMIT, aim_snr_db=-100.0), Silent())
    assert found.chosen.float_layers == ()


def test_layer_that_a_rule_calls_int8_stays_int8() -> None:
    given = problem(rules=[Rule(match="bad", precision="int8", why="asked for")])
    found = search(given, replace(NO_LIMIT, aim_snr_db=1000.0), Silent())
    assert "bad" not in given.plans.layers
    assert all("bad" not in point.float_layers for point in found.points)


def test_no_plan_but_the_static_one_where_none_may_be_evaluated() -> None:
    given = problem()
    quick = costs.settled(given.costs, ("one",))
    found = search(replace(given, costs=quick), replace(NO_LIMIT, aim_snr_db=1000.0, max_evaluations=0), Silent())
    assert (found.evaluations, found.chosen) == (1, found.first)


def test_plan_that_the_caller_refuses_is_not_what_is_left_when_the_timed_ones_are_slow() -> None:
    given = problem()

    def refuses_static(run: Run) -> bool:
        return (
            float(np.abs(run(given.batches[0])["y"] - graph.runner(given.plans.model)(given.batches[0])["y"]).max())
            < 0.1
        )

    slow = replace(given, ratio=lambda point, _: 2.0 + len(point.float_layers))
    found = search(slow, replace(NO_LIMIT, aim_snr_db=-100.0, accepts=refuses_static), Silent())
    assert found.chosen.float_layers != ()
    assert found.chosen.timed


def test_layers_that_share_a_weight_are_float_together() -> None:
    text = "(float[1,16] x) => (float[1,16] y) { [a] p = MatMul(x, w) [n] q = Tanh(p) [b] r = MatMul(q, w) [c] y = MatMul(r, v) }"
    weights = {"w": graphs.noise(1, 16, 16), "v": graphs.noise(2, 16, 16)}
    model, batch = graphs.model(text, weights), {"x": graphs.noise(0, 1, 16)}
    plan, ranges = graphs.planned(model, batch)
    shapes = graph.shapes(model, batch)
    plans = Plans(model, plan, quantize.to_int8(model, plan, ranges), lambda _: model, X86_VNNI, (), shapes)
    assert plans.layers == ("a", "b", "c")
    assert plans.groups() == [frozenset("ab"), frozenset("c"), frozenset("abc")][: len(plans.groups())]
    assert frozenset("a") not in plans.groups()


def test_accuracy_is_not_bought_beyond_the_time_of_fp32() -> None:
    given = problem()
    for fp32, layers in ((1.015, 1), (1.025, 2), (0.9, 0)):
        costly = replace(given, costs=replace(given.costs, fp32=fp32))
        found = search(costly, replace(NO_LIMIT, aim_snr_db=1000.0, max_slower=0.1), Silent())
        assert len(found.chosen.float_layers) == layers


def test_plan_with_the_layers_that_are_faster_in_float_counts_with_its_own_time() -> None:
    given = problem()
    quick = costs.settled(given.costs, ("one", "four"))
    timed = replace(given, costs=quick, ratio=lambda point, _: 0.9)
    found = search(timed, replace(NO_LIMIT, aim_snr_db=-100.0), Silent())
    assert found.chosen.float_layers == ("one", "four")
    assert found.chosen.timed
    assert found.chosen.ms == pytest.approx(3.6)


ATTENTION = """(float[1,12,16] x) => (float[1,12,16] y) {
    [query] q = MatMul(x, w1)
    [key] k = MatMul(x, w3)
    [turned] t = Transpose<perm=[0,2,1]>(k)
    [scores] s = MatMul(q, t)
    [softmax] p = Softmax<axis=-1>(s)
    [mixed] y = MatMul(p, x)
}"""


@pytest.mark.parametrize(("float_ms", "kept"), [(1.001, False), (2.0, True)])
def test_products_of_two_activations_are_float_where_the_accuracy_is_worth_their_time(
    float_ms: float, kept: bool
) -> None:
    model = graphs.model(ATTENTION, WEIGHTS)
    batches = [{"x": graphs.noise(seed, 1, 12, 16)} for seed in range(8)]
    shapes = graph.shapes(model, batches[0])
    plan = place.decide(model, WITHOUT_DYNAMIC, (Rule(match="MatMul", precision="int8", why="test"),), shapes)
    int8 = quantize.to_int8(model, plan, distinguish(model, observe(model, plan.tensors, batches).ranges))
    table = costs.from_table(model, plan, WITHOUT_DYNAMIC, shapes)
    products = {"scores", "mixed"}
    nodes = {name: costs.NodeCost(float_ms=float_ms if name in products else 9.0, int8_ms=1.0) for name in table.nodes}
    found = replace(table, nodes=nodes, quantize_ns=0.0, dequantize_ns=0.0, crossing_ns=0.0)
    plans = Plans(model, plan, int8, lambda _: model, WITHOUT_DYNAMIC, (), shapes)
    assert plans.products == products
    chosen = search(Problem(plans=plans, batches=batches, costs=found), replace(NO_LIMIT, aim_snr_db=60.0), Silent())
    assert any(set(point.float_layers) == products for point in chosen.points)
    assert (chosen.chosen == chosen.first) is kept
    assert kept or set(chosen.chosen.float_layers) & products
