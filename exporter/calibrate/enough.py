"""Was the data enough? What held-out batches say, and how much the last quarter of the samples still moved the ranges.

Both come from statistics that were made in one pass and merge: the learning curve from the smallest and largest
value of each of at most SEGMENTS parts of the data (`statistics`), whatever their number, which is not known before the end.

Held-out values outside of a range are clipped. Few values do no harm if they lie near, so what is weighed is their error:
    clipping = mean over all held-out values of (distance to the range)^2 / (step^2 / 12)        step = width / 255
beside that of rounding, which is 1. On calibration data it is 0 for "minmax", and what a method that clips has chosen to pay for
smaller steps. Held-out data are not covered where their (1 + clipping) is more than WORSE times that of the calibration data, and
FEW values or more make it so: the largest of 1000 samples and the largest of 1000 others differ.

Source: rounding to steps has the mean squared error step^2 / 12: Widrow, Kollar, "Quantization Noise" (2008), section 4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from exporter import optional
from exporter.batches import Batch
from exporter.calibrate import statistics
from exporter.calibrate.domain import distinguish
from exporter.calibrate.fold import cut
from exporter.calibrate.methods import STEPS
from exporter.calibrate.observe import CHUNK, ObserveChunk
from exporter.calibrate.ranges import Range, Ranges
from exporter.calibrate.statistics import Statistics, TensorStatistics
from exporter.errors import CalibrationError

STILL = 0.05  # a range that moved by less in the last quarter would not change an int8 model by much
WORSE = 2.0  # 3 dB: clipping adds as much error as rounding makes. One value in 2000 that lies STILL outside does
FEW = 8  # values: of two sets of one size, drawn alike, so many of the one lie outside the other once in 50 times
MOST = 64  # held-out batches that are looked at; a kind of data that calibration did not see shows in fewer
FEWEST = 4  # batches: without them there is no last quarter
SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How one tensor of held-out batches fits its calibrated range.

    outside: share of its values outside, to one bin of the histogram. values: how many these are. beyond: how far the
    farthest lies outside, in widths of the range. All 0 where none does.
    error: mean squared error of rounding and clipping on held-out data, as a multiple of that on calibration data.
    """

    tensor: str
    outside: float
    values: int
    beyond: float
    error: float

    @property
    def uncovered(self) -> bool:
        """Whether clipping costs held-out data noticeably more than it costs calibration data."""
        return self.error > WORSE and self.values >= FEW


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
    """Curves, the one that moved most first; coverage, the worst first, by that many held-out batches; and what it means."""

    curves: tuple[Curve, ...]
    coverage: tuple[Coverage, ...]
    batches: int
    sentence: str


