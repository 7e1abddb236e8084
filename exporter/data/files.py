"""Where data lies: on this machine, or anywhere fsspec reaches (`s3://`, `https://`, `memory://`). Found, then read one by one."""

from __future__ import annotations

import io
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from exporter.errors import CalibrationError
from runtime.errors import install

MOST_BYTES = 1 << 40  # of a file that is read piece by piece


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file or folder: `path` as its file system has it, which is None for this machine."""

    path: str
    system: Any = None

    @property
    def name(self) -> str:
        """For people: without what a URL may hold of keys and passwords."""
        if self.system is None:
            return self.path
        return shown(self.path if "://" in self.path else str(self.system.unstrip_protocol(self.path)))

    @property
    def suffix(self) -> str:
        plain = self.path if self.system is None else shown(self.path)
        return PurePosixPath(plain.replace(os.sep, "/")).suffix.lower()


def is_remote(given: object) -> bool:
    return (
        isinstance(given, str) and re.match(r"([a-z0-9+.-]+::)*[a-z][a-z0-9+.-]+://", given, re.IGNORECASE) is not None
    )


def shown(url: str) -> str:
    """A URL without its user, password, query and fragment: those are where keys and signatures stand."""
    return re.sub(r"(://)[^/@]*@", r"\1", re.split(r"[?#]", url)[0] if "://" in url else url)


def at(given: str | Path) -> File:
    """What a path or URL names.

    Raises:
        CalibrationError: fsspec, or the package it needs for this kind of URL, is not installed; no such kind of URL.
    """
    if not is_remote(given):
        return File(path=str(given))
    url = str(given)
    try:
        import fsspec
    except ImportError as error:
        raise CalibrationError(shown(url), found="no fsspec", do=install("remote")) from error
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise CalibrationError(
            shown(url), found=_said(error), expected="a kind of URL that fsspec reads",
            do="install the package it names" if isinstance(error, ImportError) else "",
        ) from error  # fmt: skip
    except Exception as error:  # each file system has errors of its own
        raise _unreadable(shown(url), error) from error
    return File(path=str(path), system=system)


def is_folder(file: File) -> bool:
    if file.system is None:
        return os.path.isdir(file.path)
    try:
        return bool(file.system.isdir(file.path))
    except Exception as error:  # each file system has errors of its own
        raise _unreadable(file.name, error) from error


def inside(folder: File) -> list[File]:
    """Every file of a folder and its subfolders, in the order of their names; hidden ones are not looked at."""
    if folder.system is None:
        found = _walked(folder.path)
    else:
        try:
            found = [str(path) for path in folder.system.find(folder.path)]
        except Exception as error:  # each file system has errors of its own
            raise _unreadable(folder.name, error) from error
    below = {path: relative(folder, path) for path in found}
    seen = [path for path in found if not any(part.startswith(".") for part in below[path])]
    return [File(path=path, system=folder.system) for path in sorted(seen, key=lambda path: below[path])]


def relative(folder: File, path: str) -> tuple[str, ...]:
    """The parts of a path below its folder."""
    if folder.system is None:
        return Path(path).relative_to(folder.path).parts
    return tuple(part for part in path.removeprefix(folder.path).split("/") if part)


def _walked(folder: str) -> list[str]:
    return [os.path.join(here, name) for here, _, names in os.walk(folder) for name in names]


@contextmanager
def opened(file: File) -> Iterator[BinaryIO]:
    """The file, open for reading anywhere in it. Of other files nothing is loaded, and of this one no more than is read.

    A web server that cannot begin in the middle of a file is an exception: its file is copied to a temporary one first.

    Raises:
        CalibrationError: it cannot be opened or, while it is open, not be read: the disk's or the network's errors.
    """
    with ExitStack() as stack:
        try:
            if file.system is None:
                _require_regular(file.path)
                stream: Any = open(file.path, "rb")  # noqa: SIM115
            else:
                stream = file.system.open(file.path, "rb")
            if file.system is not None and not _jumps(stream):
                stream.close()
                copy = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "copy"
                file.system.get_file(file.path, str(copy))
                stream = copy.open("rb")
        except Exception as error:  # each file system has errors of its own
            raise _unreadable(file.name, error) from error
        stack.enter_context(stream)
        try:
            yield cast("BinaryIO", stream)
        except OSError as error:
            raise _unreadable(file.name, error) from error


def _jumps(stream: Any) -> bool:
    """Whether the last byte can be read before the first; `seekable()` of a web file says so when its server cannot."""
    try:
        stream.seek(max(0, stream.seek(0, 2) - 1))
        stream.read(1)
        stream.seek(0)
    except (ValueError, OSError):
        return False
    return True


def contents(file: File) -> BinaryIO:
    """The whole file, in memory."""
    try:
        if file.system is None:
            _require_regular(file.path)
        whole = Path(file.path).read_bytes() if file.system is None else file.system.cat_file(file.path)
        return io.BytesIO(whole)
    except Exception as error:  # each file system has errors of its own
        raise _unreadable(file.name, error) from error


def _require_regular(path: str) -> None:
    """Refuse a pipe or a device, which would be waited for, and may never end; and more than a batch may have."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("something that is not a file")
    if about.st_size > MOST_BYTES:
        raise ValueError(f"{about.st_size} bytes, where at most {MOST_BYTES} may be")


def _unreadable(name: str, error: Exception) -> CalibrationError:
    return CalibrationError(name, found=_said(error), expected="a file or folder that can be read")


def _said(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return " ".join(shown(word) for word in first.split())[:160] or type(error).__name__
