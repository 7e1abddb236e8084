from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporter.causal import text
from exporter.causal.text import Sizes
from exporter.errors import CalibrationError
from tests.runtime import language

SIZES = Sizes(seen=4, unseen=2, tokens=6, apart=3)


def lines(folder: Path, content: str) -> Path:
    file = folder / "lines.txt"
    file.write_text(content, encoding="utf-8")
    return file


def test_windows_begin_as_a_text_does_and_no_line_is_in_both_kinds(tmp_path: Path) -> None:
    given = lines(tmp_path, "\n".join(["aaaa", "bbbbb", "ccccc"] * 6))
    found = text.read(given, language.tokenizer(), (0,), SIZES)
    assert found.seen.shape == (4, 6) and found.unseen.shape == (2, 6)
    assert (found.seen[:, 0] == 0).all() and (found.unseen[:, 0] == 0).all()
    assert set(np.unique(found.unseen[:, 1:])) == {2}  # "a", and the line's end, which the letters do not know
    assert set(np.unique(found.seen[:, 1:])) == {2, 3, 4}
    assert found.name == "lines.txt"


@pytest.mark.parametrize("content", ["", "ab\n", "\n\n"])
def test_too_little_text_is_refused_with_what_is_needed(content: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="too few for a window of 6 tokens"):
        text.read(lines(tmp_path, content), language.tokenizer(), (), SIZES)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    for name in ("a.txt", "none.txt"):
        with pytest.raises(CalibrationError, match=name):
            text.read(tmp_path / name, language.tokenizer(), (), SIZES)


def test_default_text_is_prose_of_pythons_own_and_says_so() -> None:
    found = text._default()
    assert len(found) > 300 and sum(map(len, found)) > 100_000 and found == text._default()
    assert "pydoc_data.topics" in text.DEFAULT
