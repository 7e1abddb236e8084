"""What a language model said where its bundle was made: prompts, greedy tokens and some logits, as probe.npz.

Keys are `0000/prompt` and so on: the number of the prompt, and a field of `Said`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime.errors import BundleError
from runtime.probe import read_arrays, write_arrays

if TYPE_CHECKING:
    from runtime.drift import Array

INTEGERS = ("prompt", "tokens", "at")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Said:
    """One prompt.

    prompt, tokens: int64, tokens given, and the greedy ones that followed.
    ahead: float32, of each of these, by how much its logit is above the second largest.
    at: int64, some tokens of the vocabulary. logits, fp32: float32, their logits behind the prompt, by the bundle's model
        and by the FP32 one.
    """

    prompt: Array
    tokens: Array
    ahead: Array
    at: Array
    logits: Array
    fp32: Array


FIELDS = tuple(field.name for field in dataclasses.fields(Said))


def write(path: Path, said: Sequence[Said]) -> None:
    """Write probe.npz; the same bytes from the same values."""
    write_arrays(path, {f"{n:04d}/{name}": getattr(each, name) for n, each in enumerate(said) for name in FIELDS})


def read(path: Path, vocabulary: int, content: bytes | None = None) -> tuple[Said, ...]:
    """Read probe.npz; `content` is its bytes, where they are read already.

    Raises:
        BundleError: no such file, other keys, dtypes or lengths, a token outside the vocabulary, NaN or infinity.
    """
    arrays = read_arrays(path, content, stored=True)
    count = len(arrays) // len(FIELDS)
    if not count or set(arrays) != {f"{number:04d}/{name}" for number in range(count) for name in FIELDS}:
        raise BundleError(
            str(path),
            path=str(path),
            found=f"arrays {', '.join(sorted(arrays)[:8])}",
            expected=f"0000/{FIELDS[0]} and so on",
        )
    found = []
    for number in range(count):
        said = Said(**{name: arrays[f"{number:04d}/{name}"] for name in FIELDS})
        _require_sound(path, number, said, vocabulary)
        found.append(said)
    return tuple(found)


def _require_sound(path: Path, number: int, said: Said, vocabulary: int) -> None:
    for name in FIELDS:
        array, wanted = getattr(said, name), np.int64 if name in INTEGERS else np.float32
        like = said.tokens if name in ("tokens", "ahead") else said.prompt if name == "prompt" else said.at
        sound = array.dtype == wanted and array.ndim == 1 and len(array) == len(like) > 0
        if sound and name in INTEGERS:
            sound = bool(array.min() >= 0 and array.max() < vocabulary)
        elif sound:
            sound = bool(np.isfinite(array).all())
        if not sound:
            where = f"{path}:{number:04d}/{name}"
            raise BundleError(
                where, path=str(path), found=f"{array.dtype}{list(array.shape)}", expected="what was recorded"
            )
