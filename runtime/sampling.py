"""Which token comes next: logits -> one token, greedy or drawn. Equal seeds draw equal tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.drift import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn.

    temperature: logits are divided by it; 0 is greedy, the token of largest logit.
    top_k: of the k most likely alone; 0 is all. top_p: of the fewest most likely that have this share of probability.
    seed: of the draws; None is another one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError("temperature", found=str(self.temperature), expected="0 (greedy) or more")
        if self.top_k < 0:
            raise InputError("top_k", found=str(self.top_k), expected="0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise InputError("top_p", found=str(self.top_p), expected="a share above 0, at most 1")

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def choose(self, logits: Array, generator: np.random.Generator) -> int:
        """The next token by logits float32 [vocabulary]."""
        if self.temperature == 0:
            return int(logits.argmax())
        shares = self.shares(logits)
        kept = np.flatnonzero(shares)
        # by the sum and not by choice(p=...), whose check of the sum takes longer than the draw
        at = int(np.searchsorted(np.cumsum(shares[kept]), generator.random(), side="right"))
        return int(kept[min(at, len(kept) - 1)])

    def shares(self, logits: Array) -> Array:
        """Probability of each token, float64 [vocabulary], those that are left out 0."""
        scaled = logits.astype(np.float64) / self.temperature
        if 0 < self.top_k < len(scaled):
            scaled[scaled < np.partition(scaled, -self.top_k)[-self.top_k]] = -np.inf
        shares = np.exp(scaled - scaled.max())
        shares /= shares.sum()
        if self.top_p < 1:
            order = np.argsort(-shares, kind="stable")
            before = np.cumsum(shares[order]) - shares[order]
            shares[order[before >= self.top_p]] = 0
            shares /= shares.sum()
        return np.asarray(shares)


GREEDY = Sampling()
