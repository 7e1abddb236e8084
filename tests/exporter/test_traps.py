"""Each trap of ONNX Runtime's tool chain that ends in a file, built with the tool itself, and what packlight makes of it.

A test that fails because the tool no longer sets its trap says so: onnxruntime 1.31.1. Traps with tests elsewhere: biases
shared through Identity (test_quantize), options and names that nobody knows (test_house, test_place), Percentile's memory
(calibrate/test_observe), kernels that saturate (correct/, devices).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import QuantType, quantize_static
from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

from exporter import graph, lint, ort_format, quantize
from exporter.calibrate import observe
from exporter.errors import CalibrationError
from exporter.quiet import quiet
from exporter.target import PORTABLE, X86_VNNI
from runtime.kernels import Kernels, trace
from runtime.session import open_session
from tests.exporter import graphs, int8

ALLOWED = {"session.qdqisint8allowed": "1"}
PRECISE = {"session.x64quantprecision": "1"}
MINE = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
LAYER = "(float[N,4] x) => (float[N,3] y) { [fc] y = MatMul(x, w) }"


def batch() -> dict[str, np.ndarray]:
    return next(int8.images(2, 1))


def ran(path: Path, entries: dict[str, str] | None = None) -> Kernels:
    return trace(path, batch(), entries=entries or {}, runs=1)


def layers(kernels: Kernels) -> list[tuple[str, str]]:
    return [(kernel.kernel, kernel.types) for kernel in kernels.kernels if kernel.macs]


def ours(folder: Path) -> Path:
    """The same network through packlight's own stages."""
    model = ir.serde.deserialize_model(int8.cnn())
    seen = list(int8.images(1, 4))
    plan, ranges = graphs.planned(model, *seen, target=PORTABLE)
    path = folder / "ours.onnx"
    path.write_bytes(graph.to_bytes(quantize.to_int8(model, plan, ranges)))
    return path


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """quantize_static with its own default types."""
    return int8.quantized(tmp_path_factory.mktemp("signed") / "default.onnx")


def test_default_types_leave_layers_float_and_the_share_and_the_lint_say_so(signed: Path, tmp_path: Path) -> None:
    share = ran(signed)
    assert round(share.integer_macs, 3) == 0.457
    assert layers(share)[:2] == [("Conv", "f32"), ("Conv", "f32")]
    assert [each.rule for each in lint.check(signed, PORTABLE) if each.severity == "error"].count(lint.TYPES) == 1
    own = ran(ours(tmp_path))
    assert own.integer_macs == 1.0 and {types for _, types in layers(own)} == {"u8s8"}


def test_entry_that_makes_them_integer_makes_them_s8s8_which_is_slower_than_float(signed: Path) -> None:
    """ "100 % integer" is not "fast": the type pair stands beside the share, and the lint goes by it."""
    share = ran(signed, ALLOWED)
    assert share.integer_macs == 1.0 and {types for _, types in layers(share)} == {"s8s8"}
    assert lint.TYPES in {each.rule for each in lint.check(signed, X86_VNNI, ALLOWED)}


def test_sixteen_bit_activations_run_float_everywhere(tmp_path: Path) -> None:
    wide = int8.quantized(tmp_path / "wide.onnx", QuantType.QUInt16, QuantType.QInt8)
    assert ran(wide).integer_macs == 0.0
    assert [(each.rule, each.severity) for each in lint.check(wide, X86_VNNI)] == [(lint.TYPES, "error")]


def test_entry_for_precision_changes_the_kernels_to_u8u8_and_the_trace_tells(tmp_path: Path) -> None:
    path = int8.quantized(tmp_path / "m.onnx", QuantType.QUInt8, QuantType.QInt8)
    assert {types for _, types in layers(ran(path))} == {"u8s8"}
    assert {types for _, types in layers(ran(path, PRECISE))} == {"u8u8"}


def converted(model: Path, folder: Path, platform: str | None) -> Path:
    """model.ort by ONNX Runtime's converter, whose --target_platform has no default."""
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        convert_onnx_models_to_ort(model, folder, [OptimizationStyle.Fixed], target_platform=platform)
    return folder / model.with_suffix(".ort").name


