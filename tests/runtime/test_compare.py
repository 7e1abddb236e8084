"""Two bundles of one tiny model: what is worse is said, what is noise is not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import runtime
from runtime import compare, samples
from runtime import manifest as manifests
from runtime.confidence import Interval
from runtime.errors import BundleError
from runtime.manifest import Budget
from runtime.probe import Probe, read_probe, write_probe
from tests.command import call
from tests.runtime import models

ROWS = 400


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.npz"
    np.savez(file, image=next(models.images(9, 1, ROWS))["image"])
    return file


def changed(folder: Path, out: Path, weights: Mapping[str, float] | None = None) -> Path:
    """A copy whose int8 model has other bytes, and `weights` that are scaled; the probe recorded anew."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    model = onnx.load(out / manifests.INT8)
    model.producer_name = "rebuilt"
    for initializer in model.graph.initializer:
        if factor := (weights or {}).get(initializer.name):
            initializer.CopyFrom(
                numpy_helper.from_array(
                    (numpy_helper.to_array(initializer) * factor).astype(np.float32), initializer.name
                )
            )
    onnx.save(model, out / manifests.INT8)
    probes = read_probe(out / manifests.PROBE)
    again = [replace(each, int8=models.run(out / manifests.INT8, each.inputs)) for each in probes]
    write_probe(out / manifests.PROBE, again)
    models.seal(out, models.manifest(Budget()))
    return out


def lines(found: compare.Comparison) -> dict[str, str]:
    return {line.what: line.verdict for line in found.lines}


def opened(*folders: Path) -> list[runtime.Bundle]:
    return [runtime.bundle.load(folder, 1) for folder in folders]


def test_a_rebuilt_model_is_the_same_and_a_worse_one_is_worse(bundle_folder: Path, data: Path, tmp_path: Path) -> None:
    rebuilt = changed(bundle_folder, tmp_path / "rebuilt")
    same = compare.compare(*opened(bundle_folder, rebuilt), data, rounds=0)
    assert lines(same) == {
        "size_bytes": "same",
        "integer_macs": "same",
        "snr_db logits": "same",
        "same_top1 logits": "too few samples to tell",  # 400 of them; see the next test
    }
    assert same.met and same.lines[2].found == 0.0 and same.lines[2].samples == ROWS
    scale = next(t.name for t in onnx.load(bundle_folder / manifests.INT8).graph.initializer if t.name == "r1_scale")
    worse = compare.compare(
        *opened(bundle_folder, changed(bundle_folder, tmp_path / "worse", {scale: 0.5})), data, rounds=0
    )
    assert lines(worse)["snr_db logits"] == "worse" and not worse.met
    assert next(line.what for line in worse.worse) == "snr_db logits"


def test_two_percent_of_top1_on_2000_samples_is_worse_and_none_is_not() -> None:
    rng = np.random.default_rng(5)
    for _ in range(20):
        old = rng.random(2000) < 0.97
        lost = rng.permutation(2000)[: int(rng.integers(90, 120))]
        new = old.copy()
        new[lost] = ~new[lost]  # flips in both directions
        short = int(old.sum()) - 40 - int(new.sum())
        back = np.flatnonzero(old & ~new if short > 0 else new & old)[: abs(short)]
        new[back] = ~new[back]
        assert int(old.sum()) - int(new.sum()) == 40
        for candidate, verdict in ((new, compare.WORSE), (old, compare.SAME)):
            both = np.column_stack([old, candidate]).astype(float)
            assert compare._share("same_top1", both, 2000).verdict == verdict


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.004, 0.1, "same"),
        (0.001, 0.1, "better"),
        (0.001, 0.004, "same"),
        (-0.004, -0.001, "same"),
        (-0.02, -0.001, "worse"),
        (-0.02, 0.001, "too few samples to tell"),
    ],
)
def test_verdict_is_of_the_bounds_and_the_margin(low: float, high: float, verdict: str) -> None:
    interval = Interval(low=low, found=(low + high) / 2, high=high)
    assert compare.judged("x", (0.0, 0.0), interval, 0.005, 50).verdict == verdict
    assert compare.judged("x", (0.0, 0.0), interval, 0.005, 19).verdict == "too few samples to tell"


def test_the_same_file_is_the_same_for_all_data(bundle_folder: Path) -> None:
    found = compare.compare(*opened(bundle_folder, bundle_folder))
    assert lines(found) == {"size_bytes": "same", "integer_macs": "same"}
    assert found.notes == ("model.int8.onnx is the same file: the same outputs in the same time",)


