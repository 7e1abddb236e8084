from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest

from runtime import ort_format
from runtime.errors import BundleError
from runtime.session import open_session
from tests.runtime import models

FORMAT = b"\x01\x00\x00\x006\x00"  # the version's text, one letter long, as a flatbuffer has it


@pytest.fixture(scope="module")
def ort_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ort") / "model.int8.ort"
    entries = {
        "session.save_model_format": "ORT",
        "optimization.disable_specified_optimizers": "NchwcTransformer",
    }
    open_session(models.pair_sum().SerializeToString(), entries=entries, optimized=path)
    return path


def said(path: Path, content: bytes) -> str:
    """ONNX Runtime's words about a file."""
    path.write_bytes(content)
    with pytest.raises(BundleError) as raised:
        open_session(path)
    return raised.value.found


def test_file_of_a_newer_onnxruntime_names_both_versions_and_what_to_do(ort_file: Path, tmp_path: Path) -> None:
    content = ort_file.read_bytes()
    assert content.count(FORMAT) == 1
    words = said(tmp_path / "newer.ort", content.replace(FORMAT, FORMAT.replace(b"6", b"7")))
    error = ort_format.refusal(Path("model.int8.ort"), words, "1.99.0")
    assert error.found == "ORT format 7, written by onnxruntime 1.99.0"
    assert error.expected == f"a format that onnxruntime {ort.__version__} reads"
    assert "install onnxruntime 1.99.0 or newer" in str(error) and f"with onnxruntime {ort.__version__}" in str(error)
    assert error.path == "model.int8.ort" and "\n" not in str(error)


def test_operator_that_this_build_does_not_have_is_named(ort_file: Path, tmp_path: Path) -> None:
    renamed = ort_file.read_bytes().replace(b"\x03\x00\x00\x00Add\x00", b"\x03\x00\x00\x00Adx\x00")
    error = ort_format.refusal(Path("model.int8.ort"), said(tmp_path / "op.ort", renamed), "1.99.0")
    assert "Adx" in error.found
    assert "required_operators_and_types.config" in str(error)


def test_operator_that_a_reduced_build_left_out_is_named() -> None:
    words = "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for QLinearAdd(1) node with name 'a'"
    assert ort_format.refusal(Path("m.ort"), words, "").found == "QLinearAdd(1)"


def test_damaged_file_says_what_onnxruntime_said(ort_file: Path, tmp_path: Path) -> None:
    words = said(tmp_path / "half.ort", ort_file.read_bytes()[:200])
    error = ort_format.refusal(Path("m.ort"), words, "")
    assert "verification failed" in error.found and str(error).endswith("copy the bundle again")


def test_file_without_its_maker_is_from_another_onnxruntime() -> None:
    assert "another onnxruntime" in str(ort_format.refusal(Path("m.ort"), "anything", ""))
