"""packlight targets | lint | explain --as, and the flags of export, as a shell sees them: exit status, stdout, stderr."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import onnx
import pytest

import runtime
from exporter import target
from exporter.recipe import load_recipe
from exporter.target import TARGETS, X86_AVX2
from runtime import cpu
from runtime import manifest as manifests
from tests.command import call
from tests.exporter import graphs
from tests.exporter.conftest import LIMITS, Exported

Captured = pytest.CaptureFixture[str]


def fitting(capsys: Captured) -> str:
    """What was printed, which fits 80 columns, and no word on stderr."""
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines()), default=0) <= 80
    return out


def refused(capsys: Captured, *args: object) -> str:
    """The one line on stderr of a command that could not run."""
    assert call(*args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_targets_lists_all_and_says_which_this_machine_is(capsys: Captured) -> None:
    assert call("targets") == 0
    out = fitting(capsys)
    assert [word for line in out.splitlines() if (word := line.split()[0]) in TARGETS] == [*TARGETS]
    assert f"this machine: {target.of(cpu.read()).name} (" in out


def test_targets_as_json_is_the_cpu_and_every_value(capsys: Captured) -> None:
    assert call("targets", "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert out["here"] == target.of(cpu.read()).name
    assert out["cpu"]["machine"] == platform.machine()
    assert [each["name"] for each in out["targets"]] == [*TARGETS]
    assert out["targets"][2]["quantize_ns"] == X86_AVX2.quantize_ns


def test_one_target_is_told_with_every_fact_and_its_source(capsys: Captured) -> None:
    expected = target.facts(X86_AVX2)
    assert call("targets", "x86-avx2") == 0
    out = fitting(capsys)
    said = " ".join(out.split())
    assert out.splitlines()[0] == "x86-avx2"
    for fact in expected:
        assert f"{fact.what}: {fact.value}" in said and fact.why in said
    assert call("targets", "x86-avx2", "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"what": f.what, "value": f.value, "why": f.why} for f in expected]


@pytest.mark.parametrize("args", [["targets", "x86-avx3"], ["lint", "{m}", "--target", "x86-avx3"]])
def test_unknown_target_is_2_and_suggests_the_nearest(args: list[str], cnn: Path, capsys: Captured) -> None:
    assert "did you mean 'x86-avx2'?" in refused(capsys, *(arg.format(m=cnn) for arg in args))


def test_lint_of_a_sound_bundle_is_0(phone: Exported, capsys: Captured) -> None:
    assert call("lint", phone.folder) == 0
    assert fitting(capsys) == "0 errors, 0 warnings\n"
    assert call("lint", phone.folder, "--target", "x86-avx2", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        str(phone.folder / name): [] for name in (manifests.INT8, manifests.ORT)
    }


def test_lint_of_a_bundle_that_would_saturate_is_1_and_writes_sarif(
    saturating: Exported, tmp_path: Path, capsys: Captured
) -> None:
    assert call("lint", saturating.folder) == 0
    assert fitting(capsys) == "0 errors, 0 warnings\n"
    assert call("lint", saturating.folder, "--target", "x86-avx2", "--sarif", tmp_path / "lint.sarif") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{saturating.folder / manifests.INT8}: error pair-rule"
    assert lines[-1] == "2 errors, 0 warnings" and max(map(len, lines[1:])) <= 80
    (run,) = json.loads((tmp_path / "lint.sarif").read_text())["runs"]
    assert [(each["ruleId"], each["level"]) for each in run["results"]] == [("pair-rule", "error")] * 2


def test_lint_of_a_file_alone_warns_of_every_cpu_and_is_0(saturating: Exported, capsys: Captured) -> None:
    assert call("lint", saturating.folder / manifests.INT8) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 errors, 2 warnings"


def test_lint_of_what_is_not_there_is_2(tmp_path: Path, capsys: Captured) -> None:
    names = ("no.onnx", "no.ort", "half.ort")
    for name, content in zip(names, (b"no", b"no", b"\x14\0\0\0ORTM" + bytes(40)), strict=True):
        (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / "none.onnx", *(tmp_path / name for name in names)):
        assert str(path) in refused(capsys, "lint", path)


def test_forecast_of_a_saturating_bundle_names_its_layers_and_what_comes_out(
    saturating: Exported, capsys: Captured
) -> None:
    assert call("explain", saturating.folder, "--as", "x86-avx2") == 0
    out = fitting(capsys)
    assert out.splitlines()[0] == "signed on x86 without VNNI (AVX2, or AVX512 alone)"
    assert "2 can clip, for their weights break the pair rule; 2 of them did" in " ".join(out.split())
    assert "export for target portable or x86-avx2" in out
    assert call("explain", saturating.folder, "--as", "x86-avx2", "--json") == 0
    forecast = json.loads(capsys.readouterr().out)
    assert [layer["node"] for layer in forecast["layers"]] == ["a", "e"]
    assert all(0 < layer["clipped"] <= 1 and layer["pairs"] > 0 for layer in forecast["layers"])
    assert forecast["without_vnni"]["outputs"][0]["snr_db"] < 20 < forecast["with_vnni"]["outputs"][0]["snr_db"]


def test_forecast_of_a_portable_bundle_clips_nothing(phone: Exported, capsys: Captured) -> None:
    assert call("explain", phone.folder, "--as", "x86-avx2") == 0
    out = fitting(capsys)
    assert "none can clip" in out and "as with VNNI, bit for bit" in out


def test_forecast_of_a_bare_file_needs_inputs(saturating: Exported, tmp_path: Path, capsys: Captured) -> None:
    model = saturating.folder / manifests.INT8
    np.savez(tmp_path / "in.npz", x=np.random.default_rng(9).random((4, 64), dtype=np.float32))
    assert call("explain", model, "--as", "portable", "--inputs", tmp_path / "in.npz", "--json") == 0
    forecast = json.loads(capsys.readouterr().out)
    assert [layer["node"] for layer in forecast["layers"]] == ["a", "e"]
    assert (forecast["with_vnni"], forecast["drift"]["batches"]) == (None, 1)
    expected = "expected a bundle's folder, or an int8 .onnx and --inputs DATA"
    for path, what in ((model, "no --inputs"), (tmp_path / "none.onnx", "nothing")):
        assert refused(capsys, "explain", path, "--as", "x86-avx2") == f"error: {path}: found {what}, {expected}\n"


@pytest.mark.parametrize("name", ["arm64", "wasm", "x86-vnni"])
def test_forecast_of_a_cpu_on_which_nothing_clips_is_refused_with_what_to_do(
    name: str, saturating: Exported, capsys: Captured
) -> None:
    error = refused(capsys, "explain", saturating.folder, "--as", name)
    assert f"--as: found {name}, expected x86-avx2 or portable; nothing clips on {name}" in error
    assert "sum u8·s8 products in int32" in error


def test_forecast_of_an_unknown_cpu_suggests_the_nearest(saturating: Exported, capsys: Captured) -> None:
    assert "did you mean 'x86-avx2'?" in refused(capsys, "explain", saturating.folder, "--as", "avx2")


def data(folder: Path, name: str, *shape: int) -> Path:
    """Four .npz files of one input."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    for n in range(4):
        np.savez(folder / f"{n}.npz", **{name: rng.random(shape, dtype=np.float32)})
    return folder