def test_a_slower_bundle_is_worse_in_time(bundle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = opened(bundle_folder, bundle_folder)
    rng = np.random.default_rng(0)
    took = {id(old): 1.0, id(new): 1.2}
    monkeypatch.setattr(compare, "seconds", lambda turn, _: took[id(turn.func.__self__)] * rng.lognormal(0, 0.05))
    slower = compare.speed(old, new, {}, 60)
    assert slower.verdict == "worse" and slower.low < -0.2 + 0.02 < slower.high + 0.05
    took[id(new)] = 1.0
    assert "worse" not in {compare.speed(old, new, {}, 60).verdict for _ in range(20)}


def test_plan_and_kernels_that_changed_are_named(bundle_folder: Path, tmp_path: Path) -> None:
    other = changed(bundle_folder, tmp_path / "other")
    (other / "plan.txt").write_text(models.PLAN.replace("head | Gemm | int8", "head | Gemm | float"))
    models.seal(other, models.manifest(Budget()))
    found = compare.compare(*opened(bundle_folder, other), rounds=0)
    assert (found.plan, found.kernels) == (("head: int8 -> float",), ())
    assert "Plan, 1 nodes:" in compare.markdown(found)


def test_a_baseline_of_another_model_is_refused_with_the_difference(bundle_folder: Path, own_bundle: Path) -> None:
    model = onnx.load(own_bundle / manifests.FP32)
    for initializer in model.graph.initializer:
        initializer.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(initializer) * 1.01, initializer.name))
    onnx.save(model, own_bundle / manifests.FP32)
    models.seal(own_bundle, models.manifest(Budget()))
    with pytest.raises(BundleError, match=r"FP32 outputs logits that agree to .* expected at least 60"):
        compare.require_one_model(*opened(own_bundle, bundle_folder))
    renamed = replace(models.manifest(Budget()), name="renamed")
    other = runtime.bundle.load(bundle_folder)
    other.manifest = replace(renamed, inputs=(replace(renamed.inputs[0], dtype="uint8"),))
    with pytest.raises(BundleError, match=r"found inputs image uint8\[\?, 3, 16, 16\], expected image float32"):
        compare.require_one_model(other, runtime.bundle.load(bundle_folder))


def test_without_an_fp32_model_probes_tell_and_nothing_in_common_is_refused(own_bundle: Path, tmp_path: Path) -> None:
    (own_bundle / manifests.FP32).unlink()
    models.seal(own_bundle, models.manifest(Budget()))
    old, new = opened(own_bundle, changed(own_bundle, tmp_path / "new"))
    found = compare.compare(old, new, rounds=0)
    assert {line.samples for line in found.lines} == {None, 3}  # three recorded batches
    probe = read_probe(own_bundle / manifests.PROBE)[0]
    write_probe(
        own_bundle / manifests.PROBE,
        [Probe(inputs={"image": probe.inputs["image"] + 1}, fp32=probe.fp32, int8=probe.int8)],
    )
    models.seal(own_bundle, models.manifest(Budget()))
    with pytest.raises(BundleError, match="no FP32 model and another probe"):
        compare.require_one_model(*opened(own_bundle), new)


def test_commands_exit_with_1_where_something_is_worse(
    bundle_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = changed(bundle_folder, tmp_path / "worse", {"r1_scale": 0.5})
    assert call("compare", bundle_folder, worse, "--data", data, "--rounds", 0, "--json") == 1
    assert json.loads(capsys.readouterr().out)["met"] is False
    assert call("compare", worse, bundle_folder, "--data", data, "--rounds", 0) == 0
    assert capsys.readouterr().out.startswith("tiny against tiny: nothing is worse beyond noise")
    assert call("check", bundle_folder, "--against", bundle_folder) == 0
    assert call("check", worse, "--against", bundle_folder, "--data", data, "--markdown", tmp_path / "c.md") == 1
    page = (tmp_path / "c.md").read_text()
    assert page.startswith("## `tiny`: met\n") and "## `tiny` against `tiny`: `worse in snr_db logits" in page


def test_samples_are_rows_of_a_file_and_files_of_a_folder(bundle_folder: Path, data: Path, tmp_path: Path) -> None:
    about = runtime.bundle.load(bundle_folder).manifest
    rows = list(samples.read(data, about))
    with np.load(data) as whole:
        np.testing.assert_array_equal(
            np.concatenate([each.inputs["image"] for each in rows]), whole["image"], strict=True
        )
        np.save(tmp_path / "b.npy", whole["image"][:2])
        np.savez_compressed(tmp_path / "a.npz", image=whole["image"][:1])
    assert [each.name for each in rows[:2]] == ["rows.npz:0", "rows.npz:1"]
    assert [each.name for each in samples.read(tmp_path, about)] == ["a.npz", "b.npy:0", "b.npy:1"]


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((2, 3, 16)), "shape"),
        (np.array([None]), "dtype"),
        (np.asfortranarray(np.zeros((2, 3, 16, 16), np.float32)), "Fortran"),
    ],
)
def test_samples_that_are_none_are_refused(array: np.ndarray, found: str, bundle_folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(runtime.InputError, match=f"found {found}"):
        list(samples.read(tmp_path / "x.npy", runtime.bundle.load(bundle_folder).manifest))
