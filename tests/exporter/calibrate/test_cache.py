from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from exporter.batches import Batch
from exporter.calibrate import cache, observe, observer, statistics
from exporter.calibrate.cache import Remembered
from exporter.calibrate.fold import cut, fold
from exporter.calibrate.observe import CHUNK
from exporter.calibrate.statistics import Statistics
from tests.exporter import graphs

TEXT = "(float[N,8] x) => (float[N,4] y) { [a] h = Gemm(x, v, b)\n [r] r = Relu(h)\n [e] y = Gemm(r, w) }"
MODEL = graphs.model(TEXT, {"v": graphs.noise(1, 8, 16), "b": graphs.noise(2, 16), "w": graphs.noise(3, 16, 4)})
NAMES, CHANNELS = ("x", "h", "y"), (("h", 1),)
TABLE = {"method": "minmax"}
RUN = cache.run_key(MODEL, NAMES, CHANNELS, True, TABLE)
CHUNKS = 10
COUNT = CHUNKS * CHUNK
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


def calibrate(look: Remembered, batches: Iterable[Batch]) -> bytes:
    found = fold((look(chunk, start) for start, chunk in cut(batches, CHUNK)), statistics.merge)
    assert found is not None
    return statistics.to_bytes(found)


def plain(count: int = COUNT) -> bytes:
    return statistics.to_bytes(observe(MODEL, NAMES, data(count), CHANNELS, True))


def until_killed(folder: str) -> None:
    """What the child process does: it dies, without a chance to tidy up, when the batch at 60 % is asked for."""

    def stream() -> Iterator[Batch]:
        for number, batch in enumerate(data()):
            if number == KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    calibrate(cache.remembered(Counted(), RUN, Path(folder)), stream())


def test_run_killed_at_60_percent_is_resumed_to_the_same_bytes_and_runs_only_the_rest(tmp_path: Path) -> None:
    code = f"from {__name__} import until_killed; until_killed({str(tmp_path)!r})"
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    counted = Counted()
    look = cache.remembered(counted, RUN, tmp_path)
    assert calibrate(look, data()) == plain()
    assert counted.ran == list(range(KILLED, COUNT))
    assert (look.taken, look.kept) == (KILLED, COUNT)


