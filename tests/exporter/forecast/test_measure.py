from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import exporter
import runtime
from exporter import forecast
from exporter.batches import Batch
from exporter.errors import CalibrationError
from exporter.numerics import pairing
from runtime import cpu
from runtime.errors import BundleError, PacklightError
from runtime.manifest import canonical
from runtime.session import open_session
from tests.exporter import graphs
from tests.exporter.forecast import cases

T = TypeVar("T")


def model(name: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.load_from_string(cases.by_name(name).model))


def batches(count: int) -> Iterator[Batch]:
    return iter([{"x": cases.real(seed, 2, 3, 12, 12)} for seed in range(10, 10 + count)])


def exported(recipe: str, out: Path) -> Path:
    path = out / "cnn.onnx"
    onnx.save(cases.cnn(), path)
    exporter.export(
        exporter.from_onnx(path),
        exporter.load_recipe(recipe),
        calibration=[{"x": cases.real(seed, 2, 3, 12, 12)} for seed in range(4)],
        heldout=list(batches(2)),
        out=out / recipe,
    )
    return out / recipe


def one_pair() -> ir.Model:
    """y = a · b with the weights [127, 127] and [127, 1], of which only the first can clip."""
    made = "(uint8[N,2] a) => (int32[N,2] y) { [dot] y = MatMulInteger(a, b) }"
    return graphs.model(made, {"b": np.array([[127, 127], [127, 1]], np.int8)})


def test_one_clipped_pair_by_hand() -> None:
    full = {"a": np.array([[255, 255], [255, 2], [200, 100], [0, 0]], np.uint8)}
    assert forecast.predict(one_pair(), full)["y"].tolist() == [[32767, 32640], [32639, 32387], [32767, 25500], [0, 0]]
    exact = forecast.predict(one_pair(), full, saturates=False)["y"]
    assert exact.tolist() == [[64770, 32640], [32639, 32387], [38100, 25500], [0, 0]]
    found = forecast.of_model(one_pair(), [full, {"a": np.zeros((4, 2), np.uint8)}])
    (layer,) = found.layers
    assert (layer.node, layer.kernel, layer.pairs) == ("dot", "MatMulInteger", 1)
    assert (layer.clipped, layer.worst) == (2 / 16, 64770 - 32767)
    assert found.clips
    assert found.drift.outputs[0].max_abs == 64770 - 32767
    assert (found.drift.batches, found.rounds_here, found.with_vnni, found.without_vnni) == (2, (), None, None)


def test_layer_that_can_clip_and_does_not_is_listed_with_nothing_clipped() -> None:
    found = forecast.of_model(one_pair(), [{"a": np.full((3, 2), 100, np.uint8)}])
    assert [(layer.pairs, layer.clipped, layer.worst) for layer in found.layers] == [(1, 0.0, 0)]
    assert not found.clips
    assert found.drift.outputs[0].max_abs == 0


def test_model_that_keeps_the_pair_rule_clips_nowhere_and_keeps_its_outputs() -> None:
    case = cases.by_name("matmul long")
    proto = onnx.load_from_string(case.model)
    weight = next(each for each in proto.graph.initializer if each.name == "b")
    rows = np.clip(onnx.numpy_helper.to_array(weight).T, -127, 127).astype(np.int32)
    weight.CopyFrom(onnx.numpy_helper.from_array(pairing.keep(rows).T.astype(np.int8), "b"))
    kept = ir.serde.deserialize_model(proto)
    found = forecast.of_model(kept, [case.inputs])
    assert (found.layers, found.clips, found.drift.outputs[0].max_abs) == ((), False, 0.0)
    assert forecast.of_model(model("matmul long"), [case.inputs]).drift.outputs[0].max_abs > 0


