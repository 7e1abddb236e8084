"""exporter.search.improve: what is timed here, what is read, and what an interrupted search keeps."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import exporter
from exporter.progress import Silent
from exporter.recipe import parse
from exporter.search import Caps, faster, memory
from exporter.search.plans import Plans
from exporter.target import X86_AVX2, X86_VNNI, Target
from tests.exporter import graphs

MODULE = importlib.import_module("exporter.search.improve")  # the package's name `improve` is its function
AIM = parse(
    exporter.load_recipe("x86-vnni").toml + "\n[search]\naim_snr_db = 90.0\nmax_slower = 0.5\n", "far"
)  # no plan reaches it


class Notes(Silent):
    """What was noted."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The whole models that were timed beside the static one, all of them half as fast; this machine is x86-vnni."""
    asked: list[float] = []

    def ratio(*given: object, **timing: float) -> float:
        asked.append(timing.get("seconds", faster.SECONDS))
        return 2.0

    monkeypatch.setattr(faster, "ratio", ratio)
    here(X86_VNNI, monkeypatch)
    return asked


def here(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is that target."""
    monkeypatch.setattr(MODULE, "is_here", lambda asked: asked.name == target.name)


def export(model: Path, out: Path, tell: Notes | None = None, **caps: object) -> dict[str, bytes]:
    """The files of the bundle."""
    batches = [{"x": graphs.noise(seed, 4, 8)} for seed in range(12)]
    exporter.export(
        exporter.from_onnx(model),
        AIM,
        batches[:8],
        batches[8:],
        out,
        progress=tell or Notes(),
        **caps,  # type: ignore[arg-type]
    )
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_fp32_is_timed_once_and_remembered(onnx_file: Path, tmp_path: Path, timed: list[float]) -> None:
    first = export(onnx_file, tmp_path / "a")
    assert json.loads(first["costs.json"])["fp32"] == 2.0
    count = len(timed)
    assert count >= 1
    assert export(onnx_file, tmp_path / "b") == first
    assert len(timed) == count


def test_search_that_was_killed_goes_on_and_finds_the_same_bundle(
    onnx_file: Path, tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export(onnx_file, tmp_path / "whole")
    (kept,) = (cache_folder / memory.FOLDER).iterdir()
    plans = json.loads(kept.read_bytes())["plans"]
    kept.unlink()

    build, built = Plans.int8, list[object]()

    def int8(self: Plans, choice: object) -> object:
        built.append(choice)
        if len(built) == 3:
            raise KeyboardInterrupt
        return build(self, choice)  # type: ignore[arg-type]

    monkeypatch.setattr(Plans, "int8", int8)
    with pytest.raises(KeyboardInterrupt, match="2 evaluations of the search are kept, run again to go on"):
        export(onnx_file, tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    assert len(json.loads(kept.read_bytes())["plans"]) == 2
    built = [None] * 3
    assert export(onnx_file, tmp_path / "again") == whole
    timing = sum(1 for choice in built[3:] if choice is not None) - (len(plans) - 2)
    assert 0 <= timing <= 6  # plans that are timed are built once more
    assert {*json.loads(kept.read_bytes())["plans"]} == {*plans}


def test_minutes_that_timing_has_spent_are_not_there_for_the_search() -> None:
    assert MODULE._goal(AIM, None, Caps(max_minutes=3.0), 60.0).max_minutes == 2.0
    assert MODULE._goal(AIM, None, Caps(), 60.0).max_minutes is None


def test_plan_without_a_time_in_the_given_costs_is_timed_only_where_this_machine_is_the_target(
    onnx_file: Path, tmp_path: Path, timed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = json.loads(export(onnx_file, tmp_path / "a")["costs.json"])
    table = tmp_path / "costs.json"
    table.write_text(json.dumps({**given, "timed": {"0" * 16: 1.5}}))
    for target, word in ((X86_VNNI, "it is timed on this machine, which is x86-vnni, too"), (X86_AVX2, "predicted")):
        here(target, monkeypatch)
        timed.clear()
        tell = Notes()
        export(onnx_file, tmp_path / target.name, tell, costs=table)
        assert (len(timed) > 0) == (target == X86_VNNI)
        assert sum(word in said for said in tell.said) == 1


def test_nothing_is_kept_where_the_cache_is_off(
    onnx_file: Path, tmp_path: Path, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", "off")
    export(onnx_file, tmp_path / "a")
    assert not cache_folder.exists()
