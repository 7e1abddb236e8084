"""exporter.cluster.connection: which schedulers and workers are taken, and what is said to the others."""

from __future__ import annotations

import subprocess
import sys

import pytest

from exporter import cluster
from exporter.calibrate import cache
from exporter.cluster import Cluster, ClusterError, connection
from runtime.errors import install
from tests.exporter.cluster.conftest import Processes
from tests.exporter.cluster.streams import LONG, ROOT, data, there

pytest.importorskip("distributed")


def test_scheduler_without_workers_is_an_error_that_says_how_to_start_one(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.5)
    with pytest.raises(ClusterError, match="no workers") as failure, cluster.connect(processes.address):
        pass
    assert failure.value.do == f"start some: dask worker {processes.address}"


@pytest.mark.parametrize("package", ["onnxruntime", "numpy", "packlight"])
def test_worker_with_another_version_is_refused_by_name(connected: Cluster, processes: Processes, package: str) -> None:
    odd = sorted(connected.client.nthreads())[0]
    connected.client.run(_pretend, {package: "0.0.1"}, workers=[odd])
    try:
        with pytest.raises(ClusterError) as at_once, cluster.connect(processes.address):
            pass
        assert at_once.value.what == f"worker {odd}: {package}"
        assert at_once.value.found == "0.0.1"
        assert at_once.value.expected == f"{cache.versions()[package]}, as here"
        with pytest.raises(ClusterError, match=f"a worker: {package}: found 0.0.1"):  # one that came later
            there(connected, data(LONG))
    finally:
        connected.client.run(_pretend, {}, workers=[odd])


def _pretend(versions: dict[str, str]) -> None:
    """On a worker: say that other versions are installed."""
    real = getattr(cache, "_real_versions", cache.versions)
    cache._real_versions = real  # type: ignore[attr-defined]
    cache.versions = lambda: real() | versions


def test_worker_on_another_kind_of_cpu_is_told_and_is_in_the_key(connected: Cluster, processes: Processes) -> None:
    odd = sorted(connected.client.nthreads())[0]
    connected.client.run(_pretend_cpu, "linux aarch64 asimddp", workers=[odd])
    notes: list[str] = []
    try:
        with cluster.connect(processes.address, notes.append) as opened:
            assert opened.cpus == tuple(sorted(["linux aarch64 asimddp", cache.kind_of_cpu()]))
    finally:
        connected.client.run(_pretend_cpu, cache.kind_of_cpu(), workers=[odd])
    assert len(notes) == 1 and "linux aarch64 asimddp" in notes[0]


def _pretend_cpu(kind: str) -> None:
    cache.kind_of_cpu = lambda: kind


def test_no_scheduler_at_the_address_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.5)
    with pytest.raises(ClusterError, match="no scheduler") as failure, cluster.connect("tcp://127.0.0.1:9"):
        pass
    assert failure.value.what == "--cluster tcp://127.0.0.1:9"


@pytest.mark.parametrize(
    "address", ["", "local", "local:0", "local:two", "host:8786", "http://host:8786", "tcp://host"]
)
def test_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match="expected tcp://host:port, or local:N"), cluster.connect(address):
        pass


def test_without_dask_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "find_spec", lambda name: None)
    with pytest.raises(ClusterError) as failure, cluster.connect("local:1"):
        pass
    assert failure.value.do == install("dask")


def test_dask_is_needed_by_connect_alone() -> None:
    code = "import sys; sys.modules['distributed'] = sys.modules['dask'] = None; import exporter.cluster"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
