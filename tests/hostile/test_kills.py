"""Kills while a bundle is written: the old one or the new one, whole, and nothing left beside it after the next run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from exporter import staged
from runtime.manifest import INT8
from tests.exporter import test_bundle as made
from tests.runtime import models

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def kills(folder: Path, *how: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.hostile.kills", str(folder), *how]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=500)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: list[dict[str, Any]] = json.loads(ran.stdout)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="folders change places at once on Linux")
def test_kill_at_any_step_leaves_the_old_bundle_or_the_new_one_and_nothing_else(tmp_path: Path) -> None:
    found = kills(tmp_path, "steps", "0")
    assert len(found) > 40
    assert {each["killed"] for each in found} == {"old", "new"}
    assert all(each["next"] == each["killed"] and each["beside"] == ["b"] for each in found), Counter(map(str, found))


def test_kill_between_two_moves_is_mended_by_the_next_run(tmp_path: Path) -> None:
    found = kills(tmp_path, "steps", "0", "no-exchange")
    assert "nothing" in {each["killed"] for each in found}  # that one of the kills was between them
    assert {each["next"] for each in found} == {"old", "new"}
    assert all(each["beside"] == ["b"] for each in found)


@pytest.mark.slow
def test_hundred_random_kills_leave_the_old_bundle_or_the_new_one(tmp_path: Path) -> None:
    found = kills(tmp_path, "random", "16")
    assert len(found) == 100
    assert {each["killed"] for each in found} <= {"old", "new"}
    assert all(each["beside"] == ["b"] for each in found)


def test_sibling_of_a_living_process_and_what_is_not_ours_are_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "b"
    (tmp_path / ".b.packlight-notes").mkdir()
    (tmp_path / ".c.packlight-0123456789abcdef").mkdir()
    (tmp_path / ".b.packlight-0123456789abcdef").symlink_to(tmp_path)
    with staged.folder(out) as own:
        (own / "work").touch()
        staged.sweep(out)
        assert (own / "work").exists()
        assert len([*tmp_path.iterdir()]) == 4
    assert len([*tmp_path.iterdir()]) == 3


def test_folder_has_the_permissions_that_its_user_gives(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o755), (0o027, 0o750), (0o077, 0o700), (0o002, 0o775)):
        before = os.umask(mask)
        try:
            made.bundle.write(tmp_path / "b", made.ABOUT, [made.probe()], made.FILES)
        finally:
            os.umask(before)
        assert (tmp_path / "b").stat().st_mode & 0o777 == mode
        assert (tmp_path / "b" / INT8).stat().st_mode & 0o777 == mode & 0o666


STOPPED = """
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored, and so have its children
import packlight
timer = threading.Timer({seconds}, os.kill, (os.getpid(), signal.SIGINT))
timer.daemon = True
timer.start()
packlight.main()
"""


@pytest.mark.parametrize("seconds", [0.05, 0.15, 0.3, 0.6, 1.5])
def test_ctrl_c_is_130_and_one_line_whenever_it_comes(seconds: float, tmp_path: Path) -> None:
    folder = models.write_bundle(tmp_path / "b")
    command = [sys.executable, "-c", STOPPED.format(seconds=seconds), "bench", str(folder), "--rounds", "10000000"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=60)
    assert (ran.returncode, ran.stdout) == (130, "")
    assert ran.stderr == "error: interrupted: found Ctrl-C; run it again\n"