def test_export_takes_limits_and_the_phones_file_by_flags(cnn: Path, tmp_path: Path, capsys: Captured) -> None:
    given = data(tmp_path / "data", "image", 2, 3, 16, 16)
    flags = ("--ort", "--max-size", "1MB", "--max-ram", "2GB", "--min-integer-macs", 0.9)
    assert call("export", cnn, "--calibration", given, *flags, "--out", tmp_path / "b") == 0
    said, err = capsys.readouterr()
    assert err == "" and max(map(len, said.splitlines()[:-1])) <= 80
    about = runtime.load(tmp_path / "b", ort=True).manifest
    assert {name: getattr(about.budget, name) for name in LIMITS} == LIMITS
    assert "max_size_bytes = 1000000" in (tmp_path / "b" / "recipe.toml").read_text()
    assert call("check", tmp_path / "b", "--ort", "--strict") == 0
    assert "max_ram_bytes" in fitting(capsys)


def test_export_that_misses_a_limit_of_a_flag_is_1(tmp_path: Path, capsys: Captured) -> None:
    text = "(float[8,8] x) => (float[8,8] y) { [l] h = MatMul(x, w)\n [n] y = MatMul(h, h) }"
    onnx.save(graphs.proto(text, {"w": graphs.noise(1, 8, 8)}), tmp_path / "m.onnx")
    given = data(tmp_path / "data", "x", 8, 8)
    args = ("export", tmp_path / "m.onnx", "--calibration", given, "--out", tmp_path / "b")
    assert call(*args, "--min-integer-macs", 0.9, "--max-size", 100) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "verdict NOT MET: integer_macs: 0.5 (at least 0.9); max_size_bytes: " in said
    assert call("explain", tmp_path / "b", "--min-integer-macs", 0.9) == 1
    assert capsys.readouterr().err == "integer_macs: 0.5 (at least 0.9): NOT MET\n"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max-size", "6 apples"], "size: found '6 apples', expected a number above 0 with B, KB, MB"),
        (["--target", "arm"], "no such recipe: found 'arm'"),
        (["--budget", "snrr>=25dB"], "found 'snrr', expected one of snr"),
        (["--budget", "top1 drop<=0.5%"], "budget top1 drop<=0.5%: found no evaluate()"),
        (["--costs", "{recipe}"], "expected a cost table"),
    ],
)
def test_limit_that_cannot_be_held_is_refused_before_any_work(
    flags: list[str], says: str, cnn: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "own.toml").write_text(load_recipe("portable").toml + "max_size_bytes = 5\n")
    given = data(tmp_path / "data", "image", 2, 3, 16, 16)
    args = [flag.format(recipe=tmp_path / "own.toml") for flag in flags]
    assert says in refused(capsys, "export", cnn, "--calibration", given, "--out", tmp_path / "b", *args)
    assert not (tmp_path / "b").exists()


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_bundle_for_vnni_where_pairs_are_added_in_int16_is_one_line_of_warning_and_with_strict_2(
    saturating: Exported, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr(cpu, "pairs_in_int16", lambda: True)
    assert call("explain", saturating.folder) == 0
    said, err = capsys.readouterr()
    assert said.startswith("signed: 100.0 % of MACs in integer kernels")
    assert err.startswith("warning: ") and "made for x86-vnni" in err and err.count("\n") == 1
    error = refused(capsys, "check", saturating.folder, "--strict")
    assert "made for x86-vnni" in error and "export with --target portable" in error
