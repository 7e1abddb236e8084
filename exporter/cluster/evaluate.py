"""Drift of an int8 model on held-out batches, measured on the workers: sums that are exact in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from exporter import heldout
from exporter.batches import Batch, digest
from exporter.calibrate.fold import fold
from exporter.calibrate.memory import Chunk, cut_chunks
from exporter.cluster.connection import Cluster
from exporter.cluster.tasks import grouped
from exporter.heldout import Outputs
from runtime import drift
from runtime import manifest as manifests
from runtime.drift import NO_BATCH, NOTHING_KNOWN, Drift, Ground, Totals, Worst, grounds
from runtime.errors import PacklightError
from runtime.verified import verify


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """Two models, and the session entries of the second."""

    fp32: bytes
    int8: bytes
    entries: tuple[tuple[str, str], ...]
    against: Mapping[str, Ground] = field(compare=False)
    against_digest: str


def evaluate(cluster: Cluster, bundle: str | Path, batches: Iterable[Batch]) -> Drift:
    """Drift of a bundle's int8 model against its FP32 model on held-out batches: the same as in one process.

    Args:
        bundle: a folder with model.fp32.onnx in it.
        batches: checked batches; read once.

    Raises:
        BundleError: not a bundle. PacklightError: no FP32 model in it, or no batches. Others as `total`.
    """
    folder = Path(bundle)
    listed = verify(folder)
    if not (folder / manifests.FP32).is_file():
        raise PacklightError(str(folder / manifests.FP32), found="nothing", expected="the reference of the drift")
    fp32, int8 = ((folder / name).read_bytes() for name in (manifests.FP32, manifests.INT8))
    found = total(cluster, fp32, int8, listed.session, batches, against=grounds(listed.judged))
    return found.drift() if found.batches else drift.measure([])


def total(
    cluster: Cluster, fp32: bytes, int8: bytes, entries: Mapping[str, str], batches: Iterable[Batch], first: int = 0,
    against: Mapping[str, Ground] = NOTHING_KNOWN,
) -> Totals:  # fmt: skip
    """The sums of the drift of `int8` against `fp32`: `drift.total` on a cluster. There may be no batch.

    Args:
        entries: session entries of the target, for `int8`.
        against: what each output is held against.
        first: number of the first batch, for messages.

    Raises:
        CalibrationError: a batch that a model refuses, or on which the FP32 model gives NaN or infinity.
        ClusterError: see `observe`.
    """
    asked = _Pair(
        fp32=fp32, int8=int8, entries=tuple(sorted(entries.items())), against=against, against_digest=_digest(against)
    )
    groups = grouped(cluster, asked, _comparer, drift.merge, cut_chunks(batches, first))
    found = fold((_with_inputs(totals, chunks) for totals, chunks in groups), drift.merge)
    return drift.total([]) if found is None else found


def _with_inputs(totals: Totals, chunks: Sequence[Chunk]) -> Totals:
    """The totals, with the worst batch itself."""
    number = totals.worst.number
    inputs = next(
        (each.batches[number - each.start] for each in chunks if 0 <= number - each.start < len(each.batches)), None
    )
    return replace(totals, worst=totals.worst._replace(inputs=inputs))


def _comparer(pair: _Pair) -> Callable[[Sequence[Batch], int], Totals]:
    """On a worker."""
    run = heldout.runner(pair.fp32, pair.int8, dict(pair.entries))

    def compare(batches: Sequence[Batch], start: int) -> Totals:
        worst = NO_BATCH

        def outputs() -> Iterator[tuple[Outputs, Outputs]]:
            nonlocal worst
            for number, batch in enumerate(batches, start):
                wanted, got = run(batch, number)
                worst = min(worst, Worst(drift.batch_snr_db(wanted, got), number), key=Worst.place)
                yield wanted, got

        return replace(drift.total(outputs(), start, pair.against), worst=worst)

    return compare


def _digest(against: Mapping[str, Ground]) -> str:
    """Of what cannot be hashed by itself: a worker opens its sessions once for all tasks that ask the same."""
    constants = {name: ground.constant for name, ground in against.items() if ground.constant is not None}
    return f"{digest(constants)} {sorted((name, ground.judged) for name, ground in against.items())}"
