from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import runtime
from runtime import manifest as manifests
from runtime import onnx_text, trusted
from runtime.errors import BundleError
from runtime.explain import explain
from runtime.manifest import Budget
from tests.runtime import models


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(b"abc" * 1000)
    return tmp_path / "f"


def test_only_regular_files_are_read_and_nothing_is_waited_for(file: Path, tmp_path: Path) -> None:
    assert trusted.read(file, 3000) == b"abc" * 1000
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    says = {
        "pipe": "something that is not a file", "link": "a link", "loop": "a link", "none": "nothing", ".": "something",
        "f/x": "nothing", "a\0b": "embedded null byte",
    }  # fmt: skip
    for name, said in says.items():
        with pytest.raises(BundleError, match=f"found {said}"):
            trusted.read(tmp_path / name, 3000)
    with pytest.raises(BundleError, match="found something that is not a file"):
        trusted.read(Path("/dev/zero"), 3000)


def test_limit_stands_before_the_read(file: Path) -> None:
    os.truncate(file, 1 << 40)  # sparse: costs no disk
    with pytest.raises(BundleError, match="found 1099511627776 bytes, expected at most 3000"):
        trusted.read(file, 3000)


def test_what_is_hashed_is_what_is_read_though_the_name_is_another_file_now(file: Path, tmp_path: Path) -> None:
    expected = manifests.digest(file)
    with trusted.hashed(file, expected) as descriptor:
        (tmp_path / "other").write_bytes(b"xyz" * 1000)
        os.replace(tmp_path / "other", file)
        assert trusted.content(file, descriptor, 3000, 3000) == b"abc" * 1000
        given = trusted.whole(file, descriptor, 3000, 3000)
        assert (Path(given).read_bytes() if isinstance(given, str) else given) == b"abc" * 1000
    with pytest.raises(BundleError, match="f: found SHA-256"):
        trusted.held(file, expected, 3000)


def test_names_stand_outside_of_weights_and_at_every_border(tmp_path: Path) -> None:
    weights = [models.noise(np.random.default_rng(n), 3000) for n in range(3)]
    nodes = [helper.make_node("Add", [f"x{n}", f"w{n}"], [f"x{n + 1}"], f"node {n}") for n in range(3)]
    named = {f"w{n}": each for n, each in enumerate(weights)}
    model = models.build(nodes, {"x0": ["n"]}, {"x3": ["n"]}, named)
    model.graph.initializer[1].raw_data = b"inside" * 2000
    model.producer_name = "y" * onnx_text.BLOCK + "edge"
    onnx.save(model, tmp_path / "m")
    descriptor = os.open(tmp_path / "m", os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    names = {b"inside", b"node 0", b"node 2", b"edge", b"none", b"yedge"}
    assert onnx_text.found(descriptor, size, names) == names - {b"inside", b"none"}
    os.close(descriptor)
    (tmp_path / "no").write_bytes(b"\xff" * 20 + b"edge")
    descriptor = os.open(tmp_path / "no", os.O_RDONLY)
    assert onnx_text.found(descriptor, 24, names) == {b"edge"}
    os.close(descriptor)


SWAPPED = ("model.fp32.onnx", "model.int8.onnx", "model.int8.ort", "probe.npz", "plan.txt")


@pytest.mark.parametrize("name", SWAPPED)
def test_file_that_is_swapped_after_load_is_never_read(ort_bundle: Path, name: str) -> None:
    bundle = runtime.load(ort_bundle, threads=1, ort=name.endswith(".ort"))
    probe = bundle.probes()[0]
    other = (ort_bundle / name).read_bytes()
    (ort_bundle / "x").write_bytes(other[:-1] + bytes([other[-1] ^ 1]))
    os.replace(ort_bundle / "x", ort_bundle / name)
    np.testing.assert_array_equal(bundle.run(probe.inputs)["logits"], probe.int8["logits"])
    calls = [runtime.check] if name != "plan.txt" else []
    calls += [runtime.kernels] if "int8" in name else []  # type: ignore[list-item]
    calls += [explain] if name == "plan.txt" or "int8.onnx" in name else []  # type: ignore[list-item]
    calls += [runtime.bench] if "fp32" in name else []  # type: ignore[list-item]
    for call in calls:
        with pytest.raises(BundleError, match=f"{name}: found (SHA-256|[0-9]+ bytes)"):
            call(bundle)


def test_file_that_is_swapped_between_hash_and_session_is_never_opened(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trusted.whole

    def swapping(path: Path, *args: int) -> bytes | str:
        given = real(path, *args)
        (own_bundle.parent / "x").write_bytes(b"no model")
        os.replace(own_bundle.parent / "x", path)
        return given

    probe = runtime.load(own_bundle).probes()[0]
    monkeypatch.setattr(trusted, "whole", swapping)
    logits = runtime.load(own_bundle, threads=1).run(probe.inputs)["logits"]
    np.testing.assert_array_equal(logits, probe.int8["logits"])


def with_weights(folder: Path, name: str, location: str) -> None:
    """A bundle whose model `name` takes a weight of ones from `location`."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    image = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16])]
    logits = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])]
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("ReduceSum", ["w"], ["sum"], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "one"], ["rows"]),
        helper.make_node("Mul", ["rows", "sum"], ["scaled"]),
        helper.make_node("Mul", ["scaled", "wide"], ["logits"]),
    ]
    one = onnx.numpy_helper.from_array(np.int64([1]), "one")
    wide = onnx.numpy_helper.from_array(np.ones((1, 10), np.float32), "wide")
    graph = helper.make_graph(nodes, "g", image, logits, [weight, one, wide])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / name).write_bytes(model.SerializeToString())
    models.seal(folder, models.manifest(Budget()))


@pytest.mark.parametrize("name", [manifests.INT8, manifests.FP32])
def test_large_weights_of_both_models_are_the_listed_bytes_and_no_others(
    own_bundle: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ones = np.ones(4, np.float32)
    ones.tofile(own_bundle / "weights.bin")
    (2 * ones).tofile("weights.bin")  # where a process stands
    with_weights(own_bundle, name, "weights.bin")
    image = {"image": np.full((1, 3, 16, 16), 0.5, np.float32)}
    bundle = runtime.load(own_bundle, threads=1)
    run = bundle.run if name == manifests.INT8 else bundle.reference()
    assert run is not None and run(image)["logits"][0, 0] == 2.0
    shutil.copy("weights.bin", own_bundle / "weights.bin")
    with pytest.raises(BundleError, match=r"weights.bin: found SHA-256"):
        bundle.reference() if name == manifests.FP32 else runtime.kernels(bundle, image)
    (own_bundle / "weights.bin").unlink()
    with_weights(own_bundle, name, "weights.bin")  # now it is not listed
    with pytest.raises(BundleError, match="cannot open it: .*External data path does not exist"):
        runtime.load(own_bundle, threads=1).reference()
