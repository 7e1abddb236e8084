from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from exporter import graph, prepare, quantize
from exporter.prepare import ends
from tests.exporter import graphs

X = {"x": graphs.noise(0, 2, 3, 6, 6)}
W = {"w": graphs.noise(1, 8, 3, 3, 3)}


def test_input_that_is_an_output_is_read_through_an_identity() -> None:
    model = graphs.model("(float[N,3,6,6] x) => (float[N,8,4,4] y, float[N,3,6,6] x) { [c] y = Conv(x, w) }", W)
    after, matched = graphs.rewritten(model, ends.rewrite, X)
    assert (matched, graphs.op_types(after)) == (1, ["Identity", "Conv"])
    assert [value.name for value in (*after.graph.inputs, *after.graph.outputs)] == ["x", "y", "x"]
    assert graphs.node(after, "c").inputs[0] is after.graph[0].outputs[0]
    assert ends.rewrite(after) == 0


def test_input_that_is_an_output_and_read_by_an_int8_node_is_quantized() -> None:
    model = graphs.model(
        "(float[N,3,6,6] x, float[N,3,6,6] x_read) => (float[N,8,4,4] y, float[N,3,6,6] x, float[N,8,4,4] z) {"
        " [c] y = Conv(x, w)\n [d] z = Conv(x_read, w) }",
        W,
    )
    batch = X | {"x_read": graphs.noise(2, 2, 3, 6, 6)}
    made = prepare.to_quantizable(model, batch)
    plan, ranges = graphs.planned(made.model, batch)
    int8 = quantize.to_int8(made.model, plan, ranges)
    assert graphs.precisions(plan)["c"] == "int8"
    assert [value.name for value in int8.graph.outputs] == ["y", "x", "z"]
    np.testing.assert_array_equal(graph.runner(int8)(batch)["x"], X["x"])


def test_input_that_nothing_reads_but_the_output_is_left_alone() -> None:
    model = graphs.model("(float[N,4] x, float[N,4] z) => (float[N,4] y, float[N,4] z) { y = Relu(x) }")
    assert ends.rewrite(model) == 0


def test_output_listed_twice_is_listed_once() -> None:
    proto = graphs.proto("(float[N,4] x) => (float[N,4] y, float[N,4] z) { y = Relu(x)\n z = Neg(y) }")
    proto.graph.output.insert(1, onnx.ValueInfoProto.FromString(proto.graph.output[0].SerializeToString()))
    model = ir.serde.deserialize_model(proto)
    assert ends.rewrite(model) == 1
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert ends.rewrite(model) == 0


def test_input_and_output_beside_one_called_as_their_scale_stand_behind_an_identity() -> None:
    model = graphs.model(
        "(float[N,3,6,6] x, float[N,3,6,6] x_scale) => (float[N,8,4,4] y, float[N,8,2,2] y_quantized_scale) {"
        " [c] y = Conv(x, w)\n [d] s = Conv(x_scale, w)\n [e] a = Add(y, s)\n [f] y_quantized_scale = Conv(a, v) }",
        W | {"v": graphs.noise(3, 8, 8, 3, 3)},
    )
    batch = X | {"x_scale": graphs.noise(2, 2, 3, 6, 6) * 5}
    made = prepare.to_quantizable(model, batch)
    assert ends.rewrite(made.model) == 0
    plan, ranges = graphs.planned(made.model, batch)
    int8 = quantize.to_int8(made.model, plan, ranges)
    assert [graphs.precisions(plan)[name] for name in "cdef"] == ["int8"] * 4
    assert [value.name for value in int8.graph.outputs] == ["y", "y_quantized_scale"]
    expected, found = graph.runner(made.model)(batch), graph.runner(int8)(batch)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() < 0.05 * np.abs(value).max()


def test_weight_that_is_an_output_is_copied_to_it_and_stays_a_weight() -> None:
    model = graphs.model("(float[N,3,6,6] x) => (float[N,8,4,4] y, float[8,3,3,3] w) { [c] y = Conv(x, w) }", W)
    made = prepare.to_quantizable(model, X)
    plan, ranges = graphs.planned(made.model, X)
    int8 = quantize.to_int8(made.model, plan, ranges)
    assert graphs.precisions(plan)["c"] == "int8"
    assert [value.name for value in int8.graph.outputs] == ["y", "w"]
    np.testing.assert_array_equal(graph.runner(int8)(X)["w"], W["w"])


def test_outputs_that_are_constant_come_out_bit_for_bit() -> None:
    given = W | {"c": graphs.noise(2, 5)}
    text = "(float[N,3,6,6] x) => (float[N,8,4,4] y, float[5] k, float[5] n) { y = Conv(x, w)\n k = Identity(c)\n n = Neg(c) }"
    made = prepare.to_quantizable(graphs.model(text, given), X)
    assert [value.name for value in made.model.graph.outputs] == ["y", "k", "n"]
    assert not any(value.is_initializer() for value in made.model.graph.outputs)
    found = graph.runner(graph.with_outputs(made.model, ["k", "n"]))(X)
    np.testing.assert_array_equal(found["k"], given["c"])
    np.testing.assert_array_equal(found["n"], -given["c"])
