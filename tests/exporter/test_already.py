from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)

import exporter
import runtime
from exporter import already, graph
from exporter.prepare.apply import to_quantizable
from exporter.report import Report
from exporter.target import ARM64, X86_VNNI
from runtime.session import open_session
from tests.exporter import graphs

BATCH = {"x": graphs.noise(0, 2, 4, 8, 8)}
WEIGHTS = {
    "w": graphs.noise(1, 8, 4, 3, 3) / 4,
    "b": graphs.noise(2, 8) / 4,
    "v": graphs.noise(3, 8, 8, 3, 3) / 6,
    "m": graphs.noise(4, 8, 6),
}
NETWORK = """(float[n,4,8,8] x) => (float[n,6] y) {
    [one] a = Conv(x, w, b)
    [relu] r = Relu(a)
    [two] c = Conv(r, v)
    [pool] p = GlobalAveragePool(c)
    [flat] f = Flatten(p)
    [last] y = MatMul(f, m)
}"""


class Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.batches: Iterator[dict[str, np.ndarray]] = iter(batches(8, 1))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def batches(count: int, seed: int) -> list[dict[str, np.ndarray]]:
    return [{"x": graphs.noise(seed * 100 + i, 2, 4, 8, 8)} for i in range(count)]


def static(
    folder: Path, activation: QuantType, form: QuantFormat = QuantFormat.QDQ, nodes: tuple[str, ...] = ()
) -> Path:
    given, made = folder / "float.onnx", folder / "int8.onnx"
    onnx.save(graphs.proto(NETWORK, WEIGHTS), given)
    quantize_static(
        given,
        made,
        Reader(),
        quant_format=form,
        per_channel=True,
        activation_type=activation,
        nodes_to_quantize=list(nodes),
    )
    return made


def exported(file: Path, out: Path, target: str = "x86-vnni") -> Report:
    recipe = exporter.load_recipe(target)
    return exporter.export(exporter.from_onnx(file), recipe, batches(8, 2), batches(4, 3), out=out, max_evaluations=0)


