"""The check of samples/web in node: onnxruntime-web's kernels, and the page's own reading of manifest, probe and profile."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import pytest

import exporter
import runtime
from exporter import ort_format
from runtime import cpu, drift, exported, gate, judged, manifest
from runtime.judged import Judged
from runtime.manifest import Budget, Manifest
from runtime.probe import Probe, read_probe, write_arrays, write_probe
from tests import models
from tests.devices import web
from tests.runtime import models as runtime_models

# Sums of float64 in another order.
CLOSE = 1e-9
Array = np.ndarray[Any, Any]
CALIBRATION, HELDOUT = 1, 2


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, classifier: Path) -> Path:
    """The folder that setup.sh makes; its bundle is that of `classifier`."""
    return web.set_up(classifier, tmp_path_factory.mktemp("web") / "out")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runtime_models.write_bundle(
        tmp_path_factory.mktemp("bundles") / "tiny", Budget(min_snr_db=10, min_integer_macs=1)
    )


@pytest.fixture
def own(classifier: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classifier, tmp_path / "own"))


def change(folder: Path, **fields: object) -> None:
    """Set fields of a bundle's manifest, and list its files as they are now."""
    about = manifest.loads((folder / manifest.MANIFEST).read_text(), manifest.MANIFEST)
    runtime_models.seal(
        folder, Manifest(**{f.name: getattr(about, f.name) for f in dataclasses.fields(about)} | fields)
    )


def refusal(page: Path, folder: Path) -> Mapping[str, str]:
    status, verdict = web.check_in_node(page, folder)
    assert (status, verdict["verdict"]) == (2, "could not run")
    said: Mapping[str, str] = verdict["error"]
    return said


def numbers(measured: runtime.Drift) -> dict[str, dict[str, Any]]:
    return {each.name: dataclasses.asdict(each) for each in measured.outputs}


def same(found: Mapping[str, Any], expected: runtime.Drift) -> None:
    """Hold a drift of the page's against one of ours: every field of every output."""
    assert found["batches"] == expected.batches
    assert [each["name"] for each in found["outputs"]] == [each.name for each in expected.outputs]
    for output, ours in zip(found["outputs"], numbers(expected).values(), strict=True):
        assert output.keys() == ours.keys()
        for name, value in ours.items():
            close(output[name], value, name)


def close(found: Any, ours: Any, where: str) -> None:
    """Hold a JSON value against a value of ours, numbers as CLOSE as they must be."""
    if isinstance(ours, float):
        assert float(found) == pytest.approx(ours, rel=CLOSE), where
    elif isinstance(ours, dict):
        assert found.keys() == ours.keys(), where
        for name, value in ours.items():
            close(found[name], value, f"{where}.{name}")
    elif isinstance(ours, tuple):
        assert len(found) == len(ours), where
        for each, value in zip(found, ours, strict=True):
            close(each, value, where)
    else:
        assert found == ours, where


@pytest.mark.parametrize("name", ["residual", "two_input"])
def test_portable_bundle_is_met_in_wasm_and_every_number_is_what_python_says(
    name: str, page: Path, tmp_path: Path
) -> None:
    folder, outputs = tmp_path / name, tmp_path / "outputs.json"
    exporter.export(
        models.source(name),
        exporter.load_recipe("portable"),
        calibration=models.batches(name, CALIBRATION, 4),
        heldout=models.batches(name, HELDOUT, 3),
        out=folder,
    )
    status, verdict = web.check_in_node(page, folder, "--outputs", str(outputs))
    assert (status, verdict["verdict"]) == (0, "met")
    bundle, here = runtime.load(folder), web.read_outputs(outputs)
    probes, about = bundle.probes(), bundle.manifest.judged
    fp32, recorded = [probe.fp32 for probe in probes], [probe.int8 for probe in probes]
    quantization, device = measure(fp32, recorded, about), measure(recorded, here, about)
    same(verdict["drift"], measure(fp32, here, about))
    same(verdict["quantization"], quantization)
    same(verdict["device"], device)
    for name, q in gate.relative(device, quantization).items():
        assert q <= 0.7 and verdict["q"][name] == pytest.approx(q, rel=CLOSE)
    assert verdict["exact"] == all(each.max_abs == 0 for each in device.outputs)


def measure(
    reference: list[Any], candidate: list[Any], about: Mapping[str, Judged] = MappingProxyType({})
) -> runtime.Drift:
    return drift.measure(zip(reference, candidate, strict=True), drift.grounds(about))


