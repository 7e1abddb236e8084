"""Where results are to be written: refused before the work, and not after it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from runtime.errors import PacklightError

FULL = (errno.ENOSPC, errno.EDQUOT)


def require_writable(path: str | os.PathLike[str], what: str) -> Path:
    """A path at which something new can be made, folders above it included.

    Args:
        path: of a file or folder that need not be there yet.
        what: the option's name, for the message.

    Raises:
        PacklightError: no path, an empty one, one below a file, in a folder that may not be written, or without a parent.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise PacklightError(what, found=repr(path), expected="a path", do="name where to write")
    place = Path(os.path.abspath(path))
    try:
        os.lstat(place)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL; a folder that may not be entered
        found = said(error) if isinstance(error, OSError) else str(error)
        raise PacklightError(f"{what} {str(path)[:80]}", found=found, expected="a path that can be made") from error
    above = next((each for each in place.parents if os.path.lexists(each)), place)
    if not above.is_dir():
        raise PacklightError(f"{what} {path}", found=f"{above} is not a folder", expected="a folder to write into")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PacklightError(
            f"{what} {path}", found=f"no permission to write in {above}", expected="a folder that you may write"
        )
    return place


def require_file(path: Path, what: str) -> Path:
    """The same for a file, which may be there and is then replaced.

    Raises:
        PacklightError: see `require_writable`; or a folder is there, or a file that may not be written.
    """
    require_writable(path, what)
    if path.is_dir():
        raise PacklightError(f"{what} {path}", found="a folder", expected="a file's name")
    if path.exists() and not os.access(path, os.W_OK):
        raise PacklightError(
            f"{what} {path}", found="a file that may not be written", expected="one that you may write"
        )
    return path


def write(path: Path, text: str, what: str) -> None:
    """Write a text file and the folders above it.

    Raises:
        PacklightError: the disk is full, or whatever else stops it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PacklightError(f"{what} {path}", found=said(error), do=remedy(error)) from error


def said(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def remedy(error: OSError, place: str = "place") -> str:
    """What to do about a path that could not be written."""
    return f"{'free some space, or ' if error.errno in FULL else ''}choose another {place}"
