"""The commands through runtime.cli.main, as a shell sees them: exit status, stdout, stderr."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.metadata import EntryPoint, version
from pathlib import Path

import numpy as np
import pytest
import typer

import runtime
from runtime import cli, gate_cli
from runtime.errors import PacklightError, install
from runtime.manifest import Budget, canonical
from tests.command import call
from tests.runtime import models

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def strict_bundle(own_bundle: Path) -> Path:
    """A bundle whose budget cannot be met."""
    models.seal(own_bundle, models.manifest(Budget(min_snr_db=200.0)))
    return own_bundle


def test_check_exits_0_when_met_and_1_when_not(bundle_folder: Path, strict_bundle: Path, capsys: Captured) -> None:
    assert call("check", bundle_folder, "--threads", 1) == 0
    assert capsys.readouterr().out.startswith("tiny: met\n")
    assert call("check", strict_bundle) == 1
    assert capsys.readouterr().out.startswith("tiny: NOT MET\n")


def test_check_writes_the_files_it_is_asked_for_also_when_not_met(strict_bundle: Path, tmp_path: Path) -> None:
    assert call("check", strict_bundle, "--junit", tmp_path / "p.xml", "--markdown", tmp_path / "p.md") == 1
    assert ET.parse(tmp_path / "p.xml").getroot().get("failures") == "1"
    assert (tmp_path / "p.md").read_text().startswith("## `tiny`: not met\n")


def test_check_json_is_the_verdict_of_the_api(bundle_folder: Path, capsys: Captured) -> None:
    assert call("check", bundle_folder, "--json", "--threads", 1) == 0
    assert capsys.readouterr().out == runtime.check(runtime.load(bundle_folder, threads=1)).to_json()


def test_bench_json_is_the_timing_of_the_api(bundle_folder: Path, capsys: Captured) -> None:
    assert call("bench", bundle_folder, "--rounds", 2, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == runtime.Timing.__dataclass_fields__.keys()
    assert (found["rounds"], found["threads"]) == (2, 1)


def test_bench_says_the_ratio_first(bundle_folder: Path, capsys: Captured) -> None:
    assert call("bench", bundle_folder, "--rounds", 2) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("x as fast as fp32")


def test_run_reads_and_writes_arrays(bundle_folder: Path, tmp_path: Path, capsys: Captured) -> None:
    inputs = next(models.images(5, 1))
    np.savez(tmp_path / "in.npz", **inputs)
    assert call("run", bundle_folder, tmp_path / "in.npz", "--out", tmp_path / "out.npz", "--json") == 0
    expected = runtime.load(bundle_folder).run(inputs)["logits"]
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_array_equal(found["logits"], expected, strict=True)
    assert json.loads(capsys.readouterr().out)["logits"]["values"] == expected.ravel().tolist()


def test_explain_leads_with_the_share_and_lists_every_node(bundle_folder: Path, capsys: Captured) -> None:
    assert call("explain", bundle_folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny: 100.0 % of MACs in integer kernels (0.429 M MACs, ")
    assert any(line.startswith("head") and "QGemm" in line and "u8s8" in line for line in lines)
    assert call("explain", bundle_folder, "--json") == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert sum(node["kernel"]["macs"] for node in nodes) == 2 * models.CLASSIFIER_MACS


def test_what_could_not_run_is_one_line_on_stderr_and_2(tmp_path: Path, bundle_folder: Path, capsys: Captured) -> None:
    assert call("check", tmp_path / "none") == 2
    assert call("run", bundle_folder, tmp_path / "none.npz") == 2
    assert call("check", bundle_folder, "--junit", bundle_folder / "manifest.json" / "parity.xml") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in err.splitlines()] == ["error"] * 3


@pytest.mark.parametrize("args", [["chekc"], ["check"], ["check", "x", "--speed"], ["bench", "x", "--threads", "0"]])
def test_wrong_usage_is_2(args: list[str]) -> None:
    assert call(*args) == 2


@pytest.mark.parametrize("command", ["check", "bench", "run", "explain"])
def test_help_teaches_with_an_example(command: str, capsys: Captured) -> None:
    assert call(command, "--help") == 0
    assert f"Example: packlight {command} build/lite0" in capsys.readouterr().out


def test_help_lists_the_exporters_commands_too(capsys: Captured) -> None:
    assert call("--help") == 0
    text = capsys.readouterr().out
    for command in ("export", "demo", "targets", "lint", "check", "bench", "run", "explain"):
        assert f" {command} " in text


def given(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    point = EntryPoint("export", target, cli.COMMANDS)
    monkeypatch.setattr(cli, "entry_points", lambda group: [point])


exporter_app = typer.Typer()


@exporter_app.command()
def _export(source: str, target: str = "portable") -> None:
    if source == "bad":
        raise PacklightError("source", found=source)
    typer.echo(f"{source} for {target}")


def test_export_is_forwarded_with_all_its_arguments(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    given(monkeypatch, f"{__name__}:exporter_app")
    assert call("export", "samples/lite0", "--target", "arm64") == 0
    assert call("export", "--help") == 0
    assert call("export", "bad") == 2
    out, err = capsys.readouterr()
    assert out.startswith("samples/lite0 for arm64\n")
    assert "Usage: packlight export" in out and "--target" in out
    assert err == "error: source: found bad\n"


def test_export_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    given(monkeypatch, "no_such_package_of_ours:app")
    assert call("export", "samples/lite0") == 2
    assert capsys.readouterr().err == (
        "error: packlight export is not installed here: found No module named 'no_such_package_of_ours'; "
        f"{install('export')}\n"
    )


def test_module_is_the_command(bundle_folder: Path) -> None:
    command = [sys.executable, "-m", "runtime", "check", str(bundle_folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("tiny: met\n")


def test_canonical_bench_round_trips(bundle_folder: Path) -> None:
    timing = runtime.bench(runtime.load(bundle_folder, threads=1), rounds=1)
    assert runtime.Timing(**json.loads(canonical(timing))) == timing


def test_error_of_nobodys_is_2_and_one_line_with_a_traceback_for_those_who_ask(
    bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def broken(*args: object, **named: object) -> None:
        raise ZeroDivisionError("a fault\nof ours")

    monkeypatch.setattr(gate_cli, "load", broken)
    assert call("check", bundle_folder) == 2
    out, err = capsys.readouterr()
    said = "error: this is a fault of packlight's or of your file: found ZeroDivisionError: a fault of ours"
    assert (out, err) == ("", f"{said}; PACKLIGHT_TRACEBACK=1 shows where\n")
    monkeypatch.setenv("PACKLIGHT_TRACEBACK", "1")
    assert call("check", bundle_folder) == 2
    assert capsys.readouterr().err.startswith("Traceback")


def test_check_and_explain_run_the_phones_file_when_asked(ort_bundle: Path, capsys: Captured) -> None:
    (ort_bundle / "model.int8.onnx").unlink()
    assert call("check", ort_bundle, "--onnx") == 2
    assert call("check", ort_bundle, "--threads", 1) == 0
    assert call("explain", ort_bundle, "--ort") == 0
    out, err = capsys.readouterr()
    assert "not known" in out and "tiny: 100.0 % of MACs in integer kernels" in out
    assert max(map(len, out.splitlines())) <= 80
    assert err.startswith("error: ") and err.endswith("or use the other\n") and err.count("\n") == 1


def test_integer_share_that_is_not_met_is_1(bundle_folder: Path, tmp_path: Path, capsys: Captured) -> None:
    np.savez(tmp_path / "in.npz", **next(models.images(5, 1)))
    fp32 = bundle_folder / "model.fp32.onnx"
    assert call("check", bundle_folder, "--min-integer-macs", 1) == 0
    assert call("explain", bundle_folder, "--min-integer-macs", 1) == 0
    assert capsys.readouterr().err == ""
    assert call("explain", fp32, "--inputs", tmp_path / "in.npz", "--min-integer-macs", 0.5) == 1
    out, err = capsys.readouterr()
    assert out.startswith("model.fp32.onnx: 0.0 % of MACs in integer kernels")
    assert err == "integer_macs: 0 (at least 0.5): NOT MET\n"
    assert call("explain", fp32, "--inputs", tmp_path / "in.npz", "--min-integer-macs", 0.5, "--json") == 1
    assert json.loads(capsys.readouterr().out)["integer_macs"] == 0.0


def test_check_holds_the_integer_share_of_a_float_model(own_bundle: Path, capsys: Captured) -> None:
    (own_bundle / "model.int8.onnx").write_bytes((own_bundle / "model.fp32.onnx").read_bytes())
    models.seal(own_bundle, models.manifest(Budget()))
    assert call("check", own_bundle, "--min-integer-macs", 0.25) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("integer_macs")]
    assert rows == [["integer_macs", "0", "0.25", "NO"]]


def test_bare_model_is_explained_on_one_batch(bundle_folder: Path, tmp_path: Path, capsys: Captured) -> None:
    np.savez(tmp_path / "in.npz", **next(models.images(5, 1)))
    model = bundle_folder / "model.int8.onnx"
    assert call("explain", model, "--inputs", tmp_path / "in.npz") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model.int8.onnx: 100.0 % of MACs in integer kernels (0.429 M MACs, ")
    assert max(map(len, lines)) <= 80
    assert call("explain", model) == 2
    assert call("explain", tmp_path / "none.onnx", "--inputs", tmp_path / "in.npz") == 2
    errors = capsys.readouterr().err.splitlines()
    expected = "expected a bundle's folder, or a model and --inputs FILE.npz"
    assert errors == [
        f"error: {model}: found no --inputs, {expected}",
        f"error: {tmp_path / 'none.onnx'}: found nothing, {expected}",
    ]


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_warning_is_one_line_on_stderr_and_strict_makes_it_2(for_vnni: Path, capsys: Captured) -> None:
    assert call("check", for_vnni) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"warning: {for_vnni}: made for x86-vnni, whose weights") and err.count("\n") == 1
    assert "note: made for x86-vnni" in out and max(map(len, out.splitlines())) <= 80
    assert call("check", for_vnni, "--strict") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {for_vnni}: found made for x86-vnni") and err.count("\n") == 1


def test_forecast_is_forwarded_with_what_was_given(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(cli, "forward", lambda command, args: told.append((command, args)))
    assert call("explain", bundle_folder, "--as", "x86-avx2") == 0
    assert call("explain", "m.onnx", "--as", "x86-avx2", "--inputs", "in.npz", "--json") == 0
    for flag in (["--ort"], ["--min-integer-macs", 0.5]):  # never dropped without a word
        assert call("explain", bundle_folder, "--as", "x86-avx2", *flag) == 2
    assert told == [
        ("forecast", [str(bundle_folder), "--as", "x86-avx2"]),
        ("forecast", ["m.onnx", "--as", "x86-avx2", "--inputs", "in.npz", "--json"]),
    ]


def test_version_is_printed(capsys: Captured) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"packlight {version('packlight')}\n"


def test_result_files_are_refused_before_the_work(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    worked: list[object] = []
    for module in (cli, gate_cli):
        monkeypatch.setattr(module, "load", lambda *args, **named: worked.append(args))
    below = bundle_folder / "manifest.json" / "x"
    np.savez(tmp_path / "in.npz", **next(models.images(5, 1)))
    for args in (["check", "--junit"], ["check", "--markdown"], ["run", tmp_path / "in.npz", "--out"]):
        assert call(args[0], bundle_folder, *args[1:], below) == 2
    assert worked == []
    assert capsys.readouterr().err.count("manifest.json is not a folder") == 3


def test_folders_above_a_result_file_are_made(bundle_folder: Path, tmp_path: Path) -> None:
    assert call("check", bundle_folder, "--junit", tmp_path / "a" / "b" / "parity.xml") == 0
    assert (tmp_path / "a" / "b" / "parity.xml").is_file()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, typer.Abort])
def test_ctrl_c_is_130_and_one_line(
    stop: type[BaseException], bundle_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def stopped(*args: object, **named: object) -> None:
        raise stop

    monkeypatch.setattr(gate_cli, "load", stopped)
    monkeypatch.setattr("signal.signal", lambda number, action: None)
    assert call("check", bundle_folder) == 130
    assert capsys.readouterr().err == "error: interrupted: found Ctrl-C; run it again\n"


def test_wrong_usage_is_one_line_that_names_the_help(capsys: Captured) -> None:
    assert call("check", "x", "--thraeds", 1) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: No such option") and "--thraeds" in said  # typer's words, which its releases change
    assert said.endswith("; see packlight check --help\n")
    assert said.count("\n") == 1


def test_control_characters_of_a_name_are_written_out(tmp_path: Path, capsys: Captured) -> None:
    for args in (["check", tmp_path / "a\x1b[2J\nb"], ["check", "\udcff"], ["bench", "x", "--threads", "\x1b[31m"]):
        assert call(*args) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and said.count("\n") == 3
    assert "a\\x1b[2J b" in said and "\\udcff" in said


def test_full_disk_is_2_and_says_so(bundle_folder: Path, capsys: Captured) -> None:
    assert call("check", bundle_folder, "--junit", "/dev/full") == 2
    assert "found No space left on device; free some space" in capsys.readouterr().err
