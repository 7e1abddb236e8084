"""Run Python source on a device: its name -> the guest -> a finished process; and check a bundle there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.devices import arm, x86
from tests.devices.guest import Guest

SECONDS = 300.0

DEVICES: Mapping[str, Callable[[], Guest]] = {
    "full": lambda: x86.masked("full"),
    "avx512": lambda: x86.masked("avx512"),
    "avx2": lambda: x86.masked("avx2"),
    "haswell": x86.haswell,
    "cortex-a53": lambda: arm.emulated("cortex-a53"),
    "cortex-a76": lambda: arm.emulated("cortex-a76"),
}
X86 = ("full", "avx512", "avx2", "haswell")
ARM = ("cortex-a53", "cortex-a76")


def run(device: str, source: str, *arguments: str, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
    """Run Python source on a device of DEVICES, with `sys.argv[1:]` the arguments.

    Skips the test where this machine lacks a tool that the device needs (see guest.require).

    Raises:
        AssertionError: the source ended with an error; its last words.
    """
    guest = DEVICES[device]()
    command = [*guest.command, "-c", source, *arguments]
    done = subprocess.run(command, env=guest.environment, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, f"{device} ended with {done.returncode}: {done.stderr[-2000:]}"
    return done


CHECK = """
import sys, runtime
print(runtime.check(runtime.load(sys.argv[1], threads=1, ort=sys.argv[2] == "ort")).to_json())
"""


def check(device: str, bundle: Path, *, ort: bool = False) -> dict[str, Any]:
    """The Verdict of `runtime.check` on the device, as its JSON says it. ort: of model.int8.ort."""
    done = run(device, CHECK, str(bundle), "ort" if ort else "onnx")
    verdict: dict[str, Any] = json.loads(done.stdout)
    return verdict
