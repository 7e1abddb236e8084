"""GPTQ: round each column of a weight to make up for the errors of the columns before it.

A layer y = W x makes the error (W - Ŵ) x. Over the calibration inputs its square is, for each output channel,

    E[((w - ŵ) x)²] = e' H e        with        e = w - ŵ,   H = E[x x'],

and not Σ e² as rounding to nearest takes it: inputs that go together can make up for each other. With A lower
triangular and H + λ I = A' A, that is |A e|², and its j-th term knows e_1 .. e_j only. So the columns are rounded in turn,
each to the code that makes its own term smallest,

    code_j = round((w_j + Σ_{i<j} A_ji e_i / A_jj) / scale).

That is what updating all later columns by the inverse of H after each comes to (Babai's nearest plane: Chen et al. 2025,
arXiv 2507.18553), without an inverse. λ = DAMPING times the mean of H's diagonal keeps Σ e² in sight, for H is from few
inputs. Where the layer has a bias that `bias` can correct, H is the covariance of x, for the error's mean is the bias's to
take.

Where a weight must keep the pair rule, the second code of a pair may have what the first has left of it.

Source: Frantar et al. 2022, arXiv 2210.17323.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exporter.batches import Array
from exporter.numerics import pairing, plane
from exporter.numerics.pairing import PAIR_LIMIT
from exporter.numerics.quantized import LARGEST

WORK_BYTES = 256 << 20  # of what is factored at once, float64, of which five are held


def fit(rows: Array, blocks: Sequence[Array], pair_rule: bool) -> tuple[Array, Array]:
    """Codes and scales of a weight.

    Args:
        rows: float32 [channels, K] in the kernel's order; the channels of a group stand together.
        blocks: H, [groups, K, K], or what stands along its diagonal, [groups, K_i, K_i] with Σ K_i = K, all but the last even.
        pair_rule: whether the codes must keep it.

    Returns:
        codes int8 [channels, K] in -127..127, scale float32 [channels]. No channel has more of e' (H + λ I) e in a block than
        the codes of `pairing.fit`, which it has instead if it had, or where H has no factor.
    """
    codes, scale = pairing.fit(rows, pair_rule)
    groups = len(blocks[0])
    weight, found = (each.reshape(groups, len(rows) // groups, -1) for each in (rows, codes))
    unit = scale.reshape(weight.shape[:2]).astype(np.float64)
    first = 0
    for second in blocks:
        at = slice(first, first + second.shape[1])
        step = max(1, WORK_BYTES // (8 * second.shape[1] ** 2))
        for group in range(0, groups, step):
            some = slice(group, group + step)
            found[some, :, at] = _fit(weight[some, :, at], found[some, :, at], unit[some], second[some], pair_rule)
        first = at.stop
    return codes, scale


def _fit(weight: Array, nearest: Array, unit: Array, second: Array, pair_rule: bool) -> Array:
    """Codes of one block, [groups, channels of a group, K]."""
    exact, plain = weight.astype(np.float64), nearest.astype(np.float64)
    factor = plane.factor(second)
    codes = _nearest_plane(exact, factor, unit, pair_rule)
    # what is no number is worse, too
    better = _error(exact, codes, unit, factor) <= _error(exact, plain, unit, factor)
    return np.where(better[:, :, None], codes, plain).astype(np.int8)


def _error(weight: Array, codes: Array, unit: Array, factor: Array) -> Array:
    """e' A' A e, [groups, channels of a group]."""
    error = weight - codes * unit[:, :, None]
    return np.asarray(np.square(error @ factor.transpose(0, 2, 1)).sum(axis=2))


def _nearest_plane(weight: Array, factor: Array, unit: Array, pair_rule: bool) -> Array:
    """The codes, float64 [groups, channels of a group, K]."""
    codes = np.empty_like(weight.transpose(0, 2, 1))

    def real(j: int, wanted: Array) -> Array:
        low, high = _left(codes[:, j - 1]) if pair_rule and j % 2 else (-LARGEST, LARGEST)
        codes[:, j] = np.clip(np.rint(wanted[:, j] / unit), low, high)
        return np.asarray(codes[:, j] * unit)

    plane.nearest(weight, factor, real)
    return codes.transpose(0, 2, 1)


def _left(neighbour: Array) -> tuple[Array, Array]:
    """The codes that may stand beside a code: lowest, highest."""
    left = np.minimum(PAIR_LIMIT - np.abs(neighbour), LARGEST)
    return np.where(neighbour < 0, -left, -LARGEST), np.where(neighbour > 0, left, LARGEST)
