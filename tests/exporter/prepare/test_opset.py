from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporter import graph, proof, trace
from exporter.errors import TraceError
from exporter.prepare import constants, opset
from tests.exporter import graphs


@pytest.mark.parametrize("found", [11, 12, 13, 18])
def test_older_graph_is_raised_and_equal(found: int) -> None:
    """Softmax changed its meaning in 13, Squeeze and Split took axes as input, BatchNormalization lost outputs in 14."""
    squeeze = "y = Squeeze<axes=[2]>(s)" if found < 13 else "y = Squeeze(s, axes)"
    model = graphs.model(
        f"(float[2,4,1] x) => (float[2,4] y) {{ r = Relu(x)\n s = Softmax<axis=1>(r)\n {squeeze} }}",
        {"axes": np.array([2])},
        found,
    )
    batch = {"x": graphs.noise(0, 2, 4, 1)}
    before = graph.runner(model)(batch)
    assert opset.rewrite(model) == 1
    assert model.opset_imports[""] == trace.OPSET
    assert proof.difference(before, graph.runner(model)(batch)) == ""


@pytest.mark.parametrize("found", [20, 21])
def test_graph_that_is_new_enough_is_left_alone(found: int) -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }", opset=found)
    assert opset.rewrite(model) == 0
    assert model.opset_imports[""] == found


def test_graph_that_cannot_be_raised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("No Adapter From Version 13")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }", opset=13)
    with pytest.raises(
        TraceError, match="opset 13 cannot be raised to 20: found No Adapter.*; export the model again at opset 20"
    ):
        opset.rewrite(model)


def test_branches_and_bodies_without_shapes_are_raised_too() -> None:
    """The checker wants a shape of every output of a branch; the converter forgets that a Loop's count is a scalar."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] x, bool c) => (float[] y, float[] s) {
      h, s = Loop<body = b (int64 i, bool k, float[] z) => (bool l, float[] u, float[] v)
        { m = ReduceMean<axes=[1]>(z)  u = Add(z, m)  l = Identity(k)  v = Tanh(u) }>(n, c, x)
      y = If(p)<then_branch = t () => (float[] e) { e = Relu(h) }, else_branch = f () => (float[] o) { o = Neg(h) }> }"""
    proto = onnx.parser.parse_model(
        text.replace("=> (float[] y, float[] s) {", "=> (float[] y, float[] s) <int64 n = {3}, bool p = {1}> {")
    )
    model = ir.serde.deserialize_model(proto)
    batch = {"x": graphs.noise(0, 2, 4), "c": np.array(True)}
    before = graph.runner(model)(batch)
    assert opset.rewrite(model) == 1
    assert proof.difference(before, graph.runner(model)(batch)) == ""


def test_operator_that_only_onnxruntime_knows_at_this_opset_goes_through() -> None:
    """Its optimizer writes LayerNormalization, an operator of opset 17, into files of opset 14."""
    model = graphs.model(
        "(float[N,4] x) => (float[N,4] y) { a = Relu(x)\n y = Identity(a) }", {"g": np.ones(4, np.float32)}
    )
    model.graph.node(1).op_type = "LayerNormalization"
    model.graph.node(1).resize_inputs(2)
    model.graph.node(1).replace_input_with(1, model.graph.initializers["g"])
    model.graph.opset_imports[""] = 14
    batch = {"x": graphs.noise(0, 2, 4)}
    before = graph.runner(model)(batch)
    assert opset.rewrite(model) == 1
    assert graphs.op_types(model) == ["Relu", "LayerNormalization"] and model.graph.node(1).domain == ""
    assert proof.difference(before, graph.runner(model)(batch)) == ""


def test_domains_that_no_node_is_from_are_not_imported() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    model.graph.opset_imports["com.microsoft.nchwc"] = 1
    assert opset.rewrite(model) == 1
    assert dict(model.opset_imports) == {"": 20}


def test_function_of_an_older_file_is_raised_too() -> None:
    """ReduceMean took axes as an attribute until 18."""
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[N,4,3,3] x) => (float[N,4] y) { y = own.pool(x) }
    <opset_import: ["" : 17], domain: "own">
    pool (a) => (b) { b = ReduceMean<axes=[2,3], keepdims=0>(a) }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    batch = {"x": graphs.noise(0, 2, 4, 3, 3)}
    before = graph.runner(model)(batch)
    assert opset.rewrite(model) == 1
    constants.rewrite(model)
    assert graphs.op_types(model) == ["ReduceMean"] and not model.functions
    assert proof.difference(before, graph.runner(model)(batch)) == ""
