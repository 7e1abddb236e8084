"""exporter.cluster.tasks: how much is under way, how it is sent, and what is left when workers or the scheduler die."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporter import cluster
from exporter.batches import Batch
from exporter.calibrate.memory import Chunk, cut_chunks
from exporter.calibrate.observe import CHUNK
from exporter.cluster import Cluster, ClusterError, connection, tasks
from tests.exporter.cluster.conftest import Processes
from tests.exporter.cluster.streams import GROUP, LONG, data, here, known, there

pytest.importorskip("distributed")


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


def test_groups_are_whole_where_they_can_be_and_powers_of_two_where_a_part_is_known() -> None:
    def chunk(number: int) -> Chunk:
        return Chunk(batches=[], start=number * CHUNK)

    given = [chunk(0), "1", *map(chunk, range(2, 11)), "11", *map(chunk, range(12, 15))]
    found = [value or [each.start // CHUNK for each in chunks] for chunks, value in tasks._groups(given)]
    assert found == [[0], "1", [2, 3], [4, 5, 6, 7], [8, 9], [10], "11", [12, 13], [14]]


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
