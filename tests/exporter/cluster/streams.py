"""One small model and a stream of batches: its statistics here and on a cluster, and what the scheduler then knows."""

from __future__ import annotations

import gc
import uuid
from collections.abc import Iterator
from pathlib import Path

from exporter import cluster
from exporter.batches import Batch
from exporter.calibrate import observe, statistics
from exporter.calibrate.memory import Memory
from exporter.calibrate.observe import CHUNK
from exporter.cluster import Cluster, tasks
from tests.exporter import graphs

ROOT = Path(__file__).parents[3]
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
