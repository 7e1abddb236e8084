"""What calibration remembers of the data: of bounded size, and mergeable, so that parts of the data combine exactly.

Everything but the moving average is exact: whatever the split and the order, merging gives the same bytes. The
moving average depends on the order of the batches; parts are put in that order, and chunks must be folded from the left
for the same last bits.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exporter.batches import Array
from exporter.calibrate import histogram
from exporter.calibrate.histogram import Histogram
from exporter.calibrate.ranges import Range, Ranges
from exporter.errors import CalibrationError

AVERAGING = 0.01  # weight of the newest batch in the moving average, as in ONNX Runtime and torch
SEGMENTS = 64  # parts of the data, in batch order, whose ranges are kept for the learning curve
FORMAT = 1
WORD = 56  # bits of the low word of an exact sum
FRACTION = 40  # bits of it behind the point


@dataclass(frozen=True, slots=True, kw_only=True)
class Average:
    """A moving average over the batches of one part of the data, as what it does to the average before it.

        m -> scale · m + shift, and `start` where nothing was before: m_1 = x_1, m_n = m_{n-1} + AVERAGING (x_n - m_{n-1})

    Maps compose: (second after first)(m) = second(first(m)).
    """

    start: float
    scale: float
    shift: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorStatistics:
    """One tensor. low, high: over the values that count, inf and -inf where there are none.

    elements: all values; masked: the saturating constants of a mask (`observe`), which are not in low, high and histogram.
    average_low, average_high: moving averages of each batch's smallest and largest value; None without values.
    lows, highs: the same per segment of batches (`Statistics.segment`), inf and -inf where a segment has no value.
    histogram: None where it was not asked for, or there is no value.
    """

    low: float
    high: float
    elements: int
    masked: int
    average_low: Average | None
    average_high: Average | None
    lows: Array
    highs: Array
    histogram: Histogram | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelStatistics:
    """Sums per channel, float32 values summed to float64 in a chunk, and over chunks exactly, in two words of int64.

        sum = high_word · 2^(WORD - FRACTION) + low_word · 2^-FRACTION        0 <= low_word < 2^WORD

    count: values of a channel. Masked values count as 0.
    """

    high_word: Array
    low_word: Array
    count: int

    @property
    def sum(self) -> Array:
        """float64 [channels]"""
        return np.ldexp(self.high_word.astype(np.float64), WORD - FRACTION) + np.ldexp(
            self.low_word.astype(np.float64), -FRACTION
        )

    @property
    def mean(self) -> Array:
        """float64 [channels]; 0 where no batch held a value."""
        return np.asarray(self.sum / max(1, self.count))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """What `batches` batches showed, the first with the number `first`, the last with `stop` - 1.

    same: {tensor asked for: the tensor that was looked at in its place}, itself in most cases (`observe.representatives`).
    tensors: {tensor that was looked at: its statistics}. channels: {(tensor, channel_axis): its sums}.
    """

    first: int
    stop: int
    batches: int
    same: Mapping[str, str]
    tensors: Mapping[str, TensorStatistics]
    channels: Mapping[tuple[str, int], ChannelStatistics]

    def of(self, tensor: str) -> TensorStatistics:
        return self.tensors[self.same[tensor]]

    @property
    def unseen(self) -> frozenset[str]:
        """The tensors that held no value that counts in any batch."""
        return frozenset(name for name in self.same if self.of(name).low > self.of(name).high)

    @property
    def means(self) -> dict[tuple[str, int], Array]:
        """{(tensor, channel_axis): float64 [channels]}, the mean of each channel."""
        return {key: found.mean for key, found in self.channels.items()}

    @property
    def ranges(self) -> Ranges:
        """The smallest and largest value of each tensor asked for."""
        return Ranges(tensors={name: self.range(name) for name in self.same}, batches=self.batches, method="minmax")

    def range(self, tensor: str) -> Range:
        """The smallest and largest value of one tensor, and how many there were."""
        found = self.of(tensor)
        return Range(low=found.low, high=found.high, elements=found.elements, masked=found.masked)

    @property
    def segment(self) -> int:
        """lows[i] is of the batches in [(start + i) · segment, (start + i + 1) · segment), start = first // segment."""
        return 1 << segment_shift(self.stop)


def segment_shift(stop: int) -> int:
    """The smallest shift with which batches 0 to stop - 1 are at most SEGMENTS segments of 2^shift batches."""
    return max(0, (max(stop, 1) - 1).bit_length() - (SEGMENTS.bit_length() - 1))


