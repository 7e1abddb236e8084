"""Codes and what they stand for. Pure numpy; the definitions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exporter.batches import Array

# vpmaddubsw adds two u8·s8 products in int16: two codes of one sign may sum to this, for 255 · 128 < 2¹⁵ <= 255 · 129
PAIR_LIMIT = 128
LARGEST = 127
# weights smaller than this are zero: their scale would not be a normal float32
NOTHING = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """A weight as symmetric codes, one scale per channel.

        real ≈ code · scale[channel]

    codes: int8 in -127..127, in the weight's shape (-128 wraps in int16 on some ARM cores).
    scale: float32 > 0, [channels] along channel_axis.
    """

    codes: Array
    scale: Array
    channel_axis: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A tensor's uint8 codes: real ≈ (code - zero_point) · scale, scale a positive normal float32."""

    scale: float
    zero_point: int

    @property
    def low(self) -> float:
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        return (255 - self.zero_point) * self.scale


def nearest(weight: Array, channel_axis: int) -> Rounded:
    """code = rint(w / scale), scale = max|w| / 127 per channel; 1 for a channel of nothing. float32 [...]."""
    codes, scale = symmetric(weight, tuple(axis for axis in range(weight.ndim) if axis != channel_axis))
    return Rounded(codes=codes, scale=scale.reshape(-1), channel_axis=channel_axis)


def symmetric(weight: Array, shared: tuple[int, ...]) -> tuple[Array, Array]:
    """Codes int8 in the weight's shape, and scales float32 of size 1 along the axes whose elements share one, as `nearest`."""
    largest = np.abs(weight).max(axis=shared, keepdims=True)
    scale = np.where(largest > NOTHING, largest / LARGEST, 1).astype(np.float32)
    return np.clip(np.rint(weight / scale), -LARGEST, LARGEST).astype(np.int8), scale


def dequantize(rounded: Rounded) -> Array:
    """code · scale, float32 in the weight's shape. ONNX DequantizeLinear-13 with zero point 0."""
    shape = [1] * rounded.codes.ndim
    shape[rounded.channel_axis] = -1
    return np.asarray(rounded.codes * rounded.scale.reshape(shape), np.float32)
