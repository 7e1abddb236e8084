"""How sure a share, a mean or a ratio of sums is, from the samples behind it: numbers -> Interval. Pairs stay pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
# Of one line; a comparison has about ten
CONFIDENCE = 0.99
RESAMPLES = 2000
# Below so many samples a bootstrap's interval is narrower than it says
FEWEST = 20
AT_A_TIME = 1 << 22  # drawn numbers: 32 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """What was found, and between which bounds it lies with the confidence that was asked for."""

    low: float
    found: float
    high: float


def wilson(right: int, samples: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a share, two-sided.

        centre ± half, of p = right / n and z the normal quantile of (1 + confidence) / 2:
        centre = (p + z²/2n) / (1 + z²/n),  half = z sqrt(p (1 - p) / n + z²/4n²) / (1 + z²/n)

    No sample is [0, 1]. Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    if not samples:
        return Interval(low=0.0, found=0.0, high=1.0)
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), right / samples
    centre = (p + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z * math.sqrt(p * (1 - p) / samples + z * z / (4 * samples**2)) / (1 + z * z / samples)
    # at the ends the bound is the share itself, which float sums may miss
    low, high = (0.0 if not right else centre - half), (1.0 if right == samples else centre + half)
    return Interval(low=low, found=p, high=high)


def paired_shares(old: Array, new: Array, confidence: float = CONFIDENCE) -> Interval:
    """Share of `new` less share of `old`, of the same samples: bool [samples] each.

    Newcombe's interval from the two of Wilson, with the correlation of the pairs: what both get right, or both wrong, tells
    nothing of the difference and widens it little.

    Source: R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions based on paired data
    (1998), method 10.
    """
    samples = len(old)
    if not samples:
        return Interval(low=-1.0, found=0.0, high=1.0)
    both, only_old = int((old & new).sum()), int((old & ~new).sum())
    only_new = int((~old & new).sum())
    neither = samples - both - only_old - only_new
    first, second = wilson(both + only_new, samples, confidence), wilson(both + only_old, samples, confidence)
    apart: float = both * neither - only_old * only_new
    apart = max(apart - samples / 2, 0) if apart > 0 else apart
    sides = (both + only_old) * (only_new + neither) * (both + only_new) * (only_old + neither)
    phi = apart / math.sqrt(sides) if sides else 0.0
    found = (only_new - only_old) / samples
    return Interval(
        low=found - _apart(first.found - first.low, second.high - second.found, phi),
        found=found,
        high=found + _apart(first.high - first.found, second.found - second.low, phi),
    )


def _apart(first: float, second: float, phi: float) -> float:
    return math.sqrt(max(0.0, first * first - 2 * phi * first * second + second * second))


def of_sums(
    columns: Array, statistic: Callable[[Array], Array], rng: np.random.Generator, confidence: float = CONFIDENCE
) -> Interval:
    """Percentile bootstrap of a statistic of sums over samples.

    Args:
        columns: float64 [samples, k]; a resample draws whole rows, so that what belongs to one sample stays together.
        statistic: sums [resamples, k] -> float64 [resamples].
        rng: of the draws.

    Source: B. Efron, Bootstrap methods: another look at the jackknife (1979).
    """
    samples = len(columns)
    with np.errstate(all="ignore"):  # an infinite error is a number of ours
        found = float(statistic(columns.sum(axis=0, keepdims=True))[0])
        if (columns == columns[:1]).all():
            return Interval(low=found, found=found, high=found)
        drawn = [statistic(columns[rows].sum(axis=1)) for rows in _draws(samples, rng, columns.shape[1])]
    return _interval(found, np.concatenate(drawn), confidence)


def of_median(values: Array, rng: np.random.Generator, confidence: float = CONFIDENCE) -> Interval:
    """Percentile bootstrap of the median of float64 [samples]."""
    drawn = [np.median(values[rows], axis=1) for rows in _draws(len(values), rng, 1)]
    return _interval(float(np.median(values)), np.concatenate(drawn), confidence)


def _draws(samples: int, rng: np.random.Generator, width: int) -> Iterator[Array]:
    step = max(1, min(RESAMPLES, AT_A_TIME // max(1, samples * width)))
    for start in range(0, RESAMPLES, step):
        yield rng.integers(samples, size=(min(step, RESAMPLES - start), samples))


def _interval(found: float, drawn: Array, confidence: float) -> Interval:
    """NaN is what infinite errors of both models make, and says nothing of either."""
    drawn = np.sort(np.nan_to_num(drawn, nan=0.0, posinf=math.inf, neginf=-math.inf))
    tail = (1 - confidence) / 2
    low, high = drawn[int(tail * (len(drawn) - 1))], drawn[math.ceil((1 - tail) * (len(drawn) - 1))]
    return Interval(low=float(low), found=0.0 if math.isnan(found) else found, high=float(high))
