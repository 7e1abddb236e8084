"""A hundred architectures through the static plan, each beside FP32 and ONNX Runtime's own quantizer: docs/models.md.

    pip install --no-deps timm==1.0.31 torchvision==0.28.0        # no other torch
    pip install -r benchmarks/requirements-breadth.txt
    python -m benchmarks.breadth                        # hours; goes on where it stopped
    python -m benchmarks.breadth --only 'timm/res*'     # anew, these alone
    python -m benchmarks.breadth --table                # docs/models.md, from what has been measured

Three models of each architecture, from one FP32 graph and the same calibration batches:

    fp32       the graph as torch gave it
    plain      quant_pre_process, then quantize_static with uint8 activations and int8 weights per channel
    packlight  the static plan (max_evaluations=0: no search) for the target that this machine is, or portable

One thread. The three run in turn, by the CPU's seconds, so that other work on the machine counts little; a short model is opened
several times and the median counts. SNR is of the worst output over the held-out batches, integer the share of multiply-adds in
integer kernels, by the profiler. What is measured lies in a file, one line of JSON an architecture.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import exporter
from benchmarks import breadth_models
from benchmarks.breadth_models import Architecture, Batch
from benchmarks.speed import Model, Reader, snr_db
from exporter import target
from runtime import cpu, verified
from runtime.bench import CPU_SECONDS, medians_ms
from runtime.kernels import Kernels, trace
from runtime.session import NO_ENTRIES, open_session

ROOT = Path(__file__).resolve().parents[1]
CACHE, TABLE = ROOT / "build" / "breadth.jsonl", ROOT / "docs" / "models.md"
WORSE_DB, SLOWER, LONG_SECONDS = 1.0, 0.95, 600.0  # what a row may lose to plain, and what an export may take
SESSIONS, SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 3, 1.0, 7, 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was measured of one architecture. Times are of one run and not kept: ratios are.

    failed: why there is no bundle; plain_failed: why plain has no numbers. speed: FP32's median time over the model's.
    why: of a bundle that is slower than FP32. started: it was begun, and nothing is known of its end.
    """

    key: str
    target: str = ""
    started: bool = False
    failed: str = ""
    plain_failed: str = ""
    seconds: float = math.nan
    fp32_ms: float = math.nan
    snr_db: float = math.nan
    plain_snr_db: float = math.nan
    speed: float = math.nan
    plain_speed: float = math.nan
    integer: float = math.nan
    plain_integer: float = math.nan
    why: str = ""
    machine: str = ""


def machine() -> str:
    return f"{cpu.name()}, onnxruntime {onnxruntime.__version__}, torch {torch.__version__}"


def measured(architecture: Architecture) -> Row:
    """Export it, quantize it plainly, time the three."""
    name = target.of(cpu.read()).name
    row = Row(key=architecture.key, target=name, machine=machine())
    calibration, heldout = architecture.batches(0), architecture.batches(1)
    with tempfile.TemporaryDirectory(prefix="packlight-breadth-") as temporary:
        folder = Path(temporary)
        source, recipe = breadth_models.source(architecture), exporter.load_recipe(name)
        start = time.perf_counter()
        try:
            exporter.export(source, recipe, calibration, heldout, out=folder / "bundle", max_evaluations=0)
        except Exception as error:  # the table tells of every kind
            traceback.print_exc()
            return replace(row, failed=_told(error), seconds=time.perf_counter() - start)
        row = replace(row, seconds=time.perf_counter() - start)
        fp32 = Model(name="fp32", path=folder / "bundle" / "model.fp32.onnx", entries=NO_ENTRIES)
        entries = verified.verify(folder / "bundle").session
        ours = Model(name="packlight", path=folder / "bundle" / "model.int8.onnx", entries=entries)
        plain = Model(name="plain", path=folder / "plain.onnx", entries=NO_ENTRIES)
        try:
            quantize_plainly(fp32.path, plain.path, calibration)
            row = replace(row, plain_snr_db=snr_db(plain, fp32, heldout))
        except Exception as error:
            row = replace(row, plain_failed=_told(error))
        row = replace(row, snr_db=snr_db(ours, fp32, heldout))
        models = [fp32, ours, *([] if row.plain_failed else [plain])]
        fp32_ms, speeds = timed(models, heldout[0])
        kernels = [trace(model.path, heldout[0], entries=model.entries) for model in models]
        row = replace(row, fp32_ms=fp32_ms, speed=speeds[1], integer=kernels[1].integer_macs)
        if not row.plain_failed:
            row = replace(row, plain_speed=speeds[2], plain_integer=kernels[2].integer_macs)
        return replace(row, why=slow(kernels[1])) if row.speed < 1 else row


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def quantize_plainly(fp32: Path, out: Path, calibration: Sequence[Batch]) -> None:
    """ONNX Runtime's preparation, the part that fails on some graphs left out there, and its quantizer."""
    clean = out.with_suffix(".clean.onnx")
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                quant_pre_process(fp32, clean, auto_merge=True)
            except Exception:  # it raises whatever sympy, onnx or its own dictionaries do
                quant_pre_process(fp32, clean, skip_symbolic_shape=True)
            quantize_static(
                clean,
                out,
                Reader(calibration),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
    finally:
        logging.disable(logging.NOTSET)


def timed(models: Sequence[Model], batch: Batch) -> tuple[float, list[float]]:
    """FP32's median milliseconds, and how many times as fast each model is; medians of the sessions' ratios."""
    found: list[list[float]] = []
    for _ in range(SESSIONS):
        sessions = [open_session(model.path, threads=1, entries=model.entries) for model in models]
        turns = [partial(session.run, None, dict(batch)) for session in sessions]
        once = math.fsum(medians_ms(turns, 1, CPU_SECONDS)) / 1e3
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / max(once, 1e-6))))
        found.append(medians_ms(turns, rounds, CPU_SECONDS))
    ratios = [[times[0] / taken for taken in times] for times in found]
    return statistics.median(times[0] for times in found), [
        statistics.median(column) for column in zip(*ratios, strict=True)
    ]


