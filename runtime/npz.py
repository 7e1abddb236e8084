"""Named arrays from a .npz file that somebody else may have written: numbers only, every limit before the memory is taken.

An .npz is a zip archive of .npy files. It is read as zip's own description says it is laid out, and not as its directory
claims: members stand one behind the other, without gap or overlap, from the first byte to the directory, which ends the file.
"""

from __future__ import annotations

import ast
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.manifest import DTYPES

if TYPE_CHECKING:
    from runtime.drift import Array

MOST_BYTES = 1 << 32  # of a file; a batch of more is none
MEMBERS = 1 << 16
DIMENSIONS = 32
HEADER = 10_000  # bytes that say what an array is, as numpy itself allows
UNFOLDS, FREELY = 20, 1 << 26  # compressed members: so many times the file's bytes, or this many, in all
LOCAL, DIRECTORY, END, END_64 = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06"
DESCRIBED, ENCRYPTED = 1 << 3, 1  # bits of a member's flags
MAGIC = b"\x93NUMPY"
# version of the .npy format -> how many bytes tell the header's length, and its encoding
VERSIONS = {b"\x01\x00": (2, "latin1"), b"\x02\x00": (4, "latin1"), b"\x03\x00": (4, "utf-8")}


def arrays(content: bytes, stored: bool = False) -> dict[str, Array]:
    """{name: array} of an .npz file's bytes, each array in C order and this machine's order of bytes.

    Args:
        content: the whole file.
        stored: refuse compressed members.

    Raises:
        ValueError: what is wrong, in words; no other error.
    """
    found: dict[str, Array] = {}
    for name, packed, member in _members(memoryview(content), content, stored):
        if not name.endswith(".npy"):
            raise ValueError(f"a member {name[:80]!r} that is no .npy file")
        found[name.removesuffix(".npy")] = array(_unpacked(packed, member))
    return found


def array(content: bytes | memoryview) -> Array:
    """The array of an .npy file's bytes. See `arrays`."""
    content = memoryview(content)
    if content[:6] != MAGIC or bytes(content[6:8]) not in VERSIONS:
        raise ValueError("no .npy file, or one of another version")
    width, encoding = VERSIONS[bytes(content[6:8])]
    begin = 8 + width
    length = int.from_bytes(content[8:begin], "little")
    if length > HEADER or begin + length > len(content):
        raise ValueError(f"a header of {length} bytes, where at most {HEADER} may be")
    dtype, fortran, shape = _described(bytes(content[begin : begin + length]).decode(encoding, "replace"))
    size = math.prod(shape) * dtype.itemsize
    if size != len(content) - begin - length:
        raise ValueError(f"{len(content) - begin - length} bytes for an array {list(shape)} of {dtype}")
    flat = np.frombuffer(content, dtype, math.prod(shape), begin + length)
    if dtype.kind == "b" and flat.view(np.uint8).max(initial=0) > 1:
        raise ValueError("booleans that are neither 0 nor 1")
    whole = flat.reshape(shape, order="F" if fortran else "C")
    return np.array(whole, dtype.newbyteorder("="), order="C")


def _described(header: str) -> tuple[np.dtype[Any], bool, tuple[int, ...]]:
    try:
        about = ast.literal_eval(header.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(f"a header that is none: {header[:60]!r}") from error
    if not isinstance(about, Mapping) or set(about) != {"descr", "fortran_order", "shape"}:
        raise ValueError("a header without descr, fortran_order and shape, or with more")
    descr, fortran, shape = about["descr"], about["fortran_order"], about["shape"]
    if not isinstance(fortran, bool):
        raise ValueError(f"fortran_order {str(fortran)[:20]}")
    if not isinstance(shape, tuple) or len(shape) > DIMENSIONS:
        raise ValueError(f"a shape that is no tuple of at most {DIMENSIONS} sizes")
    if not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
        raise ValueError("a shape of other things than sizes")
    if not isinstance(descr, str) or len(descr) > 8 or descr[:1] not in ("<", ">", "|", "="):
        raise ValueError(f"a dtype that is not one kind of number: {str(descr)[:40]}")
    try:
        dtype = np.dtype(descr)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"no dtype: {descr}") from error
    if dtype.newbyteorder("=").name not in DTYPES:
        raise ValueError(f"{'Python objects' if dtype.hasobject else dtype.name}, where numbers are expected")
    return dtype, fortran, shape


