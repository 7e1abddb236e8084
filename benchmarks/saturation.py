"""What x86 CPUs without VNNI make of an int8 EfficientNet-Lite0: ONNX Runtime's weights, seven-bit weights, and ours.

    python -m benchmarks.saturation                   # the views that samples/lite0 ships
    python -m benchmarks.saturation --images FOLDER   # your photographs: three of four calibrate, the fourth is held out

Four models from one FP32 graph and the same calibration batches:

    ORT, full range     quantize_static(activation_type=QUInt8, per_channel=True), after quant_pre_process
    ORT, reduce_range   the same with weights of seven bits, which no kernel saturates
    packlight x86-vnni  weights rounded to nearest, for CPUs with VNNI
    packlight portable  eight bits under the pair rule, which no kernel saturates either

each on this CPU, and on this CPU with AVX512 but no VNNI and with AVX2 alone (tests/devices). Prints a Markdown table: SNR of
the logits against FP32, the share of held-out batches with FP32's first class, FP32's time there over the
model's, and whether all three computed the same bits.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import exporter
from benchmarks.speed import SAMPLES, Batch, Model, Reader
from exporter import target
from exporter.source import from_file
from runtime import cpu, drift
from runtime.session import NO_ENTRIES, open_session
from tests import devices

DEVICES = {"full": "no mask", "avx512": "avx512", "avx2": "avx2"}
PRESETS = ("x86-vnni", "portable")
OUTPUT, FP32 = "logits", "fp32"

ROUNDS = 20
RUN = """
import json, sys, time
import numpy as np
from runtime.session import open_session
batches, models = np.load(sys.argv[1])["image"], json.loads(sys.argv[2])
sessions = {name: open_session(path, threads=1, entries=entries) for name, (path, entries) in models.items()}
run = lambda session: np.stack([session.run(None, {"image": batch})[0] for batch in batches])
np.savez(sys.argv[3], **{name: run(session) for name, session in sessions.items()})
times = {name: [] for name in sessions}
for _ in range(int(sys.argv[4])):
    for name, session in sessions.items():
        start = time.perf_counter()
        session.run(None, {"image": batches[0]})
        times[name].append(time.perf_counter() - start)
print(json.dumps({name: float(np.median(taken)) for name, taken in times.items()}))
"""


def made(images: Path | None, folder: Path) -> tuple[Path, list[Model], list[Batch]]:
    """The FP32 file, the four models, and the held-out batches."""
    sample = from_file(str(SAMPLES / "lite0"))
    assert sample.calibration is not None
    assert sample.heldout is not None
    calibration, heldout = list(sample.calibration(images=images)), list(sample.heldout(images=images))
    source, ours = sample.source(), []
    for preset in PRESETS:
        recipe = exporter.load_recipe(preset)
        exporter.export(source, recipe, calibration=calibration, heldout=heldout, out=folder / preset)
        path, entries = folder / preset / "model.int8.onnx", target.by_name(recipe.target).session
        ours.append(Model(name=f"packlight {preset}", path=path, entries=entries))
    fp32 = folder / PRESETS[0] / "model.fp32.onnx"
    return fp32, [*_orts(fp32, calibration, folder), *ours], heldout


def _orts(fp32: Path, calibration: Sequence[Batch], folder: Path) -> list[Model]:
    """ONNX Runtime's own quantizer with full-range and with seven-bit weights; it logs and warns a great deal."""
    clean, models = folder / "clean.onnx", []
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            quant_pre_process(fp32, clean, skip_symbolic_shape=True)
            for name, reduce_range in (("ORT, full range", False), ("ORT, reduce_range", True)):
                path = folder / f"ort-{reduce_range}.onnx"
                quantize_static(
                    clean,
                    path,
                    Reader(calibration),
                    activation_type=QuantType.QUInt8,
                    per_channel=True,
                    reduce_range=reduce_range,
                )
                models.append(Model(name=name, path=path, entries=NO_ENTRIES))
    finally:
        logging.disable(logging.NOTSET)
    return models


def computed(
    device: str, models: Sequence[Model], heldout: Sequence[Batch], folder: Path
) -> tuple[Mapping[str, np.ndarray], Mapping[str, float]]:
    """{model: logits float32 [batches, 1, 1000]} and {model: median seconds, one thread, taken in turn} on the device."""
    given, found = folder / "heldout.npz", folder / f"{device}.npz"
    np.savez(given, image=np.stack([batch["image"] for batch in heldout]))
    listed = {model.name: (str(model.path), dict(model.entries)) for model in models}
    done = devices.run(device, RUN, str(given), json.dumps(listed), str(found), str(ROUNDS), seconds=1800)
    with np.load(found) as arrays:
        return dict(arrays), json.loads(done.stdout)


def compare(images: Path | None) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(prefix="packlight-saturation-") as name:
        folder = Path(name)
        fp32, models, heldout = made(images, folder)
        session = open_session(fp32)
        reference = [session.run([OUTPUT], dict(batch))[0] for batch in heldout]
        plain = Model(name=FP32, path=fp32, entries=NO_ENTRIES)
        ran = {device: computed(device, [plain, *models], heldout, folder) for device in DEVICES}
        found = {device: outputs for device, (outputs, _) in ran.items()}
        print(f"{len(heldout)} held-out batches\n")
        print(
            f"| weights | {' | '.join(f'SNR dB, {shown} | same top-1 | speed' for shown in DEVICES.values())} | bits equal |"
        )
        print(f"|{'---|' * (2 + 3 * len(DEVICES))}")
        for model in models:
            cells = [
                f"{_cell(reference, outputs[model.name])} | {seconds[FP32] / seconds[model.name]:.2f}x"
                for outputs, seconds in ran.values()
            ]
            equal = all(np.array_equal(found["full"][model.name], found[device][model.name]) for device in DEVICES)
            print(f"| {model.name} | {' | '.join(cells)} | {'yes' if equal else 'no'} |")


def _cell(reference: Sequence[np.ndarray], found: np.ndarray) -> str:
    pairs = zip(reference, found, strict=True)
    output = drift.measure(({OUTPUT: fp32}, {OUTPUT: int8}) for fp32, int8 in pairs).outputs[0]
    assert output.same_top1 is not None
    return f"{output.snr_db:.1f} | {100 * output.same_top1:.1f} %"


def main() -> None:
    """Read the arguments; compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="photographs; the sample's own pictures by default"
    )
    given = parser.parse_args()
    print(f"{cpu.name()}, onnxruntime {onnxruntime.__version__}, samples/lite0")
    if cpu.pairs_in_int16():
        print('This CPU has no VNNI: "no mask" saturates as well.')
    compare(given.images)


if __name__ == "__main__":
    main()
