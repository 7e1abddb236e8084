"""How often `packlight compare` says "worse" of a bundle that is, and of one that is not: python -m benchmarks.compare

Twenty times: 2,000 new samples; against the baseline a bundle whose same top-1 is two points lower on 20,000 others (the scales
of its last weights are disturbed until it is), and one that was rebuilt: other bytes, the same numbers. One thread, 60 rounds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from runtime import compare
from runtime import manifest as manifests
from runtime.bundle import load
from runtime.manifest import Budget
from runtime.probe import read_probe, write_probe
from tests.runtime import models

REPETITIONS, SAMPLES, POOL, POINTS = 20, 2000, 20_000, 0.02
LAST = "w3_scale"


def images(rng: np.random.Generator, count: int) -> models.Array:
    return rng.random((count, *models.IMAGE), dtype=np.float32)


def same_top1(model: Path, pool: models.Array, expected: models.Array) -> float:
    return float((models.run(model, {"image": pool})["logits"].argmax(axis=1) == expected).mean())


def rebuilt(folder: Path, out: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy whose int8 model is changed, its probe recorded anew."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    model = onnx.load(out / manifests.INT8)
    model.producer_name = out.name
    change(model)
    onnx.save(model, out / manifests.INT8)
    probes = [
        replace(each, int8=models.run(out / manifests.INT8, each.inputs)) for each in read_probe(out / manifests.PROBE)
    ]
    write_probe(out / manifests.PROBE, probes)
    models.seal(out, models.manifest(Budget()))
    return out


def disturbed(scale: float, noise: models.Array) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for each in model.graph.initializer:
            if each.name == LAST:
                values = numpy_helper.to_array(each) * (1 + scale * noise)
                each.CopyFrom(numpy_helper.from_array(values.astype(np.float32), each.name))

    return change


def worse_by_points(folder: Path, out: Path, rng: np.random.Generator) -> tuple[Path, float]:
    """A bundle that is POINTS worse on a pool of its own, by bisection; and by how much it is."""
    pool = images(rng, POOL)
    expected = models.run(folder / manifests.FP32, {"image": pool})["logits"].argmax(axis=1)
    least, noise = same_top1(folder / manifests.INT8, pool, expected), rng.standard_normal(models.CLASSES)
    low, high = 0.0, 0.5
    for turn in range(12):
        scale = (low + high) / 2
        tried = rebuilt(folder, out / f"tried{turn}", disturbed(scale, noise))
        lost = least - same_top1(tried / manifests.INT8, pool, expected)
        low, high = (scale, high) if lost < POINTS else (low, scale)
        if abs(lost - POINTS) < 0.0005:
            break
    return tried, lost


def main() -> None:
    flagged: dict[str, dict[str, int]] = {"worse": {}, "rebuilt": {}}
    with tempfile.TemporaryDirectory() as place:
        base = models.write_bundle(Path(place) / "base")
        for repetition in range(REPETITIONS):
            rng, here = np.random.default_rng(repetition), Path(place) / str(repetition)
            here.mkdir()
            bad, lost = worse_by_points(base, here, rng)
            same = rebuilt(base, here / "rebuilt", lambda model: None)
            np.save(here / "samples.npy", images(rng, SAMPLES))
            for kind, folder in (("worse", bad), ("rebuilt", same)):
                found = compare.compare(load(base, 1), load(folder, 1), here / "samples.npy")
                told = {line.what.split()[0]: line for line in found.lines}
                for name in ("same_top1", "snr_db", "median_ms"):
                    verdicts = flagged[kind].setdefault(f"{name}: {told[name].verdict}", 0)
                    flagged[kind][f"{name}: {told[name].verdict}"] = verdicts + 1
                top1 = told["same_top1"]
                print(
                    f"{repetition:2} {kind:8} pool {lost if kind == 'worse' else 0:.4f} lost, here {-top1.found:.4f} "
                    f"({-top1.high:.4f} .. {-top1.low:.4f}), {compare.headline(found)}",
                    flush=True,
                )
    print("| bundle | line | verdict | of 20 |\n|---|---|---|---|")
    for kind, counts in flagged.items():
        for verdict, count in sorted(counts.items()):
            print(f"| {kind} | {verdict.replace(': ', ' | ')} | {count} |")


if __name__ == "__main__":
    main()
