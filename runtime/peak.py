"""The process that memory.peak_bytes starts: verify a bundle, open its model, run the probe's first batch, print the bytes.

Everything but the model is there before the count begins: numpy, ONNX Runtime, the verified folder, the inputs. Linux's
ru_maxrss starts with that of the process that made this one; VmHWM is its own, and clear_refs begins it anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from runtime.bundle import Bundle
from runtime.probe import read_probe
from runtime.verified import verify


def held(key: str) -> int:
    """Bytes of VmRSS, what is resident now, or of VmHWM, the most that was; elsewhere than on Linux the most for both."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(folder: Path, ort: bool) -> None:
    """Print what opening and running the model adds, in bytes."""
    manifest, batch = verify(folder), read_probe(folder / "probe.npz")[0].inputs
    try:
        with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
            file.write("5")
    except OSError:
        pass  # no Linux, or forbidden: the peak then began with the process
    before = held("VmRSS")
    Bundle(folder, manifest, threads=1, ort=ort).run(batch)
    print(held("VmHWM") - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "ort")
