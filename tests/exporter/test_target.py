from __future__ import annotations

import pytest

from exporter import target
from exporter.errors import RecipeError
from exporter.target import NO_KERNEL, TARGETS


def test_targets_are_found_by_their_names() -> None:
    assert [*TARGETS] == ["portable", "x86-vnni"]
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
    """FACTS: QLinearSoftmax takes 4-5 times as long as float Softmax."""
    for found in TARGETS.values():
        assert found.elementwise["Softmax"].int8_ns > 4 * found.elementwise["Softmax"].float_ns
        assert found.elementwise["Concat"].int8_ns < found.elementwise["Concat"].float_ns
