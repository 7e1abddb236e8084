"""packlight against the other int8 tools, on seven networks with seeded weights, in turn in one run.

    python -m benchmarks.rivals --work DIR --python VENV/bin/python       # all; an hour the first time, files stay in DIR
    python -m benchmarks.rivals --work DIR --rounds 200                   # time them again
    python -m benchmarks.rivals --work DIR --again packlight --only vit_s minilm --kernels 5

One FP32 graph a model (models.py), 32 calibration batches for every tool, 16 others to measure on, each of one image or text:

    fp32       the graph as torch gave it
    packlight  the bundle for x86-vnni, without a flag, with the session entries of its manifest
    ort, optimum, nncf     rival_tools.py says how each is asked; run in ONNX Runtime with default options
    openvino   its own runtime, latency hint: the bar still above, and no rival in "packlight / best"

The rivals need requirements-rivals.txt, in this Python or in that of --python. The ONNX files are timed in this process,
OpenVINO in a process that takes its turns, with its own clock. One thread, on the first held-out batch; A B C D E A B C D E ...
Times are CPU seconds of the process: on a machine that others use, elapsed time (--clock wall) counts the slices they get, which
a short run escapes and a long one does not. The profiler's times by kernel (--kernels) are elapsed time.

How to read it: `speed` is median fp32 ms / median ms: above 1 is faster. `SNR dB` is of the output over all held-out batches;
the weights are seeded noise, so compare it within a model only. `integer` is the share of multiply-adds in integer kernels, by ONNX
Runtime's profiler. `packlight / best` is packlight's speed over that of the fastest of ort, optimum and nncf.
Compare ratios of one run, never milliseconds of two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import onnxruntime

import exporter
from benchmarks import models, rival_tools
from benchmarks.speed import Batch, Model
from exporter import graph, trace
from runtime import cpu, drift, verified
from runtime.bench import in_turn, seconds
from runtime.errors import PacklightError
from runtime.kernels import trace as profile
from runtime.session import NO_ENTRIES, open_session

RIVALS = ("ort", "optimum", "nncf")
OPENVINO, OURS = "openvino", "packlight"
TOOLS = (*RIVALS, OPENVINO, OURS)
CALIBRATION, HELDOUT = 32, 16
Call = Callable[[], float]  # runs a model once, and says how many seconds it took
SUFFIX = {OPENVINO: "xml", OURS: "bundle"}
WORKER = Path(rival_tools.__file__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One tool on one model. integer: None where no profiler tells; failed: why there are no numbers."""

    model: str
    tool: str
    ms: float = math.nan
    speed: float = math.nan
    snr_db: float = math.nan
    integer: float | None = None
    failed: str = ""


def prepare(name: str, folder: Path) -> None:
    """The FP32 graph and the batches of a model, where they are not there yet."""
    if (folder / "fp32.onnx").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rival_tools.save(folder / "calibration.npz", models.batches(name, 1, CALIBRATION))
    rival_tools.save(folder / "heldout.npz", models.batches(name, 2, HELDOUT))
    (folder / "fp32.onnx").write_bytes(graph.to_bytes(trace.to_onnx(models.source(name)).model))


def quantize(name: str, tool: str, folder: Path, python: str) -> str:
    """Make the tool's file, where it is not there yet; why that failed, or nothing."""
    made, why = _file(tool, folder), folder / f"{tool}.failed"
    if not made.exists() and not why.exists():
        print(f"{name}: {tool} quantizes", file=sys.stderr, flush=True)
        if failed := _ours(folder) if tool == OURS else _theirs(name, tool, folder, python):
            why.write_text(failed, encoding="utf-8")
    return why.read_text(encoding="utf-8") if why.exists() else ""


def _file(tool: str, folder: Path) -> Path:
    return folder / f"{tool}.{SUFFIX.get(tool, 'onnx')}"


def _forget(tool: str, folder: Path) -> None:
    """Remove what a tool made, so that it is made again."""
    shutil.rmtree(_file(tool, folder), ignore_errors=True)
    for path in (_file(tool, folder), folder / f"{tool}.failed"):
        path.unlink(missing_ok=True)


