"""What calibration costs, in time and memory, beside FP32 inference and ONNX Runtime's; and what each method gives.

    python benchmarks/calibration.py                       # cost: EfficientNet-Lite0 and a ViT-S/16; some minutes, 10 GB for ORT's
    python benchmarks/calibration.py --flat SVG FILE.py    # memory over 20,000 samples of a model of your own, as a plot
    python benchmarks/calibration.py --methods FOLDER      # output SNR of every method, on models of your own

Cost: 64 images of EfficientNet-Lite0 (samples/lite0) and 32 of a ViT-S/16 with seeded weights. Every row is a process of its own,
so that its peak RSS is its own, and rows take turns. `fp32` is plain inference of the same samples; `minmax` and `percentile` are
ours, with the time of observing and of finding ranges; `percentile + int8` quantizes too. `ort percentile` is ONNX Runtime's
quantize_static with CalibrationMethod.Percentile; `ort calibration` the part of it that finds ranges: create_calibrator,
collect_data, compute_data. Imports and reading the plan are in no row. `x2` is with twice the samples.

Methods: each FILE.py of FOLDER has INPUTS, OUTPUTS, calibration(n) yielding {input: array}, and model() or onnx_path(); and may
have evaluate(run), run taking {input: array} and returning a list of outputs. At most --batches different ones are shuffled; ranges
are from one half, `auto` compares on KEPT of them, and the SNR of the worst output is on the other half, the same for every method.
--only NAME ... measures some; --seed shuffles otherwise.

How to read it: seconds and megabytes are this machine's; compare ratios of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporter.place import Plan

ROOT = Path(__file__).resolve().parents[1]
THEIRS = ("ort calibration", "ort percentile")
ROWS = ("fp32", "minmax", "percentile", "percentile + int8", *THEIRS)
SAMPLES = {"lite0": 64, "vit-s": 32}
BATCHES, KEPT = 512, 64
FLAT_SAMPLES, FLAT_REAL = 20_000, 256

Batch = Mapping[str, np.ndarray]


def staged(name: str, source: Any, batches: list[Batch], folder: Path) -> None:
    """Trace, prepare and place; what the child processes need goes into the folder."""
    from exporter import graph, place, prepare, target, trace
    from exporter.correct import bias

    prepared = prepare.to_quantizable(trace.to_onnx(source).model, batches[0]).model
    plan = place.decide(prepared, target.by_name("x86-vnni"), (), graph.shapes(prepared, batches[0]))
    (folder / f"{name}.onnx").write_bytes(graph.to_bytes(prepared))
    (folder / f"{name}.plan").write_bytes(pickle.dumps((plan, bias.channels(prepared, plan))))
    for number, batch in enumerate(batches):
        np.savez(folder / f"{name}.{number}.npz", **dict(batch))


def lite0(folder: Path) -> None:
    sample = loaded(ROOT / "samples" / "lite0" / "sample.py")
    staged("lite0", sample.source(), list(itertools.islice(sample.calibration(), SAMPLES["lite0"])), folder)


def vit(folder: Path) -> None:
    import torch
    from transformers import ViTConfig, ViTModel

    import exporter

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            size = ViTConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536)
            self.body, self.head = ViTModel(size, add_pooling_layer=False), torch.nn.Linear(384, 1000)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(image).last_hidden_state[:, 0])

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    batches: list[Batch] = [{"image": rng.standard_normal((1, 3, 224, 224), np.float32)} for _ in range(8)]
    source = exporter.from_module(Network().eval(), inputs=dict(batches[0]), outputs=["logits"])
    staged("vit-s", source, batches, folder)


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def stream(folder: Path, name: str, count: int) -> Iterator[Batch]:
    """`count` batches from disk, over and over: no process holds them."""
    known = len(list(folder.glob(f"{name}.*.npz")))
    for number in range(count):
        with np.load(folder / f"{name}.{number % known}.npz") as archive:
            yield {key: archive[key] for key in archive.files}


def child(row: str, name: str, count: int, folder: Path) -> None:
    """One row: prints seconds and peak RSS in MB."""
    work = (_theirs if row in THEIRS else _plain if row == "fp32" else _ours)(row, name, count, folder)
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, _memory("VmHWM")]))


def _plain(row: str, name: str, count: int, folder: Path) -> Callable[[], None]:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])

    def work() -> None:
        for batch in stream(folder, name, count):
            session.run(None, dict(batch))

    return work


def _ours(row: str, name: str, count: int, folder: Path) -> Callable[[], None]:
    import onnx
    import onnx_ir as ir
    import torch  # noqa: F401  an export has it loaded; counting would load it here, and imports are in no row

    from exporter import quantize
    from exporter.calibrate import distinguish, methods, observe

    model = ir.serde.deserialize_model(onnx.load(folder / f"{name}.onnx"))
    plan, _ = pickle.loads((folder / f"{name}.plan").read_bytes())
    method = row.split()[0]

    def work() -> None:
        found = observe(model, plan.tensors, stream(folder, name, count), (), methods.needs_histograms(method))
        ranges = methods.ranges(found, method)
        if row.endswith("int8"):
            quantize.to_int8(model, plan, distinguish(model, ranges))

    return work


def _theirs(row: str, name: str, count: int, folder: Path) -> Callable[[], None]:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = stream(folder, name, count)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else dict(batch)

    def calibrate() -> None:
        calibrator = create_calibrator(
            folder / f"{name}.onnx", list({*QLinearOpsRegistry, *QDQRegistry}),  # those that quantize_static takes
            augmented_model_path=str(folder / f"{name}.augmented.onnx"), calibrate_method=CalibrationMethod.Percentile,
        )  # fmt: skip
        calibrator.collect_data(Reader())
        calibrator.compute_data()

    def quantize() -> None:
        quantize_static(
            folder / f"{name}.onnx", folder / f"{name}.ort.onnx", Reader(), per_channel=True,
            activation_type=QuantType.QUInt8, calibrate_method=CalibrationMethod.Percentile,
        )  # fmt: skip

    return calibrate if row == "ort calibration" else quantize


def spawned(row: str, name: str, count: int, folder: Path) -> tuple[float, float]:
    command = [sys.executable, __file__, "--child", row, name, str(count), str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{row} {name}: {ran.stderr[-600:]}")
    seconds, megabytes = json.loads(ran.stdout.strip().splitlines()[-1])
    return seconds, megabytes


def cost(names: list[str], rounds: int, folder: Path) -> None:
    for name in names:
        (lite0 if name == "lite0" else vit)(folder)
        count = SAMPLES[name]
        took: dict[str, list[tuple[float, float]]] = {row: [] for row in ROWS}
        for turn in range(rounds):
            for row in ROWS:
                if row not in THEIRS or not turn:
                    took[row].append(spawned(row, name, count, folder))
        twice = {row: spawned(row, name, 2 * count, folder)[1] for row in ROWS[1:3]}
        best = {row: (statistics.median(s for s, _ in each), max(m for _, m in each)) for row, each in took.items()}
        theirs = best["ort percentile"]
        print(f"\n{name}: {count} samples\n{'':18s} seconds   / fp32  faster than ort   peak MB   / ort    x2 adds")
        for row, (seconds, peak) in best.items():
            more = f"{twice[row] / peak - 1:8.1%}" if row in twice else ""
            print(
                f"{row:18s} {seconds:7.2f} {seconds / best['fp32'][0]:7.2f}x {theirs[0] / seconds:15.1f}x "
                f"{peak:9.0f} {peak / theirs[1]:7.2f} {more:>10s}",
                flush=True,
            )


def flat(out: Path, path: Path) -> None:
    """Resident memory while a model of FILE.py is calibrated on generated samples, as an SVG.

    A sample is one of FLAT_REAL of the file's own calibration batches, its floats times a random number from 1 to 2.
    """
    from exporter.calibrate import observe

    case = loaded(path)
    real: list[Batch] = list(case.calibration(FLAT_REAL))
    model, plan = prepared(case, real[0])
    memory: list[tuple[int, float]] = []

    def samples() -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        for number in range(FLAT_SAMPLES):
            if number % 200 == 0:
                memory.append((number, _memory("VmRSS")))
            factor = np.float32(1 + rng.random())
            batch = real[number % len(real)]
            yield {name: array * factor if array.dtype == np.float32 else array for name, array in batch.items()}

    start = time.perf_counter()
    observe(model, plan.tensors, samples(), (), True)
    memory.append((FLAT_SAMPLES, _memory("VmRSS")))
    seconds = time.perf_counter() - start
    out.write_text(_svg(memory), encoding="utf-8")
    early = max(m for n, m in memory if n <= FLAT_SAMPLES // 10)
    print(
        f"{path.stem}: {FLAT_SAMPLES} samples, histograms, {FLAT_SAMPLES / seconds:.0f} a second: "
        f"{memory[0][1]:.0f} MB at first, at most {early:.0f} MB in the first tenth, "
        f"{max(m for _, m in memory):.0f} MB in all, {memory[-1][1]:.0f} MB at last -> {out}"
    )


def prepared(case: ModuleType, batch: Batch) -> tuple[ir.Model, Plan]:
    """The model of a FILE.py as calibration takes it."""
    import exporter
    from exporter import graph, place, prepare, target, trace

    if hasattr(case, "model"):
        free = getattr(case, "DYNAMIC", None) or None
        example = {name: batch[name] for name in case.INPUTS}
        source = exporter.from_module(case.model().eval(), inputs=example, outputs=list(case.OUTPUTS), dynamic=free)
    else:
        source = exporter.from_onnx(case.onnx_path())
    model = prepare.to_quantizable(trace.to_onnx(source).model, batch).model
    return model, place.decide(model, target.by_name("x86-vnni"), (), graph.shapes(model, batch))


def _memory(field: str) -> float:
    """MB in memory now (VmRSS) or at most (VmHWM). Linux; getrusage's maximum is the parent's where that was larger."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit("memory is read from /proc, which this system has not")


