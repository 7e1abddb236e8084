"""What an export measured and judged, as the manifest carries it: a bundle that failed there fails wherever it is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from runtime.strict import is_int, table

if TYPE_CHECKING:
    from runtime.preprocess import Place

INFINITE = {"inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One limit held against what was found: `what` is the metric and its output, as in "snr_db logits".

    found: None in a bundle, where it was a time, memory or metric on the machine of the export.
    cause: what a reader should know where it is not met.
    """

    what: str
    found: float | None
    limit: float
    met: bool
    cause: str = ""

    def __str__(self) -> str:
        side = "at most" if is_ceiling(self.what) else "at least"
        cause = f", {self.cause}" if self.cause and not self.met else ""
        return f"{self.what}: {number(self.found)} ({side} {number(self.limit)}){cause}"


def is_ceiling(what: str) -> bool:
    """Whether a limit of that name is the most that may be found: a `max_...` and a `device_q`; all others are the least."""
    return what.startswith(("max_", "device_q"))


def number(value: float | None) -> str:
    """Six digits, or all of them where they are bytes: a size as a power of ten cannot be read."""
    if value is None:
        return "as measured at export"
    return f"{value:.6g}" if abs(value) < 1e6 or math.isinf(value) else f"{value:,.0f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The drift of one output over all held-out batches, in the words and units of docs/drift.md; None where it has no such."""

    snr_db: float
    varying_db: float
    cosine: float
    max_abs: float
    same_top1: float | None
    equal: float | None
    matched: float | None
    elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The verdict of an export, and what it is about.

    batches: how many held-out batches there were. outputs: {output, or what a selecting node reads: its drift on them}.
    probe: which of them travel in the probe, counted from 0; hardest: the one with the smallest SNR.
    """

    met: bool
    lines: tuple[Line, ...]
    batches: int
    outputs: Mapping[str, Measured]
    probe: tuple[int, ...]
    hardest: int | None


def read(value: object, at: Place) -> Exported | None:
    """The manifest's `verdict`, read strictly; None where nothing was judged.

    Raises:
        BundleError: an unknown or missing key, a wrong type or value, a verdict that its own lines contradict.
    """
    if value is None:
        return None
    given = table(value, at, Exported)
    lines, outputs, probe, hardest = (given[name] for name in ("lines", "outputs", "probe", "hardest"))
    if not isinstance(lines, list):
        at.key("lines").refuse(found=str(lines)[:40], expected="a list")
    if not isinstance(outputs, dict):
        at.key("outputs").refuse(found=str(outputs)[:40], expected="an object")
    if not isinstance(probe, list) or not all(map(_is_count, probe)):
        at.key("probe").refuse(found=str(probe)[:40], expected="a list of numbers of batches")
    if hardest is not None and not _is_count(hardest):
        at.key("hardest").refuse(found=str(hardest)[:40], expected="the number of a batch or null")
    if not _is_count(batches := given["batches"]):
        at.key("batches").refuse(found=str(batches)[:40], expected="an integer >= 0")
    limits = tuple(_limit(each, at.key(f"lines[{number}]")) for number, each in enumerate(lines))
    if given["met"] is not all(limit.met for limit in limits):
        at.key("met").refuse(found=str(given["met"])[:40], expected="true where every line is met, else false")
    return Exported(
        met=bool(given["met"]),
        lines=limits,
        batches=batches,
        outputs=MappingProxyType({name: _measured(each, at.key(f"outputs.{name}")) for name, each in outputs.items()}),
        probe=tuple(probe),
        hardest=hardest,
    )


def _limit(value: object, at: Place) -> Line:
    given = table(value, at, Line)
    for name, kind, expected in (("what", str, "a text"), ("cause", str, "a text"), ("met", bool, "true or false")):
        if not isinstance(given[name], kind):
            at.key(name).refuse(found=str(given[name])[:40], expected=expected)
    found, limit = (_number(given[name], at.key(name)) for name in ("found", "limit"))
    if limit is None:
        at.key("limit").refuse(found="null", expected="a number")
    return Line(what=given["what"], found=found, limit=limit, met=given["met"], cause=given["cause"])


def _measured(value: object, at: Place) -> Measured:
    given = table(value, at, Measured)
    if not _is_count(given["elements"]):
        at.key("elements").refuse(found=str(given["elements"])[:40], expected="an integer >= 0")
    numbers: dict[str, Any] = {name: _number(each, at.key(name)) for name, each in given.items() if name != "elements"}
    for name in ("snr_db", "varying_db", "cosine", "max_abs"):
        if numbers[name] is None:
            at.key(name).refuse(found="null", expected="a number")
    return Measured(**numbers, elements=given["elements"])


def _number(value: object, at: Place) -> float | None:
    if isinstance(value, str) and value in INFINITE:
        return INFINITE[value]
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        at.refuse(found=str(value)[:40], expected='a number, "inf", "-inf" or null')
    return float(value)


def _is_count(value: object) -> bool:
    return is_int(value) and 0 <= value < 1 << 53
