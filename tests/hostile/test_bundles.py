"""Bundles that must be refused: each is a good bundle with one thing done to it, by an accident or by someone."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import runtime
from runtime import manifest as manifests
from runtime.errors import BundleError
from runtime.manifest import Budget
from tests.runtime import models


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_bundle(tmp_path_factory.mktemp("good") / "tiny")


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "tiny"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON in place, as an attacker with a text editor would."""
    file = bundle / manifests.MANIFEST
    root = json.loads(file.read_text(encoding="utf-8"))
    change(root)
    file.write_text(json.dumps(root), encoding="utf-8")


def refusal(bundle: Path) -> str:
    with pytest.raises(BundleError) as error:
        runtime.load(bundle)
    return str(error.value)


def test_good_bundle_is_loaded(bundle: Path) -> None:
    assert runtime.check(runtime.load(bundle)).exact


def test_absent_folder_and_folder_without_manifest_are_refused(bundle: Path, tmp_path: Path) -> None:
    assert "found no folder, expected a bundle" in refusal(tmp_path / "none")
    (bundle / manifests.MANIFEST).unlink()
    assert "manifest.json: found nothing, expected a file" in refusal(bundle)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": NaN}', b'{"format": 1, "format": 1}', b"[" * 200_000]
)
def test_manifest_that_is_not_one_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / manifests.MANIFEST).write_bytes(content)
    assert "manifest.json" in refusal(bundle)


def test_manifest_of_unbelievable_size_is_not_read(bundle: Path) -> None:
    with open(bundle / manifests.MANIFEST, "ab") as file:
        file.truncate(1 << 30)  # sparse: costs no disk
    assert "found 1073741824 bytes, expected at most" in refusal(bundle)


def test_newer_format_is_refused_with_what_to_do(bundle: Path) -> None:
    edit(bundle, lambda root: root.update(format=manifests.FORMAT + 1))
    assert "made by a newer packlight; upgrade packlight on this machine" in refusal(bundle)


@pytest.mark.parametrize("name", ["model.int8.onnx", "model.fp32.onnx", "probe.npz", "plan.txt", "recipe.toml"])
def test_one_flipped_bit_is_refused(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    assert f"{name}: found SHA-256 " in refusal(bundle)


def test_cut_file_is_refused_by_its_size(bundle: Path) -> None:
    os.truncate(bundle / manifests.INT8, 100)
    assert "model.int8.onnx: found 100 bytes, expected " in refusal(bundle)


def test_missing_file_is_refused_whether_listed_or_not(bundle: Path) -> None:
    (bundle / manifests.PROBE).unlink()
    assert "probe.npz: found nothing, expected a file" in refusal(bundle)
    edit(bundle, lambda root: root["files"].pop(manifests.PROBE))
    assert "manifest.json:files.probe.npz: found nothing" in refusal(bundle)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "model.int8.onnx.data", "custom_ops.so"])
def test_file_that_is_not_listed_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"")
    assert f"{name}: found a file the manifest does not list" in refusal(bundle)


def test_folder_inside_is_refused(bundle: Path) -> None:
    (bundle / "weights").mkdir()
    assert "weights: found a file the manifest does not list" in refusal(bundle)
    edit(bundle, lambda root: root["files"].update(weights=root["files"]["plan.txt"]))
    assert "weights: found something that is not a file" in refusal(bundle)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "..",
        ".",
        "",
        ".hidden",
        "C:secret",
        "a\x00b",
        "a\nb",
        "manifest.json",
    ],
)
def test_name_that_is_not_a_plain_one_is_refused(bundle: Path, name: str) -> None:
    edit(bundle, lambda root: root["files"].update({name: root["files"]["plan.txt"]}))
    assert "found a name that is not allowed" in refusal(bundle)


def test_link_that_leaves_the_folder_is_refused_even_to_equal_bytes(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / manifests.INT8, tmp_path / "outside.onnx")
    (bundle / manifests.INT8).symlink_to(tmp_path / "outside.onnx")
    assert "model.int8.onnx: found a link, expected a file in its own folder" in refusal(bundle)