def require_seen(found: Statistics) -> None:
    """Refuse a tensor that held no value that counts in any batch.

    Raises:
        CalibrationError: names the tensor.
    """
    for name in found.same:
        if name in found.unseen:
            raise CalibrationError(
                f"tensor {name!r}",
                found=f"no value in {found.batches} batches",
                expected="at least one",
                do="give batches that reach this part of the model, or a rule that keeps its node float",
                tensor=name,
            )


def exact_sums(sums: Array, count: int) -> ChannelStatistics:
    """float64 [channels] sums of a chunk, rounded to multiples of 2^-FRACTION and from then on added exactly."""
    most = math.ldexp(1.0, 62 + WORD - FRACTION)
    bounded = np.clip(sums, -most, most)
    high = np.floor(np.ldexp(bounded, FRACTION - WORD))
    rest = bounded - np.ldexp(high, WORD - FRACTION)
    return _carried(high.astype(np.int64), np.rint(np.ldexp(rest, FRACTION)).astype(np.int64), count)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of both parts of the data. Parts may come in any order; they are put into that of their batches.

    Raises:
        CalibrationError: statistics of different tensors or channels.
    """
    if a.same != b.same or a.tensors.keys() != b.tensors.keys() or a.channels.keys() != b.channels.keys():
        raise CalibrationError(
            "statistics of two calibrations", found="other tensors or channels", expected="the same",
            do="merge statistics of one graph and one plan",
        )  # fmt: skip
    a, b = (a, b) if a.first <= b.first else (b, a)
    first, stop = a.first, max(a.stop, b.stop)
    return Statistics(
        first=first,
        stop=stop,
        batches=a.batches + b.batches,
        same=a.same,
        tensors={name: _merged(a, b, name, first, stop) for name in a.tensors},
        channels={key: _added(a.channels[key], b.channels[key]) for key in a.channels},
    )


def _merged(a: Statistics, b: Statistics, name: str, first: int, stop: int) -> TensorStatistics:
    one, two = a.tensors[name], b.tensors[name]
    low, high = min(one.low, two.low), max(one.high, two.high)
    whole = one.histogram or two.histogram
    if one.histogram is not None and two.histogram is not None:
        whole = histogram.merge(one.histogram, two.histogram, low, high)
    return TensorStatistics(
        low=low,
        high=high,
        elements=one.elements + two.elements,
        masked=one.masked + two.masked,
        average_low=_after(one.average_low, two.average_low),
        average_high=_after(one.average_high, two.average_high),
        lows=_curve(np.minimum, math.inf, ((a, one.lows), (b, two.lows)), first, stop),
        highs=_curve(np.maximum, -math.inf, ((a, one.highs), (b, two.highs)), first, stop),
        histogram=whole,
    )


def average(values: Sequence[float]) -> Average | None:
    """The moving average over one value a batch, in batch order."""
    found: Average | None = None
    for x in values:
        found = _after(found, Average(start=x, scale=1 - AVERAGING, shift=AVERAGING * x))
    return found


def _after(a: Average | None, b: Average | None) -> Average | None:
    if a is None or b is None:
        return a or b
    return Average(start=b.scale * a.start + b.shift, scale=a.scale * b.scale, shift=b.scale * a.shift + b.shift)


def _curve(combine: np.ufunc, empty: float, parts: Sequence[tuple[Statistics, Array]], first: int, stop: int) -> Array:
    """Segments of both parts, as wide as the whole needs them."""
    shift = segment_shift(stop)
    start = first >> shift
    found = np.full(((stop - 1) >> shift) - start + 1, empty)
    for part, values in parts:
        own = segment_shift(part.stop)
        at = ((np.arange(len(values)) + (part.first >> own)) >> (shift - own)) - start
        combine.at(found, at, values)
    return found


def _added(a: ChannelStatistics, b: ChannelStatistics) -> ChannelStatistics:
    if not a.count or not b.count:  # an empty chunk does not know its channels where their number is free
        return a if a.count else b
    if a.high_word.shape != b.high_word.shape:
        raise CalibrationError("channel means", found="batches with other numbers of channels", expected="one number")
    return _carried(a.high_word + b.high_word, a.low_word + b.low_word, a.count + b.count)


def _carried(high: Array, low: Array, count: int) -> ChannelStatistics:
    return ChannelStatistics(high_word=high + (low >> WORD), low_word=low & ((1 << WORD) - 1), count=count)


def to_bytes(statistics: Statistics) -> bytes:
    """An npz archive without pickles. The same value gives the same bytes."""
    names = sorted(statistics.tensors)
    tensors = [statistics.tensors[name] for name in names]
    keys = sorted(statistics.channels)
    channels = [statistics.channels[key] for key in keys]
    counts = [t.histogram.counts if t.histogram is not None else np.zeros(0, np.int64) for t in tensors]
    averages = [each for t in tensors for each in (t.average_low, t.average_high)]
    header = {
        "format": FORMAT,
        "first": statistics.first,
        "stop": statistics.stop,
        "batches": statistics.batches,
        "same": {name: statistics.same[name] for name in sorted(statistics.same)},
        "tensors": names,
        "elements": [[t.elements, t.masked] for t in tensors],
        "histograms": [None if t.histogram is None else [t.histogram.exponent, t.histogram.first] for t in tensors],
        "channels": [[name, axis, each.count] for (name, axis), each in zip(keys, channels, strict=True)],
    }
    arrays: dict[str, Array] = {
        "header": np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8),
        "ranges": np.array([[t.low, t.high] for t in tensors]).reshape(-1, 2),
        "averages": np.array(
            [[math.nan] * 3 if each is None else [each.start, each.scale, each.shift] for each in averages]
        ).reshape(-1, 3),
        "curves": _packed([np.stack([t.lows, t.highs]) for t in tensors], np.float64),
        "bins": np.array([len(each) for each in counts], np.int64),
        "counts": _packed(counts, np.int64),
        "sizes": np.array([len(each.high_word) for each in channels], np.int64),
        "words": _packed([np.stack([each.high_word, each.low_word]) for each in channels], np.int64),
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def from_bytes(data: bytes) -> Statistics:
    """The value behind `to_bytes`.

    Raises:
        CalibrationError: not such an archive, or a truncated one.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return _read({name: archive[name] for name in archive.files})
    except Exception as error:  # zipfile, zlib, numpy and json each raise their own
        raise CalibrationError(
            "statistics", found=f"{type(error).__name__}: {str(error)[:120]}", expected="what to_bytes wrote"
        ) from error


