"""The pair rule: what it promises about vpmaddubsw, by arithmetic; tests/devices holds it against CPUs without VNNI."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from exporter.correct import rounding
from exporter.correct.rounding import Paired
from exporter.numerics import pairing
from exporter.numerics.quantized import NOTHING
from tests.exporter import graphs

ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 33)), elements=st.floats(-4, 4, width=32))


def saturating_sums(activations: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """u8 [K] by s8 [channels, K] as vpmaddubsw and vpmaddwd sum: products of neighbours meet in int16 and saturate."""
    products = activations.astype(np.int64) * codes.astype(np.int64)
    products = np.pad(products, ((0, 0), (0, products.shape[1] % 2)))
    return np.clip(products[:, 0::2] + products[:, 1::2], -(2**15), 2**15 - 1).sum(axis=1)


@given(ROWS, st.integers(0, 2**32 - 1))
def test_sums_of_fitted_codes_never_saturate(rows: np.ndarray, seed: int) -> None:
    codes, _ = pairing.fit(rows)
    generator = np.random.default_rng(seed)
    for activations in (np.full(rows.shape[1], 255), generator.integers(0, 256, rows.shape[1])):
        np.testing.assert_array_equal(saturating_sums(activations, codes), codes.astype(np.int64) @ activations)


def test_sums_of_full_range_codes_do_saturate_without_the_rule() -> None:
    codes = np.array([[127, 127, -127, -127]])
    assert saturating_sums(np.array([255, 255, 255, 0]), codes) != codes @ np.array([255, 255, 255, 0])
    assert pairing.keep(codes).tolist() == [[64, 64, -64, -64]]


def test_the_rule_changes_offending_pairs_alone() -> None:
    codes = np.array(
        [[127, 1, 127, -127, 100, 29, 0, 127, 127]]
    )  # pairs (127, 1), (127, -127), (100, 29), (0, 127), 127
    assert pairing.keep(codes).tolist() == [[127, 1, 127, -127, 99, 29, 0, 127, 127]]


def test_every_pair_of_codes_keeps_the_rule_and_moves_no_further_than_its_excess() -> None:
    codes = np.array(list(itertools.product(range(-127, 128, 9), repeat=2)))
    kept = pairing.keep(codes)
    same_sign = codes[:, 0] * codes[:, 1] > 0
    assert (np.abs(kept[same_sign]).sum(axis=1) <= 128).all()
    assert (kept[~same_sign] == codes[~same_sign]).all()
    excess = np.maximum(np.abs(codes).sum(axis=1) - 128, 0) * same_sign
    assert (np.abs(codes - kept).sum(axis=1) == excess).all()


@settings(max_examples=50)
@given(ROWS)
def test_fitted_codes_lose_no_more_than_seven_bits_would(rows: np.ndarray) -> None:
    codes, scale = pairing.fit(rows)
    error = ((rows - codes * scale[:, None]) ** 2).sum(axis=1)
    largest = np.abs(rows).max(axis=1)
    unit = np.where(largest > NOTHING, largest / 63.5, 1).astype(np.float32)  # the last of SCALES: 7 bits
    seven = ((rows - np.rint(rows / unit[:, None]) * unit[:, None]) ** 2).sum(axis=1)
    assert (error <= seven * (1 + 1e-4) + 1e-9).all()


def one_gemm(weight: np.ndarray) -> tuple[dict[str, np.ndarray], Paired]:
    """The codes under the rule, and the effect, of one Gemm with B = weight."""
    text = f"(float[N,{weight.shape[0]}] x) => (float[N,{weight.shape[1]}] y) {{ [g] y = Gemm(x, w) }}"
    model = graphs.model(text, {"w": weight})
    plan, _ = graphs.planned(model, {"x": graphs.noise(0, 2, weight.shape[0])})
    rounded, (effect,) = rounding.under_pair_rule(model, plan)
    return {name: each.codes for name, each in rounded.items()}, effect


def test_layer_whose_neighbours_have_unlike_signs_never_needed_the_rule_and_says_so() -> None:
    weight = np.abs(graphs.noise(1, 8, 4)) * np.array([[1], [-1]] * 4, np.float32)
    _, effect = one_gemm(weight)
    assert (effect.node, effect.broken) == ("g", 0.0)
    assert effect.kept_db >= effect.nearest_db > 35
    assert str(effect) == "pair rule: no pair breaks it"


def test_broken_share_and_both_snrs_are_those_of_a_case_by_hand() -> None:
    """One column 127, 127, 0, 0: the first of two pairs breaks the rule, and the nearest codes have no error at all.

    Of the scales tried 1.97 is the best at which 127 has the code 64: 64 · 1.97 = 126.08, an error of 0.92 in 127.
    """
    codes, effect = one_gemm(np.array([[127.0], [127.0], [0.0], [0.0]], np.float32))
    assert codes["w"].ravel().tolist() == [64, 64, 0, 0]
    assert (effect.node, effect.broken, effect.nearest_db) == ("g", 0.5, math.inf)
    assert effect.kept_db == pytest.approx(20 * math.log10(127 / 0.92), abs=1e-3)
    assert str(effect) == "pair rule: 50 % of pairs would break it; weight SNR inf -> 42.8 dB"


def test_effect_names_its_share_in_two_digits_and_snr_in_tenths() -> None:
    effect = Paired(node="fc", broken=0.01234, nearest_db=43.26, kept_db=40.04)
    assert str(effect) == "pair rule: 1.2 % of pairs would break it; weight SNR 43.3 -> 40.0 dB"


def test_depthwise_layer_has_no_pairs_and_a_float_one_is_left_alone() -> None:
    model = graphs.model(
        """(float[N,4,5,5] x) => (float[N,2,3,3] y) {
            [deep] h = Conv <group=4> (x, v)
            [flat] y = Conv (h, w)
        }""",
        {"v": np.full((4, 1, 3, 3), 1, np.float32), "w": np.full((2, 4, 1, 1), 1, np.float32)},
    )
    batch = {"x": graphs.noise(0, 1, 4, 5, 5)}
    for rules, expected in (({}, ["flat"]), ({"flat": "float"}, [])):
        plan, _ = graphs.planned(model, batch, **rules)
        rounded, effects = rounding.under_pair_rule(model, plan)
        assert [effect.node for effect in effects] == expected
        assert [*rounded] == ["w"] * len(expected)
