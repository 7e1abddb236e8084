"""Was the data enough? What held-out batches say, and how much the last quarter of the samples still moved the ranges.

Both come from statistics that were made in one pass and merge: the learning curve from the smallest and largest
value of each of at most SEGMENTS parts of the data (`statistics`), whatever their number, which is not known before the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from exporter.calibrate.ranges import Range, Ranges
from exporter.calibrate.statistics import Statistics

STILL = 0.05  # a range that moved by less in the last quarter would not change an int8 model by much
FEWEST = 4  # batches: without them there is no last quarter
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How one tensor of held-out batches fits its calibrated range.

    outside: share of its values outside, to one bin of the histogram. beyond: how far the farthest value lies outside, in
    widths of the range; 0 where none does.
    """

    tensor: str
    outside: float
    beyond: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """How wide one tensor's range was after each of SHARES of the batches, as a share of what it became; widened to hold 0."""

    tensor: str
    widths: tuple[float, ...]

    @property
    def moved(self) -> float:
        """By how much the last quarter of the samples widened the range, as a share of the final width."""
        return 1 - self.widths[-2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Enough:
    """Curves, the one that moved most first; coverage, the worst first, empty without held-out data; and what it means."""

    curves: tuple[Curve, ...]
    coverage: tuple[Coverage, ...]
    sentence: str


def judge(found: Statistics, heldout: Statistics | None = None, ranges: Ranges | None = None) -> Enough:
    """The verdict on calibration data.

    Args:
        found: of the calibration batches.
        heldout: of held-out batches, observed with histograms.
        ranges: what the int8 model covers; the smallest and largest calibration values if not given.
    """
    curves = learning(found)
    covered = coverage(ranges if ranges is not None else found.ranges, heldout) if heldout is not None else ()
    return Enough(curves=curves, coverage=covered, sentence=sentence(found, curves))


def sentence(found: Statistics, curves: Sequence[Curve]) -> str:
    """One plain sentence: whether more data would change anything."""
    if found.batches < FEWEST:
        return f"too few batches to tell whether more data would change anything: {found.batches}"
    moving = [curve for curve in curves if curve.moved > STILL]
    if not moving:
        return "more data would not change anything"
    others = f", and {len(moving) - 1} more" if len(moving) > 1 else ""
    return f"ranges still moving: {moving[0].tensor} by {moving[0].moved:.0%} in the last quarter{others}"


def learning(found: Statistics) -> tuple[Curve, ...]:
    """The learning curve of each tensor that was looked at, the one that moved most in the last quarter first.

        widths[i] = width of the range of the first SHARES[i] of the batches / width of the whole range

    in whole segments: with few batches a segment is one batch, later at most 1/32 of all. 1 for a tensor that is always 0.
    """
    span = found.stop - found.first
    origin = found.first // found.segment
    curves = []
    for name, each in found.tensors.items():
        whole = _width(each.low, each.high)
        widths = []
        for share in SHARES:
            parts = len(each.lows)
            if share < 1:
                parts = min(parts, int((found.first + share * span) // found.segment) - origin)
            part = _width(each.lows[:parts].min(initial=np.inf), each.highs[:parts].max(initial=-np.inf))
            widths.append(part / whole if whole else 1.0)
        curves.append(Curve(tensor=name, widths=tuple(widths)))
    return tuple(sorted(curves, key=lambda curve: (-curve.moved, curve.tensor)))


def coverage(ranges: Ranges, heldout: Statistics) -> tuple[Coverage, ...]:
    """How held-out values fit the ranges, worst first. Tensors that held no value are left out."""
    names = dict.fromkeys(seen for name, seen in heldout.same.items() if name in ranges.tensors)
    found = [_covered(name, ranges.tensors[name], heldout) for name in names if name in ranges.tensors]
    return tuple(sorted((c for c in found if c), key=lambda c: (-c.outside, -c.beyond, c.tensor)))


def _covered(name: str, limit: Range, heldout: Statistics) -> Coverage | None:
    seen = heldout.tensors[name]
    if seen.low > seen.high:
        return None
    low, high = min(limit.low, 0.0), max(limit.high, 0.0)
    over = max(low - seen.low, seen.high - high, 0.0)
    outside = 0.0
    if over and seen.histogram is not None:
        edges, counts = seen.histogram.edges, seen.histogram.counts
        beyond = counts[edges[1:] <= low].sum() + counts[edges[:-1] >= high].sum()
        outside = max(int(beyond), 1) / int(counts.sum())
    width = high - low
    return Coverage(tensor=name, outside=outside, beyond=over / width if width else float(over > 0))


def _width(low: float, high: float) -> float:
    return max(float(high), 0.0) - min(float(low), 0.0)