class Watch:
    """Looks at held-out batches on their way to where drift is measured: the first MOST, CHUNK at a time.

    found: their statistics, once they have passed; None before any has, and where they cannot be looked at: untried says why.
    """

    def __init__(self, look: ObserveChunk) -> None:
        self.found: Statistics | None = None
        self.untried = ""
        self._look: ObserveChunk | None = look

    def through(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches. One with NaN or infinity inside, or that the graph refuses, is the last that is looked at."""
        for first, chunk in cut(itertools.islice(batches, MOST), CHUNK):
            tried = optional.attempt(partial(self._looked, chunk, first), None)
            if tried.value is None:
                self.untried = tried.why
                yield from chunk
                break
            self.found = tried.value if self.found is None else statistics.merge(self.found, tried.value)
            yield from chunk
        self._look = None  # and with it a session
        yield from batches

    def _looked(self, chunk: Sequence[Batch], first: int) -> Statistics:
        assert self._look is not None
        try:
            return self._look(chunk, first)
        except CalibrationError as error:
            raise CalibrationError(
                error.what.replace("calibration batch", "held-out batch", 1),
                found=error.found, expected=error.expected, do=error.do, tensor=error.tensor, batch=error.batch,
            ) from error  # fmt: skip


def judge(
    found: Statistics,
    heldout: Statistics | None = None,
    ranges: Ranges | None = None,
    model: ir.Model | None = None,
) -> Enough:
    """The verdict on calibration data.

    Args:
        found: of the calibration batches.
        heldout: of held-out batches, observed with histograms.
        ranges: what the int8 model covers; the smallest and largest calibration values if not given.
        model: the graph, where ranges were cut to what its readers tell apart: what lies behind such a cut is not outside.
    """
    curves = learning(found)
    covered = () if heldout is None else coverage(ranges or found.ranges, heldout, found, model)
    batches = 0 if heldout is None else heldout.batches
    return Enough(curves=curves, coverage=covered, batches=batches, sentence=sentence(found, curves, covered))


def sentence(found: Statistics, curves: Sequence[Curve], covered: Sequence[Coverage] = ()) -> str:
    """One plain sentence: whether more data would change anything, and the worst tensor that held-out data leave."""
    bad = [each for each in covered if each.uncovered]
    if not bad:
        return _moving(found, curves)
    worst = max(bad, key=lambda each: each.error)
    others = f", and of {len(bad) - 1} more" if len(bad) > 1 else ""
    moving = _moving(found, curves).replace("more data", "more data of this kind")
    return f"{moving}; held-out values lie outside the range of {worst.tensor}{others}: give data of more kinds"


def _moving(found: Statistics, curves: Sequence[Curve]) -> str:
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


def coverage(
    ranges: Ranges, heldout: Statistics, calibration: Statistics | None = None, model: ir.Model | None = None
) -> tuple[Coverage, ...]:
    """How held-out values fit the ranges, worst first. Tensors that held no value are left out.

    Args:
        ranges: by any method.
        heldout: with histograms.
        calibration: what a method clips there, it clips on purpose; without histograms nothing is known to be so.
        model: see `judge`.
    """
    knees = _knees(model, ranges)
    asked = {seen: name for name, seen in heldout.same.items() if name in ranges.tensors}
    asked |= {seen: seen for seen in asked if seen in ranges.tensors}
    found = []
    for seen, name in asked.items():
        limit, values = _Limit.of(ranges.tensors[name], knees.get(name)), heldout.tensors[seen]
        if values.low > values.high:
            continue
        over = max(limit.low - values.low, values.high - limit.high, 0.0)
        number, clipping = limit.clips(values)
        on_purpose = limit.clips(calibration.tensors[seen])[1] if calibration is not None else 0.0
        counted = values.elements - values.masked
        found.append(
            Coverage(
                tensor=name,
                outside=number / counted,
                values=number,
                beyond=_ratio(over, limit.width),
                error=math.inf if math.isinf(clipping) else (1 + clipping) / (1 + on_purpose),
            )
        )
    return tuple(sorted(found, key=lambda c: (-c.outside, -c.beyond, c.tensor)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limit:
    """The ends of a range, infinite where no reader tells apart what lies behind, and its width."""

    low: float
    high: float
    width: float

    @classmethod
    def of(cls, found: Range, knee: Range | None) -> _Limit:
        """The range widened to hold 0, open where it ends at a knee of its readers or behind it."""
        return cls(
            low=-math.inf if knee is not None and found.low <= knee.low else min(found.low, 0.0),
            high=math.inf if knee is not None and found.high >= knee.high else max(found.high, 0.0),
            width=_width(found.low, found.high),
        )

    def clips(self, values: TensorStatistics) -> tuple[int, float]:
        """(values outside, mean squared error of clipping in that of rounding); to one bin, and 0 without a histogram."""
        if values.histogram is None or (self.low <= values.low and values.high <= self.high):
            return 0, 0.0
        edges, counts = values.histogram.edges, values.histogram.counts
        outside = (edges[1:] <= self.low) | (edges[:-1] > self.high)
        centers = (edges[:-1] + edges[1:])[outside] / 2
        distances = np.maximum(self.low - centers, centers - self.high)
        mean_square = float((counts[outside] * np.square(distances)).sum()) / int(counts.sum())
        number = max(int(counts[outside].sum()), 1)  # one value at least lies outside
        return number, _ratio(12 * STEPS**2 * mean_square, self.width**2)


def _knees(model: ir.Model | None, ranges: Ranges) -> Mapping[str, Range]:
    """The largest range of each tensor that its readers tell apart."""
    if model is None:
        return {}
    whole = {name: replace(each, low=-math.inf, high=math.inf) for name, each in ranges.tensors.items()}
    return distinguish(model, replace(ranges, tensors=whole)).tensors


def _ratio(part: float, whole: float) -> float:
    """part / whole; inf for any part of nothing."""
    return part / whole if whole else math.inf if part > 0 else 0.0


def _width(low: float, high: float) -> float:
    return max(float(high), 0.0) - min(float(low), 0.0)
