"""How much memory a bundle takes: what opening its model and running the probe once adds to a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from runtime.bundle import Bundle
from runtime.errors import PacklightError

SECONDS = 600  # a model that takes longer to open and run once is stuck


def peak_bytes(bundle: Bundle) -> int:
    """Largest resident set while the model is opened and run, less the one before, in bytes; one thread, one batch.

    Raises:
        PacklightError: the process could not tell; Windows has no such count.
    """
    here = Path(__file__).resolve()
    # by path, not -c or -m: a file of the current folder must not be taken for a module of ours
    command = [sys.executable, "-W", "ignore", str(here.with_name("peak.py")), str(bundle.path.resolve()), bundle.form]
    path = os.pathsep.join([str(here.parents[1]), *(each for each in sys.path if each)])
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and file
            command, env=os.environ | {"PYTHONPATH": path}, cwd=here.parent, capture_output=True, text=True,
            check=False, timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise _unknown(bundle, f"no answer in {SECONDS} s") from error
    if done.returncode:
        raise _unknown(bundle, (done.stderr.strip().splitlines() or [""])[-1][:200])
    return int(done.stdout)


def _unknown(bundle: Bundle, found: str) -> PacklightError:
    return PacklightError(
        f"{bundle.path}: peak memory, for max_ram_bytes",
        found=found,
        expected="a process that tells its peak",
        do="check on Linux or macOS, or export without --max-ram",
    )
