"""Recorded texts in tests/golden. UPDATE_GOLDEN=1 rewrites them; the diff is then reviewed like code."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "golden"


def same(name: str, text: str) -> bool:
    """Whether `text` is what was recorded under `name`."""
    path = FOLDER / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    return path.read_text(encoding="utf-8") == text
