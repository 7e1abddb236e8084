from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from exporter import graph
from exporter.prepare import constants
from tests.exporter import graphs

X = {"x": graphs.noise(0, 2, 4)}


def simplified(
    text: str, weights: dict[str, np.ndarray] | None = None, batch: dict[str, np.ndarray] | None = None
) -> ir.Model:
    return graphs.rewritten(graphs.model(text, weights), constants.rewrite, batch or X)[0]


def test_identity_over_a_shared_weight_is_gone() -> None:
    """The case that leaves Conv nodes float in ONNX Runtime's quantizer (FACTS 4.5)."""
    after = simplified(
        """(float[N,4] x) => (float[N,4] y) {
            [i] v = Identity(w)
            [a] p = MatMul(x, w)
            [b] q = MatMul(x, v)
            [c] y = Add(p, q)
        }""",
        {"w": graphs.noise(1, 4, 4)},
    )
    assert graphs.op_types(after) == ["MatMul", "MatMul", "Add"]
    assert all(graph.constant(graphs.node(after, name).inputs[1]) is not None for name in "ab")


def test_node_whose_inputs_are_all_constant_is_computed_now() -> None:
    after = simplified(
        "(float[N,4] x) => (float[N,4] y) { t = Transpose<perm=[1,0]>(w)\n s = Mul(t, k)\n [m] y = MatMul(x, s) }",
        {"w": graphs.noise(1, 4, 4), "k": np.float32(2)},
    )
    assert graphs.op_types(after) == ["MatMul"]
    np.testing.assert_array_equal(graph.constant(graphs.node(after, "m").inputs[1]), graphs.noise(1, 4, 4).T * 2)


def test_constant_node_becomes_an_initializer() -> None:
    after = simplified("(float[N,4] x) => (float[N,4] y) { k = Constant<value = float[1] {3.0}>()\n y = Mul(x, k) }")
    assert graphs.op_types(after) == ["Mul"]
    np.testing.assert_array_equal(graph.constant(after.graph[0].inputs[1]), [3.0])


def test_function_is_inlined() -> None:
    text = """<ir_version: 8, opset_import: ["" : 20, "own" : 1]>
    g (float[N,4] x) => (float[N,4] y) { y = own.twice(x) }
    <opset_import: ["" : 20], domain: "own">
    twice (a) => (b) { c = Relu(a)
     b = Add(c, c) }"""
    import onnx

    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    after, _ = graphs.rewritten(model, constants.rewrite, X)
    assert graphs.op_types(after) == ["Relu", "Add"] and not after.functions


def test_what_does_nothing_is_gone() -> None:
    after = simplified(
        """(float[N,4] x) => (float[N,4] y) {
            a = Identity(x)
            b = Dropout(a)
            c = Cast<to=1>(b)
            d = Mul(c, one)
            e = Add(d, zero)
            y = Relu(e)
        }""",
        {"one": np.float32(1), "zero": np.float32(0)},
    )
    assert graphs.op_types(after) == ["Relu"]


def test_cast_to_another_type_and_factor_other_than_one_stay() -> None:
    after = simplified(
        "(float[N,4] x) => (float[N,4] y) { i = Cast<to=7>(x)\n f = Cast<to=1>(i)\n y = Mul(f, k) }",
        {"k": np.float32(1.01)},
    )
    assert graphs.op_types(after) == ["Cast", "Cast", "Mul"]


def test_relu_and_clip_in_a_row_are_one_clip() -> None:
    after = simplified(
        "(float[N,4] x) => (float[N,4] y) { r = Relu(x)\n y = Clip(r, low, high) }",
        {"low": np.float32(-1), "high": np.float32(0.5)},
        {"x": graphs.noise(1, 64, 4)},
    )
    assert graphs.op_types(after) == ["Clip"]
    low, high = (float(graph.constant(value)) for value in after.graph[0].inputs[1:])
    assert (low, high) == (0.0, 0.5)


