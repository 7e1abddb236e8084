"""The sums of x86's int8 kernels without VNNI, bit for bit on any machine: codes -> (exact sum, what saturation takes from it).

AVX2, and AVX512 without VNNI, multiply uint8 activations by int8 weights with vpmaddubsw, which adds the products of two
neighbours along K in int16 and saturates. With a the activation's codes, w the weight's, both without their zero points:

    exact     = Σₖ a[k] · w[k]
    excess    = Σ over pairs (2k, 2k+1) of  p - clip(p, -2¹⁵, 2¹⁵-1),   p = a[2k] · w[2k] + a[2k+1] · w[2k+1]
    saturated = exact - excess

Zero points are taken off later, from sums of their own that cannot saturate. Only a pair of weights of one sign whose
magnitudes add up to more than 128 can leave int16 (exporter/correct/rounding.py), so the excess is gathered from those.
int8 activations, uint8 weights and depthwise Conv have kernels that widen first, and are exact.

Source: ONNX Runtime's mlas, qgemm_kernel_avx2.cpp and convsym.cpp; held by tests/exporter/forecast on an emulated CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from exporter.batches import Array
from exporter.numerics.pairing import PAIR_LIMIT

LOWEST, HIGHEST = -(2**15), 2**15 - 1
# 255 * 128 * 512 < 2**24: float32 holds every partial sum of so many products exactly, in whatever order BLAS adds them
EXACT_K = 512
AT_A_TIME = 1 << 21  # pair sums held at a time: a few arrays of 8 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The pairs of a weight that break the pair rule, in the order of their channels.

    first: [pairs] position of the first of the two along K; weights: int32 [pairs, 2]; channel: [pairs], ascending.
    """

    first: Array
    weights: Array
    channel: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """excess: int32 [positions, channels]; clipped: how many of these sums held a pair that saturated."""

    excess: Array
    clipped: int


def breaking(rows: Array) -> Pairs:
    """The pairs that can leave int16: both weights of one sign, |a| + |b| > 128.

    Args:
        rows: int8 [channels, K] in the kernel's order; K may be odd, its last has no neighbour.
    """
    even = rows.shape[1] // 2 * 2
    a, b = rows[:, 0:even:2].astype(np.int16), rows[:, 1:even:2].astype(np.int16)
    channel, pair = np.nonzero((a ^ b >= 0) & (np.abs(a + b) > PAIR_LIMIT))
    weights = np.stack([a[channel, pair], b[channel, pair]], axis=1).astype(np.int32)
    return Pairs(first=2 * pair, weights=weights, channel=channel)


def exact_sums(codes: Array, rows: Array) -> Array:
    """codes [positions, K] times rows [channels, K], both of 8 bits, as int32 [positions, channels] that wraps as the kernel's."""
    total = np.zeros((len(codes), len(rows)), np.int32)
    for start in range(0, codes.shape[1], EXACT_K):
        block = slice(start, start + EXACT_K)
        total += (codes[:, block].astype(np.float32) @ rows[:, block].astype(np.float32).T).astype(np.int32)
    return total


def excess(codes: Array, pairs: Pairs, channels: int) -> Excess:
    """What saturation takes from each sum.

    Args:
        codes: uint8 [positions, K].
        pairs: of a weight with K columns and so many channels.
    """
    taken = np.zeros((channels, len(codes)), np.int32)
    clipped = 0
    for start in range(0, len(codes), 1024):  # so many positions at a time; the gather reads rows of the transpose
        columns = np.ascontiguousarray(codes[start : start + 1024].T)
        for some in _in_blocks(_reached(pairs, columns), AT_A_TIME // columns.shape[1]):
            p = columns[some.first].astype(np.int32) * some.weights[:, :1]
            p += columns[some.first + 1].astype(np.int32) * some.weights[:, 1:]
            p -= np.clip(p, LOWEST, HIGHEST)
            begins = np.flatnonzero(np.diff(some.channel, prepend=-1))
            of = some.channel[begins]
            taken[of, start : start + 1024] += np.add.reduceat(p, begins, axis=0)
            clipped += int(np.count_nonzero(np.logical_or.reduceat(p != 0, begins, axis=0)))
    return Excess(excess=taken.T, clipped=clipped)


def _reached(pairs: Pairs, columns: Array) -> Pairs:
    """The pairs that leave int16 at the largest of these codes; few layers see 255 everywhere."""
    peak = columns.max(axis=1, initial=0).astype(np.int32)
    reach = peak[pairs.first] * pairs.weights[:, 0] + peak[pairs.first + 1] * pairs.weights[:, 1]
    return _some(pairs, (reach > HIGHEST) | (reach < LOWEST))


def _in_blocks(pairs: Pairs, size: int) -> Iterator[Pairs]:
    """The pairs in blocks of about `size`, each channel's in one block."""
    begins = np.append(np.flatnonzero(np.diff(pairs.channel, prepend=-1)), len(pairs.channel))
    start = 0
    for here, after in itertools.pairwise(begins):
        if here > start and after - start > size:
            yield _some(pairs, slice(start, here))
            start = here
    if start < len(pairs.channel):
        yield _some(pairs, slice(start, None))


def _some(pairs: Pairs, which: Array | slice) -> Pairs:
    return Pairs(first=pairs.first[which], weights=pairs.weights[which], channel=pairs.channel[which])


def patches(x: Array, kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]) -> Array:
    """A view of every window of a padded image: [batch, out..., kernel..., channels] of x [batch, in..., channels].

    out = floor((in - dilation * (kernel - 1) - 1) / stride) + 1. Kernel before channel is the order in which Conv sums.
    """
    rank = len(kernel)
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, axis=tuple(range(1, rank + 1)))
    step = (slice(None), *(slice(None, None, s) for s in strides), slice(None))
    windows = windows[step + tuple(slice(None, None, d) for d in dilations)]
    return np.moveaxis(windows, rank + 1, -1)
