from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from exporter import quantize
from exporter.prepare import names
from tests.exporter import graphs


def test_every_node_gets_a_name_of_its_own_and_keeps_the_one_it_has() -> None:
    model = graphs.model(
        """(float[N,4] x) => (float[N,4] y) {
            [same] a = Relu(x)
            [same] b = Tanh(a)
            c = Abs(b)
            [c] d = Neg(c)
            y = Relu(d)
        }"""
    )
    assert names.rewrite(model) == 1
    found = [node.name for node in model.graph]
    assert found[0] == "same" and len(set(found)) == 5 and all(found)
    assert names.rewrite(model) == 0


def test_nodes_in_branches_have_names_of_their_own_too() -> None:
    text = """<ir_version: 8, opset_import: ["" : 20]> g (float[N,4] x, bool c) => (float[N,4] y) {
      [same] a = Relu(x)
      y = If(c)<then_branch = t () => (float[] e) { [same] e = Neg(a) },
                else_branch = f () => (float[] o) { [same] o = Abs(a) }> }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    names.rewrite(model)
    found = [node.name for each in model.graphs() for node in each]
    assert found[0] == "same" and len(set(found)) == 4


def test_traces_of_the_machine_that_exported_are_taken_out() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { [r] y = Relu(x) }")
    node = model.graph[0]
    node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "/home/someone/model.py", line 7'
    node.doc_string = "/home/someone"
    model.graph.doc_string = "/home/someone"
    model.producer_name, model.producer_version = "pytorch", "2.13.0"
    names.rewrite(model)
    content = ir.serde.serialize_model(model).SerializeToString()
    assert b"someone" not in content and b"pytorch" not in content
    assert model.producer_name == "packlight"


def test_tensor_called_as_the_quantizer_calls_the_scale_of_another_is_renamed() -> None:
    model = graphs.model(
        """(float[N,3,6,6] x) => (float[N,8,4,4] y) {
            x_QuantizeLinear_Output = Neg(x)
            [c] a = Conv(x, w, w_scale)
            [d] a_zero_point = Conv(x_QuantizeLinear_Output, w, w_scale)
            y = Add(a, a_zero_point)
        }""",
        {"w": graphs.noise(1, 8, 3, 3, 3), "w_scale": graphs.noise(2, 8)},
    )
    batch = {"x": graphs.noise(0, 2, 3, 6, 6)}
    after, _ = graphs.rewritten(model, names.rewrite, batch)
    assert list(after.graph.initializers) == ["w", "w_scale_own"]
    assert [node.outputs[0].name for node in after.graph] == [
        "x_QuantizeLinear_Output_own",
        "a",
        "a_zero_point_own",
        "y",
    ]
    assert names.rewrite(after) == 0
    plan, ranges = graphs.planned(after, batch)
    quantize.to_int8(after, plan, ranges)


def test_tensor_whose_scale_would_be_called_as_an_input_or_output_is_renamed() -> None:
    model = graphs.model(
        "(float[N,4] h_scale) => (float[N,4] h_quantized_scale) { h = Relu(h_scale)\n h_quantized_scale = Tanh(h) }"
    )
    after, _ = graphs.rewritten(model, names.rewrite, {"h_scale": graphs.noise(0, 2, 4)})
    assert [value.name for value in (*after.graph.inputs, *after.graph.outputs)] == ["h_scale", "h_quantized_scale"]
    assert after.graph[0].outputs[0].name == "h_own"
    assert names.rewrite(after) == 0


def test_tensor_that_only_ends_like_a_scale_keeps_its_name() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { y = Mul(x, logit_scale) }", {"logit_scale": np.float32(2)})
    names.rewrite(model)
    assert list(model.graph.initializers) == ["logit_scale"]


def test_node_name_that_would_break_a_line_or_a_field_of_the_plan_is_changed() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { a = Relu(x)\n b = Tanh(a)\n c = Neg(b)\n y = Abs(c) }")
    for node, name in zip(model.graph, ("a | b", "a\r\nb", "a_b", "block 1"), strict=True):
        node.name = name
    assert names.rewrite(model) == 1
    assert [node.name for node in model.graph] == ["a _ b", "a_b", "c", "block 1"]
    assert names.rewrite(model) == 0
