"""Chunks of batches as tasks of a Dask cluster, merged in a tree there.

    chunks 0..3   ->  chunk  chunk  chunk  chunk  ->  merged in pairs  ->  one value  ─┐
    chunks 4..7   ->  chunk  chunk  chunk  chunk  ->  merged in pairs  ->  one value  ─┴─>  merged in pairs, here
                      └──────────────── on the workers ────────────────┘

What is computed where is Dask's choice; what is merged with what follows from the numbers of the chunks alone (`fold`). A
worker that dies takes nothing with it: the scheduler holds the batches of the groups that are under way, and no others,
however long the data are, and gives them to another one. A batch that has a `path`, an .npz file, is sent as that path and read
where it is used; workers that cannot read it, or find other bytes there, get the arrays.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from exporter.batches import Batch, digest
from exporter.calibrate import cache
from exporter.calibrate.fold import fold
from exporter.calibrate.memory import Chunk
from exporter.calibrate.observe import CHUNK
from exporter.cluster.connection import Cluster, ClusterError, require_same
from runtime.errors import BundleError, PacklightError
from runtime.probe import read_arrays

T = TypeVar("T")
K = TypeVar("K")
Look = Callable[[Sequence[Batch], int], T]

GROUP = 4  # chunks that are merged on the workers; a power of two, or the tree would not be that of one process
AHEAD = 2  # chunks under way for each thread of the cluster: one runs, one waits
AHEAD_BYTES = 256 << 20  # batches under way; beyond it no new group begins
WORKERS_SECONDS = 60.0  # without any worker: one that died may be on its way back
POLL_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A batch as the .npz file that it lies in, and what it must be there."""

    path: str
    names: tuple[str, ...]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """Batches, the number of the first, and the versions that must work on them."""

    batches: tuple[Batch | _Stored, ...]
    start: int
    versions: Mapping[str, str]


class _Elsewhere(Exception):
    """A file that this worker cannot read, or that holds something else here."""


def _opened(chunk: _Sent) -> list[Batch]:
    """On a worker: the batches of a chunk, read where only their files are named."""
    require_same(chunk.versions, cache.versions(), "a worker")
    return [_read(batch) if isinstance(batch, _Stored) else batch for batch in chunk.batches]


def _read(stored: _Stored) -> Batch:
    try:
        batch = {name: array for name, array in read_arrays(Path(stored.path)).items() if name in stored.names}
    except BundleError as error:
        raise _Elsewhere(stored.path) from error
    if digest(batch) != stored.digest:
        raise _Elsewhere(stored.path)
    return batch


def _work(make: Callable[[Any], Look[T]], asked: Any, chunk: _Sent) -> T:
    """On a worker: the value of a chunk."""
    found: T = _made(make, asked)(_opened(chunk), chunk.start)
    return found


@functools.lru_cache(maxsize=1)  # a worker opens its sessions once for all its chunks
def _made(make: Callable[[Any], Look[T]], asked: Any) -> Look[T]:
    return make(asked)


def _forget() -> None:
    """On a worker: close the sessions."""
    _made.cache_clear()


def _same(given: T) -> T:
    """On a worker: what a task needs, made by a task, so that Dask can make it again when the worker that had it is gone."""
    return given


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Chunks under way and the future of their value; or no chunk, and a value that was known."""

    chunks: Sequence[Chunk]
    value: Any

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for chunk in self.chunks for batch in chunk.batches for array in batch.values())


def grouped(
    cluster: Cluster,
    asked: Any,
    make: Callable[[Any], Look[T]],
    merge: Callable[[T, T], T],
    given: Iterable[Chunk | K],
) -> Iterator[tuple[T | K, Sequence[Chunk]]]:
    """The merged value of each group of chunks, in order, with as many groups under way as the cluster can use.

    Args:
        asked: what workers need once: a model, and what is asked of it.
        make: asked -> a function (batches of a chunk, number of the first) -> their value, on a worker.
        given: chunks, read no faster than they are used; what is no chunk is a value that is known, and stays as it is.

    Yields:
        (value of a group, its chunks), and (what was known, ()).

    Raises:
        ClusterError: all workers are gone, or a chunk has killed several. What `make` and its function raise.
    """
    client, name, here = cluster.client, f"packlight-{uuid.uuid4().hex[:12]}", cache.versions()
    held = [client.submit(_same, asked, key=f"{name}-model")]
    # the first part of a key is the kind of task: Dask gives many of one kind to whoever is idle, and not to who has the model
    number = itertools.count()
    by_path = True  # until a worker cannot read one

    def shipped(batch: Batch) -> Batch | _Stored:
        path = getattr(batch, "path", None) if by_path else None
        return _Stored(path=path, names=tuple(batch), digest=digest(batch)) if isinstance(path, str) else dict(batch)

    def submit(chunks: Sequence[Chunk]) -> Any:
        sent = (_Sent(batches=tuple(map(shipped, each.batches)), start=each.start, versions=here) for each in chunks)
        leaves = [client.submit(_work, make, held[0], chunk, key=(f"{name}-chunk", next(number))) for chunk in sent]
        return fold(leaves, lambda a, b: client.submit(merge, a, b, key=(f"{name}-merge", next(number))))

    def end(group: _Group) -> Any:
        nonlocal by_path
        if not group.chunks:
            return group.value
        first, last = group.chunks[0], group.chunks[-1]
        what = f"batches {first.start} to {last.start + len(last.batches) - 1}"
        try:
            return _result(cluster, group.value, what)
        except _Elsewhere:
            by_path = False
            return _result(cluster, submit(group.chunks), what)

    most = max(GROUP, AHEAD * cluster.threads)
    under_way: deque[_Group] = deque()
    try:
        for chunks, known in _groups(given):
            under_way.append(_Group(chunks=chunks, value=submit(chunks) if chunks else known))
            while len(under_way) > 1 and (
                len(under_way) > most
                or not under_way[0].chunks
                or sum(len(group.chunks) for group in under_way) > most
                or sum(group.size_bytes for group in under_way) > AHEAD_BYTES
            ):
                group = under_way.popleft()
                yield end(group), group.chunks
        while under_way:
            group = under_way.popleft()
            yield end(group), group.chunks
    finally:  # Ctrl-C too: the scheduler drops what nobody waits for
        under_way.clear()
        held.clear()
        with contextlib.suppress(Exception):
            client.run(_forget)


def _groups(given: Iterable[Chunk | K]) -> Iterator[tuple[Sequence[Chunk], K | None]]:
    """(GROUP chunks that begin at a multiple of it, None), fewer where the data end or some are known; ((), what is known)."""
    waiting: list[Chunk] = []
    for each in given:
        if isinstance(each, Chunk):
            waiting.append(each)
            if (each.start // CHUNK + 1) % GROUP:
                continue
        yield from ((chunks, None) for chunks in _powers(waiting))
        waiting = []
        if not isinstance(each, Chunk):
            yield (), each
    yield from ((chunks, None) for chunks in _powers(waiting))


def _powers(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Neighbours in the groups that the tree merges: 2^k that begin at a multiple of 2^k, as large as may be."""
    at = 0
    while at < len(chunks):
        first, size = chunks[at].start // CHUNK, GROUP
        while first % size or at + size > len(chunks):
            size //= 2
        yield list(chunks[at : at + size])
        at += size


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
