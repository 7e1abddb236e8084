"""packlight export through runtime.cli.main, as a shell sees it: exit status, stdout, stderr."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import typer.testing

import exporter
import runtime
from exporter import cli as exporter_cli
from tests.command import call
from tests.exporter import graphs
from tests.exporter.conftest import Exported

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight .npz files that fit `onnx_file`."""
    folder = tmp_path / "data"
    folder.mkdir()
    for n in range(8):
        np.savez(folder / f"{n}.npz", x=graphs.noise(n, 4, 8))
    return folder


def test_export_writes_a_bundle_and_a_summary_of_80_columns(
    onnx_file: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "b"
    asked = ("export", onnx_file, "--calibration", data, "--target", "x86-vnni", "--out", out)
    assert call(*asked) == 0
    said, err = capsys.readouterr()
    lines = [line for line in said.splitlines() if str(out) not in line]  # a path is not cut
    assert len(lines) <= 8 and max(map(len, lines)) <= 80
    assert lines[0].startswith("verdict   met") and lines[1].startswith("int8  ")
    assert f"bundle    {out}" in said
    assert err == ""
    assert call(*asked, "-v") == 0
    said, _ = capsys.readouterr()
    assert "\nasked     tiny for x86-vnni (recipe x86-vnni)\n" in said
    assert "6 batches calibrated (minmax), 2 held out" in said
    assert call("check", out) == 0


def test_json_is_the_report_and_nothing_else(onnx_file: Path, data: Path, tmp_path: Path, capsys: Captured) -> None:
    args = ("--calibration", data, "--heldout", data / "7.npz", "--out", tmp_path / "b", "--json")
    assert call("export", onnx_file, *args) == 0
    said, err = capsys.readouterr()
    report = json.loads(said)
    assert report.keys() == exporter.Report.__dataclass_fields__.keys() - {"kept"}  # of files with Q/DQ only
    assert (report["target"], report["calibration_batches"]) == ("portable", 8)
    assert err == ""


def test_budget_that_is_not_met_is_1_and_the_bundle_is_there(
    onnx_file: Path, data: Path, tmp_path: Path, capsys: Captured
) -> None:
    text = exporter.load_recipe("x86-vnni").toml.replace("10.0", "90.0")
    (tmp_path / "strict.toml").write_text(text)
    out = tmp_path / "b"
    assert call("export", onnx_file, "--calibration", data, "--recipe", tmp_path / "strict.toml", "--out", out) == 1
    assert "NOT MET: snr_db y" in " ".join(capsys.readouterr().out.split())
    assert runtime.load(out).manifest.budget.min_snr_db == 90.0


SAMPLE = """
import numpy as np, torch, exporter

def source():
    torch.manual_seed(0)
    return exporter.from_module(torch.nn.Linear(8, 4), {"x": np.zeros((1, 8), np.float32)}, ["y"], {"x": {0: "n"}})

def rows(seed):
    return [{"x": np.random.default_rng(seed + n).random((4, 8), dtype=np.float32)} for n in range(4)]

def calibration(): return rows(0)
def heldout(): return rows(50)
def evaluate(run): return {"mean": float(run(rows(90)[0])["y"].mean())}
"""


def test_python_file_brings_model_data_recipe_and_score(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "sample.py").write_text(SAMPLE)
    (tmp_path / "recipe.toml").write_text(
        exporter.load_recipe("x86-vnni").toml.replace('name   = "x86-vnni"', 'name = "mine"')
    )
    assert call("export", tmp_path, "--out", tmp_path / "b", "--verbose") == 0
    said, _ = capsys.readouterr()
    assert "\nasked     Linear for x86-vnni (recipe mine)" in said
    assert "score     mean: FP32 " in said
    assert (
        call("export", f"{tmp_path / 'sample.py'}:source", "--target", "portable", "--out", tmp_path / "b", "--json")
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "portable"
    assert found["scores"]["mean"][0] == pytest.approx(found["scores"]["mean"][1], abs=0.02)


REFUSED = [
    (["{onnx}"], "calibration: no data"),
    (["{onnx}", "--calibration", "{data}", "--target", "x86-vni"], "did you mean 'x86-vnni'?"),
    (["{onnx}", "--calibration", "{data}", "--recipe", "none.toml"], "no such recipe: found 'none.toml'"),
    (["{onnx}", "--calibration", "nowhere.npz"], "nowhere.npz: found "),
    (["{onnx}", "--calibration", "nowhere.py:rows"], "found no file nowhere.py"),
    (["weights.pth", "--calibration", "{data}"], "found a pickle, which runs code when it is read"),
    (["model.pkl", "--calibration", "{data}"], "found a pickle"),
    (["nowhere.onnx", "--calibration", "{data}"], "expected a readable ONNX file"),
    (["nowhere.py"], "found no such file"),
    (["{onnx}", "--calibration", "{data}", "--out", "{data}"], "found a folder that is not a bundle"),
]


@pytest.mark.parametrize(("args", "says"), REFUSED)
def test_what_cannot_run_is_one_line_on_stderr_and_2(
    args: list[str],
    says: str,
    onnx_file: Path,
    data: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("export", *(arg.format(onnx=onnx_file, data=data) for arg in args)) == 2
    said, err = capsys.readouterr()
    assert said == "" and err.startswith("error: ") and len(err.splitlines()) == 1
    assert says in err
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("args", [[], ["x", "--speed"], ["x", "--target", "portable", "--recipe", "a.toml"]])
def test_wrong_usage_is_2(args: list[str]) -> None:
    assert call("export", *args) == 2


def test_ctrl_c_is_one_line_130_and_no_folder(
    onnx_file: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.py").write_text(
        "import numpy as np\ndef rows():\n    yield np.zeros((4, 8), np.float32)\n    raise KeyboardInterrupt\n"
    )
    monkeypatch.chdir(tmp_path)
    assert call("export", onnx_file, "--calibration", "d.py:rows", "--out", "b") == 130
    said, err = capsys.readouterr()
    assert said == "" and err.startswith("error: interrupted") and len(err.splitlines()) == 1
    assert not (tmp_path / "b").exists()


def test_random_data_is_for_those_who_name_it(onnx_file: Path, tmp_path: Path, capsys: Captured) -> None:
    args = ("--calibration", "random", "--heldout", "random", "--out", tmp_path / "b")
    assert call("export", onnx_file, *args) == 0
    assert "RANDOM data: ranges and drift mean nothing" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("app", "example"),
    [(exporter_cli.export_app, "packlight export samples/lite0"), (exporter_cli.demo_app, "packlight demo --out")],
)
def test_help_teaches_with_an_example(app: typer.Typer, example: str) -> None:
    result = typer.testing.CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert f"Example: {example}" in " ".join(result.output.split())


BLOCKED = """
import sys
import xml.etree.ElementTree as ET

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "onnx", "onnx_ir", "onnxscript", "exporter", "optimum", "networkx"}:
            raise ImportError(f"{name} is not installed on this device")

sys.meta_path.insert(0, Blocker())
from runtime.cli import main
main(sys.argv[1:])
"""


def on_a_device(*args: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process that has numpy, onnxruntime and typer, and nothing of the exporter."""
    command = [sys.executable, "-c", BLOCKED, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


def test_copy_checks_itself_on_a_device_without_the_exporter(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.folder, tmp_path / "copy")
    ran = on_a_device("check", tmp_path / "copy")
    assert ran.returncode == 0, ran.stderr
    assert all(line.startswith("warning: ") for line in ran.stderr.splitlines())  # where there is no VNNI
    assert ran.stdout.startswith("residual: met")


def test_flipped_byte_is_2_on_a_device(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.folder, tmp_path / "copy")
    model = tmp_path / "copy" / "model.int8.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 3] ^= 255
    model.write_bytes(content)
    ran = on_a_device("check", tmp_path / "copy")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "model.int8.onnx: found SHA-256" in ran.stderr


def test_export_on_a_device_says_what_to_install() -> None:
    ran = on_a_device("export", "model.onnx")
    assert ran.returncode == 2
    assert "; pip install '" in ran.stderr and "[export]'" in ran.stderr


@pytest.mark.parametrize(
    ("line", "becomes", "says"),
    [
        (
            "def calibration(): return rows(0)",
            "def calibration():\n    yield rows(0)[0]\n    yield {}['gone']",
            "KeyError",
        ),
        ("def heldout(): return rows(50)", "def heldout(): return rows(50) / 0", "TypeError"),
        ("    torch.manual_seed(0)", "    raise ValueError('no weights')", "ValueError: no weights"),
        ("def evaluate(run): return", "def evaluate(run): return 1 / 0,", "ZeroDivisionError"),
    ],
)
def test_error_in_the_users_own_function_is_one_line_that_names_it(
    line: str, becomes: str, says: str, tmp_path: Path, capsys: Captured
) -> None:
    assert line in SAMPLE
    (tmp_path / "sample.py").write_text(SAMPLE.replace(line, becomes))
    assert call("export", tmp_path, "--out", tmp_path / "b") == 2
    said, err = capsys.readouterr()
    assert said == "" and len(err.splitlines()) == 1
    assert "() of your file: found " in err and says in err and "(sample.py:" in err


BARE = """
import numpy as np, torch

def source():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 4)

calibration = [{"input": np.random.default_rng(n).random((4, 8), dtype=np.float32)} for n in range(4)]
heldout = [batch["input"] + 1 for batch in calibration]
"""


def test_python_file_may_return_a_module_and_hold_lists_of_batches(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "bare.py").write_text(BARE)
    assert call("export", tmp_path / "bare.py", "--out", tmp_path / "b", "--max-evals", 0) in (0, 1)
    said = " ".join(capsys.readouterr().out.split())
    assert "note a module without names: inputs input from its forward and the first calibration batch" in said
    assert runtime.load(tmp_path / "b").manifest.outputs[0].name == "output_0"
    (tmp_path / "value.py").write_text(BARE.replace("def source():", "source = torch.nn.Linear(8, 4)\ndef other():"))
    assert call("export", tmp_path / "value.py", "--out", tmp_path / "c", "--max-evals", 0) in (0, 1)


@pytest.mark.parametrize(
    ("line", "becomes", "says"),
    [
        ("    return torch.nn", "    torch.nn", "source() of your file: found None, expected a value: return it"),
        ("    return torch.nn.Linear(8, 4)", "    return torch.nn.Linear", "found the class Linear, expected a Source"),
        ("heldout =", "evaluate = 3\nheldout =", "evaluate: found int, expected a function run -> {metric: value}"),
        ("heldout =", "def evaluate(run): return 0.9\nheldout =", "evaluate(): found float 0.9, expected {metric: number}"),
        ("calibration =", "raise SystemExit(3)\ncalibration =", "running it ended the process: found SystemExit(3)"),
        ("    torch.manual_seed(0)", "    exit(4)", "source() of your file: found SystemExit: 4"),
        ("in calibration]", "in calibration]\ncalibration = 3", "calibration: found int, expected an iterable of batches"),
    ],
)  # fmt: skip
def test_mistake_in_a_python_file_is_one_line(
    line: str, becomes: str, says: str, tmp_path: Path, capsys: Captured
) -> None:
    assert line in BARE
    text = BARE.replace(line, becomes, 1)
    (tmp_path / "bare.py").write_text(text)
    assert call("export", tmp_path / "bare.py", "--out", tmp_path / "b", "--max-evals", 0) == 2
    said, err = capsys.readouterr()
    assert said == "" and err.count("\n") == 1 and says in err


def test_out_below_a_file_is_refused_before_the_work(onnx_file: Path, data: Path, capsys: Captured) -> None:
    assert call("export", onnx_file, "--calibration", data, "--out", data / "0.npz" / "b") == 2
    err = capsys.readouterr().err
    assert "0.npz is not a folder, expected a folder to write into" in err and "free some space" not in err


def test_export_tells_ci_what_was_asked_and_found_also_where_it_could_not_run(
    onnx_file: Path, data: Path, tmp_path: Path
) -> None:
    files = {"--junit": tmp_path / "e.xml", "--markdown": tmp_path / "e.md", "--sarif": tmp_path / "e.sarif"}
    told = [each for pair in files.items() for each in pair]
    asked = ("export", onnx_file, "--calibration", data, "--out", tmp_path / "b", "--max-evals", 0)
    assert call(*asked, "--budget", "snr>=300dB", *told) == 1
    suite = ET.parse(files["--junit"]).getroot()
    failures = {case.get("name"): len(case) for case in suite}
    assert (failures["written"], failures["snr_db y"]) == (0, 1)
    assert files["--markdown"].read_text().startswith("## `tiny`: not met\n")
    rules = [each["ruleId"] for each in json.loads(files["--sarif"].read_text())["runs"][0]["results"]]
    assert "snr_db" in rules
    assert call("export", onnx_file, "--calibration", tmp_path / "nothing", *told) == 2
    suite = ET.parse(files["--junit"]).getroot()
    assert (suite.get("errors"), suite.get("failures")) == ("1", "0")
