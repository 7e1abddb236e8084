"""Slots: a number for each channel of each tensor whose values may be divided by a scale, and the constants that make up for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array

FIXED = 0  # the slot of every channel that stays as it is


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Taken:
    """A constant that takes scales: constant' = constant · s[times] / s[over], slots in shapes that broadcast to its own.

    layer: of a weight, the node that multiplies by it; else "".
    """

    constant: str
    times: Array
    over: Array
    layer: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slots:
    """of: {tensor: slots, int32 in a shape that broadcasts to its own}, of tensors that have any but FIXED.

    count: slots are 0 .. count - 1. taken: the constants behind them.
    chain: int32 [count], a number that slots have in common which stand beside each other in a tensor, directly or through others.
    ended: {tensor that a layer reads: why all its slots are FIXED}, where they began as others.
    """

    of: Mapping[str, Array]
    count: int
    taken: tuple[Taken, ...]
    chain: Array
    ended: Mapping[str, str]


def scaled(model: ir.Model, slots: Slots, scales: Array) -> ir.Model:
    """A clone of the model with the scales in its constants. Its nodes, names and shapes are the same.

    Args:
        model: the graph that the slots are of.
        scales: float64 > 0 [slots.count], 1 for FIXED.
    """
    clone = model.clone()
    for taken in slots.taken:
        value = clone.graph.initializers[taken.constant]
        array = graph.constant(value)
        if array is not None:
            moved = array * (scales[taken.times] / scales[taken.over])
            value.const_value = ir.tensor(moved.astype(np.float32), name=taken.constant)
    return clone


class Joined:
    """Numbers of which some are one (union-find); the smallest of those stands for all."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def more(self, count: int) -> Array:
        """New numbers, each by itself."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count, dtype=np.int32)

    def root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def join(self, one: int, two: int) -> None:
        low, high = sorted((self.root(one), self.root(two)))
        self._parent[high] = low

    def roots(self) -> Array:
        """int32 [count]."""
        return np.array([self.root(number) for number in range(len(self._parent))], np.int32)


def chains(tensors: Iterable[Array], count: int) -> Array:
    """`Slots.chain` of the slots that tensors have; FIXED joins nobody."""
    joined = Joined(count)
    for slots in tensors:
        several = [int(slot) for slot in np.unique(slots) if slot != FIXED]
        for slot in several[1:]:
            joined.join(several[0], slot)
    return joined.roots()