def _svg(points: list[tuple[int, float]]) -> str:
    width, height, left, bottom = 640, 240, 60, 40
    top = max(m for _, m in points) * 1.2

    def at(number: int, megabytes: float) -> str:
        x = left + (width - left - 20) * number / points[-1][0]
        return f"{x:.1f},{height - bottom - (height - bottom - 20) * megabytes / top:.1f}"

    line = " ".join(at(*point) for point in points)
    ticks = "".join(
        f'<text x="{at(n, 0).split(",")[0]}" y="{height - bottom + 18}" text-anchor="middle">{n}</text>'
        for n in range(0, points[-1][0] + 1, points[-1][0] // 4)
    ) + "".join(
        f'<text x="{left - 6}" y="{float(at(0, m).split(",")[1]) + 4:.1f}" text-anchor="end">{m:.0f}</text>'
        for m in range(0, int(top), 100)
    )
    axis = f"{at(0, top)} {at(0, 0)} {at(points[-1][0], 0)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
        f'<rect width="{width}" height="{height}" fill="white"/>'
        f'<polyline points="{axis}" fill="none" stroke="gray"/>'
        f'<polyline points="{line}" fill="none" stroke="#1f5fbf" stroke-width="2"/>'
        f'{ticks}<text x="{left + 8}" y="16">resident memory, MB</text>'
        f'<text x="{width - 20}" y="{height - 6}" text-anchor="end">calibration samples</text></svg>\n'
    )