def _read(arrays: Mapping[str, Array]) -> Statistics:
    header: dict[str, Any] = json.loads(arrays["header"].tobytes())
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}")
    names = header["tensors"]
    curves = _unpacked(arrays["curves"], np.float64).reshape(len(names), 2, -1) if names else np.zeros((0, 2, 0))
    counts = np.split(_unpacked(arrays["counts"], np.int64), np.cumsum(arrays["bins"])[:-1])
    words = np.split(_unpacked(arrays["words"], np.int64), np.cumsum(2 * arrays["sizes"])[:-1])
    averages = [
        None if math.isnan(row[0]) else Average(start=row[0], scale=row[1], shift=row[2])
        for row in arrays["averages"].tolist()
    ]
    tensors = {
        name: TensorStatistics(
            low=low, high=high, elements=elements, masked=masked,
            average_low=averages[2 * i], average_high=averages[2 * i + 1],
            lows=curves[i, 0], highs=curves[i, 1],
            histogram=None if placed is None else Histogram(exponent=placed[0], first=placed[1], counts=counts[i]),
        )
        for i, (name, (low, high), (elements, masked), placed) in enumerate(
            zip(names, arrays["ranges"].tolist(), header["elements"], header["histograms"], strict=True)
        )
    }  # fmt: skip
    channels = {
        (name, axis): ChannelStatistics(high_word=pair[0], low_word=pair[1], count=count)
        for (name, axis, count), pair in zip(header["channels"], (w.reshape(2, -1) for w in words), strict=False)
    }
    return Statistics(
        first=header["first"], stop=header["stop"], batches=header["batches"],
        same=header["same"], tensors=tensors, channels=channels,
    )  # fmt: skip


def _packed(parts: Sequence[Array], dtype: Any) -> Array:
    """All parts behind each other, deflated lightly: most counts are small numbers."""
    whole = np.concatenate([np.asarray(part, dtype).reshape(-1) for part in parts] or [np.zeros(0, dtype)])
    return np.frombuffer(zlib.compress(whole.tobytes(), 1), np.uint8)


def _unpacked(packed: Array, dtype: Any) -> Array:
    return np.frombuffer(zlib.decompress(packed.tobytes()), dtype)
