"""A Dask cluster: connected to, or started here, and checked. Bytes are equal only where the libraries are.

A worker with another ONNX Runtime, numpy or packlight is refused; one on another kind of CPU is told.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from exporter.calibrate import cache
from exporter.calibrate.cache import Note
from runtime.errors import PacklightError, install

CONNECT_SECONDS = 10.0
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


def _client(address: str, stack: contextlib.ExitStack) -> Any:
    """A client of the scheduler, or of workers that are started here; Dask is kept from talking."""
    if find_spec("distributed") is None:
        raise ClusterError("--cluster", found="no dask.distributed", do=install("dask"))
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
                expected=f"packlight {cache.versions()['packlight']}", do=f"there: {install('export,dask')}",
            ) from found  # fmt: skip
        require_same(cache.versions(), found["versions"], f"worker {worker}")
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


def require_same(ours: Mapping[str, str], theirs: Mapping[str, str], where: str) -> None:
    """Refuse versions of libraries that are not ours.

    Raises:
        ClusterError: names `where` and the library.
    """
    for package, version in ours.items():
        if theirs.get(package) != version:
            raise ClusterError(
                f"{where}: {package}", found=theirs.get(package, "nothing"), expected=f"{version}, as here",
                do="install the same version there; another one may compute other bytes",
            )  # fmt: skip