def _members(content: memoryview, whole: bytes, stored: bool) -> Iterator[tuple[str, memoryview, zipfile.ZipInfo]]:
    """(name, bytes as they lie there, what the directory says) of every member, in the order in which they lie."""
    try:
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            listed, directory, comment = archive.infolist(), archive.start_dir, archive.comment
    except Exception as error:  # zipfile's and struct's, and whatever else a damaged directory brings about
        raise ValueError(f"no zip archive: {str(error)[:100] or type(error).__name__}") from error
    if len(listed) > MEMBERS:
        raise ValueError(f"{len(listed)} members, where at most {MEMBERS} may be")
    if len({member.filename for member in listed}) != len(listed):
        raise ValueError("two members of one name")
    room = max(FREELY, UNFOLDS * len(content))
    if sum(member.file_size for member in listed) > room:
        raise ValueError(f"members that unfold to more than {room} bytes")
    begins = bytes(content[directory : directory + 4]) in (DIRECTORY, END, END_64)
    if comment or not begins or content[-22:-18] != END:
        raise ValueError("a zip archive with something before or behind it")
    at = 0
    for member in sorted(listed, key=lambda each: each.header_offset):
        if member.header_offset != at:
            raise ValueError(f"member {member.filename[:80]!r} does not begin where the one before it ends")
        begin = _begin(content, member, stored)
        end = begin + member.compress_size
        if end > directory:
            raise ValueError(f"member {member.filename[:80]!r} is longer than the archive")
        yield member.filename, content[begin:end], member
        at = end + _description(content[end : end + 24], member)
    if at != directory:
        raise ValueError("bytes between the members and the directory")


def _begin(content: memoryview, member: zipfile.ZipInfo, stored: bool) -> int:
    """Where a member's bytes begin; its own header says the same of it as the directory does."""
    head = content[member.header_offset : member.header_offset + 30]
    if len(head) < 30 or head[:4] != LOCAL:
        raise ValueError("a member without a header of its own")
    _, flags, method, _, _, crc, packed, size, name, extra = struct.unpack("<HHHHHIIIHH", head[4:])
    if flags & ENCRYPTED or flags != member.flag_bits:
        raise ValueError("an encrypted member, or one whose two headers differ")
    if method != member.compress_type or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compression {method}, where only deflate is read")
    if stored and method != zipfile.ZIP_STORED:
        raise ValueError("compressed arrays, where stored ones are expected")
    if not flags & DESCRIBED:
        long = 0xFFFFFFFF  # the number stands in zip64's extra field
        if crc != member.CRC or packed not in (member.compress_size, long) or size not in (member.file_size, long):
            raise ValueError("a member whose two headers differ")
    begin = member.header_offset + 30 + int(name)
    written = bytes(content[member.header_offset + 30 : begin]).decode("utf-8" if flags & 0x800 else "cp437", "replace")
    if written != member.orig_filename or written != member.filename:
        raise ValueError("a member with two names")
    return begin + int(extra)


def _description(behind: memoryview, member: zipfile.ZipInfo) -> int:
    """The length of what stands behind a member that was written to a stream: its CRC and sizes once more."""
    if not member.flag_bits & DESCRIBED:
        return 0
    for sizes in ("<III", "<IQQ"):
        for mark in (b"PK\x07\x08", b""):
            if max(member.compress_size, member.file_size) >> 32 and sizes == "<III":
                continue
            told = mark + struct.pack(sizes, member.CRC, member.compress_size, member.file_size)
            if behind[: len(told)] == told:
                return len(told)
    raise ValueError("a member whose two descriptions differ")


def _unpacked(packed: memoryview, member: zipfile.ZipInfo) -> bytes | memoryview:
    content: bytes | memoryview = packed
    if member.compress_type == zipfile.ZIP_DEFLATED:
        unfold = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            content = unfold.decompress(packed, member.file_size + 1)
        except zlib.error as error:
            raise ValueError(f"a member that does not unfold: {error}") from error
        if not unfold.eof or unfold.unused_data:
            raise ValueError("a member that unfolds to another size than it says")
    if len(content) != member.file_size or zlib.crc32(content) != member.CRC:
        raise ValueError("a member of another size or CRC than it says")
    return content
