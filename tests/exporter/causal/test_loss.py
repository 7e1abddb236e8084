from __future__ import annotations

import numpy as np
import pytest

from exporter.causal import loss


def test_loss_is_what_its_formulas_say() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])

    def always(shares: np.ndarray) -> loss.Logits:
        return lambda ids: np.tile(np.log(shares).astype(np.float32), (1, ids.shape[1], 1))

    windows = [np.array([0, 0, 1, 2]), np.array([0, 1])]
    found = loss.measure(always(p), always(q), windows)
    assert found.tokens == 4  # 0, 1, 2 and 1 come next
    assert found.fp32_perplexity == pytest.approx((2 * 4 * 4 * 4) ** 0.25)
    assert found.perplexity == pytest.approx((4 * 2 * 4 * 2) ** 0.25)
    assert found.kl == pytest.approx(0.25 * np.log(2))
    assert found.same_top1 == 0 and found.rise == pytest.approx(2 ** (-1 / 4) - 1)
    same = loss.measure(always(p), always(p), windows)
    assert (same.kl, same.same_top1, same.rise) == (0, 1, 0)
