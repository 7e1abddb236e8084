from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from runtime import cpu


def test_embedded_model_is_what_its_comment_says() -> None:
    matrices = [
        helper.make_tensor_value_info(name, dtype, [16, 16])
        for name, dtype in (("a", TensorProto.UINT8), ("b", TensorProto.INT8), ("y", TensorProto.INT32))
    ]
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "g", matrices[:2], matrices[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 10)], ir_version=4)
    assert model.SerializeToString() == cpu.MATMUL_INTEGER
    onnx.checker.check_model(model)


def test_flags_are_those_of_the_system_that_matter_in_our_order() -> None:
    found = cpu.read()
    assert found.machine == platform.machine()
    assert [flag for flag in cpu.FLAGS if flag in found.flags] == list(found.flags)
    listed = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    assert set(found.flags) == set(cpu.FLAGS) & set(listed)


@pytest.mark.parametrize(("model", "pairs"), [("Haswell", True), ("Nehalem", False)])
def test_cpu_that_adds_pairs_in_int16_is_known_by_what_it_computes(model: str, pairs: bool) -> None:
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("no qemu-x86_64: apt-get install qemu-user")
    root, packages = Path(cpu.__file__).parents[1], Path(onnxruntime.__file__).parents[1]
    done = subprocess.run(
        [emulator, "-cpu", model, os.path.realpath(sys.executable), "-c",
         "from runtime import cpu; print(cpu.pairs_in_int16())"],
        env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{packages}"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.split() == [str(pairs)], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("system", "family"),
    [("AMD64", "x86_64"), ("x86_64", "x86_64"), ("arm64", "aarch64"), ("ARM64", "aarch64"), ("riscv64", "riscv64")],
)
def test_family_has_one_name_on_every_system(system: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: system)
    assert cpu.machine() == family
