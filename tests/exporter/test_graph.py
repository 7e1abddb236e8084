from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from exporter import graph
from runtime.errors import PacklightError
from runtime.kernels import trace
from runtime.manifest import Tensor
from tests.exporter import graphs

NET = """(float[N,3,8,8] x) => (float[N,4] y) {
    [conv] c = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w)
    [depthwise] d = Conv<group=8, pads=[1,1,1,1]>(c, v)
    [up] u = ConvTranspose<strides=[2,2]>(d, t)
    [flat] f = Flatten(u)
    [head] y = Gemm<transB=1>(f, g, b)
}"""
WEIGHTS = {
    "w": graphs.noise(1, 8, 3, 3, 3), "v": graphs.noise(2, 8, 1, 3, 3), "t": graphs.noise(3, 8, 2, 2, 2),
    "g": graphs.noise(4, 4, 128), "b": graphs.noise(5, 4),
}  # fmt: skip
BATCH = {"x": graphs.noise(6, 5, 3, 8, 8)}
# batch 5: 8 maps of 4x4 from 3 channels by 3x3; depthwise 3x3; 4x4 pixels of 8 channels to 2 channels by 2x2; 4 x 128
MACS = {"conv": 5 * 8 * 16 * 27, "depthwise": 5 * 8 * 16 * 9, "up": 5 * 8 * 16 * 2 * 4, "flat": 0, "head": 5 * 4 * 128}


def test_shapes_are_those_of_the_run_weights_included() -> None:
    found = graph.shapes(graphs.model(NET, WEIGHTS), BATCH)
    expected = {
        "x": (5, 3, 8, 8), "c": (5, 8, 4, 4), "d": (5, 8, 4, 4), "u": (5, 2, 8, 8), "f": (5, 128), "y": (5, 4),
    }  # fmt: skip
    assert found == expected | {name: weight.shape for name, weight in WEIGHTS.items()}


def test_macs_by_hand() -> None:
    model = graphs.model(NET, WEIGHTS)
    shapes = graph.shapes(model, BATCH)
    assert {node.name: graph.macs(node, shapes) for node in model.graph} == MACS


