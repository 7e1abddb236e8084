"""What every device needs: the guest as a value, a tool or the line that installs it, a folder that is built once."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = "PACKLIGHT_REQUIRE_DEVICES"  # "1": what is missing fails, as in CI


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A Python that behaves as it would on another CPU: `[*command, "-c", source]` run in `environment`."""

    command: tuple[str, ...]
    environment: Mapping[str, str]


def require(tool: str, install: str) -> str:
    """The path of a tool; without it the test is skipped, or fails where PACKLIGHT_REQUIRE_DEVICES is 1."""
    return shutil.which(tool) or missing(f"no {tool}: {install}")


def missing(message: str) -> NoReturn:
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def environment(added: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what would steer another Python, and with what is added."""
    steering = ("PYTHONPATH", "PYTHONHOME", "LD_PRELOAD", "LD_LIBRARY_PATH")
    kept = {name: value for name, value in os.environ.items() if name not in steering}
    return {**kept, "ORT_DISABLE_TELEMETRY": "1", "PYTHONDONTWRITEBYTECODE": "1", **added}


def built(name: str, made_from: tuple[bytes | str, ...], build: Callable[[Path], None]) -> Path:
    """The folder that `build` fills, in the user's cache: built once for what it is made from, whole or not at all.

    Two processes that build at once both build, and the first to end wins.
    """
    digest = hashlib.sha256()
    for part in made_from:
        data = part.encode() if isinstance(part, str) else part
        digest.update(hashlib.sha256(data).digest())
    kept = cache() / f"{name}-{digest.hexdigest()[:16]}"
    if kept.is_dir():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=kept.parent) as folder:
        made = Path(folder) / "made"
        made.mkdir()
        build(made)
        try:
            made.rename(kept)
        except OSError:  # another process was first
            assert kept.is_dir()
    return kept


def cache() -> Path:
    """PACKLIGHT_DEVICES_CACHE, or packlight-devices in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PACKLIGHT_DEVICES_CACHE") or Path(home) / "packlight-devices")
