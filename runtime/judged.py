"""How a device judges each output of a bundle: what the export found out about it, in the manifest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.strict import is_int, table

if TYPE_CHECKING:
    from runtime.preprocess import Place

BY = ("reals", "equal", "set")
MOST_AXES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Elements of an output that are judged by themselves: those in `runs` (start, stop) along `axis`, all where it is None.

    varying_rms: root mean square of what varies in them from input to input, in held-out FP32 outputs, docs/drift.md; None where
    it is not known yet.
    """

    axis: int | None = None
    runs: tuple[tuple[int, int], ...] = ()
    varying_rms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """How an output is compared with FP32's.

    by: "reals" by their error, in each part; "equal", integers, by the share that is; "set" by the share of its items that have a
    partner. axis: along which the items of a set lie. batched: along the first axis they are others, too.
    """

    by: str
    axis: int = 0
    batched: bool = False
    parts: tuple[Part, ...] = ()


def read(value: object, at: Place) -> Judged:
    """One output's entry in the manifest's `judged`, read strictly.

    Raises:
        BundleError: an unknown or missing key, a wrong type or value.
    """
    given = table(value, at, Judged)
    by, parts = given["by"], given["parts"]
    if by not in BY or not isinstance(by, str):
        at.key("by").refuse(found=str(by)[:40], expected=f"one of {', '.join(BY)}")
    if not isinstance(batched := given["batched"], bool):
        at.key("batched").refuse(found=str(batched)[:40], expected="true or false")
    if not isinstance(parts, list):
        at.key("parts").refuse(found=str(parts)[:40], expected="a list")
    return Judged(
        by=by,
        axis=_axis(given["axis"], at.key("axis")),
        batched=batched,
        parts=tuple(_part(each, at.key(f"parts[{number}]")) for number, each in enumerate(parts)),
    )


def _part(value: object, at: Place) -> Part:
    given = table(value, at, Part)
    axis, runs, varying = given["axis"], given["runs"], given["varying_rms"]
    if not isinstance(runs, list) or bool(runs) == (axis is None):
        at.key("runs").refuse(found=str(runs)[:40], expected="a list, empty where axis is null and only there")
    is_number = isinstance(varying, (int, float)) and not isinstance(varying, bool)
    if varying is not None and not (is_number and 0 <= varying < math.inf):
        at.key("varying_rms").refuse(found=str(varying)[:40], expected="a number >= 0 or null")
    return Part(
        axis=None if axis is None else _axis(axis, at.key("axis")),
        runs=tuple(_run(each, at.key(f"runs[{number}]")) for number, each in enumerate(runs)),
        varying_rms=None if varying is None else float(varying),
    )


def _axis(value: object, at: Place) -> int:
    if not is_int(value) or not 0 <= value < MOST_AXES:
        at.refuse(found=str(value)[:40], expected=f"an axis, 0..{MOST_AXES - 1}")
    return value


def _run(value: object, at: Place) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2 or not all(map(is_int, value)) or not 0 <= value[0] < value[1]:
        at.refuse(found=str(value)[:40], expected="[start, stop] with 0 <= start < stop")
    return value[0], value[1]
