"""Statistics of calibration batches, made on the workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from exporter import graph
from exporter.batches import Batch
from exporter.calibrate import memory as memories
from exporter.calibrate import statistics
from exporter.calibrate.memory import Memory, Part
from exporter.calibrate.observe import ObserveChunk, observer, whole
from exporter.calibrate.statistics import Statistics
from exporter.cluster.connection import Cluster
from exporter.cluster.tasks import grouped


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What `observer` needs."""

    model: bytes
    tensors: tuple[str, ...]
    channels: tuple[tuple[str, int], ...]
    histograms: bool


def observe(
    cluster: Cluster,
    model: ir.Model,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    channels: Sequence[tuple[str, int]] = (),
    histograms: bool = False,
    memory: Memory | None = None,
) -> Statistics:
    """`calibrate.observe` on a cluster: the same statistics, bit for bit.

    Args:
        model, tensors, batches, channels, histograms: as for `calibrate.observe`; batches are read once,
            and no faster than they are used.
        memory: keeps the statistics of each group of chunks, and knows those of a run that was interrupted, here or there.

    Raises:
        CalibrationError: as `calibrate.observe`.
        ClusterError: all workers are gone, or a chunk has killed several.
    """
    kept = memory or Memory(b"", None)
    asked = _Asked(model=graph.to_bytes(model), tensors=tuple(tensors), channels=tuple(channels), histograms=histograms)

    def parts() -> Iterator[Part]:
        for found, chunks in grouped(cluster, asked, _observer, statistics.merge, kept.known(batches)):
            yield found if isinstance(found, Part) else memories.part(chunks, found)

    return whole(kept.keep(parts()))


def _observer(asked: _Asked) -> ObserveChunk:
    """On a worker."""
    model = ir.serde.deserialize_model(onnx.ModelProto.FromString(asked.model))
    return observer(model, asked.tensors, asked.channels, asked.histograms)
