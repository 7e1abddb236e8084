from __future__ import annotations

import onnx
import onnx_ir as ir

from exporter import graph, prepare
from exporter.prepare import observed
from tests.exporter import graphs

X = {"x": graphs.noise(0, 4, 3, 6, 6)}
W = {"w": graphs.noise(1, 8, 3, 3, 3)}
# com.microsoft's Gelu has no inference outside of ONNX Runtime
CONTRIB = """<ir_version: 8, opset_import: ["" : 20, "com.microsoft" : 1]>
g (float[N,4] x) => (y) { a = com.microsoft.Gelu(x)  y = Relu(a) }"""


def sizes(value: ir.Value) -> list[object]:
    assert value.shape is not None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def test_shapes_of_another_batch_size_and_rank_give_way_to_those_of_the_run() -> None:
    model = graphs.model("(float[N,3,6,6] x) => (float[N,C] y) { [c] c = Conv(x, w)\n [f] y = Flatten(c) }", W)
    conv, output = graphs.node(model, "c").outputs[0], graphs.node(model, "f").outputs[0]
    conv.shape, output.shape = ir.Shape([1, 8, 4, 4]), ir.Shape([1, 1, 128])
    made = prepare.to_quantizable(model, X)
    assert [tensor.shape for tensor in graph.outputs(made.reference)] == [("N", 128)]
    assert sizes(graphs.node(made.model, "c").outputs[0]) == ["N", 8, 4, 4]
    assert sizes(conv) == [1, 8, 4, 4]  # the caller's graph stays


def test_size_that_fits_the_batch_by_chance_is_found_out_at_another_size() -> None:
    model = graphs.model("(float[N,3,6,6] x) => (float[N,8,4,4] y) { [c] y = Conv(x, w) }", W)
    graphs.node(model, "c").outputs[0].shape = ir.Shape([4, 8, 4, 4])
    observed.correct(model, X)
    assert sizes(graphs.node(model, "c").outputs[0]) == [None, 8, 4, 4]


def test_name_that_stands_for_two_sizes_goes_and_one_that_fits_stays() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y, float[4,N] z) { y = Relu(x)\n [t] z = Transpose(x) }")
    graphs.node(model, "t").outputs[0].shape = ir.Shape(["N", "N"])
    observed.correct(model, {"x": graphs.noise(0, 2, 4)})
    assert [sizes(value) for value in model.graph.outputs] == [["N", 4], [4, None]]


def test_tensors_behind_an_operator_of_another_domain_have_the_type_and_shape_of_the_run() -> None:
    model = ir.serde.deserialize_model(onnx.parser.parse_model(CONTRIB))
    batch = {"x": graphs.noise(0, 2, 4)}
    observed.correct(model, batch)
    (output,) = graph.outputs(model)
    assert (output.dtype, output.shape) == ("float32", ("y_0", 4))
    assert observed.fill(model, batch) == 1 and observed.fill(model, batch) == 0
    inner = model.graph.node(0).outputs[0]
    assert (inner.dtype, sizes(inner)) == (ir.DataType.FLOAT, [None, 4])


def test_shapes_inside_a_body_are_forgotten_but_for_its_scalars() -> None:
    text = """<ir_version: 8, opset_import: ["" : 20]> g (float[N,4] x) => (float[N,4] y) <int64 n = {3}, bool c = {1}> {
      y = Loop<body = b (int64 i, bool k, float[1,4] z) => (bool l, float[1,4] u) { l = Identity(k)  u = Tanh(z) }>(n, c, x) }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    observed.correct(model, {"x": graphs.noise(0, 2, 4)})
    body = model.graph.node(0).attributes["body"].as_graph()
    assert [value.shape is None for value in (*body.inputs, *body.outputs)] == [False, False, True, True, True]