def compare(cases: list[Path], most: int, seed: int) -> None:
    """The table of methods."""
    from exporter.calibrate import methods

    columns = (*methods.METHODS, "auto")
    print("| case | calibration / held out | " + " | ".join(columns) + " | auto - best | changed |")
    print("|---" * (len(columns) + 4) + "|")
    for path in cases:
        print(_compared(path, most, seed), flush=True)


def _compared(path: Path, most: int, seed: int) -> str:
    from exporter import graph, quantize
    from exporter.calibrate import auto, methods, observe

    case = loaded(path)
    model, plan = prepared(case, next(iter(case.calibration(most))))
    batches = _different(case, graph.runner(model), most)
    order = np.random.default_rng(seed).permutation(len(batches))  # given data are sorted by class more often than not
    seen, unseen = ([batches[i] for i in part] for part in np.array_split(order, 2))
    given = auto.candidates(model, observe(model, plan.tensors, seen, (), True))
    int8 = quantize.to_int8(model, plan, given["minmax"], gates_on_codes=False)  # its scales change
    chosen = auto.choose(int8, given, auto.crossed(model, int8, plan.tensors, seen[:KEPT]))
    measure = auto.evaluator(model, int8, unseen)
    snr = [measure(given[method]).snr_db for method in methods.METHODS]
    ours = measure(chosen.ranges).snr_db
    cells = [
        path.stem,
        f"{len(seen)} / {len(unseen)}",
        *(f"{value:.2f}" for value in (*snr, ours)),
        f"{ours - max(snr):+.2f}",
        f"{len(chosen.changed)} of {len(chosen.choices)}",
    ]
    return "| " + " | ".join(cells) + " |"


def _different(case: ModuleType, run: Callable[[Batch], Mapping[str, np.ndarray]], most: int) -> list[Batch]:
    """At most `most` batches, no two alike: those to calibrate with, then what evaluate(run) of the case runs."""
    from exporter import batches

    found: dict[str, Batch] = {}

    class Enough(Exception):
        pass

    def take(batch: Batch) -> list[np.ndarray]:
        if len(found) == most:
            raise Enough
        found.setdefault(batches.digest(batch), batch)
        made = run(batch)
        return [made[name] for name in case.OUTPUTS or made]

    for batch in itertools.islice(case.calibration(most), most):
        found.setdefault(batches.digest(batch), batch)
    if len(found) < most and hasattr(case, "evaluate"):
        with contextlib.suppress(Enough):
            case.evaluate(take)
    return [*found.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--flat", nargs=2, type=Path, metavar=("SVG", "FILE.py"))
    parser.add_argument("--methods", type=Path, metavar="FOLDER")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    parser.add_argument("--batches", type=int, default=BATCHES, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the split into two halves")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if given.child:
        row, name, count, folder = given.child
        child(row, name, int(count), Path(folder))
    elif given.flat:
        flat(*given.flat)
    elif given.methods:
        cases = [p for p in sorted(given.methods.glob("*.py")) if not given.only or p.stem in given.only]
        compare(cases, given.batches, given.seed)
    else:
        with tempfile.TemporaryDirectory() as folder:
            cost(given.only or [*SAMPLES], given.rounds, Path(folder))


if __name__ == "__main__":
    main()
