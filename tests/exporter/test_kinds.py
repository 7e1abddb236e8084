from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from exporter import graph, kinds, place
from exporter.calibrate import cache
from exporter.kinds import Kind
from exporter.target import PORTABLE, TARGETS, X86_VNNI, Target, of
from runtime import cpu
from tests.exporter import graphs

MODEL = graphs.model(
    """(float[N,8,6,6] x) => (float[N,8,6,6] y) {
    [a] a = Conv <group=4, pads=[1,1,1,1]> (x, w)
    [b] b = Conv <group=2, pads=[1,1,1,1]> (a, v)
    [c] c = Conv <pads=[1,1,1,1]> (b, u)
    [d] y = Conv <group=4, pads=[1,1,1,1]> (c, w)
}""",
    {"w": graphs.noise(1, 8, 2, 3, 3), "v": graphs.noise(2, 8, 4, 3, 3), "u": graphs.noise(3, 8, 8, 3, 3)},
)
SHAPES = graph.shapes(MODEL, {"x": graphs.noise(0, 2, 8, 6, 6)})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "kinds"


def taking(monkeypatch: pytest.MonkeyPatch, ms: Mapping[int, tuple[float, float]]) -> list[Kind]:
    """Times by the channels of a group; the kinds that were asked for in float."""
    asked: list[Kind] = []

    def times(wanted: Sequence[Kind], target: Target, int8: bool) -> dict[Kind, float]:
        asked.extend([] if int8 else wanted)
        return {kind: ms[kind.weight[1]][int8] for kind in wanted}

    monkeypatch.setattr(kinds, "_times", times)
    monkeypatch.setattr(kinds, "is_here", lambda target: target is X86_VNNI)
    return asked


def test_conv_of_many_groups_is_int8_where_it_was_timed_to_be_as_fast(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = taking(monkeypatch, {2: (1.0, 1.2), 4: (1.0, 1.05)})
    found = kinds.on(X86_VNNI, MODEL, SHAPES)
    assert found.slower == {"a": True, "b": False, "d": True}
    assert [kind.weight for kind in asked] == [(8, 2, 3, 3), (8, 4, 3, 3)]  # a and d are of one kind
    assert asked[0].x == (1, 8, 6, 6) and dict(asked[0].attributes)["pads"] == (1, 1, 1, 1)
    plan = place.decide(MODEL, found, (), SHAPES)
    assert plan.int8 == ("b", "c")
    assert next(d.reason for d in plan.decisions if d.node == "a") == "its integer kernel is slower here, as timed"
    assert place.decide(MODEL, X86_VNNI, (), SHAPES).int8 == ("c",)


def test_what_was_timed_is_remembered_for_the_next_export(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taking(monkeypatch, {2: (1.0, 1.2), 4: (1.0, 1.05)})
    first = kinds.on(X86_VNNI, MODEL, SHAPES)
    asked = taking(monkeypatch, {2: (1.0, 0.1), 4: (1.0, 9.0)})
    assert kinds.on(X86_VNNI, MODEL, SHAPES) == first and asked == []
    (file,) = home.iterdir()
    file.write_text("{}x")
    assert kinds.on(X86_VNNI, MODEL, SHAPES).slower == {"a": False, "b": True, "d": False}


def test_what_takes_microseconds_is_decided_by_the_table(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taking(monkeypatch, {2: (0.001, 0.019), 4: (0.001, 0.021)})
    assert kinds.on(X86_VNNI, MODEL, SHAPES).slower == {"b": True}


def test_another_machines_target_keeps_its_table(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = taking(monkeypatch, {})
    assert kinds.on(PORTABLE, MODEL, SHAPES) is PORTABLE and asked == [] and not home.exists()


def test_given_costs_decide_again_as_they_did(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = taking(monkeypatch, {})
    (tmp_path / "costs.json").write_text(json.dumps({"nodes": {"b": {}, "c": {}}}))
    for target in (X86_VNNI, PORTABLE):
        found = kinds.on(target, MODEL, SHAPES, tmp_path / "costs.json")
        assert found.slower == {"a": True, "b": False, "d": True} and asked == []


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_kernels_of_both_sides_are_timed(name: str, home: Path) -> None:
    target = TARGETS[name]
    asked = [
        Kind((8, 2, 3, 3), (1, 8, 9, 9), (("group", 4), ("strides", (2, 2)))),
        Kind((4, 2, 3), (1, 2, 9), (("group", 1),)),
        Kind((2, 8, 40), (2, 30, 8), (), "MatMul"),
    ]
    for int8 in (False, True):
        times = kinds._times(asked, target, int8)
        assert {*times} == {*asked} and all(ms > 0 for ms in times.values())


def test_this_machine_is_the_target_that_its_cpu_is() -> None:
    assert [name for name, target in TARGETS.items() if kinds.is_here(target)] == [of(cpu.read()).name]


ATTENTION = graphs.model(
    """(float[1,H,S,K] q, float[1,H,K,S] k, float[1,H,S,K] v) => (float[1,H,S,K] y) {
    [scores] s = MatMul (q, k)
    [softmax] p = Softmax (s)
    [values] y = MatMul (p, v)
}""",
)


def attention_shapes(heads: int, tokens: int, width: int) -> dict[str, tuple[int, ...]]:
    q, k = (1, heads, tokens, width), (1, heads, width, tokens)
    return {"q": q, "k": k, "v": q, "s": (1, heads, tokens, tokens), "p": (1, heads, tokens, tokens), "y": q}


def test_product_is_float_where_it_was_timed_to_take_much_longer_in_int8(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = taking(monkeypatch, {4: (1.0, 8.0), 60: (1.0, 1.3)})
    shapes = attention_shapes(2, 60, 4)
    found = kinds.on(X86_VNNI, ATTENTION, shapes)
    assert found.slower == {"scores": True, "values": False}
    assert [(kind.x, kind.weight) for kind in asked] == [((2, 60, 4), (2, 4, 60)), ((2, 60, 60), (2, 60, 4))]
    plan = place.decide(ATTENTION, found, (), shapes)
    assert plan.int8 == ("values",)
    assert plan.decisions[0].reason == "its integer kernel is slower here, as timed"
    assert place.decide(ATTENTION, X86_VNNI, (), shapes).int8 == ("scores", "values")


def test_products_of_many_tokens_are_timed_by_a_few_heads(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = taking(monkeypatch, {64: (1.0, 8.0), 1500: (1.0, 1.0)})
    kinds.on(X86_VNNI, ATTENTION, attention_shapes(16, 1500, 64))
    assert [kind.x for kind in asked] == [(1, 1500, 64), (1, 1500, 1500)]
    assert kinds.on(X86_VNNI, ATTENTION, attention_shapes(16, 9000, 64)).slower == {}


def test_products_are_float_by_the_table_where_the_target_has_no_use_for_them(home: Path) -> None:
    assert kinds.on(PORTABLE, ATTENTION, attention_shapes(2, 60, 4)) is PORTABLE
