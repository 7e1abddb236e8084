"""Weights as codes in blocks along K, as MatMulNBits stores them: float [N, K] <-> codes, scales, zero points; pure numpy.

A row of K weights is cut into blocks of `size`; each has a scale and, if not symmetric, a zero point:

    weight ≈ (code - zero) * scale        code 0 .. 2^bits - 1,   zero = 2^(bits - 1) where symmetric

Source: onnxruntime, docs/ContribOperators.md, com.microsoft.MatMulNBits and GatherBlockQuantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
TINY = np.float32(1e-30)  # a block of zeros has some scale
# Shares of the largest weight that a scale may be made for: clipping a few often rounds the many better
SHARES = tuple(np.linspace(0.975, 0.7, 12))


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """A format: bits 4 or 8, in blocks of `size` weights along K (a power of two from 16 on)."""

    bits: Literal[4, 8]
    size: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.size < 16 or self.size & (self.size - 1):
            raise ValueError(f"no format of MatMulNBits: {self}")

    @property
    def levels(self) -> int:
        return int(2**self.bits)

    @property
    def middle(self) -> int:
        return self.levels // 2

    def bytes(self, rows: int, columns: int) -> int:
        """Of a weight [rows, columns]: codes, float32 scales, packed zero points."""
        count = -(-columns // self.size)
        zeros = 0 if self.symmetric else -(-count * self.bits // 8)
        return rows * (count * self.size * self.bits // 8 + 4 * count + zeros)

    def __str__(self) -> str:
        return f"int{self.bits} block {self.size}{'' if self.symmetric else ' asym'}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Blocked:
    """codes uint8 [N, blocks * size] one a byte, scale float32 [N, blocks], zero uint8 [N, blocks]; columns is K, unpadded."""

    blocks: Blocks
    columns: int
    codes: Codes
    scale: Floats
    zero: Codes

    def weight(self) -> Floats:
        """What the codes stand for, float32 [N, K]."""
        count = self.scale.shape[1]
        parts = self.codes.reshape(len(self.codes), count, -1).astype(np.float32)
        parts -= self.zero[:, :, None].astype(np.float32)
        parts *= self.scale[:, :, None]
        return parts.reshape(len(self.codes), -1)[:, : self.columns]

    def packed(self) -> Codes:
        """Codes as stored, uint8 [N, blocks, size * bits / 8]; of 4 bits the earlier code in the low half of a byte."""
        count = self.scale.shape[1]
        return (_nibbles(self.codes) if self.blocks.bits == 4 else self.codes).reshape(len(self.codes), count, -1)

    def packed_zero(self) -> Codes | None:
        """Zero points as stored, uint8 [N, ceil(blocks * bits / 8)]; none where symmetric, for the middle is understood."""
        if self.blocks.symmetric:
            return None
        return _nibbles(self.zero) if self.blocks.bits == 4 else self.zero


def nearest(weight: Floats, blocks: Blocks, importance: Floats | None = None) -> Blocked:
    """Each weight to its nearest code, under the scale of SHARES with the least error in each block.

    Args:
        weight: float32 [N, K].
        blocks: the format.
        importance: float32 [K], what a column's squared error is multiplied by; None is 1.
    """
    parts = in_blocks(weight, blocks)
    columns = None if importance is None else in_blocks(importance[None], blocks)
    scale, zero = fit(parts, blocks, columns)
    codes = encode(parts, scale, zero, blocks)
    return Blocked(blocks=blocks, columns=weight.shape[1], codes=codes.reshape(len(weight), -1), scale=scale, zero=zero)


def in_blocks(weight: Floats, blocks: Blocks) -> Floats:
    """[N, K] -> [N, blocks, size], with zeros behind the last column."""
    rows, columns = weight.shape
    if left := -columns % blocks.size:
        weight = np.pad(weight, ((0, 0), (0, left)))
    return weight.reshape(rows, -1, blocks.size)


def encode(parts: Floats, scale: Floats, zero: Codes, blocks: Blocks) -> Codes:
    """Nearest codes of [N, blocks, size] under [N, blocks] scales and zero points."""
    codes = np.rint(parts / scale[:, :, None])
    codes += zero[:, :, None].astype(np.float32)
    return np.asarray(np.clip(codes, 0, blocks.levels - 1), np.uint8)


def fit(parts: Floats, blocks: Blocks, importance: Floats | None = None) -> tuple[Floats, Codes]:
    """Scale float32 and zero point uint8, each [N, blocks], of [N, blocks, size]: those of SHARES with the least squared error.

    Symmetric: the extreme of larger magnitude, whatever its sign, has code 0, so that all 2^bits codes are used.
    Asymmetric: zero is within the range, so that real 0 has a code.
    """
    scale, zero = _range(parts, blocks, np.float32(1))
    if blocks.bits == 8:  # nothing is worth clipping among 256 codes
        return scale, zero
    least = _error(parts, scale, zero, blocks, importance)
    for share in SHARES:
        tried, at = _range(parts, blocks, np.float32(share))
        error = _error(parts, tried, at, blocks, importance)
        better = error < least
        least, scale, zero = np.where(better, error, least), np.where(better, tried, scale), np.where(better, at, zero)
    return scale, zero


def _error(parts: Floats, scale: Floats, zero: Codes, blocks: Blocks, importance: Floats | None) -> Floats:
    """Squared error of each block, [N, blocks]."""
    real = encode(parts, scale, zero, blocks).astype(np.float32)
    real -= zero[:, :, None].astype(np.float32)
    real *= scale[:, :, None]
    real -= parts
    np.square(real, out=real)
    return np.asarray((real if importance is None else real * importance).sum(axis=2))


def _range(parts: Floats, blocks: Blocks, share: np.float32) -> tuple[Floats, Codes]:
    low, high = parts.min(axis=2), parts.max(axis=2)
    if blocks.symmetric:
        extreme = np.where(np.abs(low) >= np.abs(high), low, high) * share
        # -middle is the one code without a partner: the extreme's
        scale = extreme / np.float32(-blocks.middle)
        scale = np.where(np.abs(scale) < TINY, TINY, scale)
        return scale.astype(np.float32), np.full(scale.shape, blocks.middle, np.uint8)
    low, high = np.minimum(low, 0) * share, np.maximum(high, 0) * share
    scale = np.maximum((high - low) / np.float32(blocks.levels - 1), TINY).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, blocks.levels - 1)
    return scale, zero.astype(np.uint8)


def _nibbles(codes: Codes) -> Codes:
    """[N, count] in 0..15 -> [N, ceil(count / 2)], the earlier in the low half."""
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return np.ascontiguousarray(codes[:, 0::2] | (codes[:, 1::2] << 4))
