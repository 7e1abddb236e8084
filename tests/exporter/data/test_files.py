from __future__ import annotations

import functools
import http.server
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exporter import data
from exporter.batches import digest
from exporter.data import files
from exporter.errors import CalibrationError
from runtime.errors import install
from tests.exporter.data.made import IDS, IMAGE, X, asked, picture, read, refusal, tokenizer

IMAGES = asked(images={"resize": 8, "crop": 8})
TEXT = asked(text={"tokenizer": "set on use"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        picture(tmp_path / "pictures" / "sub" / f"{number}.png", number)
        (tmp_path / "arrays").mkdir(exist_ok=True)
        np.savez(tmp_path / "arrays" / f"{number}.npz", x=np.full((1, 3), number, np.float32))
    np.save(tmp_path / "arrays" / "a b.npy", np.full((1, 3), 9, np.float32))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "lines.txt").write_text("a cat\nthe mat\n" * 50)
    tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tables").mkdir()
    pq.write_table(
        pa.table({"x": np.ones((2000, 3), np.float32).tolist()}), tmp_path / "tables" / "r.parquet", row_group_size=100
    )
    return tmp_path


class Ranged(http.server.SimpleHTTPRequestHandler):
    """Answers a request for a part of a file with that part, as large stores do; Python's own server cannot."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        if part is None or not self.server.ranges or not os.path.isfile(path):  # type: ignore[attr-defined]
            super().do_GET()
            return
        content = Path(path).read_bytes()
        chosen = content[int(part[1]) : int(part[2]) + 1 if part[2] else None]
        self.send_response(206)
        self.send_header("Content-Length", str(len(chosen)))
        self.send_header("Content-Range", f"bytes {part[1]}-{int(part[1]) + len(chosen) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(chosen)


class Server(http.server.ThreadingHTTPServer):
    """A web server on loopback that remembers what was asked for."""

    ranges = True
    asked: list[str]


@pytest.fixture(params=[True, False], ids=["with ranges", "without ranges"])
def server(folder: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), functools.partial(Ranged, directory=str(folder))) as made:
        made.ranges, made.asked = request.param, []
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/packlight", recursive=True)
    yield "memory://packlight"
    system.rm("/packlight", recursive=True)


CASES = (
    ("pictures", IMAGES, IMAGE),
    ("arrays", asked(), X),
    ("text", TEXT, IDS),
    ("tables", asked(columns={"batch": 128}), X),
    ("arrays/1.npz", asked(), X),
    ("tables/r.parquet", asked(columns={"batch": 1000}), X),
)


def same_as_local(folder: Path, root: str) -> None:
    for name, table, tensor in CASES:
        here, there = table, table
        if table is TEXT:
            here = asked(text={"tokenizer": str(folder / "tokenizer.json")})
            there = asked(text={"tokenizer": f"{root}/tokenizer.json"})
        local = [digest(batch) for batch in read(folder / name, here, tensor)]
        assert local and [digest(batch) for batch in read(f"{root}/{name}", there, tensor)] == local, name


def test_memory_gives_what_the_disk_gives(folder: Path, memory: str) -> None:
    same_as_local(folder, memory)


def test_file_urls_give_what_paths_give(folder: Path) -> None:
    same_as_local(folder, folder.as_uri())


def test_web_server_gives_what_the_disk_gives(folder: Path, server: Server) -> None:
    same_as_local(folder, address(server))


def test_files_are_fetched_one_by_one_as_they_are_read(server: Server) -> None:
    stream = data.read(f"{address(server)}/arrays", (X,), "calibration")
    server.asked.clear()
    assert [next(stream)["x"][0, 0] for _ in range(2)] == [0.0, 1.0]
    assert {path for path in server.asked if path.endswith(".npz")} == {"/arrays/0.npz", "/arrays/1.npz"}


def test_large_file_is_read_in_parts_where_the_server_gives_parts(folder: Path, server: Server) -> None:
    wide = np.random.default_rng(0).standard_normal((3000, 600)).astype(np.float32)  # more than fsspec asks for at once
    columns = {"x": wide[:, :3].tolist(), "rest": list(wide)}
    pq.write_table(pa.table(columns), folder / "wide.parquet", row_group_size=500)
    found = read(f"{address(server)}/wide.parquet", asked(columns={"batch": 500}), X)
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in found]), wide[:, :3])


def test_missing_files_folders_and_servers_are_refused_by_name(memory: str, server: Server) -> None:
    for root in (memory, address(server)):
        assert "/arrays/none.npz: found " in refusal(f"{root}/arrays/none.npz", asked(), X)
        assert "/nowhere: found " in refusal(f"{root}/nowhere", asked(), X)
    port = server.server_port
    server.server_close()
    assert f"http://127.0.0.1:{port}/a.npz: found " in refusal(f"http://127.0.0.1:{port}/a.npz", asked(), X)


def test_corrupt_files_are_refused_by_their_url(folder: Path, memory: str) -> None:
    system = fsspec.filesystem("memory")
    for name, table, tensor in (("a.npz", asked(), X), ("a.png", IMAGES, IMAGE), ("a.parquet", asked(), X)):
        system.pipe(f"/packlight/bad/{name}", b"none of these")
        assert f"memory:///packlight/bad/{name}: found " in refusal(f"{memory}/bad/{name}", table, tensor)


def test_kinds_of_urls_that_nothing_reads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "carrier://a/b.npz: found Protocol not known: carrier" in refusal("carrier://a/b.npz", asked(), X)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    assert "install the package it names" in refusal("s3://bucket/b.npz", asked(), X)
    monkeypatch.setitem(sys.modules, "fsspec", None)
    assert install("remote") in refusal("s3://bucket/b.npz", asked(), X)


def test_keys_and_signatures_in_a_url_are_never_shown() -> None:
    for url in ("https://me:secret@127.0.0.1:1/a.npz?X-Signature=secret", "https://127.0.0.1:1/a.npz?secret#secret"):
        said = refusal(url, asked(), X)
        assert said.startswith("https://127.0.0.1:1/a.npz: found ") and "secret" not in said


def test_what_is_a_url_and_what_is_a_path() -> None:
    for url in ("s3://bucket/key", "https://host/a.npz", "memory://x", "simplecache::s3://bucket/key"):
        assert files.is_remote(url)
    for path in ("a/b.npz", "C:\\data\\a.npz", "./s3:/a", "a:b", "file.py:function"):
        assert not files.is_remote(path)


def test_suffix_is_that_of_the_path_whatever_a_url_asks_for_besides() -> None:
    assert files.File(path="https://host/a.NPZ?version=1.2", system=object()).suffix == ".npz"


def test_folder_is_listed_in_the_order_of_its_names_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/1.npy", "a.npy", "B.npy", "b.npy", ".git/x.npy", ".a.npy", "b/.c.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [Path(file.path).relative_to(tmp_path).as_posix() for file in files.inside(files.at(tmp_path))]
    assert found == ["B.npy", "a.npy", "b/1.npy", "b.npy"]


def test_unreadable_file_says_so(tmp_path: Path) -> None:
    with (
        pytest.raises(CalibrationError, match=r"none\.txt: found .*No such file"),
        files.opened(files.at(tmp_path / "none.txt")),
    ):
        pass
