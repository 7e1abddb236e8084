from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import runtime
from exporter.causal import heard, pipeline, proof, rounding
from exporter.causal.pipeline import Asked
from exporter.causal.report import LanguageReport
from exporter.causal.text import Sizes
from exporter.errors import RecipeError, TraceError
from runtime import language_check
from runtime.errors import BundleError
from runtime.language import LanguageModel
from runtime.language_manifest import Limits
from tests.command import call
from tests.exporter.causal import tiny

pytestmark = tiny.needs_transformers
SIZES = Sizes(seen=6, unseen=3, tokens=48)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.with_words(tmp_path_factory.mktemp("causal") / "tiny", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LanguageReport]:
    out = tmp_path_factory.mktemp("out") / "bundle"
    return out, pipeline.export(source, out, Asked(scheme="mixed", sizes=SIZES))


def opened(folder: Path) -> LanguageModel:
    found = runtime.load(folder, threads=1)
    assert isinstance(found, LanguageModel)
    return found


def test_bundle_generates_checks_and_says_what_it_lost(exported: tuple[Path, LanguageReport]) -> None:
    out, report = exported
    assert sorted(each.name for each in out.iterdir()) == [
        "chat_template.jinja", "manifest.json", "model.onnx", "model.onnx.data", "probe.npz", "tokenizer.json",
    ]  # fmt: skip
    model = opened(out)
    assert language_check.check(model).met and report.met
    assert model.manifest.loss == report.loss and 0 < report.loss.kl < 1
    assert model.manifest.calibration == "Python's documentation (pydoc_data.topics)"
    assert len("".join(model.generate("The", 5))) > 0
    assert model.encode("a")[0] == 0 and model.manifest.end == (1,)
    assert "equals transformers at 7 and 33 tokens" in str(report)
    assert max(map(len, str(report).splitlines())) <= 80


def test_embedding_and_head_are_the_same_bytes_of_the_file(exported: tuple[Path, LanguageReport]) -> None:
    graph = onnx.load(exported[0] / "model.onnx", load_external_data=False).graph
    places = {
        each.name: tuple(entry.value for entry in each.external_data)
        for each in graph.initializer
        if each.external_data and each.name.startswith(("head", "embedding"))
    }
    assert places["head.weight"] == places["embedding.weight"] and places["head.scale"] == places["embedding.scale"]
    # rows of 64 and 96 numbers do not fill blocks of 128
    assert exported[1].formats["int8 block 64"] == 320 * 64 + 3 * 32 * 64
    assert exported[1].formats["int8 block 32"] == 3 * 96 * 64


