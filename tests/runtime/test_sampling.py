from __future__ import annotations

import numpy as np
import pytest

from runtime.sampling import GREEDY, Sampling

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def test_greedy_is_the_largest() -> None:
    assert GREEDY.choose(LOGITS, GREEDY.generator()) == 1


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(temperature=1), [0.1, 0.4, 0.2, 0.3]),
        (Sampling(temperature=1, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1, top_p=0.5), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(temperature=1, top_p=0.39), [0, 1, 0, 0]),
        (Sampling(temperature=1, top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        (Sampling(temperature=0.5), np.array([1, 16, 4, 9]) / 30),
    ],
)
def test_shares_are_those_of_the_settings(sampling: Sampling, shares: list[float]) -> None:
    assert np.allclose(sampling.shares(LOGITS), shares, atol=1e-6)


def test_tokens_are_drawn_as_often_as_their_share_says() -> None:
    sampling = Sampling(temperature=1, seed=5)
    generator = sampling.generator()
    drawn = np.bincount([sampling.choose(LOGITS, generator) for _ in range(4000)], minlength=4) / 4000
    assert np.allclose(drawn, [0.1, 0.4, 0.2, 0.3], atol=0.03)
