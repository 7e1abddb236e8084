"""exporter.cluster.observe: the statistics of one process, whoever made them and whatever interrupted it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from exporter import cluster
from exporter.batches import Batch
from exporter.calibrate import cache, observe, observer, statistics
from exporter.calibrate.memory import Memory
from exporter.calibrate.observe import CHUNK
from exporter.calibrate.statistics import Statistics
from exporter.cluster import Cluster
from exporter.errors import CalibrationError
from tests.exporter.cluster.conftest import Processes
from tests.exporter.cluster.streams import CHANNELS, COUNT, GROUP, LONG, MODEL, NAMES, are_forgotten, data, here, there

pytest.importorskip("distributed")


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_and_one_process_make_the_same_bytes(processes: Processes, workers: int) -> None:
    processes.grow(workers)
    with cluster.connect(processes.address) as opened:
        opened.client.wait_for_workers(workers, timeout=60)
        assert len(opened.client.nthreads()) == workers
        assert there(opened, data()) == here()
        assert are_forgotten(opened)


@pytest.mark.slow
def test_local_workers_make_the_same_bytes() -> None:
    with cluster.connect("local:2") as opened:
        assert opened.threads == 2
        assert there(opened, data()) == here()


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