def test_greedy_tokens_of_the_fp32_bundle_are_transformers_own(source: Path, tmp_path: Path) -> None:
    import torch

    pipeline.export(source, tmp_path / "fp32", Asked(scheme="fp32", sizes=SIZES))
    ours, theirs = opened(tmp_path / "fp32"), proof.reference(source)
    for seed in range(20):
        ids = np.random.default_rng(seed).integers(2, 320, (1, 5 + seed))
        wanted = theirs.generate(
            torch.from_numpy(ids),
            attention_mask=torch.ones(ids.shape, dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
        )[0, ids.shape[1] :].tolist()
        assert list(ours.tokens(ids[0].tolist(), 20)) == [token for token in wanted if token != 1]


def test_exporting_again_gives_the_same_bytes(
    exported: tuple[Path, LanguageReport], source: Path, tmp_path: Path
) -> None:
    pipeline.export(source, tmp_path / "again", Asked(scheme="mixed", sizes=SIZES))
    for file in exported[0].iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_export_goes_on_without_gptq_and_says_why(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(rounding, "to_codes", fails)
    report = pipeline.export(source, tmp_path / "plain", Asked(sizes=SIZES))
    assert "GPTQ was not tried, because not enough memory" in " ".join(report.notes) and report.calibration == ""
    assert language_check.check(opened(tmp_path / "plain")).met


def test_model_too_large_for_memory_is_proved_by_its_first_layers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_free_memory", lambda: 1)
    report = pipeline.export(source, tmp_path / "part", Asked(scheme="w8", sizes=SIZES))
    assert report.proved.layers == 2 and "equals transformers (its first 2 layers)" in " ".join(str(report).split())


def test_nothing_is_left_of_an_export_that_ends_early(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "bundle"
    pipeline.export(source, old, Asked(scheme="w8", sizes=SIZES))
    before = {each.name: each.read_bytes() for each in old.iterdir()}

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_loss", stops)
    with pytest.raises(KeyboardInterrupt):
        pipeline.export(source, old, Asked(scheme="w4", sizes=SIZES))
    assert [each.name for each in tmp_path.iterdir()] == ["bundle"]
    assert {each.name: each.read_bytes() for each in old.iterdir()} == before
    monkeypatch.undo()
    pipeline.export(source, old, Asked(scheme="w4", sizes=SIZES))
    assert opened(old).manifest.scheme == "w4"


@pytest.mark.parametrize("case", ["no tokenizer", "other vocabulary", "no scheme", "disk", "no bundle"])
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    case: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    out, asked = tmp_path / "out", Asked(sizes=SIZES)
    kinds = {"no scheme": RecipeError, "disk": BundleError, "no bundle": BundleError}
    said = {
        "no tokenizer": "found no tokenizer.json", "other vocabulary": "found token 500, expected 0 to 319",
        "no scheme": "expected one of auto, fp32, w8, w4, mixed", "disk": "GB free on its disk", "no bundle": "not a bundle",
    }  # fmt: skip
    if case == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif case == "other vocabulary":
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"]["zzzz"] = 500
        (folder / "tokenizer.json").write_text(json.dumps(content))
    elif case == "no scheme":
        asked = Asked(scheme="w3", sizes=SIZES)
    elif case == "disk":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    else:
        out.mkdir()
        (out / "mine.txt").write_text("x")
    with pytest.raises(kinds.get(case, TraceError)) as error:
        pipeline.export(folder, out, asked)
    assert said[case] in str(error.value)
    assert {each.name for each in tmp_path.iterdir()} <= {"model", "out"} and not (out / "manifest.json").exists()


def test_command_line_takes_a_causal_folder_without_a_flag(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", source, "--out", tmp_path / "b", "--budget", "kl<=5", "--scheme", "w8") == 0
    assert "max_kl" in capsys.readouterr().out
    assert opened(tmp_path / "b").manifest.limits == Limits(max_kl=5.0)
    assert call("export", source, "--out", tmp_path / "b", "--budget", "kl<=1e-9", "--scheme", "w8") == 1
    assert "NOT MET" in capsys.readouterr().out
    assert call("export", source, "--out", tmp_path / "b", "--target", "arm64") == 2
    assert "--target: found" in capsys.readouterr().err


def test_bits_go_where_the_model_hears_them_within_the_bytes_that_there_are(
    exported: tuple[Path, LanguageReport], source: Path, tmp_path: Path
) -> None:
    report = pipeline.export(source, tmp_path / "auto", Asked(sizes=SIZES))
    assert report.scheme == "auto" and report.bytes <= exported[1].bytes
    large = ("model.onnx.data", "tokenizer.json", "chat_template.jinja")
    most = sum((tmp_path / "auto" / name).stat().st_size for name in large) + pipeline.SMALL_FILES - 6000
    small = pipeline.export(source, tmp_path / "small", Asked(sizes=SIZES, limits=Limits(max_size_bytes=most)))
    assert small.met and small.bytes < report.bytes
    same = pipeline.export(source, tmp_path / "same", Asked(sizes=SIZES))
    assert same == report


def test_export_goes_on_with_mixed_where_layers_cannot_be_heard(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(heard, "measure", fails)
    report = pipeline.export(source, tmp_path / "mixed", Asked(sizes=SIZES))
    assert report.scheme == "mixed"
    assert "a step was not taken, because not enough memory" in " ".join(report.notes)