def run(file: Path, batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(open_session(file).run(None, batch)[0])


def snr_db(file: Path, out: Path) -> float:
    bundle, seen = runtime.load(out), batches(4, 5)
    wanted = np.concatenate([run(file, batch) for batch in seen])
    noise = wanted - np.concatenate([bundle.run(batch)["y"] for batch in seen])
    return float(10 * np.log10((wanted**2).sum() / max((noise**2).sum(), 1e-30)))


def test_file_that_is_whole_in_the_targets_types_ships_as_it_is(tmp_path: Path) -> None:
    file = static(tmp_path, QuantType.QUInt8)
    made = exported(file, tmp_path / "b", "portable")
    assert snr_db(file, tmp_path / "b") > 120
    assert made.integer_macs == 1.0
    assert 20 < made.drift.worst_snr_db < 60  # beside the real numbers that its codes stand for
    assert "nodes in integers as they are" in made.kept
    assert (made.int8_nodes, made.float_nodes) == (5, 0)
    assert not runtime.load(tmp_path / "b").manifest.pair_rule  # its codes were made without
    assert "pair-rule" in made.kept


def test_signed_codes_become_unsigned_ones_that_stand_for_the_same_numbers(tmp_path: Path) -> None:
    file = static(tmp_path, QuantType.QInt8)
    made = exported(file, tmp_path / "b")
    assert made.kept.startswith("3 weights, ")
    assert all(count.types == "u8s8" for count in made.kernels if count.macs)
    assert made.integer_macs == 1.0
    assert snr_db(file, tmp_path / "b") > 45
    given, ours = (ir.load(path) for path in (file, tmp_path / "b" / "model.int8.onnx"))
    scales = {float(graph.constant(n.inputs[1])) for n in given.graph if n.op_type == "QuantizeLinear"}  # type: ignore[arg-type]
    kept = {float(graph.constant(n.inputs[1])) for n in ours.graph if n.op_type == "QuantizeLinear"}  # type: ignore[arg-type]
    assert len(kept & scales) >= 3
    codes = {name: graph.constant(value) for name, value in ours.graph.initializers.items()}
    before = {name: graph.constant(value) for name, value in given.graph.initializers.items()}
    assert any(a is not None and np.array_equal(a, before["v_quantized"]) for a in codes.values())


def test_half_of_a_file_keeps_its_scales_and_the_rest_is_calibrated(tmp_path: Path) -> None:
    file = static(tmp_path, QuantType.QUInt8, nodes=("two",))
    made = exported(file, tmp_path / "b")
    assert made.integer_macs == 1.0
    assert made.kept == "1 weight, 2 ranges"
    assert snr_db(file, tmp_path / "b") > 35
    plan = (tmp_path / "b" / "plan.txt").read_text()
    assert "two | Conv | int8 | integer kernel; weight int8 per channel; weight codes of the file" in plan
    assert "relu | Relu | int8 | folds into the layer before it; scale of the file" in plan
    assert plan.count("of the file") == 3  # and the range of what the second Conv makes


def test_pairs_of_a_files_codes_that_break_the_rule_are_pulled_in_where_it_is_asked_for(tmp_path: Path) -> None:
    file = static(tmp_path, QuantType.QUInt8, nodes=("two",))
    made = exported(file, tmp_path / "b", "portable")
    assert made.kept.endswith("of 1 weight some codes moved for the pair rule")
    assert "of the file's weight codes moved for the pair rule" in (tmp_path / "b" / "plan.txt").read_text()
    assert runtime.load(tmp_path / "b").manifest.pair_rule
    assert snr_db(file, tmp_path / "b") > 30


@pytest.mark.parametrize("whole", [True, False])
def test_integer_operators_of_a_file_stay_and_what_is_float_is_quantized(whole: bool, tmp_path: Path) -> None:
    file = static(tmp_path, QuantType.QUInt8, QuantFormat.QOperator, () if whole else ("last",))
    made = exported(file, tmp_path / "b")
    assert made.integer_macs == 1.0
    ours = graphs.op_types(ir.load(tmp_path / "b" / "model.int8.onnx"))
    assert ("QLinearConv" in ours) == whole
    assert ("QLinearMatMul" in ours, "Conv" in ours) == (True, not whole)
    assert snr_db(file, tmp_path / "b") > (120 if whole else 30)


def test_dynamic_file_is_a_bundle_as_it_is(tmp_path: Path) -> None:
    given, made = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(graphs.proto(NETWORK, WEIGHTS), given)
    quantize_dynamic(given, made, op_types_to_quantize=["MatMul"])
    whole = graphs.proto("(float[n,8] f) => (float[n,6] y) { [last] y = MatMul(f, m) }", {"m": WEIGHTS["m"]})
    onnx.save(whole, given)
    quantize_dynamic(given, tmp_path / "whole.onnx")
    assert exported(made, tmp_path / "b").integer_macs == 1.0  # its Conv were float
    assert snr_db(made, tmp_path / "b") > 30
    report = exporter.export(
        exporter.from_onnx(tmp_path / "whole.onnx"), exporter.load_recipe("x86-vnni"),
        [{"f": graphs.noise(i, 3, 8)} for i in range(4)], [{"f": graphs.noise(i, 3, 8)} for i in range(4, 7)],
        out=tmp_path / "c",
    )  # fmt: skip
    assert report.drift.worst_snr_db == np.inf
    assert report.integer_macs == 1.0


def test_signed_activations_are_no_whole_file_but_on_arm(tmp_path: Path) -> None:
    model = to_quantizable(ir.load(static(tmp_path, QuantType.QInt8)), BATCH).reference
    assert already.is_whole(model, ARM64)
    assert not already.is_whole(model, X86_VNNI)
    half = to_quantizable(ir.load(static(tmp_path, QuantType.QUInt8, nodes=("two",))), BATCH).reference
    assert not already.is_whole(half, ARM64)


@pytest.mark.parametrize("bits", [TensorProto.INT8, TensorProto.INT4])
def test_weight_only_file_is_proved_as_it_is_written_and_not_as_it_is_fused(bits: int, tmp_path: Path) -> None:
    codes = np.clip(np.rint(graphs.noise(1, 64, 16) * (40 if bits == TensorProto.INT8 else 3)), -7, 7).astype(np.int64)
    file = graphs.proto(
        "(float[n,64] x) => (float[n,16] y) { [mm] y = MatMul(x, w) }", {"w": codes.astype(np.float32)}, 21
    )
    file.ir_version = 10
    del file.graph.initializer[:]
    file.graph.initializer.append(helper.make_tensor("c", bits, codes.shape, codes.reshape(-1).tolist()))
    file.graph.initializer.append(helper.make_tensor("s", TensorProto.FLOAT, [16], [0.05] * 16))
    file.graph.node.insert(0, helper.make_node("DequantizeLinear", ["c", "s"], ["w"], axis=1))  # without a name
    onnx.save(file, tmp_path / "weights.onnx")
    seen = [{"x": graphs.noise(i, 3, 64)} for i in range(12)]
    report = exporter.export(
        exporter.from_onnx(tmp_path / "weights.onnx"), exporter.load_recipe("x86-vnni"), seen[:8], seen[8:],
        out=tmp_path / "b", max_evaluations=0,
    )  # fmt: skip
    assert report.kept == "1 weight, 0 ranges"
    assert report.drift.worst_snr_db > 30
    assert report.integer_macs == 1.0
