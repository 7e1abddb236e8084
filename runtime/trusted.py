"""A file that somebody else may have put there, opened once: what is hashed is what is used, and a limit stands before each read.

A file is a regular one. What is behind a link, a pipe or a device is not the file of that name, and may never end.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from runtime.errors import BundleError

if TYPE_CHECKING:
    import mmap
    from pathlib import Path

    from runtime.manifest import File

BLOCK = 1 << 20
# Not followed: a link. Not waited for: the other end of a pipe. Windows has none of these, and its own for bytes.
FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
DESCRIPTORS = "/proc/self/fd"  # Linux: opened again by that path it is the same file, whatever lies at its old name now
COPY = "copy the bundle again"


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """(descriptor, bytes) of a regular file.

    Raises:
        BundleError: there is none, it is a link, a folder, a pipe or a device, or it cannot be read.
    """
    try:
        if os.path.islink(path):  # where O_NOFOLLOW is not known
            refuse(path, found="a link", expected="a file in its own folder")
        descriptor = os.open(path, FLAGS)
    except (OSError, ValueError) as error:  # a NUL in the name
        raise _unreadable(path, error) from error
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            refuse(path, found="something that is not a file", expected="a file", do=COPY)
        yield descriptor, about.st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)


def read(path: Path, most: int) -> bytes:
    """The whole file, which may have `most` bytes.

    Raises:
        BundleError: see `opened`; it is larger, or grows while it is read.
    """
    with opened(path) as (descriptor, size):
        return _whole(path, descriptor, size, most)


def held(path: Path, expected: File, most: int) -> bytes:
    """The whole file, whose size and SHA-256 are those expected.

    Raises:
        BundleError: see `opened`; another size or hash; more than `most` bytes.
    """
    with opened(path) as (descriptor, size):
        _require_size(path, size, expected)
        content = _whole(path, descriptor, size, most)
    import hashlib  # here: `import runtime` need not load OpenSSL

    _require_hash(path, hashlib.sha256(content).hexdigest(), expected)
    return content


@contextmanager
def hashed(path: Path, expected: File) -> Iterator[int]:
    """The descriptor of a file whose size and SHA-256 are those expected, read by this very descriptor.

    Raises:
        BundleError: see `opened`; another size or hash.
    """
    import hashlib

    seen = hashlib.sha256()
    with opened(path) as (descriptor, size):
        _require_size(path, size, expected)
        for block in _blocks(descriptor, size):
            seen.update(block)
        _require_hash(path, seen.hexdigest(), expected)
        yield descriptor


def whole(path: Path, descriptor: int, size: int, most: int) -> bytes | str:
    """What a library is given of a file that was hashed: the descriptor's own path where the system has one, else the bytes.

    Raises:
        BundleError: more than `most` bytes.
    """
    if size <= most and os.path.exists(own := f"{DESCRIPTORS}/{descriptor}"):
        return own
    return content(path, descriptor, size, most)


def content(path: Path, descriptor: int, size: int, most: int) -> bytes:
    """All bytes of a file that is open.

    Raises:
        BundleError: more than `most` bytes; it grows while it is read.
    """
    os.lseek(descriptor, 0, os.SEEK_SET)
    return _whole(path, descriptor, size, most)


def part(descriptor: int, length: int, at: int) -> bytes:
    """So many bytes from there on of a file that is open; fewer where it ends."""
    os.lseek(descriptor, at, os.SEEK_SET)
    return os.read(descriptor, length)


@contextmanager
def steady(path: Path, expected: File) -> Iterator[None]:
    """A file that is too large to be given but by its name: what is opened in here is the file that was hashed.

    Raises:
        BundleError: see `hashed`; at the end another file has its name, or it was written to or renamed.
    """
    with opened(path) as (descriptor, _):
        before = os.fstat(descriptor)
        with hashed(path, expected):
            yield
        now = (os.fstat(descriptor), os.lstat(path))
        marks = ("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
        if any(getattr(each, mark) != getattr(before, mark) for each in now for mark in marks):
            refuse(path, found="a file that changes while it is opened", expected="what was hashed", do=COPY)


@contextmanager
def mapped(path: Path, expected: File) -> Iterator[mmap.mmap | bytes]:
    """A large file as memory of which only what is looked at is read; hashed by the same descriptor.

    Raises:
        BundleError: see `hashed`.
    """
    import mmap

    with hashed(path, expected) as descriptor:
        if not expected.size_bytes:  # which no system maps
            yield b""
            return
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content:
            yield content


def refuse(path: Path, *, found: str, expected: str = "", do: str = "") -> NoReturn:
    raise BundleError(str(path), path=str(path), found=found, expected=expected, do=do)


def _whole(path: Path, descriptor: int, size: int, most: int) -> bytes:
    if size > most:
        refuse(path, found=f"{size} bytes", expected=f"at most {most}")
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        content = file.read(size + 1) if size < BLOCK else file.readall()
    if len(content) != size:
        refuse(path, found="a file that changes while it is read", expected=f"{size} bytes", do="read it again")
    return content


def _blocks(descriptor: int, size: int) -> Iterator[bytes]:
    """What the file holds, but no more than it held when it was opened and one byte, which its hash then tells."""
    left = size + 1
    while left > 0 and (block := os.read(descriptor, min(BLOCK, left))):
        left -= len(block)
        yield block


def _require_size(path: Path, size: int, expected: File) -> None:
    if size != expected.size_bytes:
        refuse(path, found=f"{size} bytes", expected=f"{expected.size_bytes}", do=COPY)


def _require_hash(path: Path, found: str, expected: File) -> None:
    if found != expected.sha256:
        refuse(path, found=f"SHA-256 {found}", expected=expected.sha256, do=COPY)


def _unreadable(path: Path, error: OSError | ValueError) -> BundleError:
    if isinstance(error, OSError) and os.path.islink(path):
        return BundleError(str(path), path=str(path), found="a link", expected="a file in its own folder", do=COPY)
    if isinstance(error, OSError) and not os.path.lexists(path):
        do = "copy the whole bundle, or export again"
        return BundleError(str(path), path=str(path), found="nothing", expected="a file", do=do)
    said = getattr(error, "strerror", None) or str(error)
    return BundleError(str(path), path=str(path), found=said, expected="a file that can be read")
