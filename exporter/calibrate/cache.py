"""Statistics on disk, found by what they depend on; `memory` says when they are written and read.

    key of a run   = SHA-256(layout of this file, packlight, ONNX Runtime, numpy, the CPU as ONNX Runtime sees it,
                             the recipe's [calibrate], what is asked for, the bytes of the graph)
    key of a chunk = SHA-256(key of the run, number of its first batch, digest of each of its batches)

So a file can only be found by the same model, recipe and data, with the same libraries, on the same kind of CPU:
what comes from disk is, bit for bit, what running the model would give. Versions and CPU are in the key because another
one may sum floats in another order, and the last bits of a range would then depend on which run was interrupted.

A file is `MAGIC`, the SHA-256 of all that follows it, the number of chunks, their keys, the statistics of all of them. It has the
first one's key as its name, and is written under another one and renamed. Files stay when an export has finished, for the next
export of the same model most often differs in its budget or its held-out data alone; when all of them take more than LIMIT_BYTES
the ones that were used longest ago go.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from exporter import graph
from exporter.batches import Batch, digest
from exporter.calibrate import statistics
from exporter.calibrate.statistics import Statistics
from runtime import cpu

Note = Callable[[str], None]

MAGIC = b"packlight statistics 2\n"
SUFFIX = ".statistics"
DIGEST_BYTES = 32
COUNT_BYTES = 4
LIMIT_BYTES = 1 << 30
LEFT_BEHIND_SECONDS = 3600  # a temporary file this old is one of a process that was killed
MAKERS = ("observe.py", "statistics.py", "histogram.py")  # of statistics
VARIABLE = "PACKLIGHT_CACHE"
OFF = "off"


def place(environment: Mapping[str, str] = os.environ, system: str = sys.platform) -> Path | None:
    """The folder of the cache: PACKLIGHT_CACHE, else the user's cache folder of this system; None where it is "off"."""
    given = environment.get(VARIABLE, "")
    if given:
        return None if given == OFF else Path(given) / "calibration"
    if system == "darwin":
        user = Path.home() / "Library" / "Caches"
    elif system == "win32":
        user = Path(environment.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        xdg = environment.get("XDG_CACHE_HOME", "")  # its rule: a path that is not absolute is as good as none
        user = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return user / "packlight" / "calibration"


def versions() -> dict[str, str]:
    """Of the libraries that compute statistics."""
    return {"packlight": metadata.version("packlight"), "onnxruntime": ort.__version__, "numpy": np.__version__}


def kind_of_cpu() -> str:
    """What decides which float kernels run here: system, machine, and the extensions that ONNX Runtime asks for."""
    return " ".join([sys.platform, cpu.machine(), *cpu.flags()])


def run_key(
    model: ir.Model,
    tensors: Sequence[str],
    channels: Sequence[tuple[str, int]],
    histograms: bool,
    table: Mapping[str, Any],
    cpus: Sequence[str] = (),
) -> bytes:
    """What the statistics of a batch depend on, besides the batch.

    Args:
        model: the prepared graph.
        tensors, channels, histograms: as for `observe`.
        table: the recipe's [calibrate], as JSON has it (`recipe.calibrate.model_dump(mode="json")`).
        cpus: kinds of the CPUs that compute; this one if none is given.
    """
    asked = {
        "layout": MAGIC.decode(),
        "versions": versions(),
        "code": code(Path(__file__).with_name(name) for name in MAKERS).hex(),
        "cpus": sorted(cpus) or [kind_of_cpu()],
        "calibrate": dict(table),
        "tensors": list(tensors),
        "channels": [list(key) for key in channels],
        "histograms": histograms,
    }
    return digest_of(json.dumps(asked, sort_keys=True, allow_nan=False).encode(), graph.to_bytes(model))


def chunk_key(run: bytes, batches: Sequence[Batch], start: int) -> str:
    """The name of the statistics of these batches, of which the first has the number `start`."""
    return digest_of(run, str(start).encode(), *(digest(batch).encode() for batch in batches)).hex()


def read(folder: Path, key: str, note: Note) -> tuple[tuple[str, ...], Statistics] | None:
    """What there is of the chunk with this key and those that follow it: (keys of all, their merged statistics).

    None where there is nothing, or the file is not what was written, of which `note` hears.
    """
    path = folder / (key + SUFFIX)
    try:
        content = path.read_bytes()
        head, check, body = content[: len(MAGIC)], len(MAGIC), len(MAGIC) + DIGEST_BYTES
        if head != MAGIC:
            raise ValueError("not statistics of this version of packlight")
        if hashlib.sha256(content[body:]).digest() != content[check:body]:
            raise ValueError("truncated, or changed on disk")
        names = body + COUNT_BYTES
        behind = names + DIGEST_BYTES * int.from_bytes(content[body:names], "big")
        keys = tuple(content[at : at + DIGEST_BYTES].hex() for at in range(names, behind, DIGEST_BYTES))
        if key not in keys[:1]:
            raise ValueError("the statistics of other data")
        found = statistics.from_bytes(content[behind:])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # what is there may be anything; the model runs again then, and the file is replaced
        note(f"calibration cache: {path} is ignored: {str(error) or type(error).__name__}")
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used now: evicted last
    return keys, found


def write(folder: Path, keys: Sequence[str], made: Statistics) -> int:
    """Keep the statistics of neighbouring chunks: written under another name, then renamed. Returns the file's size in bytes.

    Raises:
        OSError: the disk is full, or not ours to write to.
    """
    body = len(keys).to_bytes(COUNT_BYTES, "big") + bytes.fromhex("".join(keys)) + statistics.to_bytes(made)
    put(folder / (keys[0] + SUFFIX), MAGIC + hashlib.sha256(body).digest() + body)
    return len(MAGIC) + DIGEST_BYTES + len(body)


def put(path: Path, content: bytes) -> None:
    """Write a file of the cache under another name, and rename it: at no time is there half of it.

    Raises:
        OSError: the disk is full, or not ours to write to.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is kept tells something about the data
    handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:  # Ctrl-C too
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def evict(folder: Path, limit_bytes: int = LIMIT_BYTES, suffix: str = SUFFIX) -> None:
    """Remove what was used longest ago until `limit_bytes` are left, and what killed processes left behind.

    Of the files with that suffix. Another process may do the same at the same time: a file that is gone already is fine.
    """
    kept: list[tuple[float, int, Path]] = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                stat = path.stat()
                if path.suffix == suffix:
                    kept.append((stat.st_mtime, stat.st_size, path))
                elif path.suffix == ".tmp" and time.time() - stat.st_mtime > LEFT_BEHIND_SECONDS:
                    path.unlink()
    total = sum(size for _, size, _ in kept)
    for _, size, path in sorted(kept):
        if total <= limit_bytes:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size


def remove(folder: Path, keys: Iterable[str]) -> None:
    """Remove the files of chunks that another file holds now."""
    for key in keys:
        with contextlib.suppress(OSError):
            (folder / (key + SUFFIX)).unlink()


def code(files: Iterable[Path]) -> bytes:
    """Of the modules that make what is kept: while packlight is being changed, its version is not."""
    return digest_of(*(file.read_bytes() for file in files))


def digest_of(*parts: bytes) -> bytes:
    """SHA-256 over parts and their lengths: other parts, or cut otherwise, are another hash."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "big"))
        sha.update(part)
    return sha.digest()
