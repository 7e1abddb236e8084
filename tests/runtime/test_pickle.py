"""What packlight returns and raises goes through pickle, to another process and back."""

from __future__ import annotations

import pickle

import pytest

from runtime.errors import BundleError, DriftExceeded, InputError, PacklightError
from runtime.manifest import Budget
from tests.runtime import models, test_gate


def test_manifest_and_verdict_come_back_equal() -> None:
    about = models.manifest(Budget(min_snr_db=3.0))
    for value in (about, test_gate.judge()):
        assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize(
    "error",
    [
        PacklightError("a", found="b", expected="c", do="d"), BundleError("a", path="p"), InputError("a", name="n"),
        DriftExceeded("a", verdict=test_gate.judge(), found="b"),
    ],
)  # fmt: skip
def test_errors_come_back_with_their_line_and_fields(error: PacklightError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))
