from __future__ import annotations

import numpy as np
import pytest

from runtime import confidence


def test_wilson_gives_the_bounds_of_the_books() -> None:
    found = confidence.wilson(81, 263, confidence=0.95)  # Newcombe 1998, table I: 0.2553 .. 0.3662
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert confidence.wilson(0, 20, 0.95).low == 0.0 and confidence.wilson(20, 20, 0.95).high == 1.0
    assert confidence.wilson(0, 0) == confidence.Interval(low=0.0, found=0.0, high=1.0)


def test_paired_shares_are_newcombes_tenth_method() -> None:
    pairs = [(True, True)] * 36 + [(False, True)] * 12 + [(True, False)] * 2 + [(False, False)] * 0
    old, new = np.array(pairs).T
    found = confidence.paired_shares(old, new, confidence=0.95)
    assert (found.low, found.found, found.high) == pytest.approx((0.0569, 0.2, 0.3404), abs=5e-4)


def test_interval_of_pairs_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(400):
        old = rng.random(300) < 0.9
        new = np.where(rng.random(300) < 0.9, old, rng.random(300) < 0.9)  # the same share, and correlated
        found = confidence.paired_shares(old, new, confidence=0.95)
        held += found.low <= 0 <= found.high
    assert 0.93 <= held / 400 <= 0.99


def test_bootstrap_of_a_mean_is_as_wide_as_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, (400, 1))
    found = confidence.of_sums(values, lambda sums: sums[:, 0] / 400, np.random.default_rng(0), confidence=0.95)
    assert found.found == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_same_seed_gives_the_same_bounds_and_equal_samples_no_width() -> None:
    values = np.random.default_rng(1).random(50)
    first, second = (confidence.of_median(values, np.random.default_rng(3)) for _ in range(2))
    assert first == second and first.low < first.found < first.high
    same = confidence.of_sums(np.ones((30, 1)), lambda sums: sums[:, 0], np.random.default_rng(0))
    assert (same.low, same.found, same.high) == (30.0, 30.0, 30.0)


def test_an_infinite_error_of_one_model_is_a_bound_and_no_nan() -> None:
    values = np.ones((30, 1))
    values[4] = np.inf
    found = confidence.of_sums(values, lambda sums: -sums[:, 0], np.random.default_rng(0))
    assert found.low == -np.inf and found.found == -np.inf
