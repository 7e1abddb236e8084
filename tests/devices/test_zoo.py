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

import numpy as np
import pytest

from runtime.gate import Q_LIMIT
from tests import devices
from tests.devices import web, zoo

pytestmark = pytest.mark.slow

CNNS = ("lite0", "rnet", "orientation")
X86 = ("full", "avx512", "avx2")
# Attention's products stay in float, where minilm's file has no recorded bits to hold; it shows the phone's file.
BOTH = """
import sys, runtime
opened = [runtime.load(sys.argv[1], threads=1, ort=ort) for ort in (False, True)]
checked = [runtime.check(each) for each in opened]
outputs = [[bundle.run(probe.inputs) for probe in bundle.probes()] for bundle in opened]
equal = all(a[name].tobytes() == b[name].tobytes() for a, b in zip(*outputs, strict=True) for name in a)
print('{"onnx": %s, "ort": %s, "equal": %s}' % (*(each.to_json() for each in checked), str(equal).lower()))
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
    """{"onnx": Verdict, "ort": Verdict, "equal": both files' outputs are, bit for bit}."""
    found: dict[str, Any] = json.loads(devices.run(device, BOTH, str(made)).stdout)
    return found


def in_wasm(made: Path, folder: Path) -> dict[str, Any]:
    """The same in node."""
    found: dict[str, Any] = {}
    outputs = []
    for file, words in (("onnx", ()), ("ort", ("--ort",))):
        written = folder / f"{file}.json"
        _, found[file] = web.check_in_node(page(folder), made, *words, "--outputs", str(written))
        outputs.append(web.read_outputs(written))
    pairs = [(a[name], b[name]) for a, b in zip(*outputs, strict=True) for name in a]
    return found | {"equal": all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)}


def same_file(found: dict[str, Any]) -> None:
    """Hold that the phone's file ran in the same share of integer kernels, with the same outputs."""
    assert found["equal"]
    assert found["ort"]["integer_macs"] == found["onnx"]["integer_macs"]
    assert found["ort"]["met"], found["ort"]["lines"]


@pytest.mark.parametrize("device", X86)
@pytest.mark.parametrize("name", CNNS)
def test_both_files_have_the_recorded_bits_on_every_x86(name: str, device: str, folder: Path) -> None:
    found = on(device, bundle(folder, name))
    for verdict in (found["onnx"], found["ort"]):
        assert (verdict["met"], verdict["exact"], verdict["integer_macs"]) == (True, True, 1.0), verdict["lines"]
    assert found["equal"]


@pytest.mark.parametrize("device", devices.ARM)
@pytest.mark.parametrize("name", CNNS)
def test_both_files_are_met_on_arm_and_equal(name: str, device: str, folder: Path) -> None:
    found = on(device, bundle(folder, name))
    assert (found["onnx"]["met"], found["onnx"]["integer_macs"]) == (True, 1.0), found["onnx"]["lines"]
    assert max(found["onnx"]["q"].values()) <= Q_LIMIT
    same_file(found)


@pytest.mark.parametrize("name", CNNS)
def test_both_files_are_met_in_wasm_and_equal(name: str, folder: Path) -> None:
    found = in_wasm(bundle(folder, name), folder)
    assert (found["onnx"]["met"], found["onnx"]["integer_macs"]) == (True, 1.0), found["onnx"]["lines"]
    same_file(found)


def test_phone_file_of_a_transformer_runs_as_its_onnx_file_does(folder: Path) -> None:
    made = bundle(folder, "minilm")
    for found in (on("full", made), on("cortex-a76", made), in_wasm(made, folder)):
        assert found["onnx"]["integer_macs"] > 0.9
        assert found["onnx"]["met"], found["onnx"]["lines"]
        same_file(found)
