from __future__ import annotations

import numpy as np
import pytest

from exporter.calibrate.enough import Coverage, Enough
from exporter.report.make import _uncovered, _unvaried
from runtime import drift


def lines(outside: float, beyond: float, promised_db: float = 0.0, noise: float = 0.0) -> list[str]:
    covered = Coverage(tensor="x", outside=outside, values=700, beyond=beyond, error=90.0)
    enough = Enough(curves=(), coverage=(covered,), batches=8, sentence="")
    same = ({"y": np.float32([[1, 2], [1, 2]])}, {"y": np.float32([[1, 2], [1, 2 + noise]])})
    half = ({"y": np.float32([[1, 2], [1, 2]])}, {"y": np.float32([[1, 2], [2, 1]])})
    found = drift.measure([half if outside > 0.5 else same] * 8)
    return [str(line) for line in _uncovered(enough, found, promised_db) if not line.met]


def test_heldout_data_far_outside_what_was_calibrated_are_not_met() -> None:
    said = lines(outside=0.7, beyond=25.03)
    assert "calibration data do not cover held-out data: 70 % of its values lie outside, by up to 2503 %" in said[0]
    assert said[1].startswith("same_top1 y: 0.5 ")


@pytest.mark.parametrize(("outside", "beyond"), [(0.7e-1, 25.0), (0.4, 0.9)])
def test_few_values_outside_or_near_the_range_are_bad_luck(outside: float, beyond: float) -> None:
    assert lines(outside, beyond) == []


def test_ten_times_the_error_that_calibration_data_promised_is_not_met() -> None:
    assert lines(outside=0.01, beyond=0.3, promised_db=35.0, noise=0.1) == []  # 30 dB
    said = lines(outside=0.01, beyond=0.3, promised_db=35.0, noise=0.3)  # 20.5 dB
    assert said == [
        "worst SNR, dB: 20.4576 (at least 25), calibration data do not cover held-out data: 35.0 dB on calibration data"
    ]


def test_data_that_are_alike_are_not_met() -> None:
    assert [str(line) for line in _unvaried("every sample is the same")] == [
        "different samples: 1 (at least 2), every sample is the same: give real data"
    ]
    assert not list(_unvaried(""))
