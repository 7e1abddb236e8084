"""Nothing lost: what a search learns of each plan is on disk as soon as it is known, and a search of the same takes it from there.

    key = SHA-256(layout of this file, code of the search, packlight, ONNX Runtime, numpy, the CPU as ONNX Runtime sees it,
                  target, rules, limits on drift, means, digest of each batch, bytes of the prepared graph, and of those of
                  the static plan)

So a search that was interrupted goes on where it was, and finds the plan that it would have found. Errors are kept and no ms: those
are in the costs. A metric of the caller's own is not kept, for nobody knows what it depends on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from exporter.calibrate import cache

FORMAT = 1
FOLDER, SUFFIX = "search", ".json"  # beside calibration's, in the same cache
LIMIT_BYTES = 64 << 20
# What decides how a plan is built and compared
CODE = (".", "..", "../numerics")  # every module of these folders


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a plan showed: SNR of the worst output, whether each limit on drift is met, and what it took to see that, elapsed."""

    snr_db: float
    met: bool
    seconds: float


def key(parts: Iterable[bytes]) -> str:
    """The name of a search: of what its evaluations depend on, besides the code, the libraries and the CPU."""
    here = Path(__file__).parent
    versions = json.dumps([FORMAT, cache.versions(), cache.kind_of_cpu()], sort_keys=True).encode()
    return cache.digest_of(
        versions, cache.code(path for folder in CODE for path in sorted((here / folder).glob("*.py"))), *parts
    ).hex()


class Memory:
    """The evaluations of one search: {`costs.name_of` a plan: what it showed}.

    Args:
        path: where they are kept; None keeps nothing beyond this process.
        note: told of a file that is ignored, and of a disk that is full.
    """

    def __init__(self, path: Path | None = None, note: Callable[[str], None] = lambda text: None) -> None:
        self._path, self._note = path, note
        self._known = {} if path is None else _read(path, note)

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def get(self, name: str) -> Evaluation | None:
        return self._known.get(name)

    def keep(self, name: str, found: Evaluation) -> None:
        """Remember it, on disk too. A disk that is full ends the memory, and not the search."""
        self._known[name] = found
        if self._path is None:
            return
        plans = {name: [each.snr_db, each.met, each.seconds] for name, each in self._known.items()}
        text = json.dumps({"format": FORMAT, "key": self._path.stem, "plans": plans})
        try:
            cache.put(self._path, text.encode())
        except OSError as error:
            self._note(f"search: {self._path}: {error.strerror or error}; nothing more is kept of it")
            self._path = None

    def mean_seconds(self) -> float:
        """Of an evaluation that built a plan of its own; the first is of the static plan, which was there."""
        seconds = [each.seconds for each in self._known.values()]
        return math.fsum(seconds[1:] or seconds) / max(1, len(seconds) - 1)

    def interrupted(self) -> str:
        """What to tell someone who pressed Ctrl-C."""
        if self._path is None:
            return "interrupted; no evaluation of the search is kept"
        return f"interrupted; {len(self._known)} evaluations of the search are kept, run again to go on"


def at(folder: Path | None, parts: Iterable[bytes], note: Callable[[str], None]) -> Memory:
    """The memory of a search in the folder of the cache; of this process alone where the cache is off."""
    if folder is None:
        return Memory()
    cache.evict(folder / FOLDER, LIMIT_BYTES, SUFFIX)
    return Memory(folder / FOLDER / (key(parts) + SUFFIX), note)


def _read(path: Path, note: Callable[[str], None]) -> dict[str, Evaluation]:
    """What is known; nothing where the file is not what was written, of which `note` hears."""
    try:
        given = json.loads(path.read_bytes())
        if (given["format"], given["key"]) != (FORMAT, path.stem):
            raise ValueError("the evaluations of another search")
        found = {
            name: Evaluation(snr_db=float(snr_db), met=bool(met), seconds=float(seconds))
            for name, (snr_db, met, seconds) in given["plans"].items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (
        Exception
    ) as error:  # what is there may be anything; the plans are evaluated again then, and the file is replaced
        note(f"search: {path} is ignored: {str(error) or type(error).__name__}")
        return {}
    with contextlib.suppress(OSError):
        os.utime(path)  # used now: evicted last
    return found
