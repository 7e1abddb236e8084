from __future__ import annotations

import io
import struct
import zipfile
from typing import Any

import numpy as np
import pytest

from runtime import npz


def saved(*, packed: bool = False, **arrays: Any) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if packed else np.savez)(file, **arrays)
    return file.getvalue()


def npy(header: str, content: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + content


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name + ".npy", content)
    return file.getvalue()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float16", "float32", ">f4", ">i8"])
def test_arrays_are_what_numpy_saved_in_c_order_and_this_machines_bytes(dtype: str, packed: bool) -> None:
    given = np.arange(24).reshape(2, 3, 4).astype(dtype)
    every = {"x": given, "turned": np.asfortranarray(given), "scalar": given[0, 0, 0], "none": given[:0]}
    found = npz.arrays(saved(packed=packed, **every))
    assert list(found) == list(every)
    for name, array in every.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == given.dtype.newbyteorder("=") and found[name].flags.c_contiguous
        assert found[name].flags.writeable or not array.size


def test_archive_written_to_a_stream_is_read() -> None:
    class Stream(io.RawIOBase):
        def __init__(self) -> None:
            self.content = b""

        def writable(self) -> bool:
            return True

        def write(self, given: Any) -> int:
            self.content += bytes(given)
            return len(given)

    stream = Stream()
    np.savez(stream, x=np.arange(3), y=np.ones(2))
    assert npz.arrays(stream.content)["x"].tolist() == [0, 1, 2]


def overlapping() -> bytes:
    """Members whose headers stand within each other: a file of 8 kB that unfolds to two megabytes."""
    inner = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1048576,)}", bytes(1 << 20))
    content = bytearray(zipped(a=inner, b=inner))
    end = content.rindex(b"PK\x05\x06")
    start = int.from_bytes(content[end + 16 : end + 20], "little")
    second = content.index(b"PK\x01\x02", start + 1)
    content[second + 42 : second + 46] = content[start + 42 : start + 46]  # b lies where a does
    return bytes(content)


HEADER = "{{'descr': {}, 'fortran_order': {}, 'shape': {}}}"
SHAPES = ["(True,)", "(1e30,)", "(-1,)", "('2',)", "[2]", "2", "(1099511627776,)", "(3,)", "()"]
SHAPES += [f"({'1,' * 33})", f"({'9' * 5000},)"]
DESCRS = ["'|O'", "'<U4'", "'|S4'", "'|V4'", "[('a', '<f4')]", "'<c8'", "'<M8[s]'", "'<f16'", "'f4'"]
DESCRS += ["'<f4,<f4'", "3", "None", "'<f3'"]


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_that_is_none_is_refused(shape: str) -> None:
    with pytest.raises(ValueError, match="shape|bytes for an array|header"):
        npz.array(npy(HEADER.format("'<f4'", "False", shape), bytes(8)))


@pytest.mark.parametrize("descr", DESCRS)
def test_dtype_that_is_no_number_of_ours_is_refused(descr: str) -> None:
    with pytest.raises(ValueError, match="dtype|expected"):
        npz.array(npy(HEADER.format(descr, "False", "(2,)"), bytes(8)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (overlapping(), "does not begin where the one before it ends"),
        (b"#!/bin/sh\n" + saved(x=np.ones(2)), "does not begin"),
        (saved(x=np.ones(2)) + b"more", "before or behind"),
        (saved(x=np.ones(2)).replace(b"\x93NUMPY", b"\x93NUMPX"), "CRC"),
        (zipped(x=b"text"), "no .npy file"),
        (zipped(x=npy(HEADER.format("'<f4'", "1", "(2,)"), bytes(8))), "fortran_order"),
        (zipped(x=npy("{'a': __import__('os').mkdir('sprung')}")), "a header that is none"),
        (zipped(x=npy("(" * 9000)), "a header that is none"),
        (zipped(x=npy(HEADER.format("'|b1'", "False", "(2,)"), b"\x02\x01")), "neither 0 nor 1"),
        (saved(packed=True, x=np.zeros(1 << 26)), "unfold to more than"),
        (b"PK\x05\x06" + bytes(17), "no zip archive"),
    ],
)
def test_archive_that_is_not_what_it_says_is_refused(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        npz.arrays(content)


def test_encrypted_twice_named_and_otherwise_packed_members_are_refused() -> None:
    whole = saved(x=np.ones(2))
    begin = whole.index(b"PK\x01\x02")
    encrypted = bytearray(whole)
    encrypted[6] |= 1
    encrypted[begin + 8] |= 1
    other = whole.replace(b"x.npy", b"y.npy", 1)
    squeezed = io.BytesIO()
    with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", b"x" * 100)
    twice = zipped(x=b"1", y=b"1").replace(b"y.npy", b"x.npy")
    for content, says in (
        (bytes(encrypted), "encrypted"), (other, "two names"), (squeezed.getvalue(), "compression 14"), (twice, "of one name"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            npz.arrays(content)
    with pytest.raises(ValueError, match="compressed arrays, where stored ones are expected"):
        npz.arrays(saved(packed=True, x=np.ones(2)), stored=True)
