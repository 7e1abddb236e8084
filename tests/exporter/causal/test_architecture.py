from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter.causal import architecture
from exporter.errors import TraceError
from tests.exporter.causal import tiny

pytestmark = tiny.needs_transformers


def decoder(name: str) -> architecture.Decoder:
    return architecture.decoder(architecture.read(tiny.saved(name)))


def test_windows_are_those_of_the_layers() -> None:
    assert decoder("qwen2").windows == (-1, 8, 8)
    assert decoder("gemma2").windows == (8, -1, 8)
    assert decoder("gemma3").windows == (8, 8, -1)
    assert decoder("llama").windows == (-1, -1, -1)


def test_gemma3_has_other_positions_where_it_looks_near_than_where_it_looks_far() -> None:
    found = decoder("gemma3")
    assert found.rope_of == (1, 1, 0)
    far, near = found.ropes
    assert near.frequencies[0] == 1 and far.frequencies[0] == 1 / 8  # rope_scaling: linear, by 8
    assert near.frequencies[1] == pytest.approx(10_000 ** (-2 / 32))
    assert far.frequencies[1] == pytest.approx(1_000_000 ** (-2 / 32) / 8)


def test_long_rope_is_held_to_the_context_that_its_short_factors_are_for() -> None:
    found = decoder("phi3-long")
    assert found.context == 64
    assert found.ropes[0].factor == pytest.approx((1 + np.log(4) / np.log(64)) ** 0.5)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "mixtral"}, "expected one of llama, mistral"),
        ({"hidden_act": "relu"}, "found 'relu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "found 'dynamic'"),
        ({"head_dim": 12}, "no kernel for these"),
        ({"quantization_config": {"quant_method": "awq"}}, "stored by awq"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama")
    tiny.edit(tmp_path, **changed)
    with pytest.raises(TraceError) as error:
        architecture.decoder(architecture.read(tmp_path))
    assert said in str(error.value)


def test_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no config.json"):
        architecture.read(tmp_path)
