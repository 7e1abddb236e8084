"""A folder that is written beside its place and put there at once: an interrupted or killed run leaves the old one or the new one.

The work lies in a hidden sibling, `.NAME.packlight-` and sixteen digits, which is locked while its process lives. One that
nobody holds any more was left by a process that was killed: the next run for the same place gives back what it holds of an old
folder, and removes it.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there, and nothing swept
    fcntl = None  # type: ignore[assignment]

NEW, OLD = "new", "old"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


@contextmanager
def folder(out: Path) -> Iterator[Path]:
    """A new folder of the user's permissions, to be filled and then moved to `out`; gone at the end whatever happens."""
    sibling, lock = _locked(out)
    try:
        made = sibling / NEW
        made.mkdir()
        yield made
    finally:
        shutil.rmtree(sibling, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def move(made: Path, out: Path) -> None:
    """Put a folder that `folder` gave in the place of `out`.

    On Linux both change places in one step. Elsewhere the old one is moved aside first, comes back whatever stops that, and
    after a kill is given back by `sweep`.
    """
    if not out.exists():
        made.rename(out)
        return
    if exchange(made, out):
        return
    old = made.with_name(OLD)
    try:
        out.rename(old)
        made.rename(out)
    except BaseException:  # Ctrl-C too
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places at once; whether this system can."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    return int(rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)) == 0


def sweep(out: Path) -> None:
    """Clear away what killed runs for `out` have left; an old folder that is nowhere else is given back."""
    if fcntl is None or not out.parent.is_dir():
        return
    pattern = re.compile(rf"\.{re.escape(out.name)}\.packlight-[0-9a-f]{{16}}")
    for sibling in sorted(out.parent.iterdir()):
        if not pattern.fullmatch(sibling.name) or sibling.is_symlink() or not sibling.is_dir():
            continue
        try:
            lock = os.open(sibling, os.O_RDONLY)
        except OSError:  # another's, or gone by now
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for old in (sibling / OLD, sibling / NEW / OLD):
                if old.is_dir() and not os.path.lexists(out):
                    old.rename(out)
            shutil.rmtree(sibling, ignore_errors=True)
        except OSError:  # its process lives, or it is not ours to change
            pass
        finally:
            os.close(lock)


def _locked(out: Path) -> tuple[Path, int | None]:
    """A new hidden sibling of `out`, locked before anybody could sweep it."""
    while True:
        sibling = out.with_name(f".{out.name}.packlight-{secrets.token_hex(8)}")
        sibling.mkdir(mode=0o700)
        if fcntl is None:
            return sibling, None
        lock = os.open(sibling, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if sibling.exists():  # else somebody swept it before it was locked
            return sibling, lock
        os.close(lock)
