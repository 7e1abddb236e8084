from __future__ import annotations

import pytest

from exporter import target
from exporter.errors import RecipeError
from exporter.target import LISTED, NO_KERNEL, TARGETS, UNWANTED, Fact, Target
from runtime.cpu import Cpu


def test_targets_are_found_by_their_names() -> None:
    assert [*TARGETS] == ["portable", "x86-vnni", "x86-avx2", "arm64", "wasm"]
    for name, found in TARGETS.items():
        assert found.name == name and target.by_name(name) is found


def test_unknown_target_suggests_the_nearest() -> None:
    with pytest.raises(
        RecipeError, match="unknown target: found 'x86_vnni', expected one of .*did you mean 'x86-vnni'"
    ) as error:
        target.by_name("x86_vnni", "mine.toml:target")
    assert error.value.where == "mine.toml:target"
    with pytest.raises(RecipeError) as far:
        target.by_name("zzzz")
    assert "did you mean" not in str(far.value)


def test_op_type_is_a_layer_elementwise_a_mover_or_has_no_kernel_and_never_two_of_them() -> None:
    for found in TARGETS.values():
        kinds = [*found.layers, *found.elementwise, *found.movers, *NO_KERNEL]
        assert len(set(kinds)) == len(kinds)


def test_costs_are_not_negative_and_crossings_cost_something() -> None:
    for found in TARGETS.values():
        for cost in (*found.elementwise.values(), *found.movers.values()):
            assert cost.float_ns >= 0 and cost.int8_ns >= 0
        assert found.quantize_ns > 0 and found.dequantize_ns > 0 and found.crossing_ns > 0


def test_softmax_is_dearer_in_int8_and_concat_cheaper() -> None:
    """FACTS: QLinearSoftmax takes 4-5 times as long as float Softmax on x86; in wasm, whose float one is slow, twice."""
    for found in TARGETS.values():
        dearer = 2 if found.name == "wasm" else 4
        assert found.elementwise["Softmax"].int8_ns > dearer * found.elementwise["Softmax"].float_ns
        assert found.elementwise["Concat"].int8_ns < found.elementwise["Concat"].float_ns


def fact(of: Target, what: str) -> Fact:
    (found,) = [each for each in target.facts(of) if each.what == what]
    return found


def test_every_fact_has_a_value_and_a_reason() -> None:
    for found in TARGETS.values():
        facts = target.facts(found)
        first = ["types", "weights", "layers", "dynamic", "products", "by cost", "float"]
        assert [each.what for each in facts[:7]] == first
        assert len({each.what for each in facts}) == len(facts)
        assert all(each.value and len(each.why) > 20 for each in facts)


def test_every_optimizer_that_is_off_at_load_is_a_fact_with_its_reason() -> None:
    for found in TARGETS.values():
        off = {each.what.removeprefix("off at load: "): each for each in target.facts(found)[7:]}
        assert off.keys() == set(found.session[LISTED].split(";")) == UNWANTED.keys()
        assert {name: (each.value, each.why) for name, each in off.items()} == {
            name: (LISTED, why) for name, why in UNWANTED.items()
        }


def test_only_targets_that_add_pairs_in_int16_hold_weights_to_the_pair_rule() -> None:
    paired = {name for name, each in TARGETS.items() if "pair rule" in fact(each, "weights").value}
    assert paired == {name for name, each in TARGETS.items() if each.pairs_in_int16} == {"portable", "x86-avx2"}


def test_target_whose_hardware_was_not_there_to_be_timed_says_whose_costs_it_has() -> None:
    predicted = {name for name, each in TARGETS.items() if each.costs_from.startswith("predicted: ")}
    assert predicted == {"arm64"}
    for name in predicted:
        assert "predicted: x86 with VNNI" in fact(TARGETS[name], "by cost").why


def cpu(machine: str, *flags: str, pairs: bool = False) -> Cpu:
    return Cpu(name="a CPU", machine=machine, flags=flags, pairs_in_int16=pairs)


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (cpu("aarch64", "asimddp"), "arm64"),  # Linux
        (cpu("x86_64", "avx2", pairs=True), "x86-avx2"),
        (cpu("x86_64", "avx2", "avx512f", pairs=True), "x86-avx2"),
        (cpu("x86_64", pairs=True), "x86-avx2"),  # Windows lists no flags
        (cpu("x86_64", "avx2", "avx512f", "avx512_vnni"), "x86-vnni"),
        (cpu("x86_64", "avx2", "avx_vnni"), "x86-vnni"),
        # what is measured is stronger than what is listed: a hypervisor may list what the kernels do not use
        (cpu("x86_64", "avx2", "avx512_vnni", pairs=True), "x86-avx2"),
        (cpu("x86_64"), "portable"),  # SSE: its kernels widen first
        (cpu("riscv64"), "portable"),
        (cpu(""), "portable"),
    ],
)
def test_cpu_is_the_target_of_its_machine_and_of_what_its_kernels_compute(here: Cpu, expected: str) -> None:
    assert target.of(here) is TARGETS[expected]