def test_manifest_that_is_a_link_out_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / manifests.MANIFEST, tmp_path / "outside.json")
    (bundle / manifests.MANIFEST).symlink_to(tmp_path / "outside.json")
    assert "manifest.json: found a link, expected a file in its own folder" in refusal(bundle)


@pytest.mark.parametrize(
    "entry",
    [
        "session.optimized_model_filepath",
        "session.model_external_initializers_file_folder_path",
        "session.collect_node_memory_stats_to_file",
        "session.enable_profiling",
        "session.custom_ops_library",
        "ep.context_enable",
        "ep.context_file_path",
    ],
)
def test_session_entry_that_reads_or_writes_files_is_refused(bundle: Path, entry: str) -> None:
    edit(bundle, lambda root: root["session"].update({entry: "x"}))
    assert f"manifest.json:session.{entry}: found an entry no bundle may set" in refusal(bundle)


def with_external_data(bundle: Path, location: str) -> None:
    """Seal a bundle whose int8 model takes a weight from `location`."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    image = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])]
    logits = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])]
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("ReduceMean", ["flat"], ["one"], axes=[1]),
        helper.make_node("Mul", ["one", "w"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "g", image, logits, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (bundle / manifests.INT8).write_bytes(model.SerializeToString())
    models.seal(bundle, models.manifest(Budget()))


@pytest.mark.parametrize("location", ["../weights.bin", "./../weights.bin", "{outside}"])
def test_external_data_that_leaves_the_folder_is_refused(bundle: Path, location: str) -> None:
    outside = bundle.parent / "weights.bin"
    np.ones(4, np.float32).tofile(outside)
    with_external_data(bundle, location.format(outside=outside))
    assert "External data path" in refusal(bundle)


def test_external_data_inside_must_be_listed(bundle: Path) -> None:
    with_external_data(bundle, "weights.bin")
    np.ones(4, np.float32).tofile(bundle / "weights.bin")
    assert "weights.bin: found a file the manifest does not list" in refusal(bundle)
    models.seal(bundle, models.manifest(Budget()))
    assert runtime.load(bundle).manifest.files["weights.bin"].size_bytes == 16


def test_operator_of_an_unknown_library_is_refused(bundle: Path) -> None:
    model = onnx.load(bundle / manifests.INT8)
    model.graph.node[0].domain = "attacker"
    model.opset_import.append(helper.make_opsetid("attacker", 1))
    onnx.save(model, bundle / manifests.INT8)
    models.seal(bundle, models.manifest(Budget()))
    assert "model.int8.onnx: ONNX Runtime" in refusal(bundle)


@pytest.mark.parametrize("name", [manifests.INT8, manifests.FP32])
def test_model_optimized_for_one_cpu_is_refused(bundle: Path, name: str) -> None:
    settings = ort.SessionOptions()
    settings.optimized_model_filepath = str(bundle / "optimized.onnx")
    settings.log_severity_level = 3
    ort.InferenceSession(bundle / manifests.FP32, settings, providers=["CPUExecutionProvider"])
    if b"com.microsoft.nchwc" not in (bundle / "optimized.onnx").read_bytes():
        pytest.skip("this CPU has no NCHWc kernels")
    (bundle / "optimized.onnx").replace(bundle / name)
    models.seal(bundle, models.manifest(Budget()))
    assert f"{name}: found operators of com.microsoft.nchwc, expected a model for every CPU" in refusal(bundle)


def test_pickle_in_a_sealed_probe_is_refused_and_never_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parent)

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, ("sprung",)

    np.savez(bundle / manifests.PROBE, **{"0000/input/image": np.array([Trap()], dtype=object)})
    models.seal(bundle, models.manifest(Budget()))
    opened = runtime.load(bundle)
    with pytest.raises(BundleError, match="found Python objects, where numbers are expected"):
        runtime.check(opened)
    assert not (bundle.parent / "sprung").exists()
