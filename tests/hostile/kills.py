"""Exports that are killed while they write: a process of its own, which forks one child for each kill and prints what was left.

    python -m tests.hostile.kills FOLDER steps|random SEED [no-exchange]

A child writes a bundle over another one and is killed by SIGKILL: before its Nth look at the file system, or after a random
time. Behind each kill stands what lies at the place now, and after the next run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from exporter import bundle, staged
from tests.exporter import test_bundle as made

KILLS = 100
EVENTS = ("open", "os.", "shutil.", "ctypes.call_function")


def write(folder: Path, seed: int) -> None:
    bundle.write(folder / "b", made.ABOUT, [made.probe(seed)], made.FILES)


def child(act: Callable[[], None]) -> int:
    number = os.fork()
    if number == 0:
        act()
        os._exit(0)
    return number


def at_step(folder: Path, step: int) -> bool:
    """Whether a write was killed before its Nth look at the file system; it had fewer else."""

    def act() -> None:
        left = step

        def watch(event: str, arguments: object) -> None:
            nonlocal left
            if event.startswith(EVENTS):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        write(folder, 1)

    return os.waitstatus_to_exitcode(os.waitpid(child(act), 0)[1]) == -signal.SIGKILL


def after(folder: Path, seconds: float) -> bool:
    number = child(lambda: write(folder, 1))
    time.sleep(seconds)
    os.kill(number, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGKILL


def told(folder: Path, whole: dict[str, dict[str, bytes]]) -> dict[str, object]:
    """What is at the place, and beside it, before and after the next run has looked at it."""

    def found() -> str:
        if not (folder / "b").exists():
            return "nothing"
        return next((name for name, files in whole.items() if files == made.contents(folder / "b")), "half")

    before = found()
    bundle.require_place(folder / "b")
    return {"killed": before, "next": found(), "beside": sorted(each.name for each in folder.iterdir())}


def main(folder: Path, how: str, seed: int, exchange: bool) -> None:
    if not exchange:
        staged.exchange = lambda one, other: False
    whole = {}
    for name, number in (("new", 1), ("old", 0)):
        write(folder, number)
        whole[name] = made.contents(folder / "b")
    start = time.perf_counter()
    write(folder / "timed", 1)
    took, rng, results, step = time.perf_counter() - start, random.Random(seed), [], 1
    shutil.rmtree(folder / "timed")
    while len(results) < KILLS or how == "steps":
        killed = at_step(folder, step) if how == "steps" else after(folder, rng.uniform(0, 1.2 * took))
        if not killed and how == "steps":
            break
        results.append(told(folder, whole))
        step += 1
        if (how == "steps" and results[-1]["next"] == "new") or how != "steps":
            write(folder, 0)
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), len(sys.argv) < 5)
