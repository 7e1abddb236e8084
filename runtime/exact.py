"""A sum of float64 whose value does not depend on the order of what is added."""

from __future__ import annotations

import math


class Exact:
    """A sum of float64 that is rounded once, when it is read, so that the order of what is added does not matter.

    Every finite float64 is a whole number of 2^-1074, the smallest one; Python's integers have no end.
    """

    UNIT = 1 << 1074

    def __init__(self, whole: int = 0, other: float = 0.0) -> None:
        self.whole, self.other = whole, other

    def add(self, term: float) -> None:
        if math.isfinite(term):
            above, below = term.as_integer_ratio()
            self.whole += above * (self.UNIT // below)
        else:
            self.other += term

    def merged(self, second: Exact) -> Exact:
        return Exact(self.whole + second.whole, self.other + second.other)

    def value(self) -> float:
        if self.other != 0.0:  # inf or NaN
            return self.other
        try:
            return self.whole / self.UNIT
        except OverflowError:
            return math.inf if self.whole > 0 else -math.inf
