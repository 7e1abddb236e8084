from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import runtime
from exporter import bundle, graph, staged
from exporter.errors import CalibrationError
from exporter.recipe import Probe as Limits
from runtime import BundleError
from runtime import manifest as manifests
from runtime.manifest import Budget, Machine, Manifest
from runtime.probe import Probe
from tests.exporter import graphs

MODEL = graphs.model("(float[N,4] x) => (float[N,4] y) { [g] y = Gemm(x, w) }", {"w": graphs.noise(1, 4, 4)})
BYTES = graph.to_bytes(MODEL)
ABOUT = Manifest(
    name="m", target="x86-vnni", inputs=graph.inputs(MODEL), outputs=graph.outputs(MODEL), files={}, pair_rule=True,
    exact_on=(), recorded_on=Machine(machine="x86_64", flags=()), session={}, budget=Budget(), versions={},
)  # fmt: skip
FILES = {manifests.FP32: BYTES, manifests.INT8: BYTES} | dict.fromkeys(
    ("recipe.toml", "plan.txt", "ranges.json", "report.json", "report.html"), b"{}\n"
)


def batch(seed: int, rows: int = 2) -> dict[str, np.ndarray]:
    return {"x": graphs.noise(seed, rows, 4)}


def probe(seed: int = 0) -> Probe:
    out = graph.runner(MODEL)(batch(seed))
    return Probe(inputs=batch(seed), fp32=out, int8=out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_folder_is_a_bundle_that_the_runtime_loads(tmp_path: Path) -> None:
    listed = bundle.write(tmp_path / "deep" / "b", ABOUT, [probe()], FILES)
    opened = runtime.load(tmp_path / "deep" / "b")
    assert opened.manifest == listed
    assert sorted(listed.files) == sorted([*FILES, manifests.PROBE])
    assert runtime.check(opened).exact
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["b"]
    assert (tmp_path / "deep" / "b").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("old", [False, True])
def test_full_disk_is_a_bundle_error_and_leaves_nothing_new(
    old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old:
        bundle.write(tmp_path / "b", ABOUT, [probe()], FILES)
    before = contents(tmp_path / "b") if old else {}
    real = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "report.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BundleError, match="found No space left on device, .*free some space") as error:
        bundle.write(tmp_path / "b", ABOUT, [probe(1)], FILES)
    assert error.value.path == str(tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == (["b"] if old else [])
    assert not old or contents(tmp_path / "b") == before


def test_interruption_while_writing_leaves_nothing_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(path: Path, content: bytes) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        bundle.write(tmp_path / "b", ABOUT, [probe()], FILES)
    assert [*tmp_path.iterdir()] == []


def test_move_that_fails_brings_the_old_bundle_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "exchange", lambda one, other: False)  # as on systems that cannot
    bundle.write(tmp_path / "b", ABOUT, [probe()], FILES)
    before, real = contents(tmp_path / "b"), Path.rename

    def fails_into_place(path: Path, target: Path) -> Path:
        if target == tmp_path / "b" and path.name != "old":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real(path, target)

    monkeypatch.setattr(Path, "rename", fails_into_place)
    with pytest.raises(BundleError):
        bundle.write(tmp_path / "b", ABOUT, [probe(1)], FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert contents(tmp_path / "b") == before


def test_folder_that_cannot_be_written_is_a_bundle_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="choose another --out"):
        bundle.write(tmp_path / "file" / "b", ABOUT, [probe()], FILES)


def test_place_is_new_empty_or_a_bundle(tmp_path: Path) -> None:
    bundle.require_place(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    bundle.require_place(tmp_path / "empty")
    bundle.write(tmp_path / "empty", ABOUT, [probe()], FILES)
    bundle.require_place(tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for refused in (tmp_path, tmp_path / "link"):
        with pytest.raises(BundleError, match="expected a new folder, an empty one, or a bundle to replace"):
            bundle.require_place(refused)


def record(*heldout: dict[str, np.ndarray], limits: Limits | None = None, fp32: bytes = BYTES) -> bundle.Recorded:
    return bundle.record(fp32, BYTES, iter(heldout), {}, limits or Limits())


def test_drift_is_over_all_batches_and_the_probe_holds_the_first() -> None:
    batches = [batch(n) for n in range(6)]
    recorded = record(*batches)
    assert (recorded.drift.batches, len(recorded.probes)) == (6, 4)
    for kept, given in zip(recorded.probes, batches[:4], strict=True):
        np.testing.assert_array_equal(kept.inputs["x"], given["x"])
        np.testing.assert_array_equal(kept.fp32["y"], graph.runner(MODEL)(given)["y"])
    assert recorded.drift.worst_snr_db == float("inf")
    assert (recorded.kernels.macs, recorded.kernels.integer_macs) == (2 * 4 * 4, 0.0)


def test_probe_stops_at_its_bytes_but_one_batch_always_goes() -> None:
    big, small = batch(0, rows=100), batch(1)
    assert len(record(big, small, limits=Limits(batches=4, max_bytes=1)).probes) == 1
    three = [batch(n) for n in range(3)]
    each = 3 * 2 * 4 * 4  # inputs, FP32 and int8 outputs, 2 x 4 floats
    assert len(record(*three, limits=Limits(batches=4, max_bytes=2 * each)).probes) == 2
    assert len(record(*three, limits=Limits(batches=1)).probes) == 1


OTHER = (
    graphs.model("""(float[N,4] x) => (float[N,4] y)
    <float[4] one = {0.001, 0.001, 0.001, 0.001}> { z = Relu(x) y = Add(z, one) }""")
)  # an error of one size: small numbers have most


def hardest_at(place: int, count: int = 9, limits: Limits | None = None) -> bundle.Recorded:
    batches = [{"x": np.full((2, 4), 0.01 if n == place else 1 + n, np.float32)} for n in range(count)]
    relu = graphs.model("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    return bundle.record(graph.to_bytes(relu), graph.to_bytes(OTHER), iter(batches), {}, limits or Limits())


@pytest.mark.parametrize(("place", "kept"), [(0, (0, 1, 2, 3)), (2, (0, 1, 2, 3)), (7, (0, 1, 2, 7))])
def test_hardest_batch_is_in_the_probe(place: int, kept: tuple[int, ...]) -> None:
    found = hardest_at(place)
    assert (found.numbers, found.hardest) == (kept, place)
    assert [float(probe.inputs["x"][0, 0]) for probe in found.probes] == pytest.approx(
        [0.01 if n == place else 1 + n for n in kept]
    )


def test_hardest_batch_takes_the_place_of_as_many_as_its_bytes_need() -> None:
    each = 3 * 2 * 4 * 4
    assert hardest_at(7, limits=Limits(batches=1)).numbers == (7,)
    assert hardest_at(7, limits=Limits(batches=4, max_bytes=2 * each)).numbers == (0, 7)


def test_no_heldout_batch_is_refused() -> None:
    with pytest.raises(CalibrationError, match="held-out data: no batches that calibration has not seen"):
        record()


def test_nan_in_the_reference_is_refused_by_batch_and_output() -> None:
    log = graphs.model("(float[N,4] x) => (float[N,4] y) { y = Log(x) }")
    good = {"x": np.ones((1, 4), np.float32)}
    with pytest.raises(
        CalibrationError, match="held-out batch 1: output 'y' of the FP32 model: found NaN or infinity"
    ) as error:
        record(good, {"x": -np.ones((1, 4), np.float32)}, fp32=graph.to_bytes(log))
    assert (error.value.batch, error.value.tensor) == (1, "y")


def test_foreign_folder_with_a_manifest_json_is_never_replaced(tmp_path: Path) -> None:
    web, more = tmp_path / "web", tmp_path / "more"
    web.mkdir()
    (web / manifests.MANIFEST).write_text('{"short_name": "app", "icons": []}')
    bundle.write(more, ABOUT, [probe()], FILES)
    (more / "thesis.tex").write_text("years of work")
    for folder in (web, more):
        before = contents(folder)
        with pytest.raises(BundleError, match="found a folder that is not a bundle"):
            bundle.require_place(folder)
        with pytest.raises(BundleError, match="found a folder that is not a bundle"):
            bundle.write(folder, ABOUT, [probe(1)], FILES)
        assert contents(folder) == before


def test_bundle_without_its_optional_file_may_be_replaced(tmp_path: Path) -> None:
    bundle.write(tmp_path / "b", ABOUT, [probe()], FILES)
    (tmp_path / "b" / manifests.FP32).unlink()
    bundle.require_place(tmp_path / "b")


def test_bundle_that_does_not_load_is_never_put_in_place(tmp_path: Path) -> None:
    bundle.write(tmp_path / "b", ABOUT, [probe()], FILES)
    before = contents(tmp_path / "b")
    for manifest, files in (
        (replace(ABOUT, outputs=ABOUT.outputs * 2), FILES),
        (ABOUT, FILES | {manifests.INT8: b"no"}),
    ):
        with pytest.raises(BundleError, match="b: not written, for the runtime could not load it: found ") as error:
            bundle.write(tmp_path / "b", manifest, [probe(1)], files)
        assert "/." not in str(error.value)
        assert contents(tmp_path / "b") == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("done", [False, True])
def test_ctrl_c_between_the_two_moves_keeps_a_whole_bundle(
    done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "exchange", lambda one, other: False)
    bundle.write(tmp_path / "b", ABOUT, [probe()], FILES)
    before, real = contents(tmp_path / "b"), Path.rename

    def stopped(path: Path, target: Path) -> Path:
        into_place = target == tmp_path / "b" and path.name != "old"
        if into_place and done:
            real(path, target)
        if into_place:
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        bundle.write(tmp_path / "b", ABOUT, [probe(1)], FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert (contents(tmp_path / "b") == before) is not done
    assert runtime.check(runtime.load(tmp_path / "b")).exact


def test_heldout_batch_that_the_graph_refuses_is_named() -> None:
    with pytest.raises(CalibrationError, match="held-out batch 1: the model cannot run on it: found ") as error:
        record(batch(0), {"x": graphs.noise(1, 2, 5)})
    assert error.value.batch == 1


def test_empty_batches_are_no_probe_and_prove_nothing_alone() -> None:
    recorded = record(batch(0, rows=0), batch(1))
    assert (recorded.drift.batches, [each.inputs["x"].shape for each in recorded.probes]) == (2, [(2, 4)])
    assert recorded.kernels.macs == 2 * 4 * 4
    with pytest.raises(CalibrationError, match="held-out data: outputs: found no element in any of 2 batches"):
        record(batch(0, rows=0), batch(1, rows=0))
