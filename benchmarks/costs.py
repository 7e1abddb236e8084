"""What one operator costs in float and in int8: the numbers that exporter/target.py's tables quote.

    python benchmarks/costs.py            # about a minute; needs packlight[export]
    python benchmarks/costs.py x86-avx2   # beside the table of another target
    python benchmarks/costs.py wasm       # in node, by onnxruntime-web; after samples/web/setup.sh, which fetches it

Each op_type runs on one thread on a tensor of some 200,000 elements, in float and between Q/DQ pairs, among the neighbours that
cost_models.py gives it; the kernel's time is what ONNX Runtime's profiler says.

How to read it: nanoseconds per element of the op's largest tensor, float and int8, each beside exporter/target.py's. Placement
compares these costs with each other, so only their ratios matter: the last column is measured / table, float and int8, after
the machine's own speed (their median) is taken out. `!` marks what is then more than 30 % off, above FREE_NS. "ran in
float" says that ONNX Runtime had no integer kernel after all. QuantizeLinear and DequantizeLinear are costed per element and, from
the clock, per node of 16 elements: what a crossing costs whatever its size.

Layers follow: multiply-adds a nanosecond of Conv, Gemm and MatMul in float, u8·s8 and u8·u8, each the median of LAYER_ROUNDS runs
in turn with their range. K is the multiply-adds behind one output. "Relu6" is a layer whose codes saturate at 0 as after Relu6.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks import cost_models
from benchmarks.cost_models import ALONE, CASES, CHAIN, LAYERS, TYPES, Case, Feed
from exporter import target
from exporter.target import Cost
from runtime import cpu
from runtime.kernels import Kernel, trace
from runtime.session import open_session

OFF = 0.30
FREE_NS = 0.03  # below it an op is as good as free and no difference counts
ROUNDS, LAYER_ROUNDS, RUNS = 3, 5, 30
CALLS = 300
ROOT = Path(__file__).resolve().parents[1]
OWN = re.compile(r"cost(_token_\d+|_nchwc)?$")  # the op under test, with what ONNX Runtime adds to its name


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Where models run: kernels(jobs, runs) and milliseconds(models, feed), of models that take turns, [round][model]."""

    where: str
    kernels: Callable[[Sequence[tuple[Sequence[Path], Feed]], int], list[list[list[Sequence[Kernel]]]]]
    milliseconds: Callable[[Sequence[Path], Feed], list[list[float]]]


def _native_kernels(jobs: Sequence[tuple[Sequence[Path], Feed]], rounds: int) -> list[list[list[Sequence[Kernel]]]]:
    return [
        [[trace(model, feed, runs=RUNS).kernels for model in models] for _ in range(rounds)] for models, feed in jobs
    ]


def _native_milliseconds(models: Sequence[Path], feed: Feed) -> list[list[float]]:
    sessions = [open_session(model, threads=1) for model in models]
    rounds = []
    for _ in range(CALLS):
        times = []
        for session in sessions:
            start = time.perf_counter()
            session.run(None, feed)
            times.append((time.perf_counter() - start) * 1e3)
        rounds.append(times)
    return rounds


def native() -> Clock:
    """This CPU."""
    where = f"{cpu.name()}, onnxruntime {onnxruntime.__version__}, 1 thread"
    return Clock(where=where, kernels=_native_kernels, milliseconds=_native_milliseconds)


