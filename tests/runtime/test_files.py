from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime import files
from runtime.errors import PacklightError


def test_path_below_folders_that_are_not_there_is_taken_and_nothing_is_made(tmp_path: Path) -> None:
    assert files.require_writable(tmp_path / "a" / "b" / "c", "--out") == tmp_path / "a" / "b" / "c"
    assert files.require_file(tmp_path / "a" / "x.xml", "--junit") == tmp_path / "a" / "x.xml"
    assert not (tmp_path / "a").exists()


def test_path_below_a_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PacklightError, match="--out .*found .*file is not a folder"):
        files.require_writable(tmp_path / "file" / "b", "--out")


def test_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(PacklightError, match=f"found no permission to write in {tmp_path}"):
        files.require_writable(tmp_path / "a" / "b", "--out")


@pytest.mark.parametrize("path", ["", None, 3])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(PacklightError, match="expected a path"):
        files.require_writable(path, "out")


def test_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PacklightError, match="found a folder, expected a file's name"):
        files.require_file(tmp_path, "--junit")


def test_full_disk_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(PacklightError, match="found No space left on device; free some space"):
        files.write(Path("/dev/full"), "text", "--junit")
    files.write(tmp_path / "new" / "x.xml", "text", "--junit")
    assert (tmp_path / "new" / "x.xml").read_text() == "text"
