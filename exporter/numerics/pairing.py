"""The pair rule, and the codes of a weight at the scale that costs the least; no graph.

Without VNNI, x86's vpmaddubsw multiplies uint8 activations by int8 weights and adds the products of two neighbours in
int16, which saturates. Neighbours are positions (2k, 2k+1) of the sum over K, in the order the kernel takes it: for Conv
(kernel position, channel of the group), for MatMul and Gemm along the rows of B. A sum leaves int16 only if two codes of
one sign add up to more than 128 in magnitude, for 255 · 128 = 32640 < 2¹⁵. So the rule

    |a| + |b| <= 128   for neighbours a, b of one sign

makes full-range weights exact on every x86 since AVX2. Depthwise Conv has a kernel of its own that does not pair.

Per channel the scale is the one of SCALES times max|w|/127 with the least Σ(w - code · scale)²; a pair that breaks the
rule shares its excess between its two codes.
"""

from __future__ import annotations

import numpy as np

from exporter.batches import Array
from exporter.numerics.quantized import LARGEST, NOTHING

# vpmaddubsw adds two u8·s8 products in int16: two codes of one sign may sum to this, for 255 · 128 < 2¹⁵ <= 255 · 129
PAIR_LIMIT = 128
# from a fifth of the largest weights clipped to 7-bit codes, under which no pair can break the rule
SCALES = np.linspace(0.8, 2.0, 41)
FULL_RANGE_SCALES = np.linspace(0.8, 1.1, 16)


def fit(rows: Array, pair_rule: bool = True) -> tuple[Array, Array]:
    """Codes and scales of a weight whose rows are channels in the kernel's order.

    Args:
        rows: float32 [channels, K].
        pair_rule: whether the codes must keep it; if not, FULL_RANGE_SCALES are tried.

    Returns:
        codes int8 [channels, K] in -127..127, scale float32 [channels] > 0, also of a row of nothing.
    """
    unit = full_scale(rows)
    best = np.full(len(rows), np.inf)
    scale, codes = unit.copy(), np.zeros(rows.shape, np.int8)
    for factor in SCALES if pair_rule else FULL_RANGE_SCALES:
        tried = (unit * np.float32(factor)).astype(np.float32)
        found = np.clip(np.rint(rows / tried[:, None]), -LARGEST, LARGEST)
        found = keep(found) if pair_rule else found
        error = ((rows - found * tried[:, None]).astype(np.float64) ** 2).sum(axis=1)
        better = error < best
        best[better], scale[better], codes[better] = error[better], tried[better], found[better].astype(np.int8)
    return codes, scale


def keep(codes: Array) -> Array:
    """The codes with each offending pair pulled in until |a| + |b| = 128; half of the excess from either.

    Args:
        codes: whole numbers in -127..127, [channels, K] in the kernel's order; K may be odd, its last has no neighbour.
    """
    kept = codes.copy()
    even = codes.shape[1] // 2 * 2
    a, b = kept[:, 0:even:2], kept[:, 1:even:2]
    excess = np.where(a * b > 0, np.maximum(np.abs(a) + np.abs(b) - PAIR_LIMIT, 0), 0)
    kept[:, 0:even:2] = a - np.sign(a) * np.ceil(excess / 2)
    kept[:, 1:even:2] = b - np.sign(b) * np.floor(excess / 2)
    return kept


def full_scale(rows: Array) -> Array:
    """The scale per channel at which its largest weight has the largest code, float32 [channels]; 1 for a row of nothing."""
    largest = np.abs(rows).max(axis=1)
    return np.where(largest > NOTHING, largest / LARGEST, 1).astype(np.float32)
