"""exporter.search.memory: what a search has found out is on disk, and nothing else is taken for it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from exporter.search import memory
from exporter.search.memory import Evaluation, Memory

FIRST = Evaluation(snr_db=19.123456789012345, met=True, seconds=1.0)
SECOND = Evaluation(snr_db=math.inf, met=False, seconds=3.0)


def test_what_was_kept_is_read_as_it_was(tmp_path: Path) -> None:
    kept = Memory(tmp_path / "new" / "a.json", pytest.fail)
    kept.keep("static", FIRST)
    kept.keep("other", SECOND)
    again = Memory(tmp_path / "new" / "a.json", pytest.fail)
    assert (again.get("static"), again.get("other"), again.get("third")) == (FIRST, SECOND, None)
    assert "other" in again and "third" not in again
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


@pytest.mark.parametrize("cut", [0, 1, 30, -1])
def test_truncated_file_is_ignored_with_a_note_and_replaced(cut: int, tmp_path: Path) -> None:
    path, notes = tmp_path / "a.json", list[str]()
    Memory(path).keep("static", FIRST)
    path.write_bytes(path.read_bytes()[:cut])
    found = Memory(path, notes.append)
    assert found.get("static") is None
    assert len(notes) == 1 and f"{path} is ignored" in notes[0]
    found.keep("static", SECOND)
    assert Memory(path, pytest.fail).get("static") == SECOND


def test_file_of_another_search_is_ignored_with_a_note(tmp_path: Path) -> None:
    Memory(tmp_path / "a.json").keep("static", FIRST)
    (tmp_path / "a.json").rename(tmp_path / "b.json")
    notes = list[str]()
    assert Memory(tmp_path / "b.json", notes.append).get("static") is None
    assert "the evaluations of another search" in notes[0]


def test_no_folder_keeps_nothing_beyond_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = memory.at(None, [b"model"], pytest.fail)
    kept.keep("static", FIRST)
    assert kept.get("static") == FIRST
    assert [*tmp_path.iterdir()] == []
    assert "no evaluation of the search is kept" in kept.interrupted()


def test_disk_that_is_full_ends_the_memory_and_not_the_search(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    notes = list[str]()
    kept = Memory(tmp_path / "file" / "a.json", notes.append)
    kept.keep("static", FIRST)
    kept.keep("other", SECOND)
    assert len(notes) == 1 and "nothing more is kept" in notes[0]
    assert kept.get("other") == SECOND


def test_another_model_or_recipe_or_batch_is_another_search(tmp_path: Path) -> None:
    memory.at(tmp_path, [b"model", b"limits"], pytest.fail).keep("static", FIRST)
    assert memory.at(tmp_path, [b"model", b"limits"], pytest.fail).get("static") == FIRST
    for parts in ([b"model", b"others"], [b"modellimits"], [b"model"]):
        assert memory.at(tmp_path, parts, pytest.fail).get("static") is None


def test_what_an_evaluation_takes_is_told_by_those_that_built_a_plan(tmp_path: Path) -> None:
    kept = Memory(tmp_path / "a.json")
    assert kept.mean_seconds() == 0.0
    kept.keep("static", FIRST)
    assert kept.mean_seconds() == 1.0
    kept.keep("other", SECOND)
    assert Memory(tmp_path / "a.json").mean_seconds() == 3.0
    assert "2 evaluations of the search are kept, run again to go on" in kept.interrupted()
