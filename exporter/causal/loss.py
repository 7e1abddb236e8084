"""What a candidate loses against FP32 on text: perplexity, KL of its next-token distribution, same first choice.

perplexity = exp(mean over tokens of -ln p(next token))
KL         = mean over tokens of Σ_v p(v) (ln p(v) - ln q(v))     p: FP32, q: the candidate; nats a token
same_top1  = share of tokens after which both have the same most likely next one
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from exporter.batches import Array

ROWS = 32  # tokens at once: with a large vocabulary a window's logits are hundreds of megabytes
Logits = Callable[[Array], Array]  # int64 [1, tokens] -> float32 [1, tokens, vocabulary]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Over `tokens` tokens that have a next one."""

    tokens: int
    fp32_perplexity: float
    perplexity: float
    kl: float
    same_top1: float

    @property
    def rise(self) -> float:
        """Of the perplexity, as a share of FP32's."""
        return self.perplexity / self.fp32_perplexity - 1


def measure(reference: Logits, candidate: Logits, windows: Iterable[Array]) -> Loss:
    """Run both on each window, int64 [tokens]."""
    tokens, sums = 0, np.zeros(4)
    for window in windows:
        wanted, got = (run(window[None])[0, :-1] for run in (reference, candidate))
        for first in range(0, len(wanted), ROWS):
            rows = slice(first, first + ROWS)
            sums += _sums(wanted[rows], got[rows], window[1:][rows])
        tokens += len(wanted)
    fp32, candidates, kl, same = sums / tokens
    return Loss(
        tokens=tokens,
        fp32_perplexity=float(np.exp(fp32)),
        perplexity=float(np.exp(candidates)),
        kl=float(kl),
        same_top1=float(same),
    )


def _sums(wanted: Array, got: Array, following: Array) -> Array:
    """Of some tokens: -ln p and -ln q of the token that follows, KL, whether both have the same first choice."""
    wanted, got = _log_softmax(wanted), _log_softmax(got)
    at = (np.arange(len(wanted)), following)
    kl = (np.exp(wanted) * (wanted - got)).sum(dtype=np.float64)
    same = (wanted.argmax(axis=1) == got.argmax(axis=1)).sum()
    return np.array([-wanted[at].sum(dtype=np.float64), -got[at].sum(dtype=np.float64), kl, same])


def _log_softmax(logits: Array) -> Array:
    """float32 [tokens, vocabulary]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, dtype=np.float64, keepdims=True)).astype(np.float32)
    return np.asarray(shifted)