@pytest.fixture(scope="module")
def checked(page: Path, classifier: Path) -> dict[str, Any]:
    status, verdict = web.check_in_node(page, classifier)
    assert (status, verdict["verdict"]) == (0, "met")
    return verdict


def test_convolutions_and_products_have_the_recorded_bits_in_wasm(checked: dict[str, Any]) -> None:
    assert checked["exact"] and checked["q"] == {"logits": 0}


def test_kernels_and_macs_are_those_of_onnxruntime_here(checked: dict[str, Any], classifier: Path) -> None:
    ours = runtime.kernels(runtime.load(classifier))
    found = {each["node"]: each for each in checked["kernels"]}
    for kernel in ours.kernels:
        if kernel.macs:
            there = found[kernel.node]
            assert (there["kernel"], there["types"], there["macs"]) == (kernel.kernel, kernel.types, kernel.macs)
    assert checked["integer_macs"] == ours.integer_macs == 1
    two_pictures = 2 * runtime_models.CLASSIFIER_MACS
    assert sum(each["macs"] for each in checked["kernels"]) == two_pictures
    assert sum(each["ms"] for each in checked["kernels"]) > 0
    assert checked["timing"]["median_ms"] > 0 and checked["timing"]["runs"] >= 3


def test_entries_of_the_manifest_reach_the_session_and_float_kernels_fail_the_budget(page: Path, own: Path) -> None:
    change(own, session={"optimization.disable_specified_optimizers": "QDQSelectorActionTransformer"})
    status, verdict = web.check_in_node(page, own)
    assert (status, verdict["verdict"], verdict["integer_macs"]) == (1, "not met", 0)
    met = [(line["what"], line["met"]) for line in verdict["lines"]]
    assert met == [("snr_db logits", True), ("integer_macs", False), ("device_q logits", True)]


def test_outputs_far_from_the_recorded_ones_are_not_met(page: Path, own: Path) -> None:
    def moved(probe: Probe) -> Probe:  # as if the CPU of the export had saturated: five quantization errors away
        int8 = {name: probe.fp32[name] + 6 * (probe.int8[name] - probe.fp32[name]) for name in probe.int8}
        return dataclasses.replace(probe, int8=int8)

    write_probe(own / manifest.PROBE, [moved(probe) for probe in read_probe(own / manifest.PROBE)])
    change(own, exact_on=("wasm32",))
    status, verdict = web.check_in_node(page, own)
    assert status == 1
    assert verdict["q"]["logits"] == pytest.approx(5 / 6, rel=1e-3)
    unmet = {line["what"]: line["found"] for line in verdict["lines"] if not line["met"]}
    assert unmet == {"device_q logits": verdict["q"]["logits"], "exact logits": 0}


def test_phones_file_runs_in_the_same_kernels(page: Path, own: Path) -> None:
    about = runtime.load(own).manifest
    made = ort_format.convert((own / manifest.INT8).read_bytes(), about.session, "portable")
    (own / manifest.ORT).write_bytes(made.ort)
    change(own, pair_rule=False)
    status, verdict = web.check_in_node(page, own, "--ort")
    assert (status, verdict["bundle"]["model"], verdict["integer_macs"]) == (0, manifest.ORT, 1)
    assert verdict["exact"] and verdict["kernel"] is None
    assert not any("pair rule" in note for note in verdict["notes"])  # measured: wasm does not add products in int16
    assert cpu.MATMUL_INTEGER.hex() in (page / "check.mjs").read_text().replace("' +\n    '", "")


def test_tampered_model_is_refused_before_it_is_opened(page: Path, own: Path) -> None:
    model = own / manifest.INT8
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    said = refusal(page, own)
    assert said["what"] == manifest.INT8
    assert said["found"] == f"SHA-256 {manifest.digest(model).sha256}"
    assert said["expected"] == json.loads((own / manifest.MANIFEST).read_text())["files"][manifest.INT8]["sha256"]
    assert "copy the bundle again" in said["do"]
    model.write_bytes(data[:-1])
    assert (refusal(page, own)["found"], refusal(page, own)["expected"]) == (f"{len(data) - 1} bytes", str(len(data)))


def test_model_with_operators_of_one_cpu_is_refused(page: Path, own: Path) -> None:
    model = onnx.load(own / manifest.INT8)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft.nchwc", 1))
    (own / manifest.INT8).write_bytes(model.SerializeToString())
    files = {path.name: manifest.digest(path) for path in own.iterdir() if path.name != manifest.MANIFEST}
    rewrite(own, lambda root: root["files"].update({name: dataclasses.asdict(file) for name, file in files.items()}))
    assert refusal(page, own)["found"] == "operators of com.microsoft.nchwc"