def test_min_and_max_with_constants_are_a_clip() -> None:
    after = simplified(
        "(float[N,4] x) => (float[N,4] y) { m = Max(x, low)\n y = Min(m, high) }",
        {"low": np.float32(-0.5), "high": np.float32(0.5)},
        {"x": graphs.noise(1, 64, 4)},
    )
    assert graphs.op_types(after) == ["Clip"]


def test_what_nothing_reads_is_removed_and_what_is_an_output_stays() -> None:
    after = simplified(
        "(float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Relu(x)\n z = Identity(y)\n dead = Tanh(x) }"
    )
    assert graphs.op_types(after) in (["Relu", "Identity"], ["Relu"])
    assert [value.name for value in after.graph.outputs] == ["y", "z"]


def test_large_weight_that_is_read_twice_is_computed_too() -> None:
    """A tied embedding: the table is gathered from, and its transpose is the output layer."""
    table = graphs.noise(1, 4096, 4)
    after = simplified(
        """(int64[N,2] i) => (float[N,2,4096] y) {
            e = Gather(w, i)
            t = Transpose<perm=[1,0]>(w)
            [m] y = MatMul(e, t)
        }""",
        {"w": table},
        {"i": np.array([[0, 4095]])},
    )
    assert graphs.op_types(after) == ["Gather", "MatMul"]
    np.testing.assert_array_equal(graph.constant(graphs.node(after, "m").inputs[1]), table.T)


def test_result_larger_than_every_weight_is_left_to_run_time() -> None:
    after = simplified(
        "(float[N,4] x) => (float[1024,1024] y, float[N,4] z) { y = Expand(k, size)\n z = Relu(x) }",
        {"k": np.float32(2), "size": np.array([1024, 1024])},
    )
    assert "Expand" in graphs.op_types(after)


@pytest.mark.parametrize(
    ("body", "left"),
    [("ConstantOfShape(size)", "ConstantOfShape"), ("Expand(one, size)", "Expand"), ("Tile(one, size)", "Tile")],
)
def test_small_node_that_makes_gigabytes_is_not_computed(body: str, left: str) -> None:
    text = f"(float[N,4] x) => (float[N,4] y) {{ big = {body}\n s = ReduceSum<keepdims=0>(big)\n y = Add(x, s) }}"
    weights = {"size": np.array([60_000, 60_000]), "one": np.ones((1, 1), np.float32)}
    model = graphs.model(text, weights)
    constants.rewrite(model)
    assert body.split("(")[0] in graphs.op_types(model)


@pytest.mark.parametrize(
    "step", ["Mul(r, one)", "Mul(one, r)", "Div(r, one)", "Add(r, none)", "Add(none, r)", "Sub(r, none)"]
)
@pytest.mark.parametrize("shape", [(1,), (4,), (1, 4), ()])
def test_step_that_changes_nothing_is_gone(step: str, shape: tuple[int, ...]) -> None:
    weights = {"one": np.ones(shape, np.float32), "none": np.zeros(shape, np.float32)}
    after = simplified(f"(float[N,4] x) => (float[N,4] y) {{ r = Tanh(x)\n s = {step}\n y = Exp(s) }}", weights)
    assert graphs.op_types(after) == ["Tanh", "Exp"]


@pytest.mark.parametrize(
    ("step", "shape"),
    [("Mul(r, one)", (1, 1, 4)), ("Add(r, none)", (3, 2, 4)), ("Sub(none, r)", (1,)), ("Div(one, r)", (1,))],
)
def test_step_that_makes_axes_or_turns_is_kept(step: str, shape: tuple[int, ...]) -> None:
    weights = {"one": np.ones(shape, np.float32), "none": np.zeros(shape, np.float32)}
    rank = "N,4" if len(shape) == 1 else f"{shape[0]},N,4"
    after = simplified(f"(float[N,4] x) => (float[{rank}] y) {{ r = Tanh(x)\n s = {step}\n y = Exp(s) }}", weights)
    assert len(graphs.op_types(after)) > 2
