"""Text for a language model: lines -> windows of tokens, those it is fitted to apart from those it is judged on.

Without a text of the user's it is Python's own documentation, which every Python has (pydoc_data.topics, under the PSF license):
plain English about a language, so that a model for anything else is worth a text of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporter.batches import Array
from exporter.errors import CalibrationError

DEFAULT = "Python's documentation (pydoc_data.topics)"
LEAST_CHARACTERS = 200  # of a paragraph of the default text
SEED = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Windows int64 [windows, tokens], and what they are from.

    unknown: the share of the text's tokens that the tokenizer does not know; seen, unseen: fitted to, judged on.
    """

    name: str
    seen: Array
    unseen: Array
    unknown: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many windows of how many tokens; every `apart`-th paragraph is judged on, until there are `unseen`."""

    seen: int = 64
    unseen: int = 16
    tokens: int = 256
    apart: int = 4


def read(given: str | Path | None, tokenizer: Any, begin: Iterable[int], sizes: Sizes) -> Text:
    """Cut a text, a paragraph a line, into windows that each begin as a text does.

    Args:
        given: a UTF-8 file; None is the default text.
        tokenizer: of the library tokenizers.
        begin: tokens in front of every window.

    Raises:
        CalibrationError: no such file, not UTF-8, or too little text for one window of each kind.
    """
    lines, name = (_default(), DEFAULT) if given is None else (_lines(Path(given)), Path(given).name)
    parts: tuple[list[str], list[str]] = ([], [])
    for number, line in enumerate(lines):
        parts[number % sizes.apart == 0].append(line)
    seen, unknown = _windows(parts[0], tokenizer, list(begin), sizes.seen, sizes.tokens)
    unseen, more = _windows(parts[1], tokenizer, list(begin), sizes.unseen, sizes.tokens)
    if not len(seen) or not len(unseen):
        raise CalibrationError(
            f"text {name}", found=f"{len(lines)} lines, too few for a window of {sizes.tokens} tokens of each kind",
            expected=f"about {sizes.tokens * (sizes.apart + 2)} tokens and more", do="give more lines",
        )  # fmt: skip
    return Text(name=name, seen=seen, unseen=unseen, unknown=max(unknown, more))


def _windows(lines: list[str], tokenizer: Any, begin: list[int], most: int, tokens: int) -> tuple[Array, float]:
    """Windows of paragraphs one behind the other, and the share of unknown tokens."""
    unk = tokenizer.token_to_id("<unk>")
    ids: list[int] = []
    room = tokens - len(begin)
    for line in lines:
        ids += tokenizer.encode(line + "\n", add_special_tokens=False).ids
        if len(ids) >= most * room:
            break
    count = min(most, len(ids) // room)
    body = np.array(ids[: count * room], np.int64).reshape(count, room)
    unknown = float((np.array(ids) == unk).mean()) if ids and unk is not None else 0.0
    return np.concatenate([np.tile(np.array(begin, np.int64), (count, 1)), body], axis=1), unknown


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(str(path), found=str(error).partition(":")[0], expected="UTF-8 text") from error
    except OSError as error:
        raise CalibrationError(str(path), found=error.strerror or str(error), expected="lines of text") from error
    return [line for line in map(str.strip, text.splitlines()) if line]


def _default() -> list[str]:
    from pydoc_data.topics import topics

    found = [" ".join(part.split()) for text in topics.values() for part in text.split("\n\n")]
    prose = [
        part for part in dict.fromkeys(found) if len(part) >= LEAST_CHARACTERS and not re.search(r"[|{}=]|\*\*\*", part)
    ]
    np.random.default_rng(SEED).shuffle(prose)  # neighbours are about one thing
    return prose
