"""The phone's file on other CPUs: written on any x86 it is the same file, and on ARM it runs as the .onnx file does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from onnxruntime.quantization import QuantType

from exporter import ort_format
from exporter.target import SESSION
from runtime.kernels import trace
from tests import devices
from tests.exporter import int8

TRACE = """
import json, sys
from pathlib import Path
import numpy as np
from runtime.kernels import trace
from runtime.session import open_session
batch = dict(np.load(sys.argv[1]))
found = []
for path in map(Path, sys.argv[2:]):
    seen = trace(path, batch, entries=json.loads(path.with_suffix(".json").read_text()), runs=1)
    outputs = open_session(path, threads=1).run(None, batch)
    found.append([[(each.kernel, each.types, each.macs) for each in seen.kernels], outputs[0].tobytes().hex()])
print(json.dumps(found))
"""
WRITE = """
import hashlib, sys
from pathlib import Path
from exporter import ort_format
from exporter.target import SESSION
print(hashlib.sha256(ort_format.convert(Path(sys.argv[1]).read_bytes(), SESSION, "portable").ort).hexdigest())
"""


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return int8.quantized(tmp_path_factory.mktemp("u8s8") / "model.onnx", QuantType.QUInt8, QuantType.QInt8)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return int8.quantized(tmp_path_factory.mktemp("s8s8") / "model.onnx")


def on_arm(model: Path, folder: Path) -> tuple[list[list[object]], list[list[object]]]:
    """(kernels and output bytes) of the .onnx file, and of the .ort file made of it here, on a Cortex-A76."""
    np.savez(folder / "batch.npz", **next(int8.images(3, 1)))
    for name, content in ("model.onnx", model.read_bytes()), ("phone.ort", phone(model)):
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".json").write_text("{}")
    files = [str(folder / name) for name in ("batch.npz", "model.onnx", "phone.ort")]
    as_onnx, as_ort = json.loads(devices.run("cortex-a76", TRACE, *files).stdout)
    return as_onnx, as_ort


def phone(model: Path) -> bytes:
    return ort_format.convert(model.read_bytes(), {}, "arm64").ort


def test_file_runs_on_arm_in_the_kernels_of_the_onnx_file_with_its_bits(unsigned: Path, tmp_path: Path) -> None:
    as_onnx, as_ort = on_arm(unsigned, tmp_path)
    assert sorted(map(str, as_ort[0])) == sorted(map(str, as_onnx[0]))
    assert as_ort[1] == as_onnx[1]
    here = trace(unsigned, next(int8.images(3, 1)), runs=1)
    assert sorted(str([each.kernel, each.types, each.macs]) for each in here.kernels) == sorted(map(str, as_ort[0]))


def test_signed_activations_are_integer_in_the_file_as_arm_itself_would_run_them(signed: Path, tmp_path: Path) -> None:
    as_onnx, as_ort = on_arm(signed, tmp_path)
    layers = [kernel for kernel, _, macs in as_ort[0] if macs]  # type: ignore[misc]
    assert layers == ["QLinearConv", "QLinearConv", "QLinearConv", "QGemm"]
    assert sorted(map(str, as_ort[0])) == sorted(map(str, as_onnx[0])) and as_ort[1] == as_onnx[1]


def test_file_written_without_vnni_is_the_same_file(unsigned: Path) -> None:
    """What it is optimized to does not depend on the CPU that does it."""
    here = hashlib.sha256(ort_format.convert(unsigned.read_bytes(), SESSION, "portable").ort).hexdigest()
    assert devices.run("avx2", WRITE, str(unsigned)).stdout.strip() == here
