"""Calibration, and the drift of a bundle, on the workers of a Dask cluster: the bytes are those of one process.

    batches 0..G-1   ->  chunk  chunk  chunk  chunk  ->  merged in pairs  ->  one value  ─┐
    batches G..2G-1  ->  chunk  chunk  chunk  chunk  ->  merged in pairs  ->  one value  ─┴─>  merged in pairs, here
                         └──────────────── on the workers ────────────────┘

What is computed where is Dask's choice; what is merged with what follows from the numbers of the batches alone (`fold`). A
worker that dies takes nothing with it: the scheduler holds the batches of the groups that are under way, and no others,
however long the data are, and gives them to another one. A group is what the cache keeps. A batch that has a `path`, an
.npz file, is sent as that path and read where it is used; workers that cannot read it, or find other bytes there, get the arrays.

Bytes are equal only where the libraries are: a worker with another ONNX Runtime, numpy or packlight is refused.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import re
import signal
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array, Batch, digest
from exporter.calibrate import cache, statistics
from exporter.calibrate.cache import Note, Remembered
from exporter.calibrate.fold import cut, fold
from exporter.calibrate.observe import CHUNK, ObserveChunk, observer
from exporter.calibrate.statistics import Statistics
from exporter.errors import CalibrationError
from runtime import drift
from runtime import manifest as manifests
from runtime.bundle import verify
from runtime.drift import Drift, Totals
from runtime.errors import BundleError, PacklightError
from runtime.probe import read_arrays
from runtime.session import ORT_ERRORS, open_session

T = TypeVar("T")

GROUP = 4  # chunks that are merged on the workers; a power of two, or the tree would not be that of one process
AHEAD = 2  # chunks under way for each thread of the cluster: one runs, one waits
AHEAD_BYTES = 256 << 20  # batches under way; beyond it no new group begins
THREADS = 1  # of ONNX Runtime, for each thread of a worker
CONNECT_SECONDS = 10.0
WORKERS_SECONDS = 60.0  # without any worker: one that died may be on its way back
POLL_SECONDS = 2.0
ADDRESS = re.compile(r"(tcp|tls|ucx|ws|wss)://.+:\d+")
LOCAL = re.compile(r"local:([1-9]\d*)")


class ClusterError(PacklightError):
    """No cluster, no workers, or workers that would compute other bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """client: a distributed.Client. cpus: the kinds of CPU of its workers. threads: tasks that run at the same time."""

    client: Any
    cpus: tuple[str, ...]
    threads: int


@contextlib.contextmanager
def connect(address: str, note: Note = lambda text: None) -> Iterator[Cluster]:
    """Connect to a Dask scheduler, `tcp://host:port`, or start workers here, `local:N`; closed at the end.

    Args:
        address: as above. Workers of a scheduler need packlight[export,dask] in the versions of this process.
        note: told when a worker's CPU is of another kind than ours.

    Raises:
        ClusterError: Dask is not installed, no scheduler there, no worker, or a worker with other versions.
    """
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(_client(address, stack))
        if LOCAL.fullmatch(address):
            client.run(_ignore_interrupts)
        yield _checked(client, address, note)


def observe(
    cluster: Cluster,
    model: ir.Model,
    tensors: Sequence[str],
    batches: Iterable[Batch],
    channels: Sequence[tuple[str, int]] = (),
    histograms: bool = False,
    memory: Remembered | None = None,
) -> Statistics:
    """`calibrate.observe` on a cluster: the same statistics, bit for bit.

    Args:
        model, tensors, batches, channels, histograms: as for `calibrate.observe`; batches are read once,
            and no faster than they are used.
        memory: keeps the statistics of each group of chunks, and knows those of a run that was interrupted.

    Raises:
        CalibrationError: as `calibrate.observe`.
        ClusterError: all workers are gone, or a chunk has killed several.
    """
    asked = _Asked(model=graph.to_bytes(model), tensors=tuple(tensors), channels=tuple(channels), histograms=histograms)
    found = fold(_grouped(cluster, asked, _observed, statistics.merge, batches, memory), statistics.merge)
    if found is None:
        raise CalibrationError("calibration: no batches", found="an empty iterable", expected="at least one batch")
    statistics.require_seen(found)
    return found


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
    found = total(cluster, fp32, int8, listed.session, batches)
    return found.drift() if found.batches else drift.measure([])