def rewrite(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    root = json.loads((folder / manifest.MANIFEST).read_text())
    edit(root)
    (folder / manifest.MANIFEST).write_text(json.dumps(root))


@pytest.mark.parametrize(
    ("place", "edit"),
    [
        ("manifest.json:format", lambda root: root.update(format=3)),
        ("manifest.json:color", lambda root: root.update(color="red")),
        ("manifest.json:pair_rule", lambda root: root.pop("pair_rule")),
        ("manifest.json:inputs[0].dtype", lambda root: root["inputs"][0].update(dtype="complex64")),
        ("manifest.json:outputs[0].shape[0]", lambda root: root["outputs"][0].update(shape=[-1, 10])),
        ("manifest.json:files.../up", lambda root: root["files"].update({"../up": root["files"]["plan.txt"]})),
        ("manifest.json:files.plan.txt.sha256", lambda root: root["files"]["plan.txt"].update(sha256="0")),
        ("manifest.json:recorded_on.flags", lambda root: root["recorded_on"].update(flags="avx2")),
        ("manifest.json:session.ep.context_file_path", lambda root: root["session"].update({"ep.context_file_path": "x"})),
        ("manifest.json:budget.min_integer_macs", lambda root: root["budget"].update(min_integer_macs=2)),
        ("the model's outputs", lambda root: root["outputs"][0].update(shape=["batch", 10, 1])),
    ],
)  # fmt: skip
def test_manifest_is_read_as_strictly_as_in_python(
    place: str, edit: Callable[[dict[str, Any]], object], page: Path, own: Path
) -> None:
    rewrite(own, edit)
    said = refusal(page, own)
    assert said["what"].startswith((place, "probe.npz") if place.startswith("the model") else place)
    if place == "manifest.json:format":
        assert "newer packlight" in said["do"]
    with pytest.raises(runtime.BundleError):
        runtime.load(own).probes()


def test_bundle_that_failed_at_export_is_not_met_in_a_page(page: Path, own: Path) -> None:
    lines = (exported.Line(what="snr_db logits", found=float("-inf"), limit=10.0, met=False, cause="nothing is left"),)
    change(own, verdict=exported.Exported(met=False, lines=lines, batches=9, outputs={}, probe=(0,), hardest=0))
    status, found = web.check_in_node(page, own)
    assert (status, found["verdict"]) == (1, "not met")
    (line,) = [line for line in found["lines"] if not line["met"]]
    assert line["what"] == "exported"
    assert line["cause"] == "snr_db logits: -inf (at least 10), nothing is left"


def test_key_that_is_there_twice_is_refused(page: Path, own: Path) -> None:
    file = own / manifest.MANIFEST
    file.write_text(file.read_text().replace('"name": "tiny"', '"name": "t\\"i: ny", "name": "tiny"'))
    assert refusal(page, own)["found"] == "a key that appears twice in one object"


def test_keys_and_entries_of_the_format_are_those_of_python(page: Path) -> None:
    code = f"import {{KEYS, ENTRIES, DTYPES, FORMAT}} from {json.dumps((page / 'manifest.mjs').as_uri())};"
    found = node(f"{code} console.log(JSON.stringify({{KEYS, ENTRIES, DTYPES, FORMAT}}))")
    kinds = {
        name: next(getattr(module, name) for module in (manifest, judged, exported) if hasattr(module, name))
        for name in found["KEYS"]
    }
    assert found["KEYS"] == {name: [field.name for field in dataclasses.fields(kind)] for name, kind in kinds.items()}
    assert set(found["ENTRIES"]) == manifest.ENTRIES
    assert (set(found["DTYPES"]), found["FORMAT"]) == (manifest.DTYPES, manifest.FORMAT)


def node(source: str) -> Any:
    """What a module prints, as JSON."""
    ran = subprocess.run(
        [web.need_node(), "--input-type=module", "-e", source], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_arrays_of_every_dtype_and_kind_of_number_drift_as_in_python(page: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    fp32 = {name: noise(rng, np.dtype(name), 3, 5) for name in sorted(manifest.DTYPES)}
    int8 = {name: noise(rng, np.dtype(name), 3, 5) for name in sorted(manifest.DTYPES)}
    nan, inf = np.nan, np.inf
    fp32 |= {
        "agree": floats(1, nan, inf, -inf),
        "disagree": floats(1, nan),
        "zero": floats(0, 0),
        "scalar": np.float16(6e-8),
    }
    int8 |= {
        "agree": floats(2, nan, inf, -inf),
        "disagree": floats(1, 2),
        "zero": floats(0, 1),
        "scalar": np.float16(0),
    }
    fp32["rows"], int8["rows"] = floats([1, 1], [nan, 2], [3, 4]), floats([1, 1], [2, nan], [3, 4])
    fp32["empty"] = int8["empty"] = np.zeros((0, 4), np.float32)
    probe = Probe(inputs={"a/b": np.float32([[1]])}, fp32=fp32, int8=int8)
    write_probe(tmp_path / "probe.npz", [probe, probe])
    code = f"""
        import {{ readFileSync }} from 'node:fs';
        import {{ read }} from {json.dumps((page / "probe.mjs").as_uri())};
        import {{ measure }} from {json.dumps((page / "drift.mjs").as_uri())};
        import {{ toJson }} from {json.dumps((page / "check.mjs").as_uri())};
        const batches = read(new Uint8Array(readFileSync({json.dumps(str(tmp_path / "probe.npz"))})));
        console.log(toJson(measure(batches.map((b) => b.fp32), batches.map((b) => b.int8))));
    """
    expected = measure([fp32, fp32], [int8, int8])
    found = node(code)
    order = sorted(fp32)  # as the file lists them
    by_name = {each.name: each for each in expected.outputs}
    same(found, dataclasses.replace(expected, outputs=tuple(by_name[name] for name in order)))
    assert math.isinf(by_name["disagree"].snr_db) and by_name["rows"].same_top1 == 2 / 3


def floats(*values: Any) -> Array:
    return np.array(values, np.float32)


def noise(rng: np.random.Generator, dtype: np.dtype[Any], *shape: int) -> Array:
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(0, 2 if dtype.kind == "b" else 100, shape).astype(dtype)


def fortran(arrays: dict[str, Array]) -> dict[str, Array]:
    return {key: np.asfortranarray(array) for key, array in arrays.items()}


REFUSED_PROBES: Mapping[str, tuple[Callable[[Path, dict[str, Array]], object], str]] = {
    "compressed": (lambda file, arrays: np.savez_compressed(file, **arrays), "compressed arrays"),
    "objects": (
        lambda file, arrays: np.savez(file, **arrays | {"0000/input/x": np.array([{}], object)}),
        "descr |O",
    ),
    "fortran": (lambda file, arrays: np.savez(file, **fortran(arrays)), "Fortran order"),
    "big-endian": (
        lambda file, arrays: np.savez(file, **{key: array.astype(">f4") for key, array in arrays.items()}),
        "descr >f4",
    ),
    "gap": (
        lambda file, arrays: write_arrays(file, {key.replace("0001", "0007"): a for key, a in arrays.items()}),
        "batches 0,2,7",
    ),
    "role": (lambda file, arrays: write_arrays(file, arrays | {"0000/int4/logits": np.zeros(1)}), "an unknown key"),
    "tensor": (
        lambda file, arrays: write_arrays(file, arrays | {"0000/int8/more": np.zeros(1)}),
        "tensors logits,more",
    ),
    "shape": (
        lambda file, arrays: write_arrays(file, arrays | {"0000/input/image": np.zeros((2, 3, 9, 16), np.float32)}),
        "float32 [2,3,9,16]",
    ),
    "no zip": (lambda file, arrays: file.write_bytes(b"PK"), "no end of a zip"),
    "damaged": (lambda file, arrays: flip(file), "another CRC-32"),
    "twice": (lambda file, arrays: twice(file), "an array that is there twice"),
}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)


def twice(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        name = archive.namelist()[0]
        data = archive.read(name)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(file, "a") as archive:
        archive.writestr(name, data)


@pytest.mark.parametrize("kind", REFUSED_PROBES)
def test_probe_that_the_format_does_not_allow_is_refused(kind: str, page: Path, own: Path) -> None:
    write, found = REFUSED_PROBES[kind]
    file, about = own / manifest.PROBE, runtime.load(own).manifest
    with np.load(file) as arrays:
        kept = {key: arrays[key] for key in arrays.files}
    write(file, kept)
    runtime_models.seal(own, about)
    said = refusal(page, own)
    assert said["what"].startswith(manifest.PROBE)
    assert said["found"] == found
