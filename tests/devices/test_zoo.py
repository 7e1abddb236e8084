"""Trained models on other CPUs: the recorded bits on every x86, met on ARM and in wasm, and the phone's file beside them.

One export a model, which writes both files; one start a device, which runs both.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import devices
from tests.devices import web, zoo

pytestmark = pytest.mark.slow

CNNS = ("lite0", "rnet", "orientation")
CHECKED, SHARE = "runtime.check(opened[0]).to_json()", "runtime.kernels(opened[0], runs=1).integer_macs"
X86 = ("full", "avx512", "avx2")
BOTH = """
import sys, runtime
opened = [runtime.load(sys.argv[1], threads=1, ort=ort) for ort in (False, True)]
onnx, ort = ([bundle.run(probe.inputs) for probe in bundle.probes()] for bundle in opened)
equal = all(a[name].tobytes() == b[name].tobytes() for a, b in zip(onnx, ort, strict=True) for name in a)
share = runtime.kernels(opened[1], runs=1).integer_macs
print('{"onnx": %s, "ort": {"integer_macs": %r, "equal": %d}}' % (runtime.check(opened[0]).to_json(), share, equal))
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="packlight-zoo-") as made:
        yield Path(made)
    bundle.cache_clear()
    page.cache_clear()


@functools.cache
def bundle(folder: Path, name: str) -> Path:
    return zoo.export(name, folder / name)


@functools.cache
def page(folder: Path) -> Path:
    """The folder that samples/web/setup.sh makes; node checks any bundle with it."""
    return web.set_up(bundle(folder, "rnet"), folder / "page")


def on(device: str, made: Path) -> dict[str, Any]:
    """{"onnx": Verdict, "ort": {"integer_macs", "equal": outputs are the .onnx file's, bit for bit}}."""
    found: dict[str, Any] = json.loads(devices.run(device, BOTH, str(made)).stdout)
    return found


def in_wasm(made: Path, folder: Path) -> dict[str, Any]:
    """The same in node."""
    found, outputs = {}, []
    for file, words in (("onnx", ()), ("ort", ("--ort",))):
        written = folder / f"{file}.json"
        _, found[file] = web.check_in_node(page(folder), made, *words, "--outputs", str(written))
        outputs.append(web.read_outputs(written))
    pairs = [(a[name].tobytes(), b[name].tobytes()) for a, b in zip(*outputs, strict=True) for name in a]
    return {"onnx": found["onnx"], "ort": found["ort"] | {"equal": all(a == b for a, b in pairs)}}


def met(found: dict[str, Any]) -> None:
    """Hold that the bundle meets its budget there, and that the phone's file runs as the .onnx file does."""
    assert found["onnx"]["met"], found["onnx"]["lines"]
    assert found["ort"]["equal"]
    assert found["ort"]["integer_macs"] == found["onnx"]["integer_macs"]


@pytest.mark.parametrize("device", X86)
@pytest.mark.parametrize("name", CNNS)
def test_bits_are_the_recorded_ones_on_every_x86(name: str, device: str, folder: Path) -> None:
    found = on(device, bundle(folder, name))
    met(found)
    assert (found["onnx"]["exact"], found["onnx"]["integer_macs"]) == (True, 1.0)


@pytest.mark.parametrize("device", [*devices.ARM, "wasm"])
@pytest.mark.parametrize("name", CNNS)
def test_all_of_it_runs_in_integers_on_arm_and_in_wasm_and_is_met(name: str, device: str, folder: Path) -> None:
    found = in_wasm(bundle(folder, name), folder) if device == "wasm" else on(device, bundle(folder, name))
    met(found)
    assert found["onnx"]["integer_macs"] == 1


def test_transformer_is_met_in_wasm(folder: Path) -> None:
    """Attention's products, LayerNorm and Softmax are float there: no bits are promised."""
    found = in_wasm(bundle(folder, "minilm"), folder)
    met(found)
    assert found["onnx"]["integer_macs"] > 0.9


def test_transformer_and_its_phones_file_are_one_model_on_a_phones_cpu(folder: Path) -> None:
    """Without `check`, whose Q/DQ in float takes minutes where a CPU is emulated."""
    found = json.loads(devices.run("cortex-a76", BOTH.replace(CHECKED, SHARE), str(bundle(folder, "minilm"))).stdout)
    assert found["ort"] == {"integer_macs": found["onnx"], "equal": 1}
    assert found["onnx"] > 0.9
