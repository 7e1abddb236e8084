"""Cut a stream into pieces, and merge what was made of them in a tree whose shape depends on how many they are alone.

    0 1   2 3   4 5   6          each level merges neighbours; what is left over is merged from the right
    0..1  2..3  4..5  6
      0..3       4..6
           0..6

Sums of floats depend on the order of additions: one process, any number of workers, and a run that was interrupted and resumed
must add in the same one. Any 2^k neighbours that begin at a multiple of 2^k are a tree of their own: a part of the work can be
merged elsewhere and put in as one value, of the `size` 2^k. The tree also rounds less than a sum from left to right: log2(n)
times, not n.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def cut(items: Iterable[T], size: int) -> Iterator[tuple[int, list[T]]]:
    """Lists of `size` items, the last may be shorter, each with the number of its first item; read one list at a time."""
    stream = iter(items)
    for start in itertools.count(step=size):
        taken = list(itertools.islice(stream, size))
        if not taken:
            return
        yield start, taken


def fold(values: Iterable[T], merge: Callable[[T, T], T], size: Callable[[T], int] = lambda value: 1) -> T | None:
    """Merge the values, in their order; None when there is none. Holds log2(n) of them at a time.

    `size`: how many pieces a value is of already, a power of two, as the tree has them.
    """
    waiting: list[tuple[int, T]] = []  # sizes are falling powers of two
    for value in values:
        pieces = size(value)
        while waiting and waiting[-1][0] == pieces:
            value, pieces = merge(waiting.pop()[1], value), 2 * pieces
        waiting.append((pieces, value))
    if not waiting:
        return None
    merged = waiting.pop()[1]
    while waiting:
        merged = merge(waiting.pop()[1], merged)
    return merged