def slow(kernels: Kernels) -> str:
    """Where an int8 model that is slower than FP32 spends its time: the three kernels that take most of it."""
    spent: dict[str, float] = {}
    for kernel in kernels.kernels:
        spent[kernel.kernel] = spent.get(kernel.kernel, 0.0) + kernel.ms
    total = math.fsum(spent.values())
    most = sorted(spent, key=lambda name: -spent[name])[:3]
    return "its time goes to " + ", ".join(f"{name} {100 * spent[name] / total:.0f} %" for name in most)


# --- what has been measured -----------------------------------------------------------------------------------------------


def known(cache: Path) -> dict[str, Row]:
    """The rows of the file; a later line counts before an earlier one."""
    if not cache.exists():
        return {}
    rows = (Row(**json.loads(line)) for line in cache.read_text(encoding="utf-8").splitlines())
    return {row.key: row for row in rows}


def keep(cache: Path, row: Row) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def line(row: Row) -> str:
    if row.failed:
        return f"{row.key:<42} FAILED after {row.seconds:.0f} s: {row.failed}"
    plain = f"plain {row.plain_snr_db:5.1f} dB {row.plain_speed:5.2f}x {100 * row.plain_integer:5.1f} %"
    said = (
        f"{row.key:<42} {row.snr_db:5.1f} dB {row.speed:5.2f}x {100 * row.integer:5.1f} %   {row.plain_failed or plain}"
    )
    return f"{said}   {row.seconds:.0f} s   {'; '.join(short(row))}"


def short(row: Row) -> list[str]:
    """What a row falls short of."""
    found = ["not exported"] if row.failed else []
    if row.snr_db < row.plain_snr_db - WORSE_DB:
        found.append("less accurate than plain")
    if row.speed < SLOWER * row.plain_speed:
        found.append("slower than plain")
    if row.speed < 1:
        found.append("slower than FP32")
    if row.seconds > LONG_SECONDS:
        found.append("took long")
    return found


def run(chosen: Sequence[Architecture], cache: Path, again: bool) -> None:
    """Measure those that are not known; one that ended the process counts as failed when the process is started again."""
    rows = known(cache)
    for number, architecture in enumerate(chosen, start=1):
        row = rows.get(architecture.key)
        if row is not None and row.started:
            row = Row(key=row.key, failed="the process died", machine=row.machine)
            keep(cache, row)
        if row is None or again:
            keep(cache, Row(key=architecture.key, started=True, machine=machine()))
            try:
                row = measured(architecture)
            except Exception as error:  # of this script, or of the library that has the architecture
                traceback.print_exc()
                row = Row(key=architecture.key, failed=f"not measured: {_told(error)}", machine=machine())
            keep(cache, row)
        print(f"{number}/{len(chosen)} {line(row)}", flush=True)


# --- the table ------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], asked: int) -> str:
    """docs/models.md; asked: how many architectures there are."""
    lines = [*_head(rows), *_summary(rows, asked), *_tables(rows)]
    return "\n".join(lines).rstrip() + "\n"


def _head(rows: Sequence[Row]) -> Iterator[str]:
    machines = sorted({row.machine for row in rows})
    versions = f"timm {breadth_models.timm.__version__}, torchvision {breadth_models.torchvision.__version__}, "
    versions += f"transformers {breadth_models.transformers.__version__}"
    yield from (
        "# Architectures",
        "",
        "Written by `python -m benchmarks.breadth --table`, from what `python -m benchmarks.breadth` measured on",
        f"{'; '.join(machines)};",
        f"{versions}; target {', '.join(sorted({row.target for row in rows if row.target}))}.",
        "",
        "Each network has seeded weights, batch norms settled on pictures, and a small input or configuration. It is exported with",
        "the static plan, without a search. Plain is ONNX Runtime's `quant_pre_process` and `quantize_static`, uint8 activations",
        "and int8 weights per channel. Speed is FP32's time over the model's, one thread, in turn; SNR is on held-out inputs, of",
        "the worst output; integer is the share of multiply-adds in integer kernels. How each figure is taken stands in",
        "[benchmarks/breadth.py](../benchmarks/breadth.py).",
        "",
    )


