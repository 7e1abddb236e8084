from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from runtime import manifest as manifests
from runtime.errors import BundleError
from runtime.judged import Judged, Part
from runtime.manifest import Budget, File, Machine, Manifest, Tensor

EMPTY = File(sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", size_bytes=0)
SMALL = Manifest(
    name="größe",
    target="portable",
    inputs=(Tensor(name="image", dtype="float32", shape=("batch", 3)),),
    outputs=(Tensor(name="logits", dtype="float32", shape=("batch", 2)),),
    files={"probe.npz": EMPTY, "model.int8.onnx": EMPTY},
    pair_rule=True,
    exact_on=("x86_64",),
    recorded_on=Machine(machine="x86_64", flags=("avx2",)),
    session={"optimization.disable_specified_optimizers": "SkipLayerNormFusion"},
    budget=Budget(min_snr_db=30.0),
    judged={"logits": Judged(by="reals", parts=(Part(axis=1, runs=((0, 2),), varying_rms=0.5),))},
    versions={"onnxruntime": "1.31.1"},
)
SMALL_JSON = """{
 "budget": {
  "max_abs": null,
  "max_ram_bytes": null,
  "max_size_bytes": null,
  "min_cosine": null,
  "min_integer_macs": null,
  "min_same_top1": null,
  "min_snr_db": 30.0
 },
 "exact_on": [
  "x86_64"
 ],
 "files": {
  "model.int8.onnx": {
   "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
   "size_bytes": 0
  },
  "probe.npz": {
   "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
   "size_bytes": 0
  }
 },
 "format": 2,
 "inputs": [
  {
   "dtype": "float32",
   "name": "image",
   "shape": [
    "batch",
    3
   ]
  }
 ],
 "judged": {
  "logits": {
   "axis": 0,
   "batched": false,
   "by": "reals",
   "parts": [
    {
     "axis": 1,
     "runs": [
      [
       0,
       2
      ]
     ],
     "varying_rms": 0.5
    }
   ]
  }
 },
 "name": "größe",
 "outputs": [
  {
   "dtype": "float32",
   "name": "logits",
   "shape": [
    "batch",
    2
   ]
  }
 ],
 "pair_rule": true,
 "preprocessing": null,
 "recorded_on": {
  "flags": [
   "avx2"
  ],
  "machine": "x86_64"
 },
 "session": {
  "optimization.disable_specified_optimizers": "SkipLayerNormFusion"
 },
 "target": "portable",
 "verdict": null,
 "versions": {
  "onnxruntime": "1.31.1"
 }
}
"""


def changed(*path: str | int, to: Any) -> str:
    """The small manifest with one value replaced, or added."""
    root = copy.deepcopy(json.loads(SMALL_JSON))
    place = root
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return json.dumps(root)


def test_manifest_bytes_are_pinned() -> None:
    assert manifests.dumps(SMALL) == SMALL_JSON


def test_loading_what_was_written_gives_the_same_value() -> None:
    assert manifests.loads(manifests.dumps(SMALL), "manifest.json") == SMALL


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("surprise",), 1, "manifest.json:surprise: found an unknown key"),
        (("name",), 3, "manifest.json:name: found an integer"),
        (("name",), "", "manifest.json:name: found an empty string"),
        (("format",), True, "manifest.json:format: found True, expected 1 or 2"),
        (("format",), 0, "manifest.json:format: found 0, expected 1 or 2"),
        (("inputs",), [], "manifest.json:inputs: found an empty list"),
        (("inputs", 0, "dtype"), "object", "manifest.json:inputs[0].dtype: found object"),
        (("inputs", 0, "shape", 1), -1, "manifest.json:inputs[0].shape[1]: found -1"),
        (("inputs", 0, "shape", 0), True, "manifest.json:inputs[0].shape[0]: found true"),
        (("inputs", 0, "unit"), "m", "manifest.json:inputs[0].unit: found an unknown key"),
        (("files", "model.int8.onnx", "sha256"), "E3B0", "manifest.json:files.model.int8.onnx.sha256: found a string"),
        (("files", "model.int8.onnx", "size_bytes"), -1, "manifest.json:files.model.int8.onnx.size_bytes: found an"),
        (("session",), [], "manifest.json:session: found an empty list"),
        (
            ("session", "session.disable_prepacking"),
            1,
            "manifest.json:session.session.disable_prepacking: found an int",
        ),
        (("budget", "max_abs"), "small", "manifest.json:budget.max_abs: found a string"),
        (("budget", "max_abs"), True, "manifest.json:budget.max_abs: found a boolean"),
        (("budget", "min_same_top1"), 99, "manifest.json:budget.min_same_top1: found 99"),
    ],
)
def test_wrong_value_is_refused_by_its_place(path: tuple[str | int, ...], value: Any, where: str) -> None:
    with pytest.raises(BundleError) as refusal:
        manifests.loads(changed(*path, to=value), "manifest.json")
    assert str(refusal.value).startswith(where)
    assert refusal.value.path == "manifest.json"


@pytest.mark.parametrize("key", json.loads(SMALL_JSON))
def test_missing_key_is_refused_by_name(key: str) -> None:
    root = json.loads(SMALL_JSON)
    del root[key]
    with pytest.raises(BundleError, match=f"manifest.json:{key}: found nothing"):
        manifests.loads(json.dumps(root), "manifest.json")


def test_two_inputs_of_one_name_are_refused() -> None:
    twice = [json.loads(SMALL_JSON)["inputs"][0]] * 2
    with pytest.raises(BundleError, match="inputs: found two tensors of one name"):
        manifests.loads(changed("inputs", to=twice), "manifest.json")


def test_newer_format_is_refused_before_anything_else_is_read() -> None:
    with pytest.raises(BundleError, match=r"format: found 3, expected 2 or less; made by a newer packlight; upgrade"):
        manifests.loads('{"format": 3, "a new key": []}', "manifest.json")


def test_infinity_is_a_string_that_float_reads_back() -> None:
    text = manifests.canonical({"best": math.inf, "worst": (-math.inf, 1.5)})
    assert text == '{\n "best": "inf",\n "worst": [\n  "-inf",\n  1.5\n ]\n}\n'
    assert float(json.loads(text)["worst"][0]) == -math.inf


def test_nan_is_never_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        manifests.canonical({"snr_db": math.nan})


def test_digest_is_size_and_sha256(tmp_path: Path) -> None:
    file = tmp_path / "abc"
    file.write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifests.digest(file) == File(sha256=sha256, size_bytes=3)
