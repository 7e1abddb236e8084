"""exporter.search.faster: which layers are float because the model is faster so, by fake times of whole models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from exporter.progress import Silent
from exporter.search import Problem, costs, faster
from exporter.search.costs import NodeCost
from exporter.search.plans import Choice
from tests.exporter.search.test_find import problem

LAYERS = ("one", "bad", "three", "four")
Taken = Callable[[frozenset[str]], float]


def settled(given: Problem, fp32: float, taken: Taken, **timing: object) -> tuple[costs.Costs, list[frozenset[str]]]:
    """The costs, and the plans that were timed, in order."""
    asked: list[frozenset[str]] = []

    def ratio(choice: Choice, seconds: float) -> float:
        asked.append(choice.floats)
        return taken(choice.floats)

    return faster.settle(given.plans, given.costs, fp32, ratio, Silent(), **timing), asked  # type: ignore[arg-type]


def with_float_ms(given: Problem, **float_ms: float) -> Problem:
    nodes = {name: NodeCost(float_ms=ms, int8_ms=1.0) for name, ms in float_ms.items()}
    return replace(given, costs=replace(given.costs, nodes={**given.costs.nodes, **nodes}))


def test_plan_that_is_much_faster_than_fp32_is_left_alone_without_timing() -> None:
    found, asked = settled(problem(), 2.0, lambda floats: 0.5)
    assert (found.faster, found.fp32, asked) == ((), 2.0, [])


def test_float_layers_take_together_what_fp32_took() -> None:
    given = with_float_ms(problem(), one=9.0, bad=4.0, three=4.0, four=4.0)
    found, _ = settled(given, 2.0, lambda floats: 0.5)
    static, floats = (
        costs.predict(given.plans.model, given.plans.plan(Choice(floats=each)), found, given.plans.shapes)
        for each in (frozenset[str](), frozenset(LAYERS))
    )
    assert floats / static == pytest.approx(2.0)
    assert found.nodes["one"].float_ms / found.nodes["three"].float_ms == pytest.approx(9 / 4)


@pytest.mark.parametrize(
    ("taken", "most_macs", "layers"), [(0.9, 0.3, ("four",)), (0.98, 0.3, ()), (0.9, faster.MOST_MACS, ())]
)
def test_layer_that_the_profile_calls_faster_is_float_if_the_model_is_and_it_is_not_too_much_of_it(
    taken: float, most_macs: float, layers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faster, "MOST_MACS", most_macs)
    found, asked = settled(with_float_ms(problem(), four=0.2), 2.0, lambda floats: taken)
    assert found.faster == layers
    assert asked == [frozenset(["four"])] * (most_macs > 0.25)


def test_where_fp32_is_as_fast_every_group_is_timed_in_float_and_alone_in_int8() -> None:
    given = problem()
    found, asked = settled(given, 1.0, lambda floats: 1.2)
    assert set(asked) == {frozenset(each) for each in (
        ("one",), ("bad",), ("three",), ("four",), ("one", "bad"), ("three", "four"),
        ("bad", "three", "four"), ("one", "three", "four"), ("one", "bad", "four"), ("one", "bad", "three"),
    )}  # fmt: skip
    assert (found.faster, found.timed) == ((), {})


def test_fastest_whole_model_is_what_later_plans_start_from_however_much_of_it_is_float() -> None:
    given, mostly = problem(), frozenset(LAYERS) - {"bad"}
    found, asked = settled(given, 0.9, lambda floats: 0.8 if floats == mostly else 1.0 + 0.1 * len(floats))
    assert found.faster == ("one", "three", "four")
    assert found.timed == {costs.name_of(found.faster): 0.8}
    assert asked.count(mostly) == 2  # a glance, and a longer look
    static, quick = (
        costs.predict(given.plans.model, given.plans.plan(Choice(floats=floats)), found, given.plans.shapes)
        for floats in (frozenset[str](), mostly)
    )
    assert quick / static == pytest.approx(0.8)


def test_of_plans_that_are_as_fast_the_one_with_most_in_integers_is_taken() -> None:
    found, _ = settled(problem(), 0.9, lambda floats: {3: 0.900, 1: 0.905}.get(len(floats), 1.0))
    assert len(found.faster) == 1


def test_plan_that_is_hardly_faster_is_not_taken() -> None:
    found, _ = settled(problem(), 0.9, lambda floats: 0.995)
    assert found.faster == ()


def test_timing_of_many_plans_ends_in_time() -> None:
    now = iter(range(100))
    _, asked = settled(problem(), 0.9, lambda floats: 1.0, most_seconds=3.5, clock=lambda: float(next(now)))
    assert len(asked) == 3
