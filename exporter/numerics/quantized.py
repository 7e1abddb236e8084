"""QuantizedTensor: integers and what they stand for; encode and decode. Pure numpy; the definitions.

code = clip(rint(real / scale) + zero_point, lowest, highest)        real ≈ (code - zero_point) · scale
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from exporter.batches import Array
from exporter.numerics.formats import INT8, UINT8, Format, PerChannel

LARGEST = INT8.highest
# weights smaller than this are zero: their scale would not be a normal float32
NOTHING = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """A tensor as integers, with a scale for each tile of its format.

        real ≈ (code - zero_point) · scale        of the tile that the code lies in

    Invariants:
        codes: integers, format.lowest <= code <= format.highest, in the shape of the real tensor; 4 bits one a byte.
        scale: float32, of shape format.tile.scales(codes.shape).
        zero_point: in the scale's shape and the codes' type; None is the format's middle, and stands where it is symmetric.
    """

    codes: Array
    scale: Array
    format: Format
    zero_point: Array | None = None

    def __post_init__(self) -> None:
        expected = self.format.tile.scales(self.codes.shape)
        if self.scale.shape != expected or (self.zero_point is not None and self.zero_point.shape != expected):
            raise ValueError(f"scale {self.scale.shape}, expected {expected}: {self.format} of {self.codes.shape}")

    @property
    def channel_axis(self) -> int:
        """The axis whose indices have a scale each."""
        if not isinstance(self.format.tile, PerChannel):
            raise ValueError(f"{self.format} has no scale per channel: {self.format.tile}")
        return self.format.tile.axis


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
        return (UINT8.highest - self.zero_point) * self.scale


def per_channel(codes: Array, scale: Array, axis: int) -> QuantizedTensor:
    """A weight as symmetric int8 codes, one scale per index of the axis."""
    return QuantizedTensor(codes=codes, scale=scale, format=INT8.per_channel(axis))


def encode(real: Array, form: Format) -> QuantizedTensor:
    """Each number to its nearest code.

        symmetric:  scale = max|real| / (highest - middle)      zero_point = middle
        else:       scale = (high - low) / (levels - 1)         zero_point = rint(lowest - low / scale)

    with the extremes of each tile, low <= 0 <= high; scale is 1 for a tile of nothing.

    Args:
        real: float32, finite.
        form: an integer one, of at most 8 bits.
    """
    split, shared = form.tile.split(real.shape)
    view, scales = real.reshape(split), form.tile.scales(real.shape)
    if form.symmetric:
        codes, scale = symmetric(view, shared, form)
        zero = None
    else:
        low, high = (
            np.minimum(view.min(axis=shared, keepdims=True), 0),
            np.maximum(view.max(axis=shared, keepdims=True), 0),
        )
        reach = high - low
        scale = np.where(reach > NOTHING, reach / np.float32(form.levels - 1), 1).astype(np.float32)
        zero = np.clip(np.rint(form.lowest - low / scale), form.lowest, form.highest)
        codes = affine(view, scale, zero, form)
        zero = zero.astype(codes.dtype).reshape(scales)
    return QuantizedTensor(codes=codes.reshape(real.shape), scale=scale.reshape(scales), format=form, zero_point=zero)


def decode(quantized: QuantizedTensor) -> Array:
    """(code - zero_point) · scale, float32 in the shape of the codes. ONNX DequantizeLinear-21."""
    split, shared = quantized.format.tile.split(quantized.codes.shape)
    kept = tuple(1 if axis in shared else size for axis, size in enumerate(split))
    codes, form = quantized.codes.reshape(split), quantized.format
    if quantized.zero_point is not None:
        codes = codes.astype(np.int32) - quantized.zero_point.reshape(kept).astype(np.int32)
    elif form.middle:
        codes = codes.astype(np.int32) - form.middle
    return np.asarray(codes * quantized.scale.reshape(kept), np.float32).reshape(quantized.codes.shape)


def affine(real: Array, scale: Array, zero_point: Array | np.float32, form: Format) -> Array:
    """clip(rint(real / scale) + zero_point), int8 or uint8 in the shape of `real`; scale and zero_point are broadcast."""
    codes = np.rint(real / scale)
    codes += zero_point
    return np.clip(codes, form.lowest, form.highest).astype(np.int8 if form.signed else np.uint8)


def symmetric(real: Array, shared: tuple[int, ...], form: Format = INT8) -> tuple[Array, Array]:
    """Codes in the shape of `real`, and scales float32 of size 1 along the axes whose elements share one, as `encode`."""
    largest = np.abs(real).max(axis=shared, keepdims=True)
    scale = np.where(largest > NOTHING, largest / (form.highest - form.middle), 1).astype(np.float32)
    return affine(real, scale, np.float32(form.middle), form), scale


def nearest(weight: Array, channel_axis: int) -> QuantizedTensor:
    """int8 codes with a scale per channel, by `encode`. float32 [...]."""
    return encode(weight, INT8.per_channel(channel_axis))