def total(
    cluster: Cluster, fp32: bytes, int8: bytes, entries: Mapping[str, str], batches: Iterable[Batch], first: int = 0
) -> Totals:
    """The sums of the drift of `int8` against `fp32`: `drift.total` on a cluster. There may be no batch.

    Args:
        entries: session entries of the target, for `int8`.
        first: number of the first batch, for messages.

    Raises:
        CalibrationError: a batch that a model refuses, or on which the FP32 model gives NaN or infinity.
        ClusterError: see `observe`.
    """
    asked = _Pair(fp32=fp32, int8=int8, entries=tuple(sorted(entries.items())))
    found = fold(_grouped(cluster, asked, _compared, drift.merge, batches, None, first), drift.merge)
    return drift.total([]) if found is None else found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What `observer` needs."""

    model: bytes
    tensors: tuple[str, ...]
    channels: tuple[tuple[str, int], ...]
    histograms: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """Two models, and the session entries of the second."""

    fp32: bytes
    int8: bytes
    entries: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A batch as the .npz file that it lies in, and what it must be there."""

    path: str
    names: tuple[str, ...]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """Batches, the number of the first, and the versions that must work on them."""

    batches: tuple[Batch | _Stored, ...]
    start: int
    versions: Mapping[str, str]


class _Elsewhere(Exception):
    """A file that this worker cannot read, or that holds something else here."""


def _opened(chunk: _Chunk) -> list[Batch]:
    """On a worker: the batches of a chunk, read where only their files are named."""
    _require_same(chunk.versions, cache.versions(), "a worker")
    return [_read(batch) if isinstance(batch, _Stored) else batch for batch in chunk.batches]


def _read(stored: _Stored) -> Batch:
    try:
        batch = {name: array for name, array in read_arrays(Path(stored.path)).items() if name in stored.names}
    except BundleError as error:
        raise _Elsewhere(stored.path) from error
    if digest(batch) != stored.digest:
        raise _Elsewhere(stored.path)
    return batch


def _observed(asked: _Asked, chunk: _Chunk) -> Statistics:
    """On a worker: the statistics of a chunk."""
    return _observer(asked)(_opened(chunk), chunk.start)


@functools.lru_cache(maxsize=1)  # a worker opens one session for all its chunks
def _observer(asked: _Asked) -> ObserveChunk:
    model = ir.serde.deserialize_model(onnx.ModelProto.FromString(asked.model))
    return observer(model, asked.tensors, asked.channels, asked.histograms)


def _compared(pair: _Pair, chunk: _Chunk) -> Totals:
    """On a worker: the drift's sums over a chunk."""
    run = _runner(pair)
    return drift.total((run(batch, chunk.start + n) for n, batch in enumerate(_opened(chunk))), chunk.start)


@functools.lru_cache(maxsize=1)
def _runner(pair: _Pair) -> Callable[[Batch, int], tuple[dict[str, Array], dict[str, Array]]]:
    reference = open_session(pair.fp32, threads=THREADS)
    candidate = open_session(pair.int8, threads=THREADS, entries=dict(pair.entries))
    names = [output.name for output in reference.get_outputs()]

    def run(batch: Batch, number: int) -> tuple[dict[str, Array], dict[str, Array]]:
        try:
            wanted, got = (session.run(names, dict(batch)) for session in (reference, candidate))
        except ORT_ERRORS as error:
            raise CalibrationError(
                f"held-out batch {number}: the model cannot run on it", found=str(error)[:200],
                expected="shapes and values that the model takes", batch=number,
            ) from error  # fmt: skip
        for name, value in zip(names, wanted, strict=True):
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise CalibrationError(
                    f"held-out batch {number}: output {name!r} of the FP32 model", found="NaN or infinity",
                    expected="finite numbers", tensor=name, batch=number,
                )  # fmt: skip
        return dict(zip(names, wanted, strict=True)), dict(zip(names, got, strict=True))

    return run