def test_macs_are_those_the_runtime_counts(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(graph.to_bytes(graphs.model(NET, WEIGHTS)))
    assert trace(path, BATCH).macs == sum(MACS.values())


def test_macs_of_matmul_and_lstm_by_hand() -> None:
    matmul = graphs.model("(float[2,6,8] a, float[2,8,10] b) => (float[2,6,10] y) { [m] y = MatMul(a, b) }")
    shapes = graph.shapes(matmul, {"a": graphs.noise(1, 2, 6, 8), "b": graphs.noise(2, 2, 8, 10)})
    assert graph.macs(graphs.node(matmul, "m"), shapes) == 2 * 6 * 10 * 8
    lstm = graphs.model(
        "(float[7,2,8] x) => (float[7,1,2,16] y) { [l] y = LSTM<hidden_size=16>(x, w, r) }",
        {"w": graphs.noise(1, 1, 64, 8), "r": graphs.noise(2, 1, 64, 16)},
    )
    shapes = graph.shapes(lstm, {"x": graphs.noise(3, 7, 2, 8)})
    assert graph.macs(graphs.node(lstm, "l"), shapes) == 7 * 2 * 4 * 16 * (8 + 16)


def test_dimension_without_a_name_is_called_after_its_tensor() -> None:
    model = graphs.model("(float[?,4] x) => (float[N,4] y) { y = Relu(x) }")
    model.graph.inputs[0].shape = ir.Shape([None, 4])
    assert graph.inputs(model)[0].shape == ("x_0", 4)
    assert graph.outputs(model)[0].shape == ("N", 4)


def test_initializer_that_an_old_file_lists_as_input_is_not_asked_of_the_caller() -> None:
    proto = graphs.proto(
        "(float[N,4] x, float[4,4] w) => (float[N,4] y) { y = MatMul(x, w) }", {"w": np.eye(4, dtype=np.float32)}
    )
    model = ir.serde.deserialize_model(proto)
    assert [tensor.name for tensor in graph.inputs(model)] == ["x"]


def test_same_model_gives_the_same_bytes() -> None:
    model = graphs.model(NET, WEIGHTS)
    assert graph.to_bytes(model) == graph.to_bytes(model.clone()) == graph.to_bytes(graphs.model(NET, WEIGHTS))


def test_with_outputs_leaves_the_model_alone_and_reads_inner_tensors() -> None:
    model = graphs.model(NET, WEIGHTS)
    inner = graph.runner(graph.with_outputs(model, ["c", "f"]))(BATCH)
    assert {name: value.shape for name, value in inner.items()} == {"c": (5, 8, 4, 4), "f": (5, 128)}
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_graph_that_onnxruntime_refuses_and_batch_that_does_not_fit_are_run_errors() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    with pytest.raises(graph.RunError, match="Got invalid dimensions for input: x"):
        graph.runner(model)({"x": np.ones((1, 5), np.float32)})
    model.graph[0].op_type = "NoSuchOperator"
    with pytest.raises(graph.RunError, match="NoSuchOperator"):
        graph.runner(model)


def test_constant_is_the_array_of_an_initializer_and_nothing_else() -> None:
    model = graphs.model(NET, WEIGHTS)
    conv = graphs.node(model, "conv")
    np.testing.assert_array_equal(graph.constant(conv.inputs[1]), WEIGHTS["w"])
    assert graph.constant(conv.inputs[0]) is None and graph.constant(None) is None


def test_activations_and_consumers() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { [a] r = Relu(x)\n [b] y = Add(r, r) }")
    a, b = graphs.node(model, "a"), graphs.node(model, "b")
    assert graph.consumers(a.outputs[0]) == (b,)
    assert [value.name for value in graph.activations(b)] == ["r", "r"]


def test_empty_name_and_minus_one_are_dimensions_without_a_name() -> None:
    proto = graphs.proto("(float[N,M,4] x) => (float[N,M,4] y) { y = Relu(x) }")
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = ""
        value.type.tensor_type.shape.dim[1].dim_value = -1
    model = ir.serde.deserialize_model(proto)
    assert graph.inputs(model)[0].shape == ("x_0", "x_1", 4)
    assert graph.outputs(model)[0].shape == ("y_0", "y_1", 4)


def test_sequence_has_no_shape() -> None:
    text = "(float[N,4] x) => (float[N,2] y) { s = SplitToSequence<axis=1>(x, two)\n y = SequenceAt(s, zero) }"
    model = graphs.model(text, {"two": np.int64(2), "zero": np.int64(0)})
    assert graph.shapes(model, {"x": graphs.noise(1, 3, 4)}) == {"x": (3, 4), "two": (), "zero": (), "y": (3, 2)}


def test_run_error_is_one_of_packlights() -> None:
    assert issubclass(graph.RunError, PacklightError)


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax", "Sigmoid"])
def test_unsquashed_outputs_are_what_the_last_squashing_reads(op_type: str) -> None:
    text = f"(float[2,4] x) => (float[2,4] y, float[2,4] z) {{ [r] r = Neg(x) [s] y = {op_type}(r) [t] z = Abs(x) }}"
    model, batch = graphs.model(text), {"x": graphs.noise(0, 2, 4)}
    before = graph.to_bytes(model)
    found = graph.runner(graph.unsquashed(model))(batch)
    assert [*found] == ["y", "z"]
    assert np.array_equal(found["y"], -batch["x"])
    assert np.array_equal(found["z"], np.abs(batch["x"]))
    assert graph.to_bytes(model) == before


def test_unsquashed_looks_through_the_rounding_of_an_int8_output() -> None:
    text = """(float[2,4] x) => (float[2,4] y) {
        [r] r = Neg(x) [s] p = Sigmoid(r) [q] c = QuantizeLinear(p, s0, z0) [d] y = DequantizeLinear(c, s0, z0)
    }"""
    weights = {"s0": np.float32(1 / 255), "z0": np.uint8(0)}
    found = graph.runner(graph.unsquashed(graphs.model(text, weights)))({"x": graphs.noise(0, 2, 4)})
    assert np.array_equal(found["y"], -graphs.noise(0, 2, 4))


def test_softmax_inside_the_network_stays() -> None:
    text = "(float[2,4] x) => (float[2,4] y) { [s] p = Softmax(x) [n] y = Neg(p) }"
    assert "Softmax" in graphs.op_types(graph.unsquashed(graphs.model(text)))


def test_node_of_another_domain_is_not_the_operator_of_its_name() -> None:
    assert graph.op(ir.node("Conv", [])) == "Conv"
    assert graph.op(ir.node("Conv", [], domain="com.microsoft.nchwc")) == "com.microsoft.nchwc.Conv"
    assert graph.op(ir.node("FusedConv", [], domain="com.microsoft")) == "FusedConv"
    fused = ir.node("MatMul", [ir.val("a"), ir.val("b")], domain="own")
    assert not graph.is_product(fused) and graph.macs(fused, {"a": (2, 3), "b": (3, 4)}) == 0


DEFAULT = "(float[N,4] x, float[4,4] w, float t) => (float[N,4] y) { m = MatMul(x, w)\n y = Mul(m, t) }"


def with_defaults(*more: str, ir_version: int = 8) -> ir.Model:
    arrays = {"w": graphs.noise(1, 4, 4), "t": np.float32(2), **{name: np.float32(1) for name in more}}
    made = graphs.model(DEFAULT, arrays)
    made.ir_version = ir_version
    return made


def test_default_that_no_layer_reads_as_a_weight_is_an_input_and_can_be_put_back() -> None:
    model = with_defaults("unlisted")
    settled, defaults = graph.settled(model, set())
    assert [tensor.name for tensor in graph.inputs(settled)] == ["x", "t"]
    assert defaults == {"t": np.float32(2)}
    x = graphs.noise(0, 2, 4)
    put_back = graph.with_defaults(settled, defaults)
    assert [tensor.name for tensor in graph.optional(put_back)] == ["t"]
    plain, other = (graph.runner(put_back)({"x": x, **given})["y"] for given in ({}, {"t": np.asarray(6, np.float32)}))
    np.testing.assert_allclose(other, 3 * plain, rtol=1e-6)
    assert [tensor.name for tensor in graph.optional(model)] == ["w", "t"]  # what was given is as it was


def test_initializers_that_are_all_listed_as_inputs_are_weights_but_for_those_that_batches_give() -> None:
    for model in (with_defaults(), with_defaults("unlisted", ir_version=3)):
        assert graph.settled(model, set())[1] == {}
        settled, defaults = graph.settled(model, {"t"})
        assert [tensor.name for tensor in graph.inputs(settled)] == ["x", "t"] and [*defaults] == ["t"]


def test_name_of_an_axis_that_is_taken_back_is_nowhere_in_the_graph() -> None:
    model = graphs.model("(float[None,4,None] x) => (float[None,4,None] y) { y = Relu(x) }")
    named = [Tensor(name="x", dtype="float32", shape=("x_0", 4, "x_2"))]
    found = graph.renamed_axes(model, named)
    assert [t.shape for t in (*graph.inputs(found), *graph.outputs(found))] == [("x_0", 4, "x_2"), ("y_0", 4, "y_2")]
    assert graph.renamed_axes(model, graph.inputs(model)) is model


@pytest.mark.parametrize(
    ("op_type", "attributes", "dtype"),
    [("ArgMax", {"axis": 1}, TensorProto.INT64), ("Cast", {"to": TensorProto.INT32}, TensorProto.INT32)],
)
def test_real_numbers_that_decide_integers_are_read(op_type: str, attributes: dict[str, int], dtype: int) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node(op_type, ["r"], ["i"], name="decides", **attributes),
        helper.make_node("Add", ["i", "i"], ["y"], name="twice"),
    ]
    told = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])
    outputs = [helper.make_tensor_value_info("y", dtype, None)]
    for further in ([], [helper.make_tensor_value_info("r", TensorProto.FLOAT, [2, 3])]):
        between = [helper.make_tensor_value_info("r", TensorProto.FLOAT, [2, 3])]
        made = helper.make_graph(nodes, "g", [told], [*outputs, *further], value_info=[] if further else between)
        model = ir.serde.deserialize_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)]))
        read, sets = graph.selections(model)
        assert sets == []
        assert {name: value.name for name, value in read.items()} == ({} if further else {"decides reads 0": "r"})


def test_layer_that_goes_through_a_sequence_is_found() -> None:
    text = "(float[T,N,4] x) => (float[T,1,N,2] y) { [r] y = %s <hidden_size = 2> (x, w, r) }"
    weights = {"w": graphs.noise(0, 1, 2, 4), "r": graphs.noise(1, 1, 2, 2)}
    assert graph.recurs(graphs.model(text % "RNN", weights))
    assert not graph.recurs(graphs.model("(float[N] x) => (float[N] y) { [n] y = Neg(x) }", {}))
