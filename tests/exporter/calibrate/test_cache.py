from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exporter.batches import Batch
from exporter.calibrate import cache, observe, statistics
from exporter.calibrate.observe import CHUNK
from tests.exporter import graphs

TEXT = "(float[N,8] x) => (float[N,4] y) { [a] h = Gemm(x, v, b)\n [r] r = Relu(h)\n [e] y = Gemm(r, w) }"
MODEL = graphs.model(TEXT, {"v": graphs.noise(1, 8, 16), "b": graphs.noise(2, 16), "w": graphs.noise(3, 16, 4)})
NAMES, CHANNELS = ("x", "h", "y"), (("h", 1),)
TABLE = {"method": "minmax"}
RUN = cache.run_key(MODEL, NAMES, CHANNELS, True, TABLE)
KEYS = tuple(f"{number:064x}" for number in range(1, 4))


def data(count: int = CHUNK) -> Iterator[Batch]:
    return ({"x": graphs.noise(number, 1 + number % 3, 8)} for number in range(count))


MADE = observe(MODEL, NAMES, data(), CHANNELS, True)


def path(folder: Path, key: str) -> Path:
    return folder / (key + cache.SUFFIX)


def test_what_was_written_is_read_under_the_first_of_its_keys(tmp_path: Path) -> None:
    size = cache.write(tmp_path / "new", KEYS, MADE)
    assert path(tmp_path / "new", KEYS[0]).stat().st_size == size
    found = cache.read(tmp_path / "new", KEYS[0], print)
    assert found is not None
    assert found[0] == KEYS
    assert statistics.to_bytes(found[1]) == statistics.to_bytes(MADE)
    assert cache.read(tmp_path / "new", KEYS[1], pytest.fail) is None


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
def test_another_question_has_another_key(other: bytes) -> None:
    assert other != RUN


def test_same_question_has_the_same_key_and_other_libraries_have_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache.run_key(MODEL.clone(), list(NAMES), list(CHANNELS), True, dict(TABLE)) == RUN
    for package in cache.versions():
        other = cache.versions() | {package: "0"}
        with monkeypatch.context() as patch:
            patch.setattr(cache, "versions", lambda other=other: other)
            assert cache.run_key(MODEL, NAMES, CHANNELS, True, TABLE) != RUN


def test_order_of_batches_is_part_of_the_key(tmp_path: Path) -> None:
    batches = list(data(CHUNK))
    assert (
        len(
            {cache.chunk_key(RUN, batches, 0), cache.chunk_key(RUN, batches[::-1], 0), cache.chunk_key(RUN, batches, 8)}
        )
        == 3
    )


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("spoilt", "said"),
    [
        (lambda content: content[: len(content) // 2], "truncated, or changed on disk"),
        (flipped, "truncated, or changed on disk"),
        (lambda content: content[: len(cache.MAGIC) + 5], "truncated, or changed on disk"),
        (lambda content: b"PK\3\4 somebody else's file", "not statistics of this version of packlight"),
        (lambda content: b"", "not statistics of this version of packlight"),
    ],
    ids=["half", "bit", "head", "foreign", "empty"],
)
def test_spoilt_file_is_ignored_with_a_note(tmp_path: Path, spoilt: Callable[[bytes], bytes], said: str) -> None:
    cache.write(tmp_path, KEYS, MADE)
    file = path(tmp_path, KEYS[0])
    file.write_bytes(spoilt(file.read_bytes()))
    notes: list[str] = []
    assert cache.read(tmp_path, KEYS[0], notes.append) is None
    assert notes == [f"calibration cache: {file} is ignored: {said}"]


def test_file_of_other_data_under_this_name_is_ignored_with_a_note(tmp_path: Path) -> None:
    cache.write(tmp_path, KEYS[:2], MADE)
    os.rename(path(tmp_path, KEYS[0]), path(tmp_path, KEYS[1]))
    notes: list[str] = []
    assert cache.read(tmp_path, KEYS[1], notes.append) is None
    assert notes == [f"calibration cache: {path(tmp_path, KEYS[1])} is ignored: the statistics of other data"]


def test_what_was_used_longest_ago_is_evicted_first_and_foreign_files_are_left(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("not ours")
    for age, key in enumerate(KEYS):
        size = cache.write(tmp_path, [key], MADE)
        os.utime(path(tmp_path, key), (1000 - age, 1000 - age))
    assert cache.read(tmp_path, KEYS[-1], print) is not None  # the oldest, but used now
    cache.evict(tmp_path, 2 * size)
    assert {file.name for file in tmp_path.iterdir()} == {"mine.txt", *(path(tmp_path, KEYS[n]).name for n in (0, 2))}


def test_files_are_removed_where_they_are(tmp_path: Path) -> None:
    for key in KEYS:
        cache.write(tmp_path, [key], MADE)
    cache.remove(tmp_path, [KEYS[0], KEYS[2], "0" * 64])
    assert [*tmp_path.iterdir()] == [path(tmp_path, KEYS[1])]


def test_temporary_files_of_killed_processes_go_and_those_of_running_ones_stay(tmp_path: Path) -> None:
    for name, age in ((".old.tmp", 2 * cache.LEFT_BEHIND_SECONDS), (".new.tmp", 0)):
        (tmp_path / name).write_bytes(b"half")
        then = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (then, then))
    cache.evict(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [".new.tmp"]


def test_place_is_the_users_cache_folder_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    assert cache.place({}, "linux") == Path("/home/ada/.cache/packlight/calibration")
    assert cache.place({"XDG_CACHE_HOME": "/fast"}, "linux") == Path("/fast/packlight/calibration")
    assert cache.place({"XDG_CACHE_HOME": "relative"}, "linux") == Path("/home/ada/.cache/packlight/calibration")
    assert cache.place({}, "darwin") == Path("/home/ada/Library/Caches/packlight/calibration")
    assert cache.place({"PACKLIGHT_CACHE": "/mine", "XDG_CACHE_HOME": "/fast"}, "linux") == Path("/mine/calibration")
    assert cache.place({"PACKLIGHT_CACHE": "off"}, "linux") is None
