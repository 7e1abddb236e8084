from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.exporter.data.made import X, asked, read, refusal

ONE = np.ones((2, 3), np.float32)


def test_files_are_one_batch_each_in_the_order_of_their_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "b.npz", x=ONE * 2)
    np.savez(tmp_path / "a.npz", x=ONE)
    np.save(tmp_path / "c.npy", ONE * 3)
    (tmp_path / "sub").mkdir()
    np.save(tmp_path / "sub" / "a.npy", ONE * 4)
    (tmp_path / "notes.md").write_text("no batch")
    assert [batch["x"][0, 0] for batch in read(tmp_path, asked(), X)] == [1.0, 2.0, 3.0]
    assert [batch["x"][0, 0] for batch in read(str(tmp_path / "b.npz"), asked(), X)] == [2.0]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    np.savez_compressed(tmp_path / "good.npz", x=np.ones((200, 3), np.float32))
    content = bytearray((tmp_path / "good.npz").read_bytes())
    (tmp_path / "short.npz").write_bytes(content[: len(content) // 2])
    content[60:70] = bytes(255 - byte for byte in content[60:70])
    (tmp_path / "flipped.npz").write_bytes(content)
    np.save(tmp_path / "one.npy", ONE)
    (tmp_path / "array.npz").write_bytes((tmp_path / "one.npy").read_bytes())
    (tmp_path / "archive.npy").write_bytes((tmp_path / "good.npz").read_bytes())
    (tmp_path / "short.npy").write_bytes((tmp_path / "one.npy").read_bytes()[:-3])
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "pickled.npy", np.array([object()]), allow_pickle=True)
    np.savez(tmp_path / "pickled.npz", x=np.array([object()]), allow_pickle=True)
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        *("short.npz", "flipped.npz", "array.npz", "archive.npy", "short.npy", "empty.npy", "text.npz"),
        *("pickled.npy", "pickled.npz", "none.npz"),
    ],
)
def test_damaged_misnamed_and_pickled_files_are_refused(damaged: Path, name: str) -> None:
    assert f"{name}: found " in refusal(damaged / name, asked(), X)
    if name != "none.npz":
        assert f"{name}: found " in refusal((damaged / name).as_uri(), asked(), X)
