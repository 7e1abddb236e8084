"""The phone's file beside the .onnx: bytes, milliseconds to open, peak memory of opening it and running one batch (Linux).

    python benchmarks/phone.py build/lite0 ...     # bundles; the .ort file is made here, the same bytes as packlight's own

Each row is a process of its own; its peak is what the kernel says (VmHWM) above what it held before the model was opened.
Mapped is the .ort file under the two entries of docs/deploy.md, "Memory".
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import runtime
from exporter import ort_format

MAPPED = {"session.use_memory_mapped_ort_model": "1", "session.use_ort_model_bytes_for_initializers": "1"}
RUNS = 5
CHILD = """
import json, sys, time
from pathlib import Path
from runtime.probe import read_probe
from runtime.session import open_session

def held(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

batch = read_probe(Path(sys.argv[1]) / "probe.npz")[0].inputs
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts here
before, start = held("VmRSS"), time.perf_counter()
session = open_session(Path(sys.argv[2]), threads=1, entries=json.loads(sys.argv[3]))
opened = time.perf_counter() - start
session.run(None, dict(batch))
print(opened * 1e3, held("VmHWM") - before)
"""


def measured(bundle: Path, model: Path, entries: dict[str, str]) -> tuple[float, float]:
    """Medians of milliseconds to open, and of peak bytes."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(bundle), str(model), json.dumps(entries)]
    ran = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(RUNS)]
    ms, peak = zip(*((float(a), float(b)) for a, b in ran), strict=True)
    return statistics.median(ms), statistics.median(peak)


def main() -> None:
    print(f"{'bundle':<12} {'file':<16} {'MB':>6} {'open ms':>8} {'peak MB':>8}")
    for bundle in map(runtime.load, sys.argv[1:]):
        int8, entries = bundle.path / "model.int8.onnx", dict(bundle.manifest.session)
        with tempfile.TemporaryDirectory() as folder:
            ort = Path(folder) / "model.int8.ort"
            ort.write_bytes(ort_format.convert(int8.read_bytes(), entries, bundle.manifest.target).ort)
            rows = {".onnx": (int8, entries), ".ort": (ort, entries), ".ort, mapped": (ort, {**entries, **MAPPED})}
            for name, (file, given) in rows.items():
                ms, peak = measured(bundle.path, file, given)
                size = file.stat().st_size / 1e6
                print(f"{bundle.manifest.name:<12} {name:<16} {size:>6.2f} {ms:>8.1f} {peak / 1e6:>8.1f}")


if __name__ == "__main__":
    main()
