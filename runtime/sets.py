"""Outputs whose items have no order, or a number that depends on the data: how many of them have a partner."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
# Two items of a set are partners where each of their numbers differs by no more than this share of the largest one beside it
NEAR = 0.05
MOST_ITEMS = 512  # of one batch's set of real numbers, that a partner is looked for; evenly spread


def items(array: Array, axis: int, batched: bool) -> Array:
    """[items, numbers of each]: those along `axis`, and along the first one where it is another and is `batched`."""
    if not array.ndim:
        return array.reshape(1, 1)
    axis = min(axis, array.ndim - 1)
    first = np.moveaxis(array, axis, 0)
    if axis and batched:
        first = np.moveaxis(array, axis, 1)
        return first.reshape(first.shape[0] * first.shape[1], math.prod(first.shape[2:]))
    return first.reshape(first.shape[0], math.prod(first.shape[1:]))


def partners(reference: Array, candidate: Array) -> tuple[int, int]:
    """(items of the reference that have a partner, items that were looked at)."""
    if reference.shape[1:] != candidate.shape[1:] or not len(candidate):
        return 0, len(reference)
    if not np.issubdtype(reference.dtype, np.floating):
        there = {row.tobytes() for row in np.ascontiguousarray(candidate)}
        return sum(row.tobytes() in there for row in np.ascontiguousarray(reference)), len(reference)
    near = NEAR * np.abs(np.nan_to_num(reference.astype(np.float64))).max(axis=0, initial=0.0)
    looked = reference[:: max(1, math.ceil(len(reference) / MOST_ITEMS))].astype(np.float64)
    with_partner = sum(bool((np.abs(candidate - row) <= near).all(axis=1).any()) for row in looked)
    return with_partner, len(looked)
