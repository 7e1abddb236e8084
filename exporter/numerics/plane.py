"""Babai's nearest plane: round a weight column by column, each to what makes its own term of |A e|² smallest; see `gptq`.

    wanted_j = w_j + Σ_{i<j} A_ji e_i / A_jj        e_j = w_j - real_j,   real_j: what the code that is chosen stands for

Which codes there are is the caller's: it is asked for one column after the other.
Source: Frantar et al. 2022, arXiv 2210.17323; Chen et al. 2025, arXiv 2507.18553.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from exporter.batches import Array

DAMPING = 0.03
MORE_DAMPING = (1, 10, 100, 1000)  # times DAMPING, one after the other, until H has a factor
BLOCK = 32  # columns whose effect on all later ones is one matrix product

Real = Callable[
    [int, Array], Array
]  # (column j, wanted [groups, K, channels]) -> real value [groups, channels] of column j


def factor(second: Array) -> Array:
    """A, lower triangular with H + λ I = A' A, float64 [groups, K, K].

    I for a group that has seen nothing, whose H holds no numbers, or has no factor with all of MORE_DAMPING.
    """
    damped = np.array(second, np.float64)
    damped[~np.isfinite(damped).all(axis=(1, 2))] = 0
    diagonal = np.arange(damped.shape[1])
    mean = damped[:, diagonal, diagonal].mean(axis=1, keepdims=True)
    at_first = damped[:, diagonal, diagonal]
    for more in MORE_DAMPING:
        damped[:, diagonal, diagonal] = at_first + np.where(mean > 0, DAMPING * more * mean, 1)
        try:
            return np.linalg.cholesky(damped[:, ::-1, ::-1])[:, ::-1, ::-1].transpose(0, 2, 1)
        except np.linalg.LinAlgError:
            if len(damped) > 1:  # each by itself
                return np.concatenate([factor(each[None]) for each in second])
    return np.eye(damped.shape[1])[None]


def nearest(weight: Array, factor: Array, real: Real) -> Array:
    """What is chosen, float64 [groups, channels of a group, K].

    Args:
        weight: float64 [groups, channels of a group, K].
        factor: A, lower triangular, float64 [groups, K, K].
        real: chooses column j. In `wanted` columns from j to the next multiple of BLOCK hold what all columns before j ask
            of them; where j is a multiple of BLOCK that is true of all columns behind it.
    """
    columns = weight.shape[2]
    effect = factor / np.einsum("gkk->gk", factor)[:, :, None]  # A_ji / A_jj
    exact = np.ascontiguousarray(weight.transpose(0, 2, 1))
    wanted, chosen = exact.copy(), np.empty_like(exact)
    for first in range(0, columns, BLOCK):
        stop = min(first + BLOCK, columns)
        for j in range(first, stop):
            chosen[:, j] = real(j, wanted)
            error = exact[:, j] - chosen[:, j]
            wanted[:, j + 1 : stop] += effect[:, j + 1 : stop, j, None] * error[:, None]
        errors = exact[:, first:stop] - chosen[:, first:stop]
        wanted[:, stop:] += effect[:, stop:, first:stop] @ errors
    return chosen.transpose(0, 2, 1)
