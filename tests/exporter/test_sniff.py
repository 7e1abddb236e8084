"""Files that are often given for a model: each is named for what it is, and nothing of it is run."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import pytest
import torch

import exporter
from exporter.errors import TraceError
from tests.command import call

Captured = pytest.CaptureFixture[str]


def archive() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("data.pkl", b"x")
    return content.getvalue()


HEADER = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
FILES = {
    "empty": (b"", "found an empty file"),
    "page": (b"<!DOCTYPE html><html><body>404</body></html>", "found a web page, as a failed download leaves"),
    "page-in-capitals": (b"\n <HTML>sorry</HTML>", "found a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    "zip": (archive(), "found a zip archive"),
    "pickle": (b"\x80\x02}q\x00.", "found a pickle, which runs code"),
    "safetensors": (
        len(HEADER).to_bytes(8, "little") + HEADER + b"\0" * 4,
        "found safetensors: weights without a model",
    ),
    "tflite": (b"\x1c\0\0\0TFL3" + b"\0" * 40, "found a TensorFlow Lite file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 40, "found an HDF5 file"),
    "noise": (b"\xff" * 64, "found no ONNX graph"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_that_is_no_onnx_model_is_named_for_what_it_is(name: str, tmp_path: Path, capsys: Captured) -> None:
    content, says = FILES[name]
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(TraceError, match=says):
        exporter.from_onnx(tmp_path / "m.onnx")
    assert call("export", tmp_path / "m.onnx", "--calibration", "random", "--out", tmp_path / "b") == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and err.count("\n") == 1
    assert not (tmp_path / "b").exists()


def test_web_page_and_archive_in_the_place_of_a_program_are_named(tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(b"<html>")
    with pytest.raises(TraceError, match="found a web page"):
        exporter.from_program(tmp_path / "m.pt2")
    (tmp_path / "m.pt2").write_bytes(archive())
    with pytest.raises(TraceError, match="found a zip archive"):
        exporter.from_program(tmp_path / "m.pt2")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("weights.pth", "found a pickle, which runs code when it is read"),
        ("WEIGHTS.PT", "found a pickle"),
        ("model.ckpt", "load the weights in a file.py that offers source()"),
        ("model.safetensors", "found weights without a model"),
        ("model.tflite", "found a TensorFlow Lite file, .* as with tf2onnx"),
        ("model.h5", "found a Keras file"),
        ("notes.txt", "found a web page, .* expected file.py, a folder with sample.py, model.onnx or model.pt2"),
        ("", "found a folder with neither sample.py nor config.json"),
        ("nowhere", "found no such file"),
    ],
)
def test_name_that_is_no_models_says_what_to_give(name: str, says: str, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "notes.txt").write_text("<html>")
    assert call("export", tmp_path / name, "--json") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert re.search(says, err), err


@pytest.mark.parametrize("given", [None, 3, torch.zeros(1), b"m.onnx"])
def test_what_is_no_path_is_refused(given: object) -> None:
    for read in (exporter.from_onnx, exporter.from_program):
        with pytest.raises(TraceError, match="expected a path"):
            read(given)  # type: ignore[arg-type]
