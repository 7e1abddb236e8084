from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.batches import Batch
from exporter.calibrate import cache, memory, observe, observer, statistics
from exporter.calibrate.memory import Memory, Part
from exporter.calibrate.observe import CHUNK
from exporter.calibrate.statistics import Statistics
from exporter.errors import CalibrationError
from tests.exporter import graphs

TEXT = "(float[N,8] x) => (float[N,4] y) { [a] h = Gemm(x, v, b)\n [r] r = Relu(h)\n [e] y = Gemm(r, w) }"
MODEL = graphs.model(TEXT, {"v": graphs.noise(1, 8, 16), "b": graphs.noise(2, 16), "w": graphs.noise(3, 16, 4)})
NAMES, CHANNELS = ("x", "h", "y"), (("h", 1),)
TABLE = {"method": "minmax"}
RUN = cache.run_key(MODEL, NAMES, CHANNELS, True, TABLE)
COUNT = 10 * CHUNK
KILLED = 6 * CHUNK  # 60 %


def data(count: int = COUNT) -> Iterator[Batch]:
    return ({"x": graphs.noise(number, 1 + number % 3, 8)} for number in range(count))


class Counted:
    """An observer that counts the batches on which the model runs."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self._look = observer(MODEL, NAMES, CHANNELS, True)

    def __call__(self, batches: Sequence[Batch], start: int) -> Statistics:
        self.ran += range(start, start + len(batches))
        return self._look(batches, start)


def gathered(kept: Memory, batches: Iterable[Batch]) -> tuple[bytes, list[int]]:
    """The statistics, and the numbers of the batches that ran for them."""
    counted = Counted()
    return statistics.to_bytes(kept.gather(counted, batches)), counted.ran


def plain(batches: Iterable[Batch]) -> bytes:
    return statistics.to_bytes(observe(MODEL, NAMES, batches, CHANNELS, True))


def sizes(folder: Path) -> list[int]:
    """How many chunks the files are of."""
    found = [cache.read(folder, path.stem, pytest.fail) for path in folder.glob("*" + cache.SUFFIX)]
    return sorted((len(each[0]) for each in found if each is not None), reverse=True)


def until_killed(folder: str) -> None:
    """What the child process does: it dies, without a chance to tidy up, when the batch at 60 % is asked for."""

    def stream() -> Iterator[Batch]:
        for number, batch in enumerate(data()):
            if number == KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    gathered(Memory(RUN, Path(folder)), stream())


def test_run_killed_at_60_percent_is_resumed_to_the_same_bytes_and_runs_only_the_rest(tmp_path: Path) -> None:
    code = f"from {__name__} import until_killed; until_killed({str(tmp_path)!r})"
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert sizes(tmp_path) == [4, 2]
    kept = Memory(RUN, tmp_path)
    assert gathered(kept, data()) == (plain(data()), list(range(KILLED, COUNT)))
    assert (kept.taken, kept.kept) == (KILLED, COUNT)


def test_ctrl_c_keeps_every_whole_chunk_and_says_how_many_batches(tmp_path: Path) -> None:
    def stream(count: int) -> Iterator[Batch]:
        yield from data(count)
        raise KeyboardInterrupt

    for again in (2 * CHUNK + 1, CHUNK + 1):  # also while it only reads what it knows
        kept = Memory(RUN, tmp_path)
        with pytest.raises(KeyboardInterrupt):
            gathered(kept, stream(again))
        assert kept.interrupted() == f"interrupted; {2 * CHUNK} batches are kept, run again to go on"
    assert gathered(Memory(RUN, tmp_path), data()) == (plain(data()), list(range(2 * CHUNK, COUNT)))


def test_second_run_runs_nothing_and_files_are_as_few_as_the_powers_of_two_in_the_chunks(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        assert gathered(Memory(RUN, folder), data()) == (plain(data()), list(range(COUNT)))
    assert sizes(first) == [8, 2]
    assert gathered(Memory(RUN, first), data()) == (plain(data()), [])
    files = sorted(path.name for path in first.iterdir())
    assert [(first / name).read_bytes() for name in files] == [(second / name).read_bytes() for name in files]


def test_file_is_of_so_many_chunks_and_bytes_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST", 4)
    assert gathered(Memory(RUN, tmp_path / "chunks"), data())[0] == plain(data())
    assert sizes(tmp_path / "chunks") == [4, 4, 2]
    monkeypatch.setattr(memory, "MOST_BYTES", 2 * sum(batch["x"].nbytes for batch in data(2 * CHUNK)) // 2)
    assert gathered(Memory(RUN, tmp_path / "bytes"), data())[0] == plain(data())
    assert max(sizes(tmp_path / "bytes")) == 2
    assert gathered(Memory(RUN, tmp_path / "bytes"), data()) == (plain(data()), [])


def test_more_data_run_alone(tmp_path: Path) -> None:
    gathered(Memory(RUN, tmp_path), data(KILLED + 3))
    found = gathered(Memory(RUN, tmp_path), data())
    assert found == (plain(data()), list(range(KILLED, COUNT)))  # the last chunk was not whole
    assert gathered(Memory(RUN, tmp_path), data()) == (plain(data()), [])


def test_where_data_have_changed_a_files_chunks_run_again_and_the_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "MOST", 4)
    gathered(Memory(RUN, tmp_path), data())
    batches = list(data())
    changed = batches[6 * CHUNK]["x"].copy()
    changed.flat[3] = np.nextafter(changed.flat[3], np.float32(9))  # one bit of one value
    batches[6 * CHUNK] = {"x": changed}
    assert gathered(Memory(RUN, tmp_path), iter(batches)) == (plain(batches), list(range(4 * CHUNK, 8 * CHUNK)))
    assert gathered(Memory(RUN, tmp_path), iter(batches)) == (plain(batches), [])
    fewer = gathered(Memory(RUN, tmp_path), data(3 * CHUNK))
    assert fewer == (plain(data(3 * CHUNK)), list(range(3 * CHUNK)))


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(1, COUNT), min_size=1, max_size=4), bits=st.integers(0, 3))
def test_whatever_ran_before_the_bytes_are_those_of_one_run(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], bits: int
) -> None:
    folder = tmp_path_factory.mktemp("memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "MOST", 1 << bits)
        for count in counts:
            assert gathered(Memory(RUN, folder), data(count))[0] == plain(data(count))
        assert gathered(Memory(RUN, folder), data(counts[-1]))[1] == []


def test_known_reads_ahead_no_more_than_a_file_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST", 4)
    gathered(Memory(RUN, tmp_path), data())
    read = 0

    def stream() -> Iterator[Batch]:
        nonlocal read
        for batch in data():
            read += 1
            yield batch

    behind = []
    for part in Memory(RUN, tmp_path).known(stream()):
        assert isinstance(part, Part)
        behind.append(read - part.found.first)
    assert behind == [4 * CHUNK, 4 * CHUNK, 2 * CHUNK]


def test_spoilt_file_is_noted_and_replaced(tmp_path: Path) -> None:
    gathered(Memory(RUN, tmp_path), data(2 * CHUNK))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    notes: list[str] = []
    found = gathered(Memory(RUN, tmp_path, notes.append), data(2 * CHUNK))
    assert found == (plain(data(2 * CHUNK)), list(range(2 * CHUNK)))
    assert notes == [f"calibration cache: {path} is ignored: truncated, or changed on disk"]
    assert path.read_bytes() == whole


def test_disk_that_refuses_ends_the_cache_with_one_note_and_not_the_calibration(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    notes: list[str] = []
    kept = Memory(RUN, tmp_path / "file" / "folder", notes.append)
    assert gathered(kept, data())[0] == plain(data())
    assert kept.kept == 0
    assert len(notes) == 1 and notes[0].endswith("nothing more is kept of this run")


def test_without_a_folder_nothing_is_kept_and_the_statistics_are_the_same() -> None:
    kept = Memory(RUN, None)
    assert gathered(kept, data())[0] == plain(data())
    assert (kept.taken, kept.kept) == (0, 0)
    assert kept.interrupted() == "interrupted; the calibration cache is off, so no batch is kept"


def test_no_batches_are_an_error_and_a_tensor_without_values_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="calibration: no batches"):
        gathered(Memory(RUN, tmp_path), iter(()))
    empty = [{"x": np.zeros((0, 8), np.float32)}]
    assert "x" in statistics.from_bytes(gathered(Memory(RUN, tmp_path), empty)[0]).unseen
