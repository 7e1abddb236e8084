"""How much memory a bundle takes: what opening its model and running the probe once adds to a process of its own."""

from __future__ import annotations

import subprocess
import sys

from runtime import manifest as manifests
from runtime.bundle import Bundle
from runtime.errors import PacklightError

# What a process holds with numpy and ONNX Runtime loaded is theirs; what comes on top is the model's
# Linux's ru_maxrss starts with that of the process that made this one; VmHWM is its own
CHILD = """
import sys
import runtime
def peak():
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = peak()
bundle = runtime.load(sys.argv[1], threads=1, ort=bool(int(sys.argv[2])))
bundle.run(bundle.probes()[0].inputs)
print(peak() - before)
"""


def peak_bytes(bundle: Bundle) -> int:
    """Growth of the largest resident set, in bytes, one thread, on the probe's first batch.

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