def _forget() -> None:
    """On a worker: close the sessions."""
    _observer.cache_clear()
    _runner.cache_clear()


def _same(given: T) -> T:
    """On a worker: what a task needs, made by a task, so that Dask can make it again when the worker that had it is gone."""
    return given


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """A group under way: its batches, its value or the future of it, its name in the cache."""

    batches: Sequence[Batch]
    start: int
    value: Any
    key: str

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for batch in self.batches for array in batch.values())


def _grouped(
    cluster: Cluster,
    asked: Any,
    work: Callable[[Any, _Chunk], T],
    merge: Callable[[T, T], T],
    batches: Iterable[Batch],
    memory: Remembered | None,
    first: int = 0,
) -> Iterator[T]:
    """The merged value of each group of batches, in order, with as many groups under way as the cluster can use."""
    client, name, here = cluster.client, f"packlight-{uuid.uuid4().hex[:12]}", cache.versions()
    given = [client.submit(_same, asked, key=f"{name}-model")]
    # the first part of a key is the kind of task: Dask gives many of one kind to whoever is idle, and not to who has the model
    number = itertools.count()
    by_path = True  # until a worker cannot read one

    def shipped(batch: Batch) -> Batch | _Stored:
        path = getattr(batch, "path", None) if by_path else None
        return _Stored(path=path, names=tuple(batch), digest=digest(batch)) if isinstance(path, str) else dict(batch)

    def submit(group: Sequence[Batch], start: int) -> Any:
        parts = ((tuple(map(shipped, part)), start + at) for at, part in cut(group, CHUNK))
        chunks = (_Chunk(batches=part, start=at, versions=here) for part, at in parts)
        leaves = [client.submit(work, given[0], chunk, key=(f"{name}-chunk", next(number))) for chunk in chunks]
        return fold(leaves, lambda a, b: client.submit(merge, a, b, key=(f"{name}-merge", next(number))))

    def begin(start: int, group: Sequence[Batch]) -> _Group:
        key = memory.key(group, start) if memory is not None else ""
        known = memory.look(key, len(group)) if memory is not None else None
        return _Group(batches=group, start=start, value=submit(group, start) if known is None else known, key=key)

    def end(group: _Group) -> Any:
        nonlocal by_path
        if isinstance(group.value, Statistics):
            return group.value
        what = f"batches {group.start} to {group.start + len(group.batches) - 1}"
        try:
            value = _result(cluster, group.value, what)
        except _Elsewhere:
            by_path = False
            value = _result(cluster, submit(group.batches, group.start), what)
        if memory is not None:
            memory.keep(group.key, value, len(group.batches))
        return value

    most = max(GROUP, AHEAD * cluster.threads) * CHUNK
    under_way: deque[_Group] = deque()
    try:
        for start, batch_group in cut(batches, GROUP * CHUNK):
            under_way.append(begin(first + start, batch_group))
            while len(under_way) > 1 and (
                sum(len(each.batches) for each in under_way) > most
                or sum(each.size_bytes for each in under_way) > AHEAD_BYTES
            ):
                yield end(under_way.popleft())
        while under_way:
            yield end(under_way.popleft())
    finally:  # Ctrl-C too: the scheduler drops what nobody waits for
        under_way.clear()
        given.clear()
        with contextlib.suppress(Exception):
            client.run(_forget)


