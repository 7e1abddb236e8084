"""How numbers are stored: Format, and Scheme, which says of a layer how its weights and its activations are. Values, no graph.

An integer format stands for real numbers by an affine map, one scale and zero point for each tile of a tensor:

    real ≈ (code - zero_point) · scale        lowest <= code <= highest

A tile is what shares a scale: the tensor, a channel, a block of so many along an axis.
`exporter.numerics.quantized` encodes and decodes. Source: ONNX QuantizeLinear-21, DequantizeLinear-21.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

Word = Literal["float", "int8", "dynamic", "w8a32"]  # a scheme in a recipe's rules and in a plan


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale, of shape []."""

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a tensor of that shape, as ONNX has them."""
        return ()

    def split(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shape in which a tile is whole axes, and those axes."""
        return shape, tuple(range(len(shape)))


@dataclass(frozen=True, slots=True)
class PerChannel:
    """A scale for each index of an axis, of shape [channels]."""

    axis: int

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[self.axis],)

    def split(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return shape, tuple(axis for axis in range(len(shape)) if axis != self.axis % len(shape))


@dataclass(frozen=True, slots=True)
class PerBlock:
    """A scale for each `size` neighbours along an axis, of the tensor's shape with that axis divided by `size`."""

    axis: int
    size: int

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        at = self.axis % len(shape)
        return (*shape[:at], self._count(shape), *shape[at + 1 :])

    def split(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        at = self.axis % len(shape)
        return (*shape[:at], self._count(shape), self.size, *shape[at + 1 :]), (at + 1,)

    def _count(self, shape: tuple[int, ...]) -> int:
        if shape[self.axis] % self.size:
            raise ValueError(f"axis {self.axis} of {shape} is no multiple of {self.size}")
        return shape[self.axis] // self.size


Tile = PerTensor | PerChannel | PerBlock


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How real numbers are stored.

    kind: integers by an affine map, or narrower floats.
    symmetric: every zero point is the middle: 0, of unsigned codes 2^(bits - 1).
    narrow: without the lowest signed code, so that the codes of w and -w are each other's negative.
    tile: what shares a scale; of no meaning to floats.
    """

    kind: Literal["integer", "float"] = "integer"
    bits: int
    signed: bool = True
    symmetric: bool = True
    narrow: bool = False
    tile: Tile = PerTensor()

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return self.highest - self.lowest + 1

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def highest(self) -> int:
        return int(2 ** (self.bits - self.signed)) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric one."""
        return 0 if self.signed else int(2 ** (self.bits - 1))

    @property
    def storage(self) -> str:
        """The name of its type in ONNX's TensorProto.DataType."""
        if self.kind == "float":
            return "FLOAT" if self.bits == 32 else f"FLOAT{self.bits}"
        return f"{'' if self.signed else 'U'}INT{self.bits}"

    def tiled(self, tile: Tile) -> Format:
        """The same with other tiles."""
        return replace(self, tile=tile)

    def per_channel(self, axis: int) -> Format:
        return self.tiled(PerChannel(axis))

    def in_blocks(self, axis: int, size: int) -> Format:
        return self.tiled(PerBlock(axis, size))

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Of a tensor of that shape: codes, float32 scales, and packed zero points where they are not the middle."""
        elements, scales = _product(shape), _product(self.tile.scales(shape))
        if self.kind == "float":
            return elements * self.bits // 8
        zeros = 0 if self.symmetric else -(-scales * self.bits // 8)
        return -(-elements * self.bits // 8) + 4 * scales + zeros

    def __str__(self) -> str:
        name = "float" if self.kind == "float" else f"{'' if self.signed else 'u'}int"
        block = f" in blocks of {self.tile.size}" if isinstance(self.tile, PerBlock) else ""
        return f"{name}{self.bits}{block}"


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


FP32 = Format(kind="float", bits=32)
FP16 = Format(kind="float", bits=16)
# -128 wraps in int16 on some ARM cores: no code is -128
INT8 = Format(bits=8, narrow=True)
UINT8 = Format(bits=8, signed=False, symmetric=False)
INT4 = Format(bits=4)
UINT4 = Format(bits=4, signed=False, symmetric=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a layer computes: the formats of its weights and of its activations.

    name: the field's (W: weights, A: activations, and their bits). word: that of a plan and of a recipe's rules.
    activations: FP32 where the layer computes in float. dynamic: whether their range is taken as they run.
    takes: what it needs, as a message says it.
    """

    name: str
    word: Word
    weights: Format
    activations: Format
    dynamic: bool = False
    takes: str = "a node"

    @property
    def in_integers(self) -> bool:
        """Whether the layer multiplies integers, and not only stores them."""
        return self.activations.kind == "integer"

    def __str__(self) -> str:
        return self.word


W8A8 = Scheme(name="W8A8", word="int8", weights=INT8, activations=UINT8, takes="a node with an integer kernel")
W8A8_DYNAMIC = Scheme(
    name="W8A8 dynamic", word="dynamic", weights=INT8, activations=UINT8, dynamic=True,
    takes="a layer that dynamic int8 can run",
)  # fmt: skip
W8A32 = Scheme(
    name="W8A32", word="w8a32", weights=INT8.in_blocks(0, 32), activations=FP32,
    takes="a layer whose weight can be stored in blocks",
)  # fmt: skip
FLOAT = Scheme(name="FP32", word="float", weights=FP32, activations=FP32)

SCHEMES: Mapping[Word, Scheme] = MappingProxyType({each.word: each for each in (W8A8, W8A8_DYNAMIC, W8A32, FLOAT)})
