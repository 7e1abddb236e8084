from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from runtime.errors import BundleError, PacklightError
from runtime.session import open_session
from tests.runtime import models


def test_path_and_bytes_open_the_same_model(tmp_path: Path) -> None:
    onnx.save(models.pair_sum(), tmp_path / "m.onnx")
    feed = {name: np.ones((2, 4), np.float32) for name in ("left", "right")}
    for model in (tmp_path / "m.onnx", (tmp_path / "m.onnx").read_bytes()):
        assert open_session(model, threads=1).run(None, feed)[0].tolist() == [[2.0] * 4] * 2


def test_entries_reach_onnxruntime() -> None:
    entries = {"session.disable_prepacking": "1", "some.entry.nobody.knows": "x"}
    settings = open_session(models.pair_sum().SerializeToString(), threads=3, entries=entries).get_session_options()
    assert {key: settings.get_session_config_entry(key) for key in entries} == entries
    assert settings.intra_op_num_threads == 3


def test_cpu_alone_is_the_default_provider() -> None:
    assert open_session(models.pair_sum().SerializeToString()).get_providers() == ["CPUExecutionProvider"]


def test_model_that_is_none_is_refused_in_onnxruntimes_words(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="model: ONNX Runtime .* cannot open it: found .*INVALID_PROTOBUF"):
        open_session(b"junk")
    with pytest.raises(BundleError, match="NO_SUCHFILE") as refusal:
        open_session(tmp_path / "none.onnx")
    assert refusal.value.path == str(tmp_path / "none.onnx")


def test_entry_that_onnxruntime_refuses_is_our_error() -> None:
    with pytest.raises(BundleError, match="Config key is empty"):
        open_session(models.pair_sum().SerializeToString(), entries={"": "1"})


def test_threads_and_providers_that_cannot_be_are_refused() -> None:
    model = models.pair_sum().SerializeToString()
    with pytest.raises(PacklightError, match="threads: found 0, expected 1 or more"):
        open_session(model, threads=0)
    with pytest.raises(PacklightError, match="provider: found AbacusExecutionProvider, expected one of .*CPU"):
        open_session(model, providers=["AbacusExecutionProvider"])
