"""Codes and what they stand for. Pure numpy; the definitions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exporter.batches import Array

# vpmaddubsw adds two u8·s8 products in int16: two codes of one sign may sum to this, for 255 · 128 < 2¹⁵ <= 255 · 129
PAIR_LIMIT = 128


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


def dequantize(rounded: Rounded) -> Array:
    """code · scale, float32 in the weight's shape. ONNX DequantizeLinear-13 with zero point 0."""
    shape = [1] * rounded.codes.ndim
    shape[rounded.channel_axis] = -1
    return np.asarray(rounded.codes * rounded.scale.reshape(shape), np.float32)
