"""Counts of a tensor's values in bins whose width is a power of two: they merge exactly, in any order.

    bin of x = floor(x / 2^exponent)

Bins lie at whole multiples of their width, so that two neighbours are one bin of the next exponent:
floor(floor(x / w) / 2) = floor(x / 2w). The exponent is the smallest with which [low, high] takes at most BINS bins. It
depends on the smallest and largest value alone, so that the histogram of all the data is the same bytes however the data was
split, and no second pass over it is needed when a later batch reaches further.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from exporter.batches import Array

BINS = 4096  # between 2048 and 4096 are used: a bin is 1/8 of a uint8 step or narrower
WHOLE = 23  # |x| / 2^exponent stays below 2^23, where float32 holds floor() exactly
SMALLEST = -126  # float32's smallest normal exponent
BLOCK = 1 << 15  # values counted at a time: they stay in the cache, and torch does not share them out among its threads


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Histogram:
    """counts[i] values in [(first + i) · 2^exponent, (first + i + 1) · 2^exponent); int64, the first and last not 0."""

    exponent: int
    first: int
    counts: Array

    @property
    def width(self) -> float:
        """The width of a bin, in the tensor's own unit."""
        return math.ldexp(1.0, self.exponent)

    @property
    def edges(self) -> Array:
        """float64 [len(counts) + 1], the ends of the bins."""
        return np.ldexp(np.arange(self.first, self.first + len(self.counts) + 1, dtype=np.float64), self.exponent)


def place(low: float, high: float) -> tuple[int, int, int]:
    """(exponent, first bin, last bin) of the histogram whose smallest value is `low` and largest `high`, both finite.

    exponent = the smallest e >= SMALLEST with floor(high/2^e) - floor(low/2^e) < BINS and max(|low|, |high|) < 2^(e + WHOLE)
    """
    exponent = max(
        SMALLEST,
        math.frexp(max(abs(low), abs(high)))[1] - WHOLE,
        # below it [low, high] is longer than BINS bins for certain
        math.frexp(high - low)[1] - BINS.bit_length() if high > low else SMALLEST,
    )
    while True:
        first, last = (math.floor(math.ldexp(end, -exponent)) for end in (low, high))
        if last - first < BINS:
            return exponent, first, last
        exponent += 1


class Counter:
    """Counts block by block into one growing histogram; `result` is the value. Not safe for two threads at once.

    By torch: numpy's bincount takes twice as long, for it reads 64 bits of each index, and holds the interpreter's lock.
    """

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf
        self._exponent = self._first = 0
        self._counts: Array = np.zeros(0, np.int64)

    @staticmethod
    def scratch() -> tuple[Array, Array]:
        """Room for the indices and the scaled values of a block; one for each thread."""
        return np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float32)

    def add(self, values: Array, low: float, high: float, scratch: tuple[Array, Array]) -> None:
        """Count float32 values, flat, all of them in [low, high], which are their smallest and largest."""
        import torch  # seconds at start-up, which a worker that counts nothing does not wait

        self._widen(low, high)
        scale = np.float32(math.ldexp(1.0, -self._exponent)) if self._exponent <= 0 else None
        bins = len(self._counts)
        for start in range(0, values.size, BLOCK):
            block = values[start : start + BLOCK]
            index, scaled = (room[: block.size] for room in scratch)
            if scale is None:  # float32 would lose the sign of tiny values
                whole = np.floor(np.ldexp(block.astype(np.float64), -self._exponent)) - self._first
                index[:] = whole
            else:
                np.multiply(block, scale, out=scaled)
                if self._first:  # else no value is below 0, and the cast cuts off as floor does
                    np.floor(scaled, out=scaled)
                    np.subtract(scaled, np.float32(self._first), out=scaled)
                np.copyto(index, scaled, casting="unsafe")
            self._counts += torch.bincount(torch.from_numpy(index), minlength=bins).numpy()

    def result(self) -> Histogram:
        return Histogram(exponent=self._exponent, first=self._first, counts=self._counts.copy())

    def _widen(self, low: float, high: float) -> None:
        if self._low <= low and high <= self._high:
            return
        self._low, self._high = min(self._low, low), max(self._high, high)
        exponent, first, last = place(self._low, self._high)
        counts = np.zeros(last - first + 1, np.int64)
        if self._counts.size:
            _add(counts, first, exponent, self.result())
        self._exponent, self._first, self._counts = exponent, first, counts


def count(values: Array) -> Histogram:
    """The histogram of finite float32 values, at least one."""
    flat = values.reshape(-1)
    counter = Counter()
    counter.add(flat, float(flat.min()), float(flat.max()), Counter.scratch())
    return counter.result()


def merge(a: Histogram, b: Histogram, low: float, high: float) -> Histogram:
    """The histogram of the values of both, whose smallest is `low` and largest `high`: associative and commutative, exactly."""
    exponent, first, last = place(low, high)
    counts = np.zeros(last - first + 1, np.int64)
    for each in (a, b):
        _add(counts, first, exponent, each)
    return Histogram(exponent=exponent, first=first, counts=counts)


def _add(counts: Array, first: int, exponent: int, other: Histogram) -> None:
    """Add another histogram's counts to `counts`, whose bins are as wide or wider."""
    step = min(exponent - other.exponent, 62)  # more than an index has bits
    bins = np.arange(other.first, other.first + len(other.counts)) >> step
    np.add.at(counts, bins - first, other.counts)