def test_converter_without_a_platform_bakes_float_into_the_phones_file(signed: Path, tmp_path: Path) -> None:
    """No session entry of the phone brings the integers back."""
    careless = converted(signed, tmp_path / "none", None)
    careful = converted(signed, tmp_path / "arm", "arm")
    assert round(ran(careless, ALLOWED).integer_macs, 3) == 0.457
    (finding,) = lint.check_ort(careless, signed, batch(), {}, "arm64")
    assert (finding.rule, finding.severity, finding.node) == (lint.FLOAT_ORT, "error", "stem")
    assert lint.check_ort(careful, signed, batch(), {}, "arm64") == ()
    made = tmp_path / "made.ort"
    made.write_bytes(ort_format.convert(signed.read_bytes(), {}, "portable").ort)
    assert layers(ran(made)) == layers(ran(careful))


def test_float_model_saved_at_level_all_is_for_one_cpu_and_is_found(tmp_path: Path) -> None:
    saved = tmp_path / "saved.onnx"
    open_session(int8.cnn().SerializeToString(), optimized=saved)
    if "com.microsoft.nchwc" not in {node.domain for node in onnx.load(saved).graph.node}:
        pytest.skip("ONNX Runtime has no NCHWc kernels for this CPU")
    rules = [(each.rule, each.severity) for each in lint.check(saved)]
    assert rules and set(rules) == {(lint.ONE_CPU, "error")}
    made = ort_format.convert(int8.cnn().SerializeToString(), {}, "portable")
    assert "com.microsoft.nchwc" not in ort_format.domains(made.ort)


class Rows(int8.Reader):
    """x [2, 4] a batch, each filled with one value."""

    def __init__(self, values: Iterable[float]) -> None:
        super().__init__(rows(values))


def rows(values: Iterable[float]) -> Iterator[dict[str, np.ndarray]]:
    return ({"x": np.full((2, 4), value, np.float32)} for value in values)


def scale(path: Path) -> float:
    """Of the QuantizeLinear of x."""
    model = onnx.load(path)
    name = next(node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "x")
    return float(onnx.numpy_helper.to_array(next(each for each in model.graph.initializer if each.name == name)))


def layer() -> onnx.ModelProto:
    return graphs.proto(LAYER, {"w": graphs.noise(1, 4, 3)}, opset=17)


def test_calibration_option_drops_batches_and_ours_sees_the_true_range(tmp_path: Path) -> None:
    values = [100.0, *[1.0] * 10]
    with quiet():
        quantize_static(
            layer(), tmp_path / "m.onnx", Rows(values), extra_options={"CalibMaxIntermediateOutputs": 5}, **MINE
        )
    assert scale(tmp_path / "m.onnx") == pytest.approx(1 / 255)
    ranges = observe(ir.serde.deserialize_model(layer()), ("x",), rows(values)).ranges
    assert ranges.tensors["x"].high == 100.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_value_that_is_no_number_is_calibrated_on_without_a_word_and_ours_refuses_it(
    bad: float, tmp_path: Path
) -> None:
    with quiet(), np.errstate(all="ignore"):
        quantize_static(layer(), tmp_path / "m.onnx", Rows([1.0, bad]), **MINE)
    assert (tmp_path / "m.onnx").is_file()
    with pytest.raises(CalibrationError) as raised:
        observe(ir.serde.deserialize_model(layer()), ("x",), rows([1.0, bad]))
    assert (raised.value.tensor, raised.value.batch) == ("x", 1)


def test_calibration_cache_of_other_data_is_used_again_and_ours_leaves_none(tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    for name, value in (("first", 1.0), ("second", 50.0)):
        with quiet():
            quantize_static(layer(), tmp_path / name, Rows([value]), calibration_cache_path=cache, **MINE)
    assert scale(tmp_path / "second") == scale(tmp_path / "first") == pytest.approx(1 / 255)

    def own(value: float) -> bytes:
        model = ir.serde.deserialize_model(layer())
        plan, ranges = graphs.planned(model, *rows([value]))
        return graph.to_bytes(quantize.to_int8(model, plan, ranges))

    alone, _, after = own(50.0), own(1.0), own(50.0)
    (tmp_path / "own").write_bytes(after)
    assert after == alone and scale(tmp_path / "own") == pytest.approx(50 / 255)
