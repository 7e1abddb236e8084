"""Statistics -> ranges: which real numbers a tensor's 256 codes shall cover. Pure functions of one tensor's statistics.

Every range is then widened to hold 0, which must have a code of its own (padding, Relu); here too where the formula
needs the step of the codes. No method goes beyond the smallest and largest value.

Source for all: Nagel et al. 2021, "A White Paper on Neural Network Quantization", arXiv 2106.08295, section 3.1; each
function names its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from exporter.batches import Array
from exporter.calibrate.histogram import Histogram
from exporter.calibrate.ranges import Range, Ranges
from exporter.calibrate.statistics import Statistics, TensorStatistics, require_seen
from exporter.errors import CalibrationError

METHODS = ("minmax", "moving-average", "percentile", "entropy", "mse")
PERCENTILE = 99.99
STEPS = 255  # between the 256 codes of uint8
# ends that entropy and mse try: 1, 0.99, 0.99^2, ... of the whole range, down to 1/16; the result is within 1 % of the best
SHRINK = 0.99 ** np.arange(276)
EMPTY = 1e-4  # a count that stands for none: KL is infinite without it (ONNX Runtime's smooth_distribution)

Ends = tuple[float, float]


def ranges(statistics: Statistics, method: str, percentile: float = PERCENTILE) -> Ranges:
    """The range of every tensor that statistics were asked for, by one method.

    Raises:
        CalibrationError: no such method, statistics without the histograms that it needs, a tensor without values.
    """
    if method not in METHODS:
        raise CalibrationError("method", found=repr(method), expected=f"one of {', '.join(METHODS)}")
    require_seen(statistics)
    find = BY_NAME[method] if method != "percentile" else lambda found: percentile_range(found, percentile)
    ends = {name: find(found) for name, found in statistics.tensors.items()}
    return Ranges(
        tensors={
            name: Range(
                low=ends[seen][0],
                high=ends[seen][1],
                elements=statistics.tensors[seen].elements,
                masked=statistics.tensors[seen].masked,
            )
            for name, seen in statistics.same.items()
        },
        batches=statistics.batches,
        method=method,
    )


def needs_histograms(method: str) -> bool:
    """Whether a method, "best" or "auto" looks at more than smallest and largest values."""
    return method not in ("minmax", "moving-average")


def minmax(found: TensorStatistics) -> Ends:
    """(min x, max x) over all batches. Source: Jacob et al. 2018, arXiv 1712.05877, section 3."""
    return found.low, found.high


def moving_average(found: TensorStatistics) -> Ends:
    """m_1 = x_1, m_n = m_{n-1} + 0.01 (x_n - m_{n-1}), with x_n the smallest (largest) value of batch n.

    Batches in which the tensor is empty are left out. Source: torch's MovingAverageMinMaxObserver, and ONNX Runtime's
    constant (`CalibMovingAverageConstant`); Jacob et al. 2018, section 3.1.
    """
    if found.average_low is None or found.average_high is None:
        return minmax(found)
    return found.average_low.start, found.average_high.start


def percentile_range(found: TensorStatistics, percentile: float = PERCENTILE) -> Ends:
    """The same share of the values is cut off at both ends: (100 - percentile) / 2 % of them at each.

        low  = lower end of the bin of the value with rank floor(tail (n - 1))
        high = upper end of the bin of the value with rank ceil((1 - tail) (n - 1)),   tail = (100 - percentile) / 200

    Within one bin outside of numpy.percentile's "lower" and "higher". Source: ONNX Runtime's PercentileCalibrater with
    symmetric=False. (Its default, symmetric=True, takes one percentile of |x| and lays it on both sides.)

    Args:
        percentile: in (0, 100].

    Raises:
        CalibrationError: no histogram, or a percentile outside of (0, 100].
    """
    if not 0 < percentile <= 100:
        raise CalibrationError("percentile", found=str(percentile), expected="above 0, at most 100")
    whole = _histogram(found)
    total = np.cumsum(whole.counts)
    tail, last = (100 - percentile) / 200, int(total[-1]) - 1
    ranks = (np.floor(tail * last), np.ceil((1 - tail) * last))
    bottom, top = (int(np.searchsorted(total, rank, side="right")) for rank in ranks)
    return _within(found, whole.edges[bottom], whole.edges[min(top, len(whole.counts) - 1) + 1])


def entropy(found: TensorStatistics) -> Ends:
    """The range whose 256 levels tell least of the distribution apart, by Kullback-Leibler divergence.

    For each T in SHRINK · max(|low|, |high|), with P the counts of the bins in [max(low, -T), min(high, T)], in which the
    first and last bin also hold what lies outside, and Q the counts inside alone, levelled out over the bins that are
    not empty in each of 256 equal groups of bins:

        KL(T) = sum of p log(p / q),    p = P / sum P,  q = Q / sum Q;    smallest KL wins, among equals the widest

    Where fewer than 256 bins are left, T is not tried. The bin of 0 counts as its neighbour does: 0 has a code of its
    own whatever the range, and half of a Relu's values are 0. Source: Migacz 2017, "8-bit Inference with TensorRT", GTC
    s7310; the smoothing as in ONNX Runtime's EntropyCalibrater, the rule for 0 as in NVIDIA's pytorch-quantization. ONNX
    Runtime's own default, 128 bins for 128 levels, tries one T only, the largest.

    Raises:
        CalibrationError: no histogram.
    """
    whole = _histogram(found)
    counts, first = whole.counts.astype(np.float64), whole.first
    if first <= 0 < first + len(counts):
        counts[-first] = counts[1 - first] if 1 - first < len(counts) else counts[max(0, -first - 1)]
    widest = max(abs(found.low), abs(found.high))
    best, chosen = np.inf, minmax(found)
    before = (-1, -1)
    for reach in widest * SHRINK:
        low, high = max(found.low, -reach), min(found.high, reach)
        start = int(np.floor(low / whole.width)) - first
        stop = int(np.floor(high / whole.width)) - first + 1
        if stop - start < STEPS + 1 or start >= len(counts) or stop <= 0 or (start, stop) == before:
            continue
        before = (start, stop)
        divergence = _divergence(counts, start, stop)
        if divergence < best:
            best, chosen = divergence, (low, high)
    return _within(found, *chosen)


def _divergence(counts: Array, start: int, stop: int) -> float:
    inside = counts[start:stop]
    p = inside.copy()
    p[0] += counts[:start].sum()
    p[-1] += counts[stop:].sum()
    groups = -(-np.arange(STEPS + 1) * len(p) // (STEPS + 1))
    full = p > 0
    per = np.add.reduceat(full.astype(np.float64), groups)
    levels = np.add.reduceat(inside, groups) / np.maximum(per, 1)
    q = np.repeat(levels, np.diff(groups, append=len(p)))[full]
    p, q = p[full], np.maximum(q, EMPTY)
    if not len(p):
        return float("inf")
    return float(np.sum(p * np.log(p / q)) / p.sum() + np.log(q.sum() / p.sum()))


def mse(found: TensorStatistics) -> Ends:
    """The range with the least expected squared error of quantization.

        E(l, h) = sum over x < l of (x - l)^2 + sum over x > h of (x - h)^2
                + sum over |x| <= s/2 of x^2 + s^2/12 · (number of the other x in [l, h]),    s = (h - l) / 255

    over all pairs l in SHRINK · min(low, 0), h in SHRINK · max(high, 0): values outside are clipped, values that
    round to the code of 0 lose themselves, and rounding spreads evenly over a step elsewhere. The sums are those of bin
    centres. Among equals the widest wins. Source: Choukroun et al. 2019, arXiv 1902.06822; Nagel et al. 2021, section 3.1.

    Raises:
        CalibrationError: no histogram.
    """
    whole = _histogram(found)
    edges = whole.edges
    centres = (edges[1:] + edges[:-1]) / 2
    sums = [np.concatenate([[0.0], np.cumsum(whole.counts * centres**power)]) for power in range(3)]

    def below(x: Array) -> list[Array]:  # number, sum and sum of squares of the values below x
        return [np.interp(x, edges, each) for each in sums]

    lows, highs = SHRINK * min(found.low, 0.0), SHRINK * max(found.high, 0.0)
    lows, highs = (ends[:1] if ends[0] == 0 else ends for ends in (lows, highs))
    n0, n1, n2 = below(lows)
    clipped_low = n2 - 2 * lows * n1 + lows**2 * n0
    m0, m1, m2 = (each[-1] - part for each, part in zip(sums, below(highs), strict=True))
    clipped_high = m2 - 2 * highs * m1 + highs**2 * m0
    left_end, right_end = lows[:, None], highs[None, :]
    step = (right_end - left_end) / STEPS
    left, right = (below(end) for end in (np.maximum(-step / 2, left_end), np.minimum(step / 2, right_end)))
    rest = sums[0][-1] - n0[:, None] - m0[None, :] - (right[0] - left[0])
    error = clipped_low[:, None] + clipped_high[None, :] + (right[2] - left[2]) + step**2 / 12 * rest
    bottom, top = np.unravel_index(int(np.argmin(error)), error.shape)
    return _within(found, float(lows[bottom]), float(highs[top]))


def _histogram(found: TensorStatistics) -> Histogram:
    if found.histogram is None:
        raise CalibrationError(
            "method", found="statistics without histograms", expected="observe(..., histograms=True)"
        )
    return found.histogram


def _within(found: TensorStatistics, low: float, high: float) -> Ends:
    """The ends cut to the smallest and largest value that there were."""
    return min(max(float(low), found.low), found.high), max(min(float(high), found.high), found.low)


BY_NAME: Mapping[str, Callable[[TensorStatistics], Ends]] = MappingProxyType(
    {
        "minmax": minmax,
        "moving-average": moving_average,
        "percentile": percentile_range,
        "entropy": entropy,
        "mse": mse,
    }
)
