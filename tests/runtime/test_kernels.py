"""Multiply-adds against counts by hand, and kernels against what ONNX Runtime 1.31 is known to run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import runtime
from runtime import manifest as manifests
from runtime.errors import PacklightError
from runtime.kernels import Kernel, trace
from tests.runtime import models
from tests.runtime.models import Array

node = helper.make_node
RNG = np.random.default_rng(0)
MS = "com.microsoft"
HIDDEN, FEATURES, STEPS, BATCH = 8, 5, 7, 3


def real(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def s8(*shape: int) -> Array:
    return RNG.integers(-127, 127, shape).astype(np.int8)


def u8(*shape: int) -> Array:
    return RNG.integers(0, 255, shape).astype(np.uint8)


ONE, ZERO_U8, ZERO_S8 = np.float32(1), np.uint8(0), np.int8(0)
Q = {"s": ONE, "z": ZERO_U8, "zw": ZERO_S8}

# kernel, attributes, domain, input names in order, arrays that are inputs, arrays that are weights, output type, MACs, types
CASES = [
    ("Gemm", {"transA": 1}, "", "x w", {"x": real(20, 3)}, {"w": real(20, 7)}, 3 * 20 * 7, "f32"),
    ("MatMul", {}, "", "x w", {"x": real(2, 5, 3, 20)}, {"w": real(20, 7)}, 2 * 5 * 3 * 20 * 7, "f32"),
    ("MatMul", {}, "", "x w", {"x": real(2, 3, 20), "w": real(2, 20, 7)}, {}, 2 * 3 * 20 * 7, "f32"),
    ("MatMul", {}, "", "x w", {"x": real(4, 3, 20)}, {"w": real(20)}, 4 * 3 * 20, "f32"),
    ("MatMul", {}, "", "x w", {"x": real(20)}, {"w": real(20, 5)}, 20 * 5, "f32"),
    ("MatMul", {}, "", "x w", {"x": real(0, 20)}, {"w": real(20, 5)}, 0, "f32"),
    ("Conv", {"group": 2}, "", "x w", {"x": real(2, 6, 10)}, {"w": real(8, 3, 3)}, 2 * 8 * 8 * 3 * 3, "f32"),
    ("ConvTranspose", {"group": 2, "strides": [2, 2]}, "", "x w", {"x": real(1, 6, 5, 5)}, {"w": real(6, 4, 3, 3)}, 6 * 25 * 36, "f32"),
    (
        *("LSTM", {"hidden_size": HIDDEN, "direction": "bidirectional"}, "", "x w r", {"x": real(STEPS, BATCH, FEATURES)}),
        {"w": real(2, 4 * HIDDEN, FEATURES), "r": real(2, 4 * HIDDEN, HIDDEN)},
        *(STEPS * BATCH * 2 * 4 * HIDDEN * (FEATURES + HIDDEN), "f32"),
    ),
    (
        *("GRU", {"hidden_size": HIDDEN}, "", "x w r", {"x": real(STEPS, BATCH, FEATURES)}),
        {"w": real(1, 3 * HIDDEN, FEATURES), "r": real(1, 3 * HIDDEN, HIDDEN)},
        *(STEPS * BATCH * 3 * HIDDEN * (FEATURES + HIDDEN), "f32"),
    ),
    (
        *("DynamicQuantizeLSTM", {"hidden_size": HIDDEN}, MS, "x w r - - - - - s1 z1 s1 z1", {"x": real(STEPS, BATCH, FEATURES)}),
        {"w": s8(1, FEATURES, 4 * HIDDEN), "r": s8(1, HIDDEN, 4 * HIDDEN), "s1": real(1) ** 2, "z1": np.zeros(1, np.int8)},
        *(STEPS * BATCH * 4 * HIDDEN * (FEATURES + HIDDEN), "f32s8"),
    ),
    ("MatMulInteger", {}, "", "x w", {"x": u8(2, 3, 20)}, {"w": s8(20, 7)}, 2 * 3 * 20 * 7, "u8s8"),
    ("ConvInteger", {}, "", "x w", {"x": u8(1, 3, 8, 8)}, {"w": u8(4, 3, 3, 3)}, 4 * 36 * 27, "u8u8"),
    ("MatMulIntegerToFloat", {}, MS, "x w s s", {"x": u8(2, 3, 20)}, {"w": s8(20, 7), "s": ONE}, 2 * 3 * 20 * 7, "u8s8"),
    ("DynamicQuantizeMatMul", {}, MS, "x w s", {"x": real(2, 3, 20)}, {"w": s8(20, 7), "s": ONE}, 2 * 3 * 20 * 7, "f32s8"),
    ("QLinearMatMul", {}, "", "x s z w s zw s z", {"x": u8(2, 3, 20)}, {"w": s8(20, 7), **Q}, 2 * 3 * 20 * 7, "u8s8"),
    ("QLinearConv", {"group": 2}, "", "x s z w s zw s z", {"x": u8(1, 6, 8, 8)}, {"w": s8(4, 3, 3, 3), **Q}, 4 * 36 * 27, "u8s8"),
    ("QGemm", {"transB": 1}, MS, "x s z w s zw - s z", {"x": u8(3, 20)}, {"w": s8(7, 20), **Q}, 3 * 20 * 7, "u8s8"),
    ("Attention", {"num_heads": 2}, MS, "x w b", {"x": real(2, 6, 8)}, {"w": real(8, 24), "b": real(24)}, 2 * 6 * 8 * 24 + 2 * 2 * 6 * 6 * 8, "f32"),
    ("QAttention", {"num_heads": 2}, MS, "x w b s s - z zw", {"x": u8(2, 6, 8)}, {"w": s8(8, 24), "b": real(24), **Q}, 2 * 6 * 8 * 24 + 2 * 2 * 6 * 6 * 8, "u8s8"),
    ("MultiHeadAttention", {"num_heads": 2}, MS, "x k k", {"x": real(2, 6, 8), "k": real(2, 9, 8)}, {}, 2 * 2 * 6 * 9 * 8, "f32"),
    ("Add", {}, "", "x w", {"x": real(3, 4)}, {"w": real(4)}, 0, "f32"),
]  # fmt: skip
INTEGER = {"DynamicQuantizeLSTM", "MatMulInteger", "ConvInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"} | {
    *("QLinearMatMul", "QLinearConv", "QGemm", "QAttention"),
}


def save(
    path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, Array], weights: dict[str, Array], output: int
) -> Path:
    graph = helper.make_graph(
        nodes,
        "case",
        [
            helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for k, v in inputs.items()
        ],
        [helper.make_tensor_value_info("y", output, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=8), path)
    return path


@pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}-{case[6]}" for case in CASES])
def test_macs_types_and_integer_by_hand(tmp_path: Path, case: tuple[object, ...]) -> None:
    op_type, attributes, domain, names, inputs, weights, macs, types = case
    output = {"MatMulInteger": TensorProto.INT32, "ConvInteger": TensorProto.INT32}.get(op_type, TensorProto.FLOAT)
    if op_type.startswith("QLinear") or op_type == "QGemm":
        output = TensorProto.UINT8
    only = node(op_type, [name.strip("-") for name in names.split()], ["y"], "it", domain=domain, **attributes)
    found = trace(save(tmp_path / "m.onnx", [only], inputs, weights, output), inputs, runs=2)
    kernel = next(each for each in found.kernels if each.node.startswith("it"))
    assert (kernel.kernel, kernel.macs, kernel.types) == (op_type, macs, types)
    assert kernel.integer is (op_type in INTEGER)
    assert found.macs == macs
    assert found.integer_macs == (1.0 if op_type in INTEGER else 0.0)


def test_float_and_int8_files_of_one_model_have_equal_macs(bundle_folder: Path) -> None:
    inputs = next(models.images(0, 1, size=1))
    fp32 = trace(bundle_folder / manifests.FP32, inputs)
    int8 = trace(bundle_folder / manifests.INT8, inputs)
    assert fp32.macs == int8.macs == models.CLASSIFIER_MACS
    assert (fp32.integer_macs, int8.integer_macs) == (0.0, 1.0)


def test_nchwc_convs_are_counted_without_padding_and_under_their_own_names(bundle_folder: Path) -> None:
    fp32 = trace(bundle_folder / manifests.FP32, next(models.images(0, 1, size=1)))
    macs = {kernel.node: kernel.macs for kernel in fp32.kernels if kernel.macs}
    assert macs == {
        "conv": 24 * 16 * 16 * 27,
        "depthwise": 24 * 8 * 8 * 9,
        "pointwise": 16 * 8 * 8 * 24,
        "head": 16 * 8 * 8 * models.CLASSES,
    }


def test_share_of_a_half_quantized_model_is_that_of_its_integer_nodes(tmp_path: Path) -> None:
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["xq"], "q"),
        node("MatMulInteger", ["xq", "w"], ["i"], "integer"),
        node("Cast", ["i"], ["f"], "cast", to=TensorProto.FLOAT),
        node("MatMul", ["f", "v"], ["y"], "float"),
    ]
    weights = {"s": ONE, "z": ZERO_U8, "w": s8(20, 7), "v": real(7, 5)}
    inputs = {"x": real(3, 20)}
    found = trace(save(tmp_path / "m.onnx", nodes, inputs, weights, TensorProto.FLOAT), inputs)
    assert found.integer_macs == (3 * 20 * 7) / (3 * 20 * 7 + 3 * 7 * 5)


def test_body_of_a_loop_counts_each_turn_and_its_time_once(tmp_path: Path) -> None:
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("MatMul", ["h", "w"], ["h2"], "inner"), node("Identity", ["c"], ["c2"], "go on")],
        "body",
        [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, []), info("h", TensorProto.FLOAT, [3, 5])],
        [info("c2", TensorProto.BOOL, []), info("h2", TensorProto.FLOAT, [3, 5])],
    )
    inputs = {"x": real(3, 5)}
    weights = {"w": real(5, 5), "n": np.int64(4), "t": np.bool_(True)}
    loop = node("Loop", ["n", "t", "x"], ["y"], "loop", body=body)
    found = trace(save(tmp_path / "m.onnx", [loop], inputs, weights, TensorProto.FLOAT), inputs)
    assert {k.node: k.macs for k in found.kernels} == {"inner": 4 * 3 * 5 * 5, "go on": 0, "loop": 0}
    assert found.ms == pytest.approx(sum(k.ms for k in found.kernels if k.node != "loop"))


def test_entries_of_the_target_change_the_kernels_and_not_the_macs(bundle_folder: Path) -> None:
    inputs = next(models.images(0, 1, size=1))
    plain = {"optimization.disable_specified_optimizers": "QDQSelectorActionTransformer"}
    found = trace(bundle_folder / manifests.INT8, inputs, entries=plain)
    assert found.integer_macs == 0.0
    assert found.macs == models.CLASSIFIER_MACS


def test_bundle_is_traced_on_its_probe_unless_told_otherwise(bundle_folder: Path) -> None:
    bundle = runtime.load(bundle_folder, threads=1)
    one, two = runtime.kernels(bundle, next(models.images(0, 1, size=1))), runtime.kernels(bundle)
    assert two.macs == 2 * one.macs == 2 * models.CLASSIFIER_MACS
    assert {k.types for k in two.kernels if k.integer and k.macs} == {"u8s8"}


def test_profile_files_do_not_stay(bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    trace(bundle_folder / manifests.INT8, next(models.images(0, 1)))
    assert list(tmp_path.iterdir()) == []


def test_inputs_the_model_cannot_run_are_our_error(bundle_folder: Path) -> None:
    with pytest.raises(PacklightError, match="ONNX Runtime failed while running"):
        trace(bundle_folder / manifests.INT8, {"image": np.zeros((1, 1), np.float32)})
    with pytest.raises(PacklightError, match="ONNX Runtime failed while running"):
        trace(bundle_folder / manifests.INT8, {})


def test_no_macs_is_no_share() -> None:
    only = Kernel(node="add", kernel="QLinearAdd", types="u8", ms=0.1, macs=0, integer=True)
    assert runtime.Kernels(kernels=(only,)).integer_macs == 0.0
