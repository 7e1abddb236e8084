"""A command in a process of its own, with limits of time and memory: for a bundle whose graph may compute for ever.

What a manifest says can be held against rules; what a graph computes cannot. A loop of 2**62 turns, or a tensor of a terabyte,
is found out by running it, in a process that ends.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import PacklightError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SAID = 1 << 24  # bytes of what the process writes that are kept; a verdict has some kB
DIED = "the process died by signal {}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a process ended, and what it said."""

    status: int
    out: str
    err: str


def run(arguments: Sequence[str], seconds: float | None, most_bytes: int | None) -> Ended:
    """Run `packlight ARGUMENTS` in a process of its own; its status is that of the command, 0 to 2.

    Args:
        arguments: of the command line.
        seconds: after which it is killed, with all that it started.
        most_bytes: of memory that it may write to, as Linux counts it (RLIMIT_DATA); numpy and ONNX Runtime take 100 MB of it.

    Raises:
        PacklightError: it took longer, or died; or this system has no such limit.
    """
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # -P: a file of the current folder must not be taken for a module of ours
    command = [sys.executable, "-P", "-m", "runtime.limited", str(most_bytes or 0), *arguments]
    path = os.pathsep.join([here, *(each for each in sys.path if each)])
    if most_bytes is not None and not sys.platform.startswith("linux"):
        raise PacklightError("--max-memory", found=sys.platform, expected="Linux, which holds a process to it")
    process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
        command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise PacklightError(
            "the check was ended", found=f"no verdict in {seconds:g} s", expected="one within --timeout",
            do="do not use the bundle, or give it more time",
        ) from error  # fmt: skip
    finally:
        _end(process)
    said, told = (each[:SAID].decode("utf-8", "replace") for each in (out, err))
    if process.returncode not in (0, 1, 2):
        limit = f"; at most {most_bytes} bytes of memory were allowed" if most_bytes is not None else ""
        raise PacklightError(
            "the check was ended", found=DIED.format(-process.returncode) + limit, expected="a verdict",
            do="do not use the bundle, or give it more memory",
        )  # fmt: skip
    return Ended(status=process.returncode, out=said, err=told)


def size(text: str, flag: str) -> int:
    """2GB -> 2000000000, 512MiB -> 536870912; a bare number is bytes.

    Raises:
        PacklightError: no size above 0.
    """
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", text.strip())
    value = int(float(found[1]) * UNITS.get(found[2].upper(), 0)) if found else 0
    if value < 1:
        raise PacklightError(
            flag, found=repr(text[:40]), expected="a number above 0 with B, KB, MB, GB, KiB, MiB or GiB"
        )
    return value


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process and of those that it started."""
    try:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except OSError:
        pass  # all of them have ended
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
