"""How fast and how close: FP32, ONNX Runtime's own static int8, and packlight, in turn in one run.

    python benchmarks/speed.py                      # all three samples, some minutes; needs what samples/*/README.md install
    python benchmarks/speed.py digits --rounds 100  # one of them

Five models from one FP32 graph and the same calibration batches:

    fp32       the graph as torch gave it
    ort        quantize_static(model, out, reader): ONNX Runtime's defaults (S8S8, one scale a tensor)
    ort-u8s8   quantize_static with activation_type=QUInt8, per_channel=True: all op_types, the best of its plain settings
    portable   packlight, weights under the pair rule, for any CPU
    x86-vnni   packlight, weights rounded to nearest

Both of ORT's are quantized after quant_pre_process, as its manual asks. One thread, on the first held-out batch; the five run
in turn, A B C D E A B C D E ..., so that a drifting machine hits all alike.

How to read it: `speed` is median fp32 ms / median ms: above 1 is faster. `SNR dB` is of the worst output, over all held-out batches
(docs/drift.md). `integer` is the share of multiply-adds that ran in integer kernels, by the profiler: an SNR beside a small
share says little. `size` is the file's over fp32's. Compare ratios of one run, never milliseconds of two.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import exporter
from exporter import target
from exporter.source import from_file
from runtime import cpu, drift
from runtime.bench import medians_ms
from runtime.kernels import trace
from runtime.session import NO_ENTRIES, open_session

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
NAMES = ("digits", "lite0", "minilm")
TARGETS = ("portable", "x86-vnni")

Batch = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One of the five: an ONNX file and the session entries it is run with."""

    name: str
    path: Path
    entries: Mapping[str, str]


class Reader(CalibrationDataReader):
    """Calibration batches as ONNX Runtime asks for them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else dict(batch)


def made(name: str, folder: Path) -> tuple[list[Model], list[Batch]]:
    """The five models of a sample, and its held-out batches."""
    sample = from_file(str(SAMPLES / name))
    assert sample.calibration is not None
    assert sample.heldout is not None
    calibration, heldout = list(sample.calibration()), list(sample.heldout())
    source = sample.source()
    ours = []
    for preset in TARGETS:
        recipe = exporter.load_recipe(preset)
        exporter.export(source, recipe, calibration=calibration, heldout=heldout, out=folder / preset)
        entries = target.by_name(recipe.target).session
        ours.append(Model(name=preset, path=folder / preset / "model.int8.onnx", entries=entries))
    fp32 = folder / TARGETS[0] / "model.fp32.onnx"
    return [Model(name="fp32", path=fp32, entries=NO_ENTRIES), *_orts(fp32, calibration, folder), *ours], heldout


def _orts(fp32: Path, calibration: Sequence[Batch], folder: Path) -> list[Model]:
    """ONNX Runtime's own quantizer, twice; it logs and warns a great deal."""
    clean, plain, best = folder / "clean.onnx", folder / "ort.onnx", folder / "ort-u8s8.onnx"
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _pre_process(fp32, clean)
            quantize_static(clean, plain, Reader(calibration))
            quantize_static(clean, best, Reader(calibration), activation_type=QuantType.QUInt8, per_channel=True)
    finally:
        logging.disable(logging.NOTSET)
    return [Model(name=name, path=path, entries=NO_ENTRIES) for name, path in (("ort", plain), ("ort-u8s8", best))]


def _pre_process(fp32: Path, out: Path) -> None:
    """ONNX Runtime's preparation; its symbolic shape inference, a part that may be skipped, fails on some graphs."""
    try:
        quant_pre_process(fp32, out, auto_merge=True)
    except Exception as error:  # it raises whatever sympy, onnx or its own dictionaries do
        print(f"quant_pre_process without symbolic shapes, which fails here: {type(error).__name__}: {error}")
        quant_pre_process(fp32, out, skip_symbolic_shape=True)


def times_ms(models: Sequence[Model], batch: Batch, rounds: int) -> list[float]:
    """Median milliseconds of each model, taken in turn."""
    sessions = [open_session(model.path, threads=1, entries=model.entries) for model in models]
    return medians_ms([partial(session.run, None, dict(batch)) for session in sessions], rounds)


def snr_db(model: Model, reference: Model, heldout: Sequence[Batch]) -> float:
    """SNR of the worst output over all held-out batches."""
    runs = []
    for each in (reference, model):
        session = open_session(each.path, entries=each.entries)
        names = [output.name for output in session.get_outputs()]
        runs.append((session, names))
    pairs = ([dict(zip(names, s.run(names, dict(b)), strict=True)) for s, names in runs] for b in heldout)
    return drift.measure((fp32, int8) for fp32, int8 in pairs).worst_snr_db


def compare(name: str, rounds: int) -> None:
    """Print the table of one sample."""
    with tempfile.TemporaryDirectory(prefix="packlight-speed-") as folder:
        models, heldout = made(name, Path(folder))
        times = times_ms(models, heldout[0], rounds)
        shapes = ", ".join(f"{key} {list(value.shape)}" for key, value in heldout[0].items())
        print(f"\n{name}: {shapes}; fp32 {times[0]:.2f} ms, {rounds} rounds, {len(heldout)} held-out batches")
        print(f"{'':<12}{'speed':>7}{'SNR dB':>9}{'integer':>10}{'size':>8}")
        for model, taken in zip(models, times, strict=True):
            share = trace(model.path, heldout[0], entries=model.entries).integer_macs
            size = model.path.stat().st_size / models[0].path.stat().st_size
            snr = snr_db(model, models[0], heldout)
            print(f"{model.name:<12}{times[0] / taken:6.2f}x{snr:9.1f}{100 * share:8.1f} %{size:7.2f}x")


def main() -> None:
    """Read the arguments; compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", nargs="*", metavar="SAMPLE", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--rounds", type=int, default=60, help="timed calls of each model")
    given = parser.parse_args()
    if unknown := set(given.samples) - set(NAMES):
        parser.error(f"no sample {', '.join(sorted(unknown))}; choose from {', '.join(NAMES)}")
    print(f"{cpu.name()}, onnxruntime {onnxruntime.__version__}, 1 thread; speed: fp32 ms / ms, medians in turn")
    for name in given.samples or NAMES:
        compare(name, given.rounds)


if __name__ == "__main__":
    main()
