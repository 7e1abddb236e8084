from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter.prepare import edit
from tests.exporter import graphs


def test_initializer_takes_the_next_free_name() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { y = Mul(x, k) }", {"k": np.float32(2)})
    names = [edit.initializer(model, "k", np.zeros(3, np.float32)).name for _ in range(3)]
    assert names == ["k_1", "k_2", "k_3"]
    assert [*model.graph.initializers] == ["k", *names]
    assert edit.initializer(model, "free", np.zeros(3, np.int64)).dtype == ir.DataType.INT64


def test_replace_keeps_the_name_type_and_readers_of_an_output() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y, float[N,4] z) { [r] y = Relu(x)\n [n] z = Neg(y) }")
    relu = graphs.node(model, "r")
    new = ir.node("Abs", [relu.inputs[0]], name="a")
    edit.replace(model, [relu], [new], relu.outputs[0], new.outputs[0])
    assert graphs.op_types(model) == ["Abs", "Neg"]
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert graphs.node(model, "n").inputs[0] is new.outputs[0]
    assert new.outputs[0].dtype == ir.DataType.FLOAT and str(new.outputs[0].shape) == "[N,4]"


def test_initializer_takes_the_name_of_no_other_tensor() -> None:
    """An input `h_bias` beside a Conv `h`: the initializer would take its place."""
    model = graphs.model(
        "(float[N,4] h_bias) => (float[N,4] h_bias_2) { h_bias_1 = Relu(h_bias)\n h_bias_2 = Neg(h_bias_1) }"
    )
    assert edit.initializer(model, "h_bias", np.zeros(3, np.float32)).name == "h_bias_3"


def test_initializer_takes_no_name_whose_scale_is_called_as_another_tensor() -> None:
    model = graphs.model("(float[N,4] k_quantized_scale) => (float[N,4] y) { y = Relu(k_quantized_scale) }")
    assert edit.initializer(model, "k", np.zeros(3, np.float32)).name == "k_1"