def _ours(folder: Path) -> str:
    calibration, heldout = (rival_tools.load(folder / f"{each}.npz") for each in ("calibration", "heldout"))
    recipe = exporter.load_recipe("x86-vnni")
    source = exporter.from_onnx(folder / "fp32.onnx")
    try:
        exporter.export(source, recipe, calibration=calibration, heldout=heldout, out=_file(OURS, folder))
    except PacklightError as error:
        return " ".join(str(error).split())
    return ""


def _theirs(name: str, tool: str, folder: Path, python: str) -> str:
    flags = ["--transformer"] if name in models.TRANSFORMERS else []
    done = subprocess.run([python, str(WORKER), tool, str(folder), *flags], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["no word"]
    return said[-1].strip() if done.returncode else ""


def open_onnx(tool: str, folder: Path) -> Model:
    """The tool's ONNX file, packlight's with the entries of its manifest."""
    if tool == OURS:
        path = _file(OURS, folder)
        return Model(name=tool, path=path / "model.int8.onnx", entries=verified.verify(path).session)
    return Model(name=tool, path=_file(tool, folder), entries=NO_ENTRIES)


def run_all(model: Model, heldout: Sequence[Batch]) -> Iterator[dict[str, drift.Array]]:
    """The outputs of each batch, by name."""
    session = open_session(model.path, threads=1, entries=model.entries)
    names = [output.name for output in session.get_outputs()]
    for batch in heldout:
        yield dict(zip(names, session.run(names, dict(batch)), strict=True))


@contextlib.contextmanager
def worker(folder: Path, python: str, clock: str) -> Iterator[Call]:
    """OpenVINO's model in a process of its own: each call runs it once there and gives the seconds it took."""
    command = [python, str(WORKER), "turns", str(folder), "--clock", clock]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ready = process.stdout.readline().split()
        if ready[:1] != ["ready"]:
            raise PacklightError("OpenVINO's worker", found=" ".join(ready) or "nothing", expected="ready")
        asked, told = process.stdin, process.stdout

        def call() -> float:
            asked.write("\n")
            asked.flush()
            return float(told.readline())

        yield call
        asked.close()


def compare(name: str, folder: Path, tools: Sequence[str], rounds: int, python: str, clock: str) -> list[Result]:
    """FP32 and every tool on one model: quantized where needed, timed in turn, measured."""
    prepare(name, folder)
    heldout = rival_tools.load(folder / "heldout.npz")
    failed = {tool: quantize(name, tool, folder, python) for tool in tools}
    reference = list(run_all(fp32 := Model(name="fp32", path=folder / "fp32.onnx", entries=NO_ENTRIES), heldout))
    opened, snr, integer = {"fp32": fp32}, {"fp32": math.inf}, {"fp32": 0.0}
    calls: dict[str, Call] = {"fp32": _call(fp32, heldout[0], clock)}
    with contextlib.ExitStack() as stack:
        for tool in (tool for tool in tools if not failed[tool]):
            try:
                if tool == OPENVINO:
                    calls[tool] = stack.enter_context(worker(folder, python, clock))
                    outputs = rival_tools.load(folder / "openvino.npz")
                else:
                    opened[tool] = open_onnx(tool, folder)
                    outputs = list(run_all(opened[tool], heldout))
                    integer[tool] = profile(opened[tool].path, heldout[0], entries=opened[tool].entries).integer_macs
                    calls[tool] = _call(opened[tool], heldout[0], clock)
                snr[tool] = drift.measure(zip(reference, outputs, strict=True)).worst_snr_db
            except PacklightError as error:
                failed[tool] = " ".join(str(error).split())
        times = dict(zip(calls, in_turn(list(calls.values()), rounds), strict=True))
    results = [
        Result(model=name, tool=tool, ms=ms, speed=times["fp32"] / ms, snr_db=snr[tool], integer=integer.get(tool))
        for tool, ms in times.items()
    ]
    return results + [Result(model=name, tool=tool, failed=why) for tool, why in failed.items() if why]


def _call(model: Model, batch: Batch, clock: str) -> Call:
    session = open_session(model.path, threads=1, entries=model.entries)
    return partial(seconds, partial(session.run, None, dict(batch)), rival_tools.CLOCKS[clock])


def over_best(results: Sequence[Result]) -> tuple[float, str]:
    """packlight's speed over that of the fastest rival, and the rival's name; NaN where either is missing."""
    speeds = {each.tool: each.speed for each in results if not each.failed}
    best = max((tool for tool in RIVALS if tool in speeds), key=speeds.__getitem__, default="")
    return speeds.get(OURS, math.nan) / speeds.get(best, math.nan), best


def show(results: Sequence[Result]) -> None:
    """Print the table of one model."""
    print(f"\n{results[0].model}: fp32 {results[0].ms:.2f} ms\n{'':<12}{'speed':>7}{'SNR dB':>9}{'integer':>10}")
    for each in results:
        if each.failed:
            print(f"{each.tool:<12}fails: {each.failed[:100]}")
        else:
            share = "" if each.integer is None else f"{100 * each.integer:8.1f} %"
            print(f"{each.tool:<12}{each.speed:6.2f}x{each.snr_db:9.1f}{share}")
    ratio, best = over_best(results)
    print(f"packlight / best ({best}): {ratio:.2f}", flush=True)


def show_kernels(tool: str, folder: Path, top: int) -> None:
    """Print the kernels, by operator and types, that take the most time: ms of a run, how many."""
    model = open_onnx(tool, folder)
    ran = profile(model.path, rival_tools.load(folder / "heldout.npz")[0], entries=model.entries, runs=30)
    times: dict[str, list[float]] = {}
    for each in ran.kernels:
        times.setdefault(f"{each.kernel} {each.types}", []).append(each.ms)
    ordered = sorted(times.items(), key=lambda item: -sum(item[1]))[:top]
    largest = ", ".join(f"{len(taken)} {kernel} {sum(taken):.2f}" for kernel, taken in ordered)
    print(f"{tool}, {ran.ms:.2f} ms in kernels: {largest}", flush=True)


def summary(results: Mapping[str, Sequence[Result]]) -> None:
    """Print the geometric mean of packlight over the best rival, and the worst."""
    ratios = {name: over_best(each)[0] for name, each in results.items()}
    known = {name: ratio for name, ratio in ratios.items() if not math.isnan(ratio)}
    if known:
        worst = min(known, key=known.__getitem__)
        mean = statistics.geometric_mean(known.values())
        print(f"\npacklight / best of {', '.join(RIVALS)}: geometric mean {mean:.2f} of {len(known)} models, ", end="")
        print(f"worst {known[worst]:.2f} ({worst})")


def main() -> None:
    """Read the arguments; compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the files of every tool, kept")
    parser.add_argument("--python", default=sys.executable, help="the Python that has requirements-rivals.txt")
    parser.add_argument("--only", nargs="+", choices=models.MODELS, default=list(models.MODELS), metavar="MODEL")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS, metavar="TOOL", help=", ".join(TOOLS))
    parser.add_argument("--again", nargs="+", choices=TOOLS, default=(), metavar="TOOL", help="quantize again")
    parser.add_argument("--rounds", type=int, default=60, help="timed calls of each")
    parser.add_argument("--clock", choices=rival_tools.CLOCKS, default="cpu", help="cpu by default, see above")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="where packlight and the best rival spend")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    given = parser.parse_args()
    print(
        f"{cpu.name()}, onnxruntime {onnxruntime.__version__}, 1 thread; speed: fp32 ms / ms, medians in turn, {given.clock} time"
    )
    results: dict[str, list[Result]] = {}
    for name in given.only:
        folder = given.work / name
        for tool in given.again:
            _forget(tool, folder)
        results[name] = compare(name, folder, given.tools, given.rounds, given.python, given.clock)
        show(results[name])
        ran = {each.tool for each in results[name] if not each.failed}
        for tool in ("fp32", OURS, over_best(results[name])[1]):
            if given.kernels and tool in ran:
                show_kernels(tool, folder, given.kernels)
    summary(results)
    if given.json:
        given.json.write_text(json.dumps([asdict(each) for rows in results.values() for each in rows], indent=1))


if __name__ == "__main__":
    main()
