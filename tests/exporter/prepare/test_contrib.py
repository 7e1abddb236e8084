from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from exporter import graph, prepare, proof
from exporter.prepare import contrib, observed
from tests.exporter import graphs

CNN = """(float[N,3,13,13] x) => (float[N,5] y, float[N,16,10,10] z) {
    a = Conv<strides=[2,2]>(x, first)
    b = Relu(a)
    c = Conv(b, point)
    d = LeakyRelu<alpha=0.1>(c)
    e = Conv<group=20, pads=[1,1,1,1]>(d, depth)
    f = Sigmoid(e)
    g = Conv<pads=[1,1,1,1]>(f, last, bias)
    p = Conv(f, side)
    h = Add(g, p)
    i = Relu(h)
    j = MaxPool<kernel_shape=[2,2], strides=[1,1]>(i)
    z = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(j, , twice)
    k = GlobalAveragePool(j)
    l = Flatten(k)
    y = Gemm(l, head)
}"""
WEIGHTS = {
    "first": graphs.noise(1, 16, 3, 3, 3), "point": graphs.noise(2, 20, 16, 1, 1) / 4, "depth": graphs.noise(3, 20, 1, 3, 3),
    "last": graphs.noise(4, 16, 20, 3, 3) / 8, "bias": graphs.noise(5, 16), "side": graphs.noise(6, 16, 20, 1, 1),
    "head": graphs.noise(7, 16, 5), "twice": np.array([1, 1, 2, 2], np.float32),
}  # fmt: skip


def microsoft(text: str, **weights: graphs.Array) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 20, "com.microsoft" : 1]> g {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return ir.serde.deserialize_model(proto)


def unfused(model: ir.Model, **batch: graphs.Array) -> list[str]:
    """op_types after the rewrite, which is proved equal."""
    expected = observed.correct(model, batch)
    observed.fill(model, batch)
    assert contrib.rewrite(model) > 0
    assert proof.difference(expected, graph.runner(model)(batch)) == ""
    return [graph.op(node) for node in model.graph]


@pytest.mark.parametrize("level", ["ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_file_that_onnxruntimes_optimizer_saved_quantizes_as_the_one_it_read(level: str, tmp_path: Path) -> None:
    given = graphs.model(CNN, WEIGHTS)
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "m.onnx"), 4
    ort.InferenceSession(graph.to_bytes(given), options, providers=["CPUExecutionProvider"])
    saved = ir.load(tmp_path / "m.onnx")
    assert any(node.domain for node in saved.graph)
    batch = {"x": graphs.noise(0, 2, 3, 13, 13)}
    made = prepare.to_quantizable(saved, batch)
    assert dict(made.reference.opset_imports) == dict(made.model.opset_imports) == {"": 20}
    plain = graphs.planned(prepare.to_quantizable(given, batch).model, batch)[0]
    fused = graphs.planned(made.model, batch)[0]
    assert sorted(d.op_type for d in fused.decisions if d.macs and d.precision == "int8") == ["Conv"] * 5 + ["Gemm"]
    # channels that were filled up to the CPU's block stay, so there may be more of them
    assert sum(d.macs for d in fused.decisions) >= sum(d.macs for d in plain.decisions)


def test_product_of_transposed_factors_and_its_factor() -> None:
    model = microsoft(
        """(float[2,4,3] a, float[2,5,4] b) => (y) { y = com.microsoft.FusedMatMul<transA=1, transB=1, alpha=0.5>(a, b) }"""
    )
    found = unfused(model, a=graphs.noise(0, 2, 4, 3), b=graphs.noise(1, 2, 5, 4))
    assert found == ["Transpose", "Transpose", "MatMul", "Mul"]


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ("BiasGelu(x, b)", ["Add", "Gelu"]),
        ("FastGelu(x)", ["Gelu"]),
        ("QuickGelu<alpha=1.5>(x)", ["Mul", "Sigmoid", "Mul"]),
        ('FusedGemm<activation="LeakyRelu", activation_alpha=0.3, transB=1>(x, w, b)', ["Gemm", "LeakyRelu"]),
        ("SkipLayerNormalization<epsilon=0.00001>(x, x, b, b, b)", ["Add", "Add", "LayerNormalization"]),
    ],
)
def test_operator_is_written_as_those_it_was_made_of(node: str, expected: list[str]) -> None:
    model = microsoft(
        f"(float[N,4] x) => (y) {{ y = com.microsoft.{node} }}", w=graphs.noise(1, 4, 4), b=graphs.noise(2, 4)
    )
    assert unfused(model, x=graphs.noise(0, 3, 4)) == expected


def test_sum_that_a_skipped_normalization_puts_out_is_kept() -> None:
    model = microsoft(
        "(float[N,4] x) => (y, s) { y, m, v, s = com.microsoft.SkipLayerNormalization(x, x, g) }", g=graphs.noise(1, 4)
    )
    assert unfused(model, x=graphs.noise(0, 3, 4)) == ["Add", "LayerNormalization"]
    assert [value.name for value in model.graph.outputs] == ["y", "s"]


@pytest.mark.parametrize("mask", [np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int32), np.array([4, 2], np.int32)])
def test_weights_inside_attention_become_those_of_a_layer(mask: graphs.Array) -> None:
    shape = ",".join(map(str, mask.shape))
    model = microsoft(
        f"(float[2,4,8] x, int32[{shape}] m) => (y) {{ y = com.microsoft.Attention<num_heads=2>(x, w, b, m) }}",
        w=graphs.noise(1, 8, 24) / 3,
        b=graphs.noise(2, 24),
    )
    assert unfused(model, x=graphs.noise(0, 2, 4, 8), m=mask) == ["MatMul", "Add", "Split", "MultiHeadAttention"]