def _result(cluster: Cluster, future: Any, what: str) -> Any:
    """Wait for a value as long as there are workers, or they may come back."""
    from distributed import CancelledError, KilledWorker, TimeoutError

    alone_since = None
    while True:
        try:
            return future.result(timeout=POLL_SECONDS)
        except TimeoutError:
            now = time.monotonic()
            alone_since = None if cluster.client.nthreads() else alone_since or now
            if alone_since is not None and now - alone_since > WORKERS_SECONDS:
                raise ClusterError(
                    f"{what}: no worker is left", found=f"none for {WORKERS_SECONDS:.0f} s", expected="at least one",
                    do="look at the workers' logs, start some, and run again",
                ) from None  # fmt: skip
        except (PacklightError, _Elsewhere):
            raise
        except KilledWorker as error:
            raise ClusterError(
                f"{what}: every worker that was given a part of them died", found=str(error)[:200],
                expected="workers with enough memory", do="give them more, or smaller batches",
            ) from error  # fmt: skip
        except CancelledError as error:
            raise ClusterError(f"{what}: the scheduler is gone", do="start it, and run again") from error
        except Exception as error:  # whatever went wrong on a worker comes back as it is
            raise ClusterError(f"{what}: a worker failed", found=f"{type(error).__name__}: {error}"[:300]) from error


def _client(address: str, stack: contextlib.ExitStack) -> Any:
    """A client of the scheduler, or of workers that are started here; Dask is kept from talking."""
    if find_spec("distributed") is None:
        raise ClusterError("--cluster", found="no dask.distributed", do="pip install 'packlight[dask]'")
    if not (LOCAL.fullmatch(address) or ADDRESS.fullmatch(address)):
        raise ClusterError("--cluster", found=repr(address), expected="tcp://host:port, or local:N with N workers")
    dask, distributed = import_module("dask"), import_module("distributed")
    # batches and models are larger than what Dask warns of; a client talks when a scheduler closes
    stack.enter_context(dask.config.set({"distributed.admin.large-graph-warning-threshold": "64GiB"}))
    log = logging.getLogger("distributed")
    stack.callback(log.setLevel, log.level)
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of versions that differ: those that matter are compared below
            if local := LOCAL.fullmatch(address):
                count, quiet, http = int(local[1]), logging.CRITICAL, "127.0.0.1:0"
                address = stack.enter_context(
                    distributed.LocalCluster(count, threads_per_worker=1, dashboard_address=http, silence_logs=quiet)
                )
            return distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, RuntimeError, ValueError, distributed.TimeoutError) as error:
        raise ClusterError(
            f"--cluster {address}", found=f"no scheduler: {error}"[:200], expected="a running `dask scheduler`",
            do="start one there, or give --cluster local:N",
        ) from error  # fmt: skip


def _checked(client: Any, address: str, note: Note) -> Cluster:
    """The cluster behind a client: at least one worker, and each of them one that computes what this process would."""
    from distributed import TimeoutError

    try:
        client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    except TimeoutError as error:
        do = f"start some: dask worker {address}"
        raise ClusterError(f"--cluster {address}", found="no workers", do=do) from error
    cpus = set()
    for worker, found in client.run(_facts, on_error="return").items():
        if isinstance(found, Exception):
            raise ClusterError(
                f"worker {worker}: packlight", found=f"{type(found).__name__}: {found}"[:200],
                expected=f"packlight {cache.versions()['packlight']}", do="pip install 'packlight[export,dask]' there",
            ) from found  # fmt: skip
        _require_same(cache.versions(), found["versions"], f"worker {worker}")
        cpus.add(found["cpu"])
    if others := sorted(cpus - {cache.kind_of_cpu()}):
        note(
            f"cluster: workers on another kind of CPU ({'; '.join(others)}): the last bits of ranges may differ from ours"
        )
    return Cluster(client=client, cpus=tuple(sorted(cpus)), threads=sum(client.nthreads().values()))


def _ignore_interrupts() -> None:
    """On a worker of ours: a terminal sends Ctrl-C to all its processes; this one is stopped by the one that heeds it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _facts() -> dict[str, Any]:
    """On a worker: what decides about its last bits."""
    return {"versions": cache.versions(), "cpu": cache.kind_of_cpu()}


def _require_same(ours: Mapping[str, str], theirs: Mapping[str, str], where: str) -> None:
    for package, version in ours.items():
        if theirs.get(package) != version:
            raise ClusterError(
                f"{where}: {package}", found=theirs.get(package, "nothing"), expected=f"{version}, as here",
                do="install the same version there; another one may compute other bytes",
            )  # fmt: skip
