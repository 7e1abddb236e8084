from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import runtime
from runtime import language_check
from runtime.language import LanguageModel
from tests.command import call
from tests.exporter.causal import tiny

SAMPLE = Path(__file__).resolve().parents[3] / "samples" / "llm"


@pytest.mark.slow
@tiny.needs_transformers
def test_sample_meets_its_recorded_numbers(tmp_path: Path) -> None:
    import subprocess

    subprocess.run([sys.executable, SAMPLE / "make.py", tmp_path / "tiny-llama"], check=True)
    assert call("export", tmp_path / "tiny-llama", "--out", tmp_path / "tiny") == 0
    model = runtime.load(tmp_path / "tiny", threads=1)
    assert isinstance(model, LanguageModel)
    verdict = language_check.check(model)
    assert verdict.met
    assert verdict.same_tokens == verdict.tokens == 96
    assert len("".join(model.generate("The function", 20))) > 20
    loss = model.manifest.loss
    found = {
        "fp32_perplexity": loss.fp32_perplexity, "rise": loss.rise, "kl": loss.kl, "same_top1": loss.same_top1,
        "bytes": model.manifest.files["model.onnx.data"].size_bytes,
    }  # fmt: skip
    expected = json.loads((SAMPLE / "expected.json").read_text())["numbers"]
    assert found.keys() == expected.keys()
    for name, line in expected.items():
        assert abs(found[name] - line["value"]) <= line["tolerance"], (name, found[name])