def test_ctrl_c_keeps_every_whole_chunk_and_says_how_many_batches(tmp_path: Path) -> None:
    def stream() -> Iterator[Batch]:
        yield from data(2 * CHUNK + 1)
        raise KeyboardInterrupt

    look = cache.remembered(Counted(), RUN, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        calibrate(look, stream())
    assert look.interrupted() == f"interrupted; {2 * CHUNK} batches are kept, run again to go on"
    again = Counted()
    assert calibrate(cache.remembered(again, RUN, tmp_path), data()) == plain()
    assert again.ran == list(range(2 * CHUNK, COUNT))


def test_second_run_runs_nothing_and_its_files_have_the_same_bytes(tmp_path: Path) -> None:
    first, second, counted = tmp_path / "1", tmp_path / "2", Counted()
    for folder in (first, second):
        assert calibrate(cache.remembered(Counted(), RUN, folder), data()) == plain()
    assert calibrate(cache.remembered(counted, RUN, first), data()) == plain()
    assert counted.ran == []
    files = sorted(path.name for path in first.iterdir())
    assert len(files) == CHUNKS
    assert [(first / name).read_bytes() for name in files] == [(second / name).read_bytes() for name in files]


OTHER = graphs.model(TEXT, {"v": graphs.noise(1, 8, 16), "b": graphs.noise(2, 16), "w": graphs.noise(4, 16, 4)})


@pytest.mark.parametrize(
    "other",
    [
        cache.run_key(OTHER, NAMES, CHANNELS, True, TABLE),
        cache.run_key(MODEL, NAMES[:2], CHANNELS, True, TABLE),
        cache.run_key(MODEL, NAMES, (("h", 0),), True, TABLE),
        cache.run_key(MODEL, NAMES, CHANNELS, False, TABLE),
        cache.run_key(MODEL, NAMES, CHANNELS, True, TABLE | {"method": "percentile"}),
        cache.run_key(MODEL, NAMES, CHANNELS, True, TABLE, ["linux x86_64 avx2"]),
    ],
    ids=["weights", "tensors", "channels", "histograms", "recipe", "cpu"],
)
def test_another_question_finds_nothing(tmp_path: Path, other: bytes) -> None:
    calibrate(cache.remembered(Counted(), RUN, tmp_path), data())
    look = cache.remembered(Counted(), other, tmp_path)
    assert look.look(look.key(list(data(CHUNK)), 0), CHUNK) is None


def test_same_question_has_the_same_key_and_other_libraries_have_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.run_key(MODEL.clone(), list(NAMES), list(CHANNELS), True, dict(TABLE)) == RUN
    for package in cache.versions():
        other = cache.versions() | {package: "0"}
        with monkeypatch.context() as patch:
            patch.setattr(cache, "versions", lambda other=other: other)
            assert cache.run_key(MODEL, NAMES, CHANNELS, True, TABLE) != RUN


def test_other_data_are_run_and_the_chunks_that_are_the_same_are_not(tmp_path: Path) -> None:
    calibrate(cache.remembered(Counted(), RUN, tmp_path), data())
    batches = list(data())
    changed = batches[2 * CHUNK]["x"].copy()
    changed.flat[3] = np.nextafter(changed.flat[3], np.float32(9))  # one bit of one value
    batches[2 * CHUNK] = {"x": changed}
    counted = Counted()
    assert calibrate(cache.remembered(counted, RUN, tmp_path), batches) == statistics.to_bytes(
        observe(MODEL, NAMES, batches, CHANNELS, True)
    )
    assert counted.ran == list(range(2 * CHUNK, 3 * CHUNK))


def test_order_of_batches_is_part_of_the_key(tmp_path: Path) -> None:
    batches = list(data(CHUNK))
    assert (
        len(
            {cache.chunk_key(RUN, batches, 0), cache.chunk_key(RUN, batches[::-1], 0), cache.chunk_key(RUN, batches, 8)}
        )
        == 3
    )


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        (lambda content: content[: len(content) // 2], "truncated, or changed on disk"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "truncated, or changed on disk"),
        (lambda content: content[: len(cache.MAGIC) + 5], "truncated, or changed on disk"),
        (lambda content: b"PK\3\4 somebody else's file", "not statistics of this version of packlight"),
        (lambda content: b"", "not statistics of this version of packlight"),
    ],
    ids=["half", "bit", "head", "foreign", "empty"],
)
def test_spoilt_file_is_ignored_with_a_note_and_replaced(tmp_path: Path, spoilt: object, said: str) -> None:
    calibrate(cache.remembered(Counted(), RUN, tmp_path), data(2 * CHUNK))
    path = tmp_path / (cache.chunk_key(RUN, list(data(CHUNK)), 0) + cache.SUFFIX)
    whole = path.read_bytes()
    path.write_bytes(spoilt(whole))  # type: ignore[operator]
    notes: list[str] = []
    counted = Counted()
    assert calibrate(cache.remembered(counted, RUN, tmp_path, notes.append), data(2 * CHUNK)) == plain(2 * CHUNK)
    assert counted.ran == list(range(CHUNK))
    assert notes == [f"calibration cache: {path} is ignored: {said}"]
    assert path.read_bytes() == whole


def test_file_of_other_data_under_this_name_is_ignored_with_a_note(tmp_path: Path) -> None:
    calibrate(cache.remembered(Counted(), RUN, tmp_path), data(2 * CHUNK))
    batches = list(data(2 * CHUNK))
    first, second = (
        tmp_path / (cache.chunk_key(RUN, batches[at : at + CHUNK], at) + cache.SUFFIX) for at in (0, CHUNK)
    )
    first.write_bytes(second.read_bytes())
    notes: list[str] = []
    assert calibrate(cache.remembered(Counted(), RUN, tmp_path, notes.append), batches) == plain(2 * CHUNK)
    assert notes == [f"calibration cache: {first} is ignored: the statistics of other data"]


def test_disk_that_refuses_ends_the_cache_with_one_note_and_not_the_calibration(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    notes: list[str] = []
    look = cache.remembered(Counted(), RUN, tmp_path / "file" / "folder", notes.append)
    assert calibrate(look, data()) == plain()
    assert look.kept == 0
    assert len(notes) == 1 and notes[0].endswith("nothing more is kept of this run")


def test_without_a_folder_nothing_is_kept_and_the_statistics_are_the_same() -> None:
    look = cache.remembered(Counted(), RUN, None)
    assert calibrate(look, data()) == plain()
    assert (look.taken, look.kept) == (0, 0)
    assert look.interrupted() == "interrupted; the calibration cache is off, so no batch is kept"


def test_what_was_used_longest_ago_is_evicted_first_and_foreign_files_are_left(tmp_path: Path) -> None:
    calibrate(cache.remembered(Counted(), RUN, tmp_path), data())
    (tmp_path / "mine.txt").write_text("not ours")
    paths = [tmp_path / (cache.chunk_key(RUN, chunk, start) + cache.SUFFIX) for start, chunk in cut(data(), CHUNK)]
    for age, path in enumerate(paths):
        os.utime(path, (1000 - age, 1000 - age))
    assert cache.read(tmp_path, paths[-1].stem, print) is not None  # the oldest, but used now
    cache.evict(tmp_path, sum(path.stat().st_size for path in (paths[-1], *paths[:2])))
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", *(path.name for path in (paths[-1], *paths[:2]))}


def test_temporary_files_of_killed_processes_go_and_those_of_running_ones_stay(tmp_path: Path) -> None:
    for name, age in ((".old.tmp", 2 * cache.LEFT_BEHIND_SECONDS), (".new.tmp", 0)):
        (tmp_path / name).write_bytes(b"half")
        then = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (then, then))
    cache.remembered(Counted(), RUN, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".new.tmp"]


def test_place_is_the_users_cache_folder_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    assert cache.place({}, "linux") == Path("/home/ada/.cache/packlight/calibration")
    assert cache.place({"XDG_CACHE_HOME": "/fast"}, "linux") == Path("/fast/packlight/calibration")
    assert cache.place({"XDG_CACHE_HOME": "relative"}, "linux") == Path("/home/ada/.cache/packlight/calibration")
    assert cache.place({}, "darwin") == Path("/home/ada/Library/Caches/packlight/calibration")
    assert cache.place({"PACKLIGHT_CACHE": "/mine", "XDG_CACHE_HOME": "/fast"}, "linux") == Path("/mine/calibration")
    assert cache.place({"PACKLIGHT_CACHE": "off"}, "linux") is None
