from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import exporter
import runtime
from exporter import graph, trace, weights
from exporter.errors import QuantizeError, TraceError
from exporter.source import from_onnx
from tests.exporter import graphs

TEXT = "(float[N,64] x, int64[N] ids) => (float[N,8] y) { e = Gather(table, ids)\n h = Add(e, x)\n y = MatMul(h, w) }"
ARRAYS = {"table": graphs.noise(0, 300, 64), "w": graphs.noise(1, 64, 8)}


def batch(seed: int) -> dict[str, graphs.Array]:
    return {"x": graphs.noise(seed, 4, 64), "ids": np.random.default_rng(seed).integers(0, 300, 4)}


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LIMIT_BYTES", 50_000)
    monkeypatch.setattr(weights, "LEAST_BYTES", 10_000)


def saved(folder: Path, opset: int = 20) -> Path:
    path = folder / "m.onnx"
    model = graphs.proto(TEXT, ARRAYS, opset)
    onnx.save(model, path, save_as_external_data=True, location="m.bin", size_threshold=0)
    return path


def test_graph_within_the_limit_is_its_bytes_alone() -> None:
    model = graphs.model(TEXT, ARRAYS)
    assert weights.heavy(model) == {} and weights.outside(model) is model
    assert weights.size(graph.to_bytes(model)) == len(graph.to_bytes(model))


@pytest.mark.usefixtures("small_limits")
def test_heavy_weights_lie_beside_the_bytes_and_the_graph_runs(tmp_path: Path) -> None:
    model = graphs.model(TEXT, ARRAYS)
    content = graph.to_bytes(model)
    assert [*weights.heavy(model)] == ["table"] and len(content) < 10_000
    assert weights.size(content) == len(content) + ARRAYS["table"].nbytes
    assert content == graph.to_bytes(graphs.model(TEXT, ARRAYS))
    expected = (ARRAYS["table"][batch(2)["ids"]] + batch(2)["x"]) @ ARRAYS["w"]
    np.testing.assert_allclose(graph.runner(model)(batch(2))["y"], expected, rtol=1e-4, atol=1e-4)
    weights.write(content, tmp_path / "model.onnx")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    read = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    np.testing.assert_array_equal(read["table"], ARRAYS["table"])
    np.testing.assert_array_equal(read["w"], ARRAYS["w"])


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("opset", [17, 20])
def test_model_with_external_data_becomes_a_bundle_with_external_data(tmp_path: Path, opset: int) -> None:
    source = from_onnx(saved(tmp_path, opset))
    assert source.folder == tmp_path.resolve() and len(source.model.SerializeToString()) < 10_000  # type: ignore[union-attr]
    out = tmp_path / "bundle"
    report = exporter.export(
        source,
        exporter.load_recipe("portable"),
        [batch(i) for i in range(4)],
        [batch(i) for i in range(4, 7)],
        out,
        max_evaluations=1,
    )
    assert report.fp32_bytes > ARRAYS["table"].nbytes
    bundle = runtime.load(out)
    assert bundle.manifest.files["model.fp32.onnx.data"].size_bytes == ARRAYS["table"].nbytes
    expected = (ARRAYS["table"][batch(9)["ids"]] + batch(9)["x"]) @ ARRAYS["w"]
    found = bundle.run(batch(9))["y"]
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
    assert graph.runner(ir.load(out / "model.fp32.onnx"))(batch(9))["y"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.usefixtures("small_limits")
def test_device_may_leave_off_the_reference_with_its_data_and_not_the_data_alone(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    given = [batch(i) for i in range(4)]
    exporter.export(
        from_onnx(saved(tmp_path)), exporter.load_recipe("portable"), given, [batch(9)], out, max_evaluations=1
    )
    (out / "model.fp32.onnx.data").unlink()
    with pytest.raises(runtime.BundleError, match=r"model\.fp32\.onnx\.data"):
        runtime.load(out)
    (out / "model.fp32.onnx").unlink()
    assert runtime.load(out).run(batch(9))["y"].shape == (4, 8)


@pytest.mark.usefixtures("small_limits")
def test_large_external_data_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.bin").read_bytes()[:5000])
    with pytest.raises(TraceError, match=r"external data: found m\.bin has 5000 bytes"):
        from_onnx(path)


@pytest.mark.usefixtures("small_limits")
def test_what_needs_a_single_file_is_refused_in_one_line() -> None:
    with pytest.raises(QuantizeError, match=r"--ort: found 0\.0 GB of weights, expected at most 0\.0 GB; leave it out"):
        weights.require_bytes(graphs.model(TEXT, ARRAYS), "--ort")


@pytest.mark.parametrize("flat", [True, False])
def test_sparse_initializer_is_read_as_a_dense_one(tmp_path: Path, flat: bool) -> None:
    dense = np.zeros((64, 8), np.float32)
    dense[::7] = graphs.noise(3, 64, 8)[::7]
    at = np.flatnonzero(dense) if flat else np.argwhere(dense)
    values = numpy_helper.from_array(dense[dense != 0], "w")
    sparse = onnx.helper.make_sparse_tensor(values, numpy_helper.from_array(at.astype(np.int64), "w_at"), [64, 8])
    model = graphs.proto(TEXT, ARRAYS)
    del model.graph.initializer[1]
    model.graph.sparse_initializer.append(sparse)
    onnx.save(model, tmp_path / "m.onnx")
    traced = trace.to_onnx(from_onnx(tmp_path / "m.onnx")).model
    np.testing.assert_array_equal(graph.constant(traced.graph.initializers["w"]), dense)
