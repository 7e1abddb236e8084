"""Streaming min-max: statistics are taken batch by batch and nothing of a batch is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array, Batch
from exporter.calibrate.ranges import Range, Ranges
from exporter.errors import CalibrationError

# An attention mask adds -3.4e38 (float32's lowest) or half of it; no activation of a working network is near
SATURATING = 1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What calibration saw: ranges, and {(tensor, channel_axis): float64 [channels]} means that were asked for."""

    ranges: Ranges
    means: Mapping[tuple[str, int], Array]


def observe(
    model: ir.Model, tensors: Sequence[str], batches: Iterable[Batch], channels: Sequence[tuple[str, int]] = ()
) -> Observed:
    """Run the FP32 graph on every batch and take the range of each named tensor.

        low = min over batches of min(x), high = max over batches of max(x), over the x with |x| < SATURATING

    Shapes may differ from batch to batch, and a tensor may be empty in some. Peak memory is one batch's tensors.

    Args:
        model: the prepared graph.
        tensors: names of float32 tensors of the graph, inputs included.
        batches: checked batches (`exporter.batches.read`); read once.
        channels: (tensor, channel_axis) of those among `tensors` whose mean per channel is wanted too.

    Raises:
        CalibrationError: NaN or infinity (names batch and tensor), a batch the graph refuses, no batches, a tensor
            that held no value in any batch.
    """
    inner = [name for name in tensors if name not in {value.name for value in model.graph.inputs}]
    run = graph.runner(graph.with_outputs(model, inner)) if inner else None
    seen: dict[str, Range] = {}
    sums: dict[tuple[str, int], Array] = {}
    counts = dict.fromkeys(channels, 0)
    count = 0
    for count, batch in enumerate(batches, start=1):
        values = dict(batch)
        if run is not None:
            try:
                values |= run(batch)
            except graph.RunError as error:
                raise CalibrationError(
                    f"calibration batch {count - 1}: ONNX Runtime cannot run it",
                    found=str(error),
                    expected="shapes the model accepts",
                    batch=count - 1,
                ) from error
        for name in tensors:
            found = _range(values[name], name, count - 1)
            if found is not None:
                seen[name] = merge(seen[name], found) if name in seen else found
        for key in channels:
            name, axis = key
            rest = np.moveaxis(values[name], axis, -1)
            total = rest.reshape(-1, rest.shape[-1]).sum(axis=0, dtype=np.float64)
            sums[key] = sums[key] + total if key in sums else total
            counts[key] += rest.size // max(1, rest.shape[-1])
    if not count:
        raise CalibrationError("calibration: no batches", found="an empty iterable", expected="at least one batch")
    for name in tensors:
        if name not in seen:
            raise CalibrationError(
                f"tensor {name!r}",
                found=f"no value in {count} batches",
                expected="at least one",
                do="give batches that reach this part of the model, or a rule that keeps its node float",
                tensor=name,
            )
    means = {key: total / counts[key] for key, total in sums.items()}
    return Observed(ranges=Ranges(tensors=seen, batches=count, method="minmax"), means=means)


def merge(a: Range, b: Range) -> Range:
    """The range of both: associative and commutative, so that shards combine in any order."""
    return Range(
        low=min(a.low, b.low),
        high=max(a.high, b.high),
        elements=a.elements + b.elements,
        masked=a.masked + b.masked,
    )


def _range(values: Array, name: str, batch: int) -> Range | None:
    """Range of one tensor in one batch; None when it holds no value that counts."""
    if values.size == 0:
        return None
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):  # a NaN anywhere makes both NaN
        raise CalibrationError(
            f"calibration batch {batch}: tensor {name!r}",
            found="NaN" if np.isnan(values).any() else "infinity",
            expected="finite numbers",
            do="look at this batch; if the model is meant to make infinities here, keep the node float with a rule",
            tensor=name,
            batch=batch,
        )
    whole = Range(low=low, high=high, elements=values.size, masked=0)
    if low > -SATURATING and high < SATURATING:
        return whole
    rest = values[np.abs(values) < SATURATING]
    if rest.size == 0:
        return None
    return replace(whole, low=float(rest.min()), high=float(rest.max()), masked=values.size - rest.size)