def _summary(rows: Sequence[Row], asked: int) -> Iterator[str]:
    made = [row for row in rows if not row.failed]
    compared = [row for row in made if not row.plain_failed]

    def count(what: str, among: Sequence[Row]) -> str:
        names = [row.key for row in among if what in short(row)]
        return f"{len(names)} of {len(among)}"

    yield from (
        "| | |",
        "|---|---|",
        f"| measured so far | {len(rows)} of {asked} |",
        f"| exported | {len(made)} of {len(rows)} |",
        f"| longest export | {max((row.seconds for row in made), default=0):.0f} s |",
        f"| plain could not be made or run | {len(made) - len(compared)} of {len(made)} |",
        f"| more than {WORSE_DB:.0f} dB below plain | {count('less accurate than plain', compared)} |",
        f"| more than {100 * (1 - SLOWER):.0f} % slower than plain | {count('slower than plain', compared)} |",
        f"| slower than FP32 | {count('slower than FP32', made)} |",
        f"| plain slower than FP32 | {sum(row.plain_speed < 1 for row in compared)} of {len(compared)} |",
        f"| median speed, packlight and plain | {_median(compared, 'speed'):.2f}x, {_median(compared, 'plain_speed'):.2f}x |",
        f"| median SNR, packlight and plain | {_median(compared, 'snr_db'):.1f} dB, {_median(compared, 'plain_snr_db'):.1f} dB |",
        "",
    )


def _median(rows: Sequence[Row], field: str) -> float:
    return statistics.median([getattr(row, field) for row in rows] or [math.nan])


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    for library in dict.fromkeys(row.key.partition("/")[0] for row in rows):
        yield from (f"## {library}", "")
        yield "| | SNR dB | plain | speed | plain | integer | plain | export | |"
        yield "|---|---|---|---|---|---|---|---|---|"
        yield from (_cells(row) for row in rows if row.key.startswith(f"{library}/"))
        yield ""
        yield from (
            f"- **{row.key}**: {note}." for row in rows if row.key.startswith(f"{library}/") for note in _notes(row)
        )
        yield ""


def _cells(row: Row) -> str:
    name = row.key.partition("/")[2]
    if row.failed:
        return f"| {name} | | | | | | | {row.seconds:.0f} s | not exported |"
    plain = ("", "", "") if row.plain_failed else (
        f"{row.plain_snr_db:.1f}", f"{row.plain_speed:.2f}x", f"{100 * row.plain_integer:.0f} %"
    )  # fmt: skip
    ours = (f"{row.snr_db:.1f}", f"{row.speed:.2f}x", f"{100 * row.integer:.0f} %")
    cells = [cell for pair in zip(ours, plain, strict=True) for cell in pair]
    return f"| {name} | {' | '.join(cells)} | {row.seconds:.0f} s | {', '.join(short(row))} |"


def _notes(row: Row) -> Iterator[str]:
    if row.failed:
        yield f"not exported: {_cut(row.failed)}"
    if row.plain_failed:
        yield f"plain has no numbers: {_cut(row.plain_failed)}"
    if row.why:
        yield f"slower than FP32: {row.why}"


def _cut(text: str) -> str:
    return text if len(text) < 60 else f"{text[:57]}..."


def main() -> None:
    """Read the arguments; measure, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="PATTERN", help="library/name, with * and ?: measured anew")
    parser.add_argument("--failed", action="store_true", help="measure anew those that fall short of something")
    parser.add_argument("--cache", type=Path, default=CACHE, help="what has been measured, a line each")
    parser.add_argument("--table", action="store_true", help=f"write {TABLE.relative_to(ROOT)} from it")
    given = parser.parse_args()
    every = breadth_models.architectures()
    if given.table:
        rows = known(given.cache)
        done = [rows[each.key] for each in every if each.key in rows and not rows[each.key].started]
        TABLE.write_text(table(done, len(every)), encoding="utf-8")
        return
    chosen: Sequence[Architecture] = every
    if given.only:
        chosen = [each for each in every if any(fnmatchcase(each.key, pattern) for pattern in given.only)]
        if not chosen:
            parser.error(f"--only {' '.join(given.only)}: no such architecture")
    if given.failed:
        rows = known(given.cache)
        chosen = [each for each in chosen if each.key in rows and short(rows[each.key])]
    print(f"{machine()}, {len(chosen)} architectures", file=sys.stderr, flush=True)
    run(chosen, given.cache, again=bool(given.only or given.failed))


if __name__ == "__main__":
    main()
