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


def test_graph_that_cannot_be_raised_is_refused() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }", opset=13)
    model.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(
        TraceError, match="opset 13 cannot be raised to 20: found .*; export the model again at opset 20"
    ):
        opset.rewrite(model)


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
