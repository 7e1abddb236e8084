from __future__ import annotations

import onnx
import pytest

from exporter import already, bundle, ops, shrink
from exporter.correct import moves
from exporter.forecast import layer
from exporter.target import TARGETS
from runtime.kernels import INTEGER, WEIGHT


@pytest.mark.parametrize("name", TARGETS)
def test_every_operator_that_a_target_names_has_a_row_with_a_kernel(name: str) -> None:
    found = TARGETS[name]
    for op_type in (*found.layers, *found.elementwise, *found.movers):
        assert ops.of(op_type).kernel, op_type
    assert all(ops.of(op_type).layer for op_type in (*found.layers, *found.dynamic))
    assert all(ops.of(op_type).values != "new" for op_type in found.movers), "its output has its input's scale"
    assert not {*found.layers, *found.elementwise, *found.movers} & ops.NO_KERNEL.keys()


def test_operators_are_onnxs_or_kernels_that_a_file_can_hold() -> None:
    onnxs = {each.name for each in onnx.defs.get_all_schemas()}
    others = {name for name in ops.OPERATORS if name not in onnxs}
    assert {name for name in others if not ops.of(name).integer} == {"ReorderInput", "ReorderOutput"}


def test_integer_kernels_are_those_that_the_runtime_counts_and_their_weights_lie_where_it_looks() -> None:
    assert INTEGER <= ops.INTEGER
    shared = {name: at for name, at in WEIGHT.items() if name in ops.OPERATORS}
    assert {"QLinearConv", "QGemm", "MatMulIntegerToFloat", "LSTM", "Conv"} <= shared.keys()
    assert all(at in ops.of(name).weights for name, at in shared.items())


def test_layers_in_integers_name_a_layer_that_has_a_kernel() -> None:
    plain = {row.plain for row in ops.OPERATORS.values() if row.plain}
    assert plain == set(already.LAYERS) == {"Conv", "Gemm", "MatMul"}
    assert {*layer.FOLLOWED, *layer.INSIDE} <= ops.INTEGER


def test_operator_without_a_row_claims_nothing() -> None:
    assert ops.of("Einsum") == ops.Operator()
    assert ops.of("Einsum").bits == "here"


def test_values_of_an_input_are_not_said_to_move_through_a_sum() -> None:
    assert {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity"} == ops.MOVES
    assert {"Gather", "MaxPool"} <= ops.CARRIES - ops.MOVES
    assert not {"Add", "Resize", "AveragePool", "Concat"} & ops.CARRIES


def test_scales_are_propagated_through_operators_that_have_rows_or_reduce_and_resize() -> None:
    assert moves.HANDLERS.keys() - ops.OPERATORS.keys() == {"PRelu", "ReduceMean", "ReduceSum"}


def test_large_weights_are_looked_for_where_layers_and_tables_have_them() -> None:
    assert shrink.WEIGHTS["Gather"] == (0,) and shrink.WEIGHTS["MatMul"] == (0, 1) and shrink.WEIGHTS["LSTM"] == (1, 2)
    assert "LayerNormalization" not in shrink.WEIGHTS


@pytest.mark.parametrize(
    ("kernel", "integer", "exact"),
    [
        ("QLinearConv", True, True),
        ("QLinearSigmoid", True, True),
        ("MatMulIntegerToFloat", True, False),
        ("QAttention", True, False),  # it holds a Softmax in float
        ("Transpose", False, True),
        ("Add", False, False),
        ("Conv", False, False),
    ],
)
def test_kernel_gives_the_same_bits_on_every_cpu_or_does_not(kernel: str, integer: bool, exact: bool) -> None:
    assert bundle.same_bits(kernel, integer) is exact