def in_node() -> Clock:
    """onnxruntime-web in node, from the cache that samples/web/setup.sh fills."""
    version = json.loads((ROOT / "samples" / "web" / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "packlight-devices"
    cache = Path(os.environ.get("PACKLIGHT_DEVICES_CACHE", cache)) / f"onnxruntime-web-{version}"
    runtime = cache / "node_modules" / "onnxruntime-web" / "dist" / "ort.wasm.bundle.min.mjs"
    if not runtime.is_file():
        raise SystemExit(f"found no {runtime}; run samples/web/setup.sh once, which fetches it")

    def call(jobs: Sequence[tuple[Sequence[Path], Feed]], rounds: int, profile: bool) -> list[Any]:
        with tempfile.TemporaryDirectory(prefix="packlight-costs-") as folder:
            asked = [
                {
                    "models": [str(model) for model in models],
                    "feed": {name: _written(array, Path(folder) / f"{at}_{name}") for name, array in feed.items()},
                    "rounds": rounds,
                    "runs": RUNS if profile else 1,
                    "profile": profile,
                    "extra": {},
                }
                for at, (models, feed) in enumerate(jobs)
            ]
            command = ["node", "--no-liftoff", str(ROOT / "benchmarks" / "costs.mjs"), str(runtime), "/"]
            ran = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(ran.stderr)
        answer: list[Any] = json.loads(ran.stdout)
        return answer

    def kernels(jobs: Sequence[tuple[Sequence[Path], Feed]], rounds: int) -> list[list[list[Sequence[Kernel]]]]:
        return [
            [[[Kernel(**kernel) for kernel in model] for model in each] for each in job]
            for job in call(jobs, rounds, True)
        ]

    return Clock(
        where=f"onnxruntime-web {version} in node on {cpu.name()}, 1 thread",
        kernels=kernels,
        milliseconds=lambda models, feed: call([(models, feed)], CALLS, False)[0],
    )


def _written(array: np.ndarray, path: Path) -> dict[str, Any]:
    path.write_bytes(array.tobytes())
    return {"file": str(path), "dims": array.shape, "type": str(array.dtype)}


def read(case: Case, rounds: Sequence[Sequence[Sequence[Kernel]]]) -> tuple[float, float | None, Mapping[str, float]]:
    """Nanoseconds an element: in float, in int8 (None: ran in float), and of the Q and DQ nodes seen beside it.

    Float and int8 took turns; of ROUNDS medians the smallest counts, which other work on the machine touched least.
    """
    size = math.prod(case.shape)
    scale = 1e6 / (size * case.largest)
    floats, codes = ([_own(each[quantized]) for each in rounds] for quantized in (False, True))
    float_ns = min(kernel.ms for kernel in floats if kernel is not None) * scale
    crossings = {
        kernel.kernel: min(k.ms for each in rounds for k in each[True] if k.node == kernel.node) * 1e6 / size
        for kernel in rounds[0][True]
        if kernel.kernel in ("QuantizeLinear", "DequantizeLinear")
        and case.place == ALONE
        and case.largest == case.outputs == 1
    }
    if all(kernel is None for kernel in codes):
        return float_ns, 0.0, crossings  # it became the saturation of the QuantizeLinear behind its layer
    kernels = [kernel for kernel in codes if kernel is not None]
    in_codes = kernels[0].kernel.startswith("QLinear") or kernels[0].types.startswith("u8")
    return float_ns, min(kernel.ms for kernel in kernels) * scale if in_codes else None, crossings


def _own(kernels: Sequence[Kernel]) -> Kernel | None:
    return next((kernel for kernel in kernels if OWN.match(kernel.node)), None)


def crossing_ns(folder: Path, clock: Clock) -> float:
    """Nanoseconds of one QuantizeLinear or DequantizeLinear of SMALL elements: (chain with them - chain without) / nodes."""
    times = zip(*clock.milliseconds(*cost_models.prepare_chain(folder)), strict=True)
    slow, fast = (statistics.median(taken) for taken in times)
    return float(slow - fast) * 1e6 / (2 * CHAIN)


def print_layers(folder: Path, clock: Clock) -> None:
    """Multiply-adds a nanosecond of every layer in each type: median, and range over LAYER_ROUNDS turns."""
    jobs = []
    for at, layer in enumerate(LAYERS.values()):
        own = folder / f"layer{at}"
        own.mkdir()
        jobs.append(cost_models.prepare_layer(layer, own))
    print(f"\n{'MACs a ns':<28}{'K':>5}" + "".join(f"{name:>22}" for name in TYPES) + "   float ms / u8s8 ms")
    for (name, layer), rounds in zip(LAYERS.items(), clock.kernels(jobs, LAYER_ROUNDS), strict=True):
        line, times = f"{name:<28}{layer.depth:>5}", []
        for at in range(len(TYPES)):
            seen = [[kernel for kernel in each[at] if kernel.macs] for each in rounds]
            rates = [kernels[0].macs / kernels[0].ms / 1e6 for kernels in seen]
            times.append(statistics.median(kernels[0].ms for kernels in seen))
            line += f"{statistics.median(rates):9.2f} ({min(rates):5.2f}-{max(rates):5.2f})"
        print(f"{line}   {times[0]:.3f} / {times[1]:.3f} = {times[0] / times[1]:.2f}")


def main(name: str = "x86-vnni") -> None:
    """Print the table beside that of the target called `name`."""
    assumed = target.by_name(name)
    clock = in_node() if name == "wasm" else native()
    listed: dict[str, Cost] = {**assumed.elementwise, **assumed.movers}
    rows: list[tuple[str, float, float, float | None, float]] = []  # op, measured and table in float, then in int8
    seen: dict[str, list[float]] = {"QuantizeLinear": [], "DequantizeLinear": []}
    with tempfile.TemporaryDirectory(prefix="packlight-costs-") as folder:
        jobs = [cost_models.prepare(op_type, CASES[op_type], Path(folder)) for op_type in listed]
        for (op_type, table), rounds in zip(listed.items(), clock.kernels(jobs, ROUNDS), strict=True):
            float_ns, int8_ns, crossings = read(CASES[op_type], rounds)
            rows.append((op_type, float_ns, table.float_ns, int8_ns, table.int8_ns))
            for kernel, value in crossings.items():
                seen[kernel].append(value)
        per_node = crossing_ns(Path(folder), clock)
    quantize, dequantize = (statistics.median(values) for values in seen.values())
    pairs = [pair for row in rows for pair in ((row[1], row[2]), (row[3], row[4]))]
    speed = statistics.median(found / given for found, given in pairs if found and given >= FREE_NS)
    print(f"{clock.where}; this machine takes {speed:.2f} of the table's times")
    print(f"{'ns an element':<20}{'float':>8}{'table':>8}{'int8':>8}{'table':>8}   measured / table / {speed:.2f}")
    for op_type, float_ns, float_table, int8_ns, int8_table in rows:
        shown = f"{float_ns:8.3f}{float_table:8.2f}" + (
            "    ran in float" if int8_ns is None else f"{int8_ns:8.3f}{int8_table:8.2f}"
        )
        print(f"{op_type:<20}{shown}   {_off(float_ns, float_table, speed)} {_off(int8_ns, int8_table, speed)}")
    for name, found, given in (
        ("QuantizeLinear", quantize, assumed.quantize_ns),
        ("DequantizeLinear", dequantize, assumed.dequantize_ns),
    ):
        print(f"{name:<20}{'':16}{found:8.3f}{given:8.2f}   {'':6}{_off(found, given, speed)}")
    off = _off(per_node, assumed.crossing_ns, speed)
    print(f"{'the same, per node':<20}{'':16}{per_node:8.0f}{assumed.crossing_ns:8.0f}   {'':6}{off}")
    with tempfile.TemporaryDirectory(prefix="packlight-costs-") as folder:
        print_layers(Path(folder), clock)


def _off(found: float | None, given: float, speed: float) -> str:
    if found is None:
        return "     !"
    if max(found / speed, given) < FREE_NS:
        return " free "
    ratio = found / given / speed if given else math.inf
    return f"{ratio:5.2f}{' ' if 1 - OFF <= ratio <= 1 / (1 - OFF) else '!'}"


if __name__ == "__main__":
    main(*sys.argv[1:2])
