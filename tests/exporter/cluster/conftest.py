"""A real `dask scheduler` and real `dask worker` processes, on loopback: started once for each file of tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from exporter import cluster
from exporter.cluster import Cluster
from tests.exporter.cluster.streams import ROOT


class Processes:
    """A scheduler and its workers, as a user starts them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / "scheduler.json"
        self._environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "60s",
            "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "False",
        }
        self.scheduler = self._start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"
        )
        while not self._file.exists() or not self._file.read_text():
            assert self.scheduler.poll() is None, "the scheduler did not start"
            time.sleep(0.05)
        self.address: str = json.loads(self._file.read_text())["address"]
        self.workers: list[subprocess.Popen[bytes]] = []

    def _start(self, kind: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", kind, "--scheduler-file", str(self._file), *options]
        log = open(self._folder / f"{kind}-{time.monotonic_ns()}.log", "wb")  # noqa: SIM115
        with log:
            return subprocess.Popen(command, env=self._environment, cwd=self._folder, stdout=log, stderr=log)

    def grow(self, count: int) -> None:
        """Start workers until there are so many."""
        while len(self.workers) < count:
            self.workers.append(self._start("worker", "--nthreads", "1", "--no-nanny", "--no-dashboard"))

    def stop(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
        for process in (*self.workers, self.scheduler):
            process.wait(10)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(tmp_path_factory.mktemp("dask"))
    yield started
    started.stop()


@pytest.fixture
def connected(processes: Processes) -> Iterator[Cluster]:
    processes.grow(2)
    with cluster.connect(processes.address) as opened:
        opened.client.wait_for_workers(2, timeout=30)
        yield opened
