"""x86-64 CPUs without VNNI: this CPU with a masked cpuid, at native speed, and qemu's Haswell to hold it against.

ONNX Runtime picks its kernels by what the instruction `cpuid` answers, which a program cannot forbid on every machine. So the
guest gets a copy of ONNX Runtime's library in which each `cpuid` is an invalid instruction, and cpuid.c answers in its place.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnxruntime

from tests.devices import guest
from tests.devices.guest import ROOT, Guest

CPUID, INVALID = b"\x0f\xa2", b"\x06\xa2"  # 06 is no instruction in 64-bit mode, and no compiler emits it
PACKAGES = Path(onnxruntime.__file__).resolve().parents[1]
SOURCE = Path(__file__).with_name("cpuid.c")
MEGAHERTZ = re.compile(r"^cpu MHz.*$", re.MULTILINE)  # changes from one reading to the next
HIDDEN = {
    "full": (),
    "avx512": ("vnni", "amx"),
    "avx2": ("vnni", "amx", "avx512", "avx10"),
}  # flags that have it in their name


@functools.cache
def masked(level: str) -> Guest:
    """This CPU as one of HIDDEN: "avx2" hides AVX512, VNNI and AMX, "avx512" VNNI and AMX, "full" nothing."""
    _on_x86()
    native = next((PACKAGES / "onnxruntime" / "capi").glob("onnxruntime_pybind11_state*.so"))
    patched = _patched(native)
    site = guest.built("x86-site", (str(PACKAGES), str(patched)), lambda folder: _mirror(native, patched, folder))
    preloaded = {
        "LD_PRELOAD": str(patched / "cpuid.so"),
        "PACKLIGHT_MASK": level,
        "PACKLIGHT_CPUINFO": str(_listed(level) / "proc" / "cpuinfo"),
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]),
    }
    return Guest(command=(sys.executable,), environment=guest.environment(preloaded))


@functools.cache
def haswell() -> Guest:
    """qemu's Haswell: AVX2, no AVX512, no VNNI. Much slower than the mask avx2, and independent of it."""
    _on_x86()
    emulator = guest.require("qemu-x86_64", "apt-get install qemu-user")
    path = os.pathsep.join([str(ROOT), str(PACKAGES)])
    command = (emulator, "-cpu", "Haswell", "-L", str(_listed("avx2")), os.path.realpath(sys.executable))
    return Guest(command=command, environment=guest.environment({"PYTHONPATH": path}))


def _on_x86() -> None:
    if platform.machine() != "x86_64" or sys.platform != "linux":
        guest.missing(f"this is {sys.platform} on {platform.machine()}: an x86 CPU is masked on x86-64 Linux")


def _patched(native: Path) -> Path:
    """The folder with cpuid.so and ONNX Runtime's library without cpuid."""
    compiler = guest.require("gcc", "apt-get install gcc binutils")
    guest.require("objdump", "apt-get install gcc binutils")

    def build(folder: Path) -> None:
        command = [compiler, "-O2", "-Wall", "-shared", "-fPIC", "-o", str(folder / "cpuid.so"), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True)
        (folder / native.name).write_bytes(without_cpuid(native))

    return guest.built("x86", (native.read_bytes(), SOURCE.read_bytes(), Path(__file__).read_bytes()), build)


def _mirror(native: Path, patched: Path, folder: Path) -> None:
    """The package onnxruntime with the patched library in place of its own: links, no copies."""
    for source, _, files in os.walk(PACKAGES / "onnxruntime"):
        here = folder / Path(source).relative_to(PACKAGES)
        here.mkdir()
        for name in files:
            (here / name).symlink_to(patched / name if name == native.name else Path(source, name))


def _listed(level: str) -> Path:
    """The folder with proc/cpuinfo as Linux would write it for this CPU without what the level hides."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    listed = "".join(_shown(line, HIDDEN[level]) for line in text.splitlines(keepends=True))

    def build(folder: Path) -> None:
        (folder / "proc").mkdir()
        (folder / "proc" / "cpuinfo").write_text(listed, encoding="utf-8")

    return guest.built(f"{level}-cpuinfo", (MEGAHERTZ.sub("", listed),), build)


def _shown(line: str, hidden: tuple[str, ...]) -> str:
    if not line.startswith("flags"):
        return line
    key, _, flags = line.partition(":")
    return f"{key}: {' '.join(flag for flag in flags.split() if not any(part in flag for part in hidden))}\n"


def without_cpuid(library: Path) -> bytes:
    """The library with 06 A2 for each instruction cpuid. The bytes 0F A2 also stand inside other instructions: objdump tells."""
    content = bytearray(library.read_bytes())
    for offset in cpuid_offsets(library):
        assert content[offset : offset + 2] == CPUID
        content[offset : offset + 2] = INVALID
    return bytes(content)


def cpuid_offsets(library: Path) -> list[int]:
    """Where in the file the instructions cpuid are."""
    offset_of_address = {}  # of each section
    for line in _objdump("--section-headers", library):
        fields = line.split()
        if len(fields) == 7 and fields[0].isdigit():  # index, name, size, address, load address, offset, alignment
            offset_of_address[fields[1]] = int(fields[5], 16) - int(fields[3], 16)
    found, section = [], ""
    for line in _objdump("--disassemble", library):
        if line.startswith("Disassembly of section "):
            section = line.removeprefix("Disassembly of section ").rstrip(":\n")
        elif line.endswith("\tcpuid\n"):
            found.append(int(line.partition(":")[0], 16) + offset_of_address[section])
    assert found, f"no cpuid in {library}"
    return found


def _objdump(what: str, library: Path) -> Iterator[str]:
    command = ["objdump", "--no-show-raw-insn", what, str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"LC_ALL": "C"}) as running:
        assert running.stdout is not None
        yield from running.stdout
    assert running.returncode == 0, f"objdump of {library} ended with {running.returncode}"
