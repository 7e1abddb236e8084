from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import runtime
from runtime import language_check, language_probe
from runtime import language_manifest as manifests
from runtime.errors import BundleError, DriftExceeded
from runtime.language import LanguageModel
from runtime.language_manifest import Limits
from runtime.manifest import digest
from tests.command import call
from tests.runtime import language


def changed(folder: Path, **fields: object) -> None:
    """Rewrite the first prompt of the probe, with a manifest that lists it."""
    first, second = language_probe.read(folder / "probe.npz", 11)
    language_probe.write(folder / "probe.npz", [replace(first, **fields), second])
    found = manifests.loads((folder / "manifest.json").read_text(), "")
    files = {name: digest(folder / name) for name in found.files}
    (folder / "manifest.json").write_text(manifests.dumps(replace(found, files=files)))


def checked(folder: Path) -> language_check.LanguageVerdict:
    model = runtime.load(folder, threads=1)
    assert isinstance(model, LanguageModel)
    return language_check.check(model)


def test_bundle_says_here_what_it_said_there(tmp_path: Path) -> None:
    found = checked(language.write(tmp_path / "letters"))
    assert found.met and found.exact
    assert (found.q, found.same_tokens, found.tokens, found.undecided) == (0.0, 12, 12, 0)
    found.require()


def test_other_logits_are_told_in_units_of_quantization(tmp_path: Path) -> None:
    folder = language.write(tmp_path / "letters")
    first, _ = language_probe.read(folder / "probe.npz", 11)
    changed(folder, logits=first.logits + np.float32(0.02), fp32=first.fp32 + np.float32(0.02))
    found = checked(folder)
    assert not found.met and found.q == pytest.approx(2 / 2**0.5, rel=0.01)  # of one prompt of two, twice its 0.01
    with pytest.raises(DriftExceeded, match="device_q logits"):
        found.require()


def test_other_tokens_are_a_fault_unless_the_step_was_undecided(tmp_path: Path) -> None:
    folder = language.write(tmp_path / "letters")
    first, _ = language_probe.read(folder / "probe.npz", 11)
    other = first.tokens.copy()
    other[3] = (other[3] + 1) % 11
    changed(folder, tokens=other)
    assert [line.what for line in checked(folder).lines if not line.met] == ["tokens as recorded"]
    ahead = first.ahead.copy()
    ahead[3] = 0
    changed(folder, ahead=ahead)
    found = checked(folder)
    assert found.met and (found.undecided, found.same_tokens) == (1, 9)


def test_limits_of_the_export_are_held_against_what_it_measured(tmp_path: Path) -> None:
    limits = Limits(max_kl=0.01, max_rise=0.2, min_same_top1=0.95, max_size_bytes=10**9)
    found = checked(language.write(tmp_path / "letters", limits=limits))
    assert {line.what: line.met for line in found.lines if line.what.startswith(("max", "min"))} == {
        "max_kl": False, "max_rise": True, "min_same_top1": False, "max_size_bytes": True,
    }  # fmt: skip


def test_command_line_checks_runs_and_talks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = language.write(tmp_path / "letters")
    assert call("check", folder, "--junit", tmp_path / "a.xml", "--markdown", tmp_path / "a.md") == 0
    said = capsys.readouterr().out
    assert "## letters: met" in said and (tmp_path / "a.md").read_text() == said
    assert 'tests="2" failures="0"' in (tmp_path / "a.xml").read_text()
    assert call("run", folder, "--prompt", "bc", "--max-tokens", 4) == 0
    wanted = "".join(language.LETTERS[token] for token in language.followed([0, 3, 4], 4))
    assert capsys.readouterr().out == f"{wanted}\n"
    assert call("check", folder, "--json") == 0
    assert '"met": true' in capsys.readouterr().out


def test_conversation_goes_on_line_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    folder = language.write(tmp_path / "letters")
    monkeypatch.setattr("sys.stdin", io.StringIO("bc\nd\n"))
    assert call("chat", folder, "--temperature", 0, "--max-tokens", 3) == 0
    first = language.followed([0, 3, 4], 3)
    second = language.followed([0, 3, 4, *first, 5], 3)
    lines = ["".join(language.LETTERS[token] for token in each) for each in (first, second)]
    assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("run",), "no --prompt"),
        (("run", "x.npz"), "found"),
        (("run", "--prompt", ""), "max"),
        (("check", "--strict"), "--strict"),
        (("bench",), "a language model"),
    ],
)
def test_what_is_not_for_a_language_model_is_refused(
    args: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = language.write(tmp_path / "letters")
    if args == ("run", "--prompt", ""):  # the token that begins a text is a prompt
        assert call("run", folder, "--prompt", "", "--max-tokens", 2) == 0
        return
    assert call(args[0], folder, *args[1:]) == 2
    assert said in capsys.readouterr().err


def test_probe_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = language.write(tmp_path / "letters")
    first, _ = language_probe.read(folder / "probe.npz", 11)
    for fields in (
        {"tokens": first.tokens + 20},
        {"ahead": first.ahead[:2]},
        {"logits": np.full_like(first.logits, np.nan)},
        {"at": first.at.astype(np.float32)},
    ):
        language_probe.write(tmp_path / "probe.npz", [replace(first, **fields)])
        with pytest.raises(BundleError):
            language_probe.read(tmp_path / "probe.npz", 11)