def test_layers_are_named_as_in_the_file_in_the_order_in_which_they_run() -> None:
    found = forecast.of_model(model("cnn qdq"), batches(2))
    names = [layer.node for layer in found.layers]
    assert names == ["plain", "grouped", "odd", "dilated", "pointwise", "head"]
    assert all(0 < layer.clipped < 1 and layer.worst > 0 for layer in found.layers)


def test_shares_over_batches_are_those_of_each_weighed_by_their_sums() -> None:
    first, second = batches(2)
    both = forecast.of_model(model("cnn qdq"), [first, second]).layers
    alone = [forecast.of_model(model("cnn qdq"), [batch]).layers for batch in (first, second)]
    for layer, one, other in zip(both, *alone, strict=True):
        assert layer.clipped == pytest.approx((one.clipped + other.clipped) / 2)
        assert (layer.worst, layer.pairs) == (max(one.worst, other.worst), one.pairs)


def test_bundle_is_measured_on_its_probe_and_against_fp32(tmp_path: Path) -> None:
    vnni, portable = (exported(recipe, tmp_path) for recipe in ("x86-vnni", "portable"))
    found = forecast.of_bundle(vnni)
    assert found.clips and found.with_vnni is not None and found.without_vnni is not None
    assert found.with_vnni.worst_snr_db > found.without_vnni.worst_snr_db + 5
    bundle, saturates = runtime.load(vnni), cpu.pairs_in_int16()
    for probe in bundle.probes():  # recorded on this CPU
        entries = bundle.manifest.session
        predicted = forecast.predict(vnni / "model.int8.onnx", probe.inputs, entries, saturates=saturates)
        np.testing.assert_array_equal(predicted["y"], probe.int8["y"])
    kept = forecast.of_bundle(portable)
    assert kept.layers == ()
    assert kept.with_vnni == kept.without_vnni
    assert kept.drift.outputs[0].max_abs == 0


def test_file_and_folder_of_inputs_are_read(tmp_path: Path) -> None:
    (tmp_path / "int8.onnx").write_bytes(cases.by_name("cnn qdq").model)
    batch = next(batches(1))
    np.savez(tmp_path / "batch.npz", **batch)
    found = forecast.of_model(tmp_path / "int8.onnx", tmp_path / "batch.npz")
    assert canonical(found) == canonical(forecast.of_model(model("cnn qdq"), [batch]))


def test_file_for_phones_is_forecast_as_the_onnx_file_is(tmp_path: Path) -> None:
    written = {"session.save_model_format": "ORT"}
    open_session(cases.by_name("cnn qdq").model, entries=written, optimized=tmp_path / "int8.ort")
    onnx_file, ort_file = (
        forecast.of_model(model("cnn qdq"), batches(1)),
        forecast.of_model(tmp_path / "int8.ort", batches(1)),
    )
    assert ort_file == onnx_file
    assert ort_file.clips


def test_batches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CalibrationError, match="inputs batch 0"):
        forecast.of_model(model("cnn qdq"), [{"z": np.zeros(3, np.float32)}])
    with pytest.raises(CalibrationError, match="no batches"):
        forecast.of_model(model("cnn qdq"), [])


def test_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "int8.onnx").write_bytes(b"no model")
    with pytest.raises(BundleError, match="cannot open it"):
        forecast.of_model(tmp_path / "int8.onnx", batches(1))
    with pytest.raises(PacklightError):
        forecast.of_bundle(tmp_path / "nothing")


class Told:
    def __init__(self) -> None:
        self.said: list[object] = []

    def stage(self, text: str) -> None:
        self.said.append(text)

    def each(
        self, items: Iterable[T], text: str, total: int | None = None, samples: Callable[[T], int] | None = None
    ) -> Iterator[T]:
        for number, item in enumerate(items):
            self.said.append((text, number, total))
            yield item


def test_progress_is_told_batch_by_batch() -> None:
    told = Told()
    forecast.of_model(model("cnn qdq"), batches(2), progress=told)
    assert told.said == ["forecast x86 without VNNI", ("batches", 0, None), ("batches", 1, None)]
