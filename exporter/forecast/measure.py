"""Forecast what an int8 model does on x86 without VNNI: (model, real inputs) -> Forecast. No such machine is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter import batches, data
from exporter.batches import Array, Batch
from exporter.forecast import walk
from exporter.forecast.layer import Clips
from exporter.progress import Progress, Silent
from runtime import drift
from runtime import manifest as manifests
from runtime.drift import Drift
from runtime.probe import read_probe
from runtime.session import NO_ENTRIES
from runtime.verified import int8_model, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipped:
    """A layer that can clip, over all batches: uint8 activations by int8 weights.

    node, kernel: its name in the file, and what ONNX Runtime runs for it.
    pairs: pairs of weights that break the pair rule; of a weight that is computed, those of the first batch.
    clipped: share, 0..1, of the layer's sums in which at least one pair left int16.
    worst: the largest error of a sum, in units of the int32 accumulator.
    """

    node: str
    kernel: str
    pairs: int
    clipped: float
    worst: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """An int8 model on x86 without VNNI.

    layers: those that can clip, in order of execution; none when every int8 weight keeps the pair rule.
    drift: of the outputs there against the outputs of a CPU that does not saturate.
    with_vnni, without_vnni: of the outputs of either against FP32's, where these are known.
    rounds_here: nodes in float whose last bits differ from CPU to CPU; with none of them the forecast is exact.
    """

    layers: tuple[Clipped, ...]
    drift: Drift
    with_vnni: Drift | None
    without_vnni: Drift | None
    rounds_here: tuple[str, ...]

    @property
    def clips(self) -> bool:
        """Whether any sum of these batches left int16."""
        return any(layer.clipped > 0 for layer in self.layers)


def of_bundle(path: Path, progress: Progress | None = None) -> Forecast:
    """Forecast a bundle on its probe's inputs, with its manifest's session entries.

    Raises:
        BundleError: the bundle is not to be trusted, or ONNX Runtime refuses its model.
        PacklightError: a layer can clip in a way that is not followed.
    """
    about, probes = verify(path), read_probe(path / manifests.PROBE)
    pairs = ((probe.inputs, probe.fp32) for probe in probes)
    return _measure(walk.cut(int8_model(path, about), about.session), pairs, len(probes), progress)


def of_model(
    model: ir.Model | Path, given: Any, entries: Mapping[str, str] = NO_ENTRIES, progress: Progress | None = None
) -> Forecast:
    """Forecast any int8 model, with Q/DQ or with integer operators.

    Args:
        model: a graph, or an ONNX file.
        given: batches, or a path to them, as exporter.batches.read takes them; only real ones tell how often a layer clips.
        entries: session config entries it will be run with.

    Raises:
        BundleError: no such file, or ONNX Runtime refuses it.
        CalibrationError: no batches, or batches that do not fit the model.
        PacklightError: a layer can clip in a way that is not followed.
    """
    ready = walk.cut(model, entries)
    _, stream = batches.peek(data.read(given, ready.inputs, "inputs"), "inputs")
    return _measure(ready, ((batch, None) for batch in stream), None, progress)


def predict(
    model: ir.Model | Path, inputs: Batch, entries: Mapping[str, str] = NO_ENTRIES, *, saturates: bool = True
) -> dict[str, Array]:
    """The outputs on x86 without VNNI; without `saturates`, on a CPU whose sums are exact, whatever this one does."""
    return dict(walk.run(walk.cut(model, entries), inputs, saturates).outputs)


def _measure(
    ready: walk.Cut,
    stream: Iterable[tuple[Batch, Mapping[str, Array] | None]],
    total: int | None,
    progress: Progress | None,
) -> Forecast:
    listener = progress or Silent()
    listener.stage("forecast x86 without VNNI")
    seen: list[tuple[Mapping[str, Array], Mapping[str, Array], Mapping[str, Array] | None]] = []
    sums = [Clips()] * len(ready.layers)
    pairs = [0] * len(ready.layers)
    for inputs, fp32 in listener.each(stream, "batches", total):
        exact = walk.run(ready, inputs, saturates=False).outputs
        there = walk.run(ready, inputs, saturates=True) if ready.layers else walk.Ran(outputs=exact, clips=())
        if not seen:
            pairs = [each.pairs for each in there.clips]
        sums = [before + now for before, now in zip(sums, there.clips, strict=True)]
        seen.append((exact, there.outputs, fp32))
    layers = tuple(
        Clipped(
            node=layer.name,
            kernel=layer.node.op_type,
            pairs=count,
            clipped=of.clipped / (of.sums or 1),
            worst=of.worst,
        )
        for layer, count, of in zip(ready.layers, pairs, sums, strict=True)
    )
    known = [(fp32, exact, there) for exact, there, fp32 in seen if fp32 is not None]
    return Forecast(
        layers=layers,
        drift=drift.measure((exact, there) for exact, there, _ in seen),
        with_vnni=drift.measure((fp32, exact) for fp32, exact, _ in known) if known else None,
        without_vnni=drift.measure((fp32, there) for fp32, _, there in known) if known else None,
        rounds_here=ready.rounds_here,
    )
