from __future__ import annotations

import pytest

from exporter.errors import CalibrationError, QuantizeError, RecipeError, TraceError
from runtime import PacklightError


@pytest.mark.parametrize("error", [RecipeError, TraceError, CalibrationError, QuantizeError])
def test_every_error_of_ours_is_one_line_under_one_root(error: type[PacklightError]) -> None:
    raised = error("conv3/weight", found="NaN", expected="numbers", do="look at batch 17")
    assert isinstance(raised, PacklightError)
    assert str(raised) == "conv3/weight: found NaN, expected numbers; look at batch 17"


def test_errors_carry_fields_and_not_only_words() -> None:
    assert TraceError("m", op_types=["aten.x"]).op_types == ("aten.x",)
    assert (CalibrationError("m", tensor="t", batch=17).tensor, CalibrationError("m", batch=17).batch) == ("t", 17)
    assert QuantizeError("m", node="n").node == "n"
    assert RecipeError("unknown key", where="a.toml").where == "a.toml"
    assert str(RecipeError("unknown key", where="a.toml")) == "a.toml: unknown key"
