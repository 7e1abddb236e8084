from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from exporter import graph, precision
from exporter.prepare import to_quantizable
from tests.exporter import graphs

BODY = "h = MatMul(x, w)\n r = Relu(h)\n y = Add(r, b)"
NAMES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "double": TensorProto.DOUBLE}


def model(kind: str, body: str = BODY, **weights: Any) -> ir.Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 20]> g ({kind}[N,8] x) => ({kind}[N,4] y) {{ {body} }}'
    )
    arrays = {"w": graphs.noise(1, 8, 4), "b": graphs.noise(2, 4)} | weights
    for name, array in arrays.items():
        tensor = onnx.helper.make_tensor(name, NAMES[kind], array.shape, array.ravel().tolist())
        proto.graph.initializer.append(tensor)
    return ir.serde.deserialize_model(proto)


def expected(x: Any) -> Any:
    return np.maximum(x @ graphs.noise(1, 8, 4), 0) + graphs.noise(2, 4)


@pytest.mark.parametrize("kind", NAMES)
def test_layers_compute_in_float32_and_the_ends_keep_their_types(kind: str) -> None:
    before = model(kind)
    after, said = precision.to_float32(before)
    public = {"float16": "float16", "bfloat16": "float32", "double": "float64"}[kind]
    assert [tensor.dtype for tensor in (*graph.inputs(after), *graph.outputs(after))] == [public, public]
    assert [t.name for t in (*graph.inputs(after), *graph.outputs(after))] == ["x", "y"]
    assert {value.dtype for value in after.graph.initializers.values()} == {ir.DataType.FLOAT}
    name = "float64" if kind == "double" else kind
    told = (f"{name} computed in float32",)
    assert said == (told if kind != "bfloat16" else (*told, "x, y given as float32, for numpy has no bfloat16"))
    x = graphs.noise(0, 3, 8)
    found = graph.runner(after)({"x": x.astype(public)})["y"]
    assert found.dtype == public
    np.testing.assert_allclose(found.astype(np.float64), expected(x), atol=0.05 if kind == "bfloat16" else 0.01)
    assert before.graph.inputs[0].dtype != ir.DataType.FLOAT  # what was given is not changed
    onnx.checker.check_model(ir.serde.serialize_model(after), full_check=True)


def test_values_beyond_half_precision_between_layers_stay_finite() -> None:
    one = "one = Constant<value_floats=[1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0]>()"
    norm = f"{one}\n c = Cast<to=1>(x)\n n = LayerNormalization<axis=-1>(c, one)\n d = Cast<to=10>(n)"
    large = {"big": np.float32([60000.0]), "small": np.float32([1 / 512])}
    given = model("float16", f"{norm}\n h = MatMul(d, w)\n s = Mul(h, big)\n y = Mul(s, small)", **large)
    x = {"x": graphs.noise(0, 4, 8).astype(np.float16)}
    after, _ = precision.to_float32(given)
    inner = graph.runner(graph.with_outputs(after, ["s", "y"]))(x)
    assert inner["s"].dtype == np.float32 and np.abs(inner["s"]).max() > np.finfo(np.float16).max
    np.testing.assert_allclose(inner["y"].astype(np.float32), inner["s"] / 512, rtol=1e-3)
    nearness = to_quantizable(after, x, given).given_db
    assert nearness is not None and nearness > 50


def test_doubles_that_no_layer_is_joined_to_keep_their_digits() -> None:
    text = """(float[N,8] x, double[N] time) => (float[N,4] y, double[N] since) {
        since = Sub(time, start)
        h = MatMul(x, w)
        y = Relu(h) }"""
    weights = {"start": np.float64(1.7e9), "w": graphs.noise(1, 8, 4)}
    assert precision.to_float32(before := graphs.model(text, weights)) == (before, ())


def test_double_mask_becomes_the_largest_float32_and_bodies_of_branches_too() -> None:
    text = """(double[N,8] x, bool c) => (double[N,4] y) {
        h = MatMul(x, w)
        y = If (c) <
            then_branch = one () => (double[N,4] a) { a = Add(h, low) },
            else_branch = two () => (double[N,4] b) { k = Constant<value = double {2.5}>()
                b = Mul(h, k) } > }"""
    weights = {"w": graphs.noise(1, 8, 4).astype(np.float64), "low": np.float64(-1.7e308)}
    after, said = precision.to_float32(graphs.model(text, weights))
    assert said == ("float64 computed in float32",)
    x = graphs.noise(0, 3, 8).astype(np.float64)
    run = graph.runner(after)
    assert np.all(run({"x": x, "c": np.array(True)})["y"] == -np.finfo(np.float32).max)
    found = run({"x": x, "c": np.array(False)})["y"]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, x @ weights["w"] * 2.5, rtol=1e-4, atol=1e-5)


def test_float32_model_is_the_same_object() -> None:
    before = graphs.model(
        f"(float[N,8] x) => (float[N,4] y) {{ {BODY} }}", {"w": graphs.noise(1, 8, 4), "b": graphs.noise(2, 4)}
    )
    assert precision.to_float32(before)[0] is before


def test_input_that_is_an_output_too_keeps_its_name_and_type() -> None:
    body = "h = MatMul(x, w)\n y = Add(h, b)"
    given = model("float16", body)
    given.graph.outputs.append(given.graph.inputs[0])
    after, _ = precision.to_float32(given)
    x = graphs.noise(0, 3, 8).astype(np.float16)
    found = graph.runner(after)({"x": x})
    assert [*found] == ["y", "x"] and found["x"].dtype == np.float16
    np.testing.assert_array_equal(found["x"], x)
