from __future__ import annotations

import json

import pytest

from exporter.calibrate import Range, Ranges


def test_json_is_sorted_and_whole_whatever_the_order() -> None:
    one, two = (Range(low=-n, high=n + 0.5, elements=n, masked=0) for n in (1, 2))
    forward = Ranges(tensors={"a": one, "b": two}, batches=3, method="minmax")
    backward = Ranges(tensors={"b": two, "a": one}, batches=3, method="minmax")
    assert forward.to_json() == backward.to_json()
    assert json.loads(forward.to_json()) == {
        "batches": 3,
        "method": "minmax",
        "tensors": {
            "a": {"elements": 1, "high": 1.5, "low": -1, "masked": 0},
            "b": {"elements": 2, "high": 2.5, "low": -2, "masked": 0},
        },
    }
    assert forward.to_json().endswith("}\n")


def test_json_never_holds_nan() -> None:
    bad = Ranges(tensors={"a": Range(low=float("nan"), high=1, elements=1, masked=0)}, batches=1, method="minmax")
    with pytest.raises(ValueError, match="not JSON compliant"):
        bad.to_json()
