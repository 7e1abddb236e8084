"""What packlight adds on a device: microseconds a call over a bare InferenceSession.run, and the time `import runtime` takes.

    python benchmarks/overhead.py                  # makes a tiny bundle; needs packlight[export]
    python benchmarks/overhead.py build/digits     # any bundle; needs what a device has: packlight alone

How to read it: `Bundle.run` checks names, dtypes and shapes and then calls the session; both are called in turn, one
thread, on the same input, and the difference of the medians is what checking costs. It does not depend on the model, but
the smaller the model, the quieter the number. `import` compares fresh Python processes, in turn: medians of
`import runtime`, which imports numpy and onnxruntime, over `import onnxruntime` by itself. `load` is `runtime.load` of a
bundle of 100 MB, in turn with hashing its files and opening its model, by seconds of the CPU on this thread. Limits that
packlight holds itself to: 20 microseconds, 1.15 times, 1.1 times.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

import runtime
from runtime import cpu, manifest
from runtime.bench import CPU_SECONDS, in_turn, seconds
from runtime.probe import Probe, write_probe
from runtime.session import open_session

CALLS = 5000
PROCESSES = 31
LOADS = 15
TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def call_us(folder: Path) -> tuple[float, float]:
    """Median microseconds of Bundle.run, and of the bare session on the same model."""
    bundle = runtime.load(folder, threads=1)
    feed = dict(bundle.probes()[0].inputs)
    session = open_session(folder / "model.int8.onnx", threads=1, entries=bundle.manifest.session)
    names = [output.name for output in session.get_outputs()]
    turns: tuple[Callable[[], object], ...] = (lambda: bundle.run(feed), lambda: session.run(names, feed))
    times: tuple[list[float], ...] = ([], [])
    for _ in range(CALLS):
        for turn, taken in zip(turns, times, strict=True):
            start = time.perf_counter()
            turn()
            taken.append(time.perf_counter() - start)
    ours, bare = (statistics.median(taken) * 1e6 for taken in times)
    return ours, bare


def import_ms() -> tuple[float, float]:
    """Median milliseconds of `import runtime`, and of `import onnxruntime` by itself, in fresh processes."""
    times: dict[str, list[float]] = {"runtime": [], "onnxruntime": []}
    for _ in range(PROCESSES):
        for module, taken in times.items():
            command = [sys.executable, "-c", TIMED.format(module)]
            taken.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    ours, bare = (statistics.median(taken) * 1e3 for taken in times.values())
    return ours, bare


def load_ms() -> tuple[float, float]:
    """Median milliseconds of loading a bundle of 100 MB, and of hashing its files and opening its model."""
    with tempfile.TemporaryDirectory(prefix="packlight-overhead-") as folder:
        bundle = large(Path(folder) / "large")

        def bare() -> None:
            for file in bundle.iterdir():
                manifest.digest(file)
            open_session(bundle / manifest.INT8, threads=1)

        turns: tuple[Callable[[], object], ...] = (lambda: runtime.load(bundle, threads=1), bare)
        ours, bare_ms = in_turn([partial(seconds, turn, CPU_SECONDS) for turn in turns], LOADS)
    return ours, bare_ms


def large(folder: Path) -> Path:
    """A bundle of 100 MB: 25 products with matrices of 1000 x 1000 float32."""
    import onnx  # only here: a device has no exporter
    from onnx import helper, numpy_helper

    folder.mkdir()
    rng, shape, count = np.random.default_rng(0), ["rows", 1000], 25
    weights = [numpy_helper.from_array(rng.random((1000, 1000), np.float32), f"w{n}") for n in range(count)]
    nodes = [helper.make_node("MatMul", [f"h{n}", f"w{n}"], [f"h{n + 1}"]) for n in range(count)]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("h0", f"h{count}")]
    graph = helper.make_graph(nodes, "large", ends[:1], ends[1:], weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / manifest.INT8
    )
    inputs = {"h0": np.ones((1, 1000), np.float32)}
    outputs = {f"h{count}": np.ones((1, 1000), np.float32)}
    write_probe(folder / manifest.PROBE, [Probe(inputs=inputs, fp32=outputs, int8=outputs)])
    about = manifest.Manifest(
        name="large", target="portable", pair_rule=True, exact_on=(),
        inputs=(manifest.Tensor(name="h0", dtype="float32", shape=("rows", 1000)),),
        outputs=(manifest.Tensor(name=f"h{count}", dtype="float32", shape=("rows", 1000)),),
        files={file.name: manifest.digest(file) for file in folder.iterdir()},
        recorded_on=manifest.Machine(machine=cpu.machine(), flags=cpu.flags()),
    )  # fmt: skip
    (folder / manifest.MANIFEST).write_text(manifest.dumps(about), encoding="utf-8")
    return folder


def tiny(folder: Path) -> Path:
    """A bundle of one small Gemm."""
    import torch  # only here: a device has no exporter

    import exporter

    example = torch.zeros(1, 16)
    source = exporter.from_module(torch.nn.Linear(16, 16), inputs={"x": example}, outputs=["y"])
    exporter.export(source, exporter.load_recipe("portable"), calibration="random", heldout="random", out=folder)
    return folder


def main() -> None:
    """Print both measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, help="a bundle's folder; a tiny one is made by default")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="packlight-overhead-") as folder:
        ours, bare = call_us(given.bundle or tiny(Path(folder) / "tiny"))
    print(f"{cpu.name()}, onnxruntime {onnxruntime.__version__}, 1 thread")
    print(f"Bundle.run  {ours:8.1f} us   bare session {bare:8.1f} us   overhead {ours - bare:5.1f} us (limit 20)")
    ours, bare = import_ms()
    print(f"import      {ours:8.1f} ms   onnxruntime  {bare:8.1f} ms   ratio    {ours / bare:5.2f} (limit 1.15)")
    ours, bare = load_ms()
    print(f"load 100 MB {ours:8.1f} ms   hash and open {bare:7.1f} ms   ratio    {ours / bare:5.2f} (limit 1.1)")


if __name__ == "__main__":
    main()
