"""How much memory a bundle takes: what opening its model and running the probe once adds to a process of its own."""

from __future__ import annotations

import subprocess
import sys

from runtime import manifest as manifests
from runtime.bundle import Bundle
from runtime.errors import PacklightError

# Everything but the model is there before the count begins: numpy, ONNX Runtime, the verified folder, the inputs.
# Linux's ru_maxrss starts with that of the process that made this one; VmHWM is its own, and 5 begins it anew
CHILD = """
import sys
from pathlib import Path
from runtime.bundle import Bundle, verify
from runtime.probe import read_probe
folder = Path(sys.argv[1])
manifest, batch = verify(folder), read_probe(folder / "probe.npz")[0].inputs
def held(key):
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
try:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
except OSError:
    pass
before = held("VmRSS")
Bundle(folder, manifest, 1, ort=bool(int(sys.argv[2]))).run(batch)
print(held("VmHWM") - before)
"""


def peak_bytes(bundle: Bundle) -> int:
    """Largest resident set while the model is opened and run, less the one before, in bytes; one thread, the probe's first batch.

    Raises:
        PacklightError: the process could not tell; Windows has no such count.
    """
    ort = str(int(bundle.model.name == manifests.ORT))
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(bundle.path), ort]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter and text
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        raise PacklightError(
            f"{bundle.path}: peak memory", found=lines[-1][:200], expected="a process that tells its peak"
        )
    return int(done.stdout)
