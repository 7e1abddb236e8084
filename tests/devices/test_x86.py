"""The masks themselves: what a guest sees of its CPU, how its library is changed, and what is said where a tool is missing."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from runtime import cpu
from tests import devices
from tests.devices import guest, x86

SEEN = """
import json
from runtime import cpu
print(json.dumps([list(cpu.flags()), cpu.pairs_in_int16()]))
"""


def seen(device: str) -> tuple[set[str], bool]:
    """The CPU's extensions as Linux lists them to the guest, and whether int8 kernels saturate there."""
    flags, pairs = json.loads(devices.run(device, SEEN).stdout)
    return set(flags), pairs


def test_masks_hide_what_they_say_and_nothing_else() -> None:
    full, avx512, avx2 = (seen(device)[0] for device in ("full", "avx512", "avx2"))
    vnni = {flag for flag in full if "vnni" in flag or "amx" in flag}
    assert avx512 == full - vnni
    assert avx2 == {flag for flag in full - vnni if not flag.startswith("avx512")}
    assert "avx2" in avx2


@pytest.mark.parametrize("device", ["avx512", "avx2"])
def test_products_saturate_under_the_masks(device: str) -> None:
    assert seen(device)[1]


def test_products_saturate_under_the_mask_full_as_they_do_without_a_mask() -> None:
    assert seen("full")[1] == cpu.pairs_in_int16()


def test_only_instructions_cpuid_are_replaced() -> None:
    native = next((x86.PACKAGES / "onnxruntime" / "capi").glob("onnxruntime_pybind11_state*.so"))
    patched = Path(x86.masked("full").environment["LD_PRELOAD"]).with_name(native.name)
    before, after = native.read_bytes(), patched.read_bytes()
    assert len(before) == len(after)
    step = 1 << 16
    unequal = [
        start for start in range(0, len(before), step) if before[start : start + step] != after[start : start + step]
    ]
    changed = [place for start in unequal for place in range(start, start + step) if before[place] != after[place]]
    assert {(before[place : place + 2], after[place : place + 2]) for place in changed} == {(x86.CPUID, x86.INVALID)}
    assert 10 < len(changed) < before.count(x86.CPUID)  # the other pairs of these bytes are parts of other instructions


def test_instruction_that_is_invalid_and_not_ours_ends_the_guest() -> None:
    ud2 = "import ctypes, mmap; page = mmap.mmap(-1, 4096, prot=7); page.write(b'\\x0f\\x0b'); "
    ud2 += "ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()"
    masked = x86.masked("avx2")
    done = subprocess.run([*masked.command, "-c", ud2], env=masked.environment, check=False, timeout=60)
    assert done.returncode == -signal.SIGILL


def test_missing_tool_is_said_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(guest.REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="no qemu-none: apt-get install qemu-user"):
        guest.require("qemu-none", "apt-get install qemu-user")


def test_missing_tool_fails_where_devices_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(guest.REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="no qemu-none: apt-get install qemu-user"):
        guest.require("qemu-none", "apt-get install qemu-user")


def test_folder_is_built_once_and_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PACKLIGHT_DEVICES_CACHE", str(tmp_path))
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("whole")
        if len(calls) == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        guest.built("thing", ("1",), build)
    assert list(tmp_path.iterdir()) == []
    folder = guest.built("thing", ("1",), build)
    assert guest.built("thing", ("1",), build) == folder
    assert len(calls) == 2
    assert (folder / "file").read_text() == "whole"
    assert guest.built("thing", ("2",), build) != folder
