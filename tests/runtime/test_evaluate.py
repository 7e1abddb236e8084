"""A bundle on data of one's own: bounds, budgets that are held against them, the worst sample first."""

from __future__ import annotations

import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import runtime
from runtime import evaluate, samples, scores
from runtime.confidence import Interval
from runtime.errors import InputError, PacklightError
from runtime.manifest import Budget
from runtime.preprocess import Preprocessing
from runtime.scores import Asked
from tests.command import call
from tests.runtime import models


@pytest.fixture
def data(tmp_path: Path) -> Path:
    image = next(models.images(9, 1, 40))["image"]
    image[17] *= 20  # far outside the ranges: what int8 clips
    np.savez(tmp_path / "rows.npz", image=image)
    return tmp_path / "rows.npz"


def test_numbers_are_those_of_drift_and_the_worst_sample_is_first(bundle_folder: Path, data: Path) -> None:
    bundle = runtime.bundle.load(bundle_folder, 1)
    found = evaluate.evaluate(bundle, data)
    reference = bundle.reference()
    assert reference is not None
    rows = [each.inputs for each in samples.read(data, bundle.manifest)]
    (whole,) = runtime.drift.measure([(reference(row), bundle.run(row)) for row in rows]).outputs
    by_name = {line.what: line for line in found.lines}
    assert by_name["snr_db logits"].found == pytest.approx(whole.snr_db, rel=1e-9)
    assert by_name["cosine logits"].found == pytest.approx(whole.cosine, rel=1e-9)
    assert by_name["max_abs logits"].found == whole.max_abs
    assert by_name["same_top1 logits"].found == pytest.approx(whole.same_top1)
    assert by_name["snr_db logits"].low < whole.snr_db < by_name["snr_db logits"].high
    assert found.samples == 40 and found.integer_macs == 1.0
    wrong = [each for each in found.worst if each.same == 0]
    assert "rows.npz:17" in [each.name for each in found.worst[: len(wrong) + 1]]


@pytest.mark.parametrize(
    ("limit", "most", "verdict"),
    [
        (24.0, False, "met"),
        (25.0, False, "too few samples to tell"),
        (27.0, False, "not met"),
        (28.0, True, "met"),
        (27.0, True, "too few samples to tell"),
        (25.0, True, "not met"),
    ],
)
def test_a_limit_is_met_when_its_bound_meets_it(limit: float, most: bool, verdict: str) -> None:
    assert evaluate.held("x", Interval(low=24.5, found=26.0, high=27.5), limit, most).verdict == verdict


def test_perfect_agreement_on_few_samples_does_not_meet_a_strict_limit(own_bundle: Path, tmp_path: Path) -> None:
    models.seal(own_bundle, models.manifest(Budget(min_same_top1=0.9, min_snr_db=1.0)))
    np.savez(tmp_path / "few.npz", **next(models.images(5, 1, 10)))
    found = evaluate.evaluate(runtime.bundle.load(own_bundle, 1), tmp_path / "few.npz")
    assert {line.what: line.verdict for line in found.lines if line.limit is not None} == {
        "snr_db logits": "too few samples to tell",
        "same_top1 logits": "too few samples to tell",
    }
    assert not found.met and found.lines[0].low == -math.inf
    assert call("eval", own_bundle, tmp_path / "few.npz", "--junit", tmp_path / "e.xml") == 1
    assert "too few samples to tell" in (tmp_path / "e.xml").read_text()


def test_labels_and_a_metric_of_the_users_are_of_both_models(
    bundle_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = runtime.bundle.load(bundle_folder, 1)
    reference = bundle.reference()
    assert reference is not None
    right = [int(reference(each.inputs)["logits"].argmax()) for each in samples.read(data, bundle.manifest)]
    (tmp_path / "labels.txt").write_text("\n".join(map(str, right)))
    assert call("eval", bundle_folder, data, "--labels", tmp_path / "labels.txt", "--json") == 0
    by_name = {line["what"]: line for line in json.loads(capsys.readouterr().out)["lines"]}
    assert by_name["metric fp32"]["found"] == 1.0
    assert by_name["metric int8"]["found"] == by_name["same_top1 logits"]["found"]
    (tmp_path / "mine.py").write_text("def largest(outputs, label):\n    return outputs['logits'].max()\n")
    assert call("eval", bundle_folder, data, "--metric", f"{tmp_path / 'mine.py'}:largest") == 0
    assert "metric int8 - fp32" in capsys.readouterr().out


def test_what_is_wrong_with_labels_and_metrics_is_said(bundle_folder: Path, data: Path, tmp_path: Path) -> None:
    bundle = runtime.bundle.load(bundle_folder, 1)
    with pytest.raises(InputError, match="labels: found 41, expected 40"):
        evaluate.evaluate(bundle, data, Asked(metric=scores.top1, labels=[0] * 41))
    with pytest.raises(InputError, match="none for rows.npz:2"):
        evaluate.evaluate(bundle, data, Asked(metric=scores.top1, labels=[0, 1]))
    with pytest.raises(PacklightError, match=r"--metric on rows.npz:0: found ZeroDivisionError"):
        evaluate.evaluate(bundle, data, Asked(metric=lambda outputs, label: 1 / 0))
    (tmp_path / "m.py").write_text("x = 1\n")
    with pytest.raises(PacklightError, match="no function lost"):
        scores.function(f"{tmp_path / 'm.py'}:lost")
    with pytest.raises(PacklightError, match=r"expected file.py:function"):
        scores.function("nothing")


def test_pictures_are_made_ready_as_the_manifest_says(own_bundle: Path, tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    wanted = Preprocessing(input="image", resize=(16, 16), scale=1 / 255)
    models.seal(own_bundle, replace(models.manifest(Budget()), preprocessing=wanted))
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        pillow.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "labels.csv").write_text("0.png,3\n1.png,4\n2.png,5\n")
    asked = Asked(metric=scores.top1, labels=samples.labels(tmp_path / "labels.csv"))
    found = evaluate.evaluate(runtime.bundle.load(own_bundle, 1), tmp_path / "pictures", asked)
    assert sorted(each.name for each in found.worst) == ["0.png", "1.png", "2.png"]


def test_memory_is_that_of_a_sample_and_not_of_the_file(bundle_folder: Path, tmp_path: Path) -> None:
    about = runtime.bundle.load(bundle_folder).manifest
    np.save(tmp_path / "many.npy", np.zeros((10_000, 3, 16, 16), np.float32))  # 31 MB
    tracemalloc.start()
    try:
        assert sum(1 for _ in samples.read(tmp_path / "many.npy", about)) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
