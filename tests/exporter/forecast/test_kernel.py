"""The arithmetic of vpmaddubsw, by hand and against the plain definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.batches import Array
from exporter.forecast import kernel


def saturating_sums(codes: Array, rows: Array) -> Array:
    """The definition: products of neighbours meet in int16."""
    even = rows.shape[1] + rows.shape[1] % 2
    wide = [np.pad(each.astype(np.int64), ((0, 0), (0, even - each.shape[1]))) for each in (codes, rows)]
    p = wide[0][:, None, :] * wide[1][None]
    return np.clip(p[..., 0::2] + p[..., 1::2], -(2**15), 2**15 - 1).sum(axis=-1)


def test_one_pair_by_hand() -> None:
    codes = np.array([[255, 255, 1], [255, 2, 1]], np.uint8)
    rows = np.array([[127, 127, 5], [-100, -127, 5], [127, -127, 127]], np.int8)
    pairs = kernel.breaking(rows)
    assert (pairs.first.tolist(), pairs.weights.tolist(), pairs.channel.tolist()) == (
        [0, 0],
        [[127, 127], [-100, -127]],
        [0, 1],
    )
    assert kernel.exact_sums(codes, rows).tolist() == [[64775, -57880, 127], [32644, -25749, 32258]]
    found = kernel.excess(codes, pairs, 3)
    # 255 · 254 = 64770 stops at 32767; -255 · 227 = -57885 stops at -32768; 255 · 127 + 2 · 127 = 32639 does not
    assert found.excess.tolist() == [[32003, -25117, 0], [0, 0, 0]]
    assert found.clipped == 2


@pytest.mark.parametrize(
    ("a", "b", "breaks"),
    [
        *((64, 64, False), (65, 64, True), (127, 1, False), (127, 2, True), (-64, -64, False), (-128, -1, True)),
        *((-128, 0, False), (127, -127, False), (-128, 127, False)),
    ],
)
def test_pair_breaks_the_rule_exactly_when_255_of_both_leaves_int16(a: int, b: int, breaks: bool) -> None:
    rows = np.array([[a, b]], np.int8)
    assert len(kernel.breaking(rows).first) == breaks
    assert (not -(2**15) <= 255 * (a + b) < 2**15 and a * b >= 0) == breaks


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 1100), st.integers(0, 2**32 - 1))
def test_exact_less_excess_is_the_saturating_sum(positions: int, channels: int, k: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    codes = generator.choice(np.array([0, 3, 128, 254, 255], np.uint8), (positions, k))
    rows = generator.choice(np.array([-128, -127, -64, 0, 1, 64, 65, 127], np.int8), (channels, k))
    exact, pairs = kernel.exact_sums(codes, rows), kernel.breaking(rows)
    np.testing.assert_array_equal(exact, codes.astype(np.int64) @ rows.T.astype(np.int64))
    found = kernel.excess(codes, pairs, channels)
    np.testing.assert_array_equal(exact - found.excess, saturating_sums(codes, rows))
    assert np.count_nonzero(found.excess) <= found.clipped <= positions * channels


def test_blocks_of_positions_and_of_pairs_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 256, (2500, 64)).astype(np.uint8)
    rows = generator.integers(-128, 128, (30, 64)).astype(np.int8)
    pairs = kernel.breaking(rows)
    whole = kernel.excess(codes, pairs, 30)
    monkeypatch.setattr(kernel, "AT_A_TIME", 10_000)
    small = kernel.excess(codes, pairs, 30)
    np.testing.assert_array_equal(whole.excess, small.excess)
    assert whole.clipped == small.clipped > 0


def test_excess_of_opposite_signs_cancels_and_still_counts_as_clipped() -> None:
    rows = np.array([[127, 127, -127, -127]], np.int8)
    found = kernel.excess(np.full((1, 4), 255, np.uint8), kernel.breaking(rows), 1)
    assert (found.excess.tolist(), found.clipped) == ([[32003 - 32002]], 1)


def test_patches_are_in_the_order_kernel_position_then_channel() -> None:
    x = np.arange(2 * 5 * 3).reshape(1, 2, 5, 3)
    seen = kernel.patches(x, (2, 2), (1, 2), (1, 2))
    assert seen.shape == (1, 1, 2, 2, 2, 3)
    assert seen[0, 0, 1].reshape(-1).tolist() == [x[0, i, j, c] for i in (0, 1) for j in (2, 4) for c in range(3)]
