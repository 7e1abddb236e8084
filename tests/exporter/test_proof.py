from __future__ import annotations

import numpy as np
import pytest

from exporter import proof

X = np.linspace(-1, 1, 1000, dtype=np.float32)


def test_equal_outputs_do_not_differ() -> None:
    assert proof.difference({"y": X}, {"y": X.copy()}) == ""


def test_rounding_of_another_summation_order_is_no_difference() -> None:
    assert proof.difference({"y": X}, {"y": X * np.float32(1 + 3e-7)}) == ""


def test_error_of_two_thousandths_is_a_difference_and_one_of_five_ten_thousandths_is_not() -> None:
    """60 dB is a relative error of 1e-3; a sound network with batch norms over next to nothing was seen at 68."""
    assert proof.difference({"y": X}, {"y": X * np.float32(1.002)}).startswith("'y' differs: SNR 54.0 dB")
    assert proof.difference({"y": X}, {"y": X * np.float32(1.0005)}) == ""


def test_output_that_is_zero_but_for_rounding_has_no_snr_worth_the_name() -> None:
    zero = np.zeros(4, np.float32)
    assert proof.difference({"y": zero}, {"y": zero + np.float32(9e-7)}) == ""
    assert "SNR -inf dB" in proof.difference({"y": zero}, {"y": zero + np.float32(2e-6)})


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        ({}, "no output 'y'"),
        ({"y": X[:, None]}, "'y' has shape [1000, 1] instead of [1000]"),
        ({"y": X.astype(np.float64)}, "'y' has dtype float64 instead of float32"),
        ({"y": np.full_like(X, np.nan)}, "'y' differs: SNR -inf dB"),
    ],
)
def test_difference_is_named(candidate: dict[str, np.ndarray], says: str) -> None:
    assert says in proof.difference({"y": X}, candidate)


def test_worst_output_is_the_one_named() -> None:
    assert proof.difference({"a": X, "b": X}, {"a": X, "b": -X}).startswith("'b' differs: SNR -6.0 dB")


def test_integer_outputs_must_be_equal() -> None:
    ids = np.arange(8)
    assert proof.difference({"ids": ids}, {"ids": ids.copy()}) == ""
    assert "differs" in proof.difference({"ids": ids}, {"ids": ids[::-1].copy()})
