from __future__ import annotations

import pytest

from exporter.causal import limits
from exporter.errors import RecipeError
from runtime.language_manifest import Limits


def test_limits_are_said_as_people_say_them() -> None:
    assert limits.parse(["kl<=.05", "ppl rise <= 3%", "same-top1>=90%"], 10**6) == Limits(
        max_kl=0.05, max_rise=0.03, min_same_top1=0.9, max_size_bytes=10**6
    )
    assert limits.parse(["perplexity rise<=0.1"]) == Limits(max_rise=0.1)


@pytest.mark.parametrize("said", [["kl>=.05"], ["snr>=20dB"], ["kl"], ["kl<=.1", "kl<=.2"], ["ppl<=3"]])
def test_what_is_no_limit_of_a_language_model_is_refused(said: list[str]) -> None:
    with pytest.raises(RecipeError, match="--budget"):
        limits.parse(said)
