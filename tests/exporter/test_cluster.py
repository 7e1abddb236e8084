"""A real `dask scheduler` and real `dask worker` processes, on loopback. They are started once and used by all tests."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter import cluster
from exporter.batches import Batch
from exporter.calibrate import cache, observe, observer, statistics
from exporter.calibrate.memory import Chunk, Memory, cut_chunks
from exporter.calibrate.observe import CHUNK
from exporter.calibrate.statistics import Statistics
from exporter.cluster import Cluster, ClusterError, connection, tasks
from exporter.errors import CalibrationError
from runtime import drift
from runtime import manifest as manifests
from runtime.errors import PacklightError
from runtime.session import open_session
from tests.exporter import graphs
from tests.runtime import models
from tests.runtime.conftest import bundle_folder

__all__ = ["bundle_folder"]  # a bundle that takes no export

pytest.importorskip("distributed")

ROOT = Path(__file__).parents[2]
TEXT = "(float[N,8] x) => (float[N,4] y) { [a] h = Gemm(x, v, b)\n [r] r = Relu(h)\n [e] y = Gemm(r, w) }"
MODEL = graphs.model(TEXT, {"v": graphs.noise(1, 8, 16), "b": graphs.noise(2, 16), "w": graphs.noise(3, 16, 4)})
NAMES, CHANNELS = ("x", "h", "y"), (("h", 1), ("y", 1))
GROUP = tasks.GROUP * CHUNK
COUNT = 3 * GROUP + 2 * CHUNK + 3  # whole groups, whole chunks, and a part of one
LONG = 12 * GROUP


def data(count: int = COUNT) -> Iterator[Batch]:
    return ({"x": graphs.noise(number, 1 + number % 3, 8)} for number in range(count))


def here(count: int = COUNT) -> bytes:
    """The statistics of one process."""
    return statistics.to_bytes(observe(MODEL, NAMES, data(count), CHANNELS, True))


def there(to: Cluster, batches: Iterator[Batch], memory: Memory | None = None) -> bytes:
    return statistics.to_bytes(cluster.observe(to, MODEL, NAMES, batches, CHANNELS, True, memory))


def known(to: Cluster) -> int:
    """How many tasks the scheduler knows of; a task holds its batches."""
    return int(to.client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))


def are_forgotten(to: Cluster) -> bool:
    """Whether the scheduler has dropped every task that the client has. It hears from a client in order, so a task tells when."""
    gc.collect()  # a future is forgotten when the last reference to it goes
    echo = to.client.submit(int, key=f"echo-{uuid.uuid4().hex}")
    assert echo.result() == 0
    return known(to) == 1


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


def test_scheduler_without_workers_is_an_error_that_says_how_to_start_one(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.5)
    with pytest.raises(ClusterError, match="no workers") as failure, cluster.connect(processes.address):
        pass
    assert failure.value.do == f"start some: dask worker {processes.address}"


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_and_one_process_make_the_same_bytes(processes: Processes, workers: int) -> None:
    processes.grow(workers)
    with cluster.connect(processes.address) as opened:
        opened.client.wait_for_workers(workers, timeout=60)
        assert len(opened.client.nthreads()) == workers
        assert there(opened, data()) == here()
        assert are_forgotten(opened)


def test_worker_killed_in_the_middle_changes_nothing(processes: Processes) -> None:
    processes.grow(4)
    with cluster.connect(processes.address) as opened:
        opened.client.wait_for_workers(4, timeout=60)
        address_of = {pid: address for address, pid in opened.client.run(os.getpid).items()}
        victim = processes.workers[-1]
        lost: list[int] = []

        def kill() -> None:
            while not lost or (not lost[-1] and len(lost) < 100):  # until it holds work that it will never finish
                lost.append(len(opened.client.processing()[address_of[victim.pid]]))
                time.sleep(0.05)
            victim.kill()

        def stream() -> Iterator[Batch]:
            for number, batch in enumerate(data(LONG)):
                if number == LONG // 3:
                    victim.send_signal(signal.SIGSTOP)
                    threading.Thread(target=kill).start()
                yield batch

        found = there(opened, stream())
        assert victim.wait(10) == -signal.SIGKILL
        assert lost[-1] > 0
        assert len(opened.client.nthreads()) == 3
    processes.workers.remove(victim)
    assert found == here(LONG)


def test_no_more_than_a_window_of_batches_is_under_way_however_long_the_data_are(connected: Cluster) -> None:
    most = 0
    window = max(tasks.GROUP, tasks.AHEAD * connected.threads) + tasks.GROUP  # chunks

    def stream() -> Iterator[Batch]:
        nonlocal most
        for number, batch in enumerate(data(LONG)):
            if number % GROUP == GROUP - 1:
                most = max(most, known(connected))
            yield batch

    there(connected, stream())
    # a task a chunk, fewer merges than chunks, the model, and what a busy scheduler has not forgotten yet
    assert 0 < most <= 2.5 * window
    assert window * CHUNK < LONG / 2


def test_large_batches_keep_fewer_of_them_under_way(connected: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AHEAD", 100)
    monkeypatch.setattr(tasks, "AHEAD_BYTES", 1)
    read = 0
    ahead: list[int] = []

    def stream() -> Iterator[Batch]:
        nonlocal read
        for batch in data(LONG):
            read += 1
            yield batch

    done = 0
    for value, _ in tasks.grouped(connected, None, _counter, _add, cut_chunks(stream())):
        done += value
        ahead.append(read - done)
    assert done == LONG
    assert max(ahead) <= GROUP


def _counter(asked: None) -> Callable[[Sequence[Batch], int], int]:
    return lambda batches, start: len(batches)


def _add(a: int, b: int) -> int:
    return a + b


class InFile(dict[str, Any]):
    """A batch with the path of its file."""

    path: str


def in_files(folder: Path, count: int) -> Iterator[InFile]:
    for number, batch in enumerate(data(count)):
        found = InFile(batch)
        found.path = str(folder / f"{number}.npz")
        yield found


def are_paths(to: Cluster) -> set[bool]:
    """Of the chunks that the scheduler holds: whether files are named in them."""

    def held(dask_scheduler: Any) -> set[bool]:
        from distributed.protocol.pickle import dumps

        chunks = (task for task in dask_scheduler.tasks.values() if "-chunk" in str(task.key))
        return {b".npz" in dumps(task.run_spec) for task in chunks}

    return set(to.client.run_on_scheduler(held))


@pytest.mark.parametrize("there_too", [True, False], ids=["shared", "elsewhere"])
def test_batches_in_files_are_sent_as_paths_where_workers_can_read_them(
    connected: Cluster, tmp_path: Path, there_too: bool
) -> None:
    for number, batch in enumerate(data(LONG)):
        other = {"x": batch["x"] + 1}  # what lies there on another machine, under the same name
        np.savez(tmp_path / f"{number}.npz", **(batch if there_too else other))
    sent: set[bool] = set()

    def stream() -> Iterator[Batch]:
        for number, batch in enumerate(in_files(tmp_path, LONG)):
            if number > LONG // 2 and number % GROUP == 0:  # by then, what does not work has been tried
                sent.update(are_paths(connected))
            yield batch

    assert there(connected, stream()) == here(LONG)
    assert sent == {True} if there_too else False in sent


def test_ctrl_c_keeps_whole_groups_and_drops_the_rest_and_the_next_run_goes_on(
    connected: Cluster, tmp_path: Path
) -> None:
    run = cache.run_key(MODEL, NAMES, CHANNELS, True, {}, connected.cpus)

    def stream() -> Iterator[Batch]:
        yield from data(LONG - 1)
        raise KeyboardInterrupt

    memory = Memory(run, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        there(connected, stream(), memory)
    assert memory.kept > 0 and memory.kept % GROUP == 0
    assert are_forgotten(connected)
    again = Memory(run, tmp_path)
    assert there(connected, data(LONG), again) == here(LONG)
    assert again.taken == memory.kept


def test_cluster_and_one_process_go_on_where_the_other_was_interrupted(connected: Cluster, tmp_path: Path) -> None:
    run = cache.run_key(MODEL, NAMES, CHANNELS, True, {}, connected.cpus)
    assert run == cache.run_key(MODEL, NAMES, CHANNELS, True, {})
    ran: list[int] = []

    def look(batches: Sequence[Batch], start: int) -> Statistics:
        ran.append(start)
        return observer(MODEL, NAMES, CHANNELS, True)(batches, start)

    def alone(count: int) -> bytes:
        return statistics.to_bytes(Memory(run, tmp_path).gather(look, data(count)))

    first = 3 * CHUNK + GROUP  # not where a group of the cluster ends
    assert alone(first) == here(first)
    memory = Memory(run, tmp_path)
    assert there(connected, data(), memory) == here()
    assert memory.taken == first
    ran.clear()
    assert alone(LONG) == here(LONG)
    assert ran == list(range(COUNT - 3, LONG, CHUNK))  # but for the last chunk, which was not whole


def test_groups_are_whole_where_they_can_be_and_powers_of_two_where_a_part_is_known() -> None:
    def chunk(number: int) -> Chunk:
        return Chunk(batches=[], start=number * CHUNK)

    given = [chunk(0), "1", *map(chunk, range(2, 11)), "11", *map(chunk, range(12, 15))]
    found = [value or [each.start // CHUNK for each in chunks] for chunks, value in tasks._groups(given)]
    assert found == [[0], "1", [2, 3], [4, 5, 6, 7], [8, 9], [10], "11", [12, 13], [14]]


def test_bad_batch_has_the_error_of_one_process(connected: Cluster) -> None:
    def bad() -> Iterator[Batch]:
        for number, batch in enumerate(data()):
            yield {"x": np.full((1, 8), 3e38, np.float32)} if number == GROUP + 3 else batch

    with pytest.raises(CalibrationError) as one:
        observe(MODEL, NAMES, bad(), CHANNELS, True)
    with pytest.raises(CalibrationError) as many:
        there(connected, bad())
    assert str(many.value) == str(one.value)
    assert (many.value.batch, many.value.tensor) == (GROUP + 3, one.value.tensor)


def test_no_batches_is_the_error_of_one_process(connected: Cluster) -> None:
    with pytest.raises(CalibrationError, match="calibration: no batches"):
        there(connected, iter(()))


def test_drift_of_a_bundle_on_a_cluster_is_that_of_one_process(connected: Cluster, bundle_folder: Path) -> None:
    listed = manifests.loads((bundle_folder / manifests.MANIFEST).read_text(), "manifest")
    fp32 = open_session(bundle_folder / manifests.FP32, threads=1)
    int8 = open_session(bundle_folder / manifests.INT8, threads=1, entries=listed.session)
    names = [output.name for output in fp32.get_outputs()]
    count = GROUP + CHUNK + 1

    def batches() -> Iterator[Batch]:
        return ({"image": graphs.noise(number, 1 + number % 2, *models.IMAGE)} for number in range(count))

    def pairs() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        for batch in batches():
            wanted, got = (dict(zip(names, each.run(names, dict(batch)), strict=True)) for each in (fp32, int8))
            yield wanted, got

    found = cluster.evaluate(connected, bundle_folder, batches())
    assert found == drift.measure(pairs())
    some = drift.total(itertools.islice(pairs(), 5))  # a part of it here, the rest there
    paths = (bundle_folder / name for name in (manifests.FP32, manifests.INT8))
    rest = itertools.islice(batches(), 5, None)
    more = cluster.total(connected, *(path.read_bytes() for path in paths), listed.session, rest, 5)
    assert drift.merge(some, more).drift() == found
    assert found.batches == count
    assert 5 < found.worst_snr_db < 60


def test_heldout_batch_that_the_models_refuse_is_named(connected: Cluster, bundle_folder: Path) -> None:
    batches = [{"image": graphs.noise(n, 1, *models.IMAGE)} for n in range(CHUNK)]
    batches[5] = {"image": graphs.noise(0, 1, 4, 16, 16)}
    with pytest.raises(CalibrationError, match="held-out batch 5: the model cannot run on it"):
        cluster.evaluate(connected, bundle_folder, batches)
    with pytest.raises(PacklightError, match="drift of no batches"):
        cluster.evaluate(connected, bundle_folder, [])


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
    assert failure.value.do == "pip install 'packlight[dask]'"


def test_no_worker_for_too_long_ends_the_wait(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "WORKERS_SECONDS", 0.5)
    monkeypatch.setattr(tasks, "POLL_SECONDS", 0.2)
    processes.grow(1)
    with cluster.connect(processes.address) as opened:

        def stream() -> Iterator[Batch]:
            for number, batch in enumerate(data(LONG)):
                if number == GROUP:
                    for worker in processes.workers:
                        worker.kill()
                        worker.wait(10)
                    processes.workers.clear()
                yield batch

        with pytest.raises(ClusterError, match="no worker is left"):
            there(opened, stream())


def test_scheduler_that_dies_ends_the_run_with_an_error(processes: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    processes.grow(1)  # the last test that needs them
    with cluster.connect(processes.address):
        monkeypatch.setattr(connection, "CONNECT_SECONDS", 1.0)
    with cluster.connect(processes.address) as opened:

        def stream() -> Iterator[Batch]:
            for number, batch in enumerate(data(LONG)):
                if number == GROUP:
                    processes.scheduler.kill()
                    processes.scheduler.wait(10)
                yield batch

        with pytest.raises(ClusterError, match="the scheduler is gone"):
            there(opened, stream())


@pytest.mark.slow
def test_local_workers_make_the_same_bytes() -> None:
    with cluster.connect("local:2") as opened:
        assert opened.threads == 2
        assert there(opened, data()) == here()


def test_dask_is_needed_by_connect_alone() -> None:
    code = "import sys; sys.modules['distributed'] = sys.modules['dask'] = None; import exporter.cluster"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
