"""Nothing lost: a run takes from disk what it knows, and puts there what it learns, folded as it goes.

    chunks that ran    0      0 1      0 1 2        0 1 2 3      ...
    files              [0]    [0 1]    [0 1] [2]    [0 1 2 3]         2^k chunks each, as `fold` merges them

A file is of at most MOST chunks and MOST_BYTES of batches, so that a run leaves one for so many, and log2(MOST) more. It has the
name of its first chunk and knows the keys of all. Whether the data still are what it was made of shows when the last of its
batches has been read, and data are read once: until then they wait in memory, to be run if one of them differs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporter.batches import Batch
from exporter.calibrate import cache, statistics
from exporter.calibrate.cache import Note
from exporter.calibrate.fold import cut
from exporter.calibrate.observe import CHUNK, ObserveChunk, whole
from exporter.calibrate.statistics import Statistics

MOST = 64  # chunks, a power of two: where data have changed, so many may have to run again
MOST_BYTES = 128 << 20
LOOK_EVERY_BYTES = cache.LIMIT_BYTES // 16  # how much may be written before the folder's size is looked at again


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Batches that are looked at together, the number of the first, and their key, empty where nothing is kept."""

    batches: Sequence[Batch]
    start: int
    key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What 2^k neighbouring chunks showed, the first a multiple of 2^k; size_bytes: of their batches; stored: on disk as it is."""

    keys: tuple[str, ...]
    size_bytes: int
    found: Statistics
    stored: bool

    @property
    def full(self) -> bool:
        """Whether no batch is missing in the last chunk. More data would be another chunk, and what holds it another file."""
        return self.found.batches == len(self.keys) * CHUNK

    @property
    def grows(self) -> bool:
        """Whether it is the left half of a part that a file may hold."""
        chunks = 2 * len(self.keys)
        left = self.found.first // CHUNK % chunks == 0
        return left and self.full and chunks <= MOST and 2 * self.size_bytes <= MOST_BYTES


def part(chunks: Sequence[Chunk], found: Statistics) -> Part:
    """What chunks showed that have run."""
    return Part(keys=tuple(chunk.key for chunk in chunks), size_bytes=_size(chunks), found=found, stored=False)


def cut_chunks(batches: Iterable[Batch], start: int = 0) -> Iterator[Chunk]:
    """Batches in chunks without keys; `start` is the number of the first."""
    return (Chunk(batches=chunk, start=start + at) for at, chunk in cut(batches, CHUNK))


class Memory:
    """What is on disk of one run.

    taken: batches whose statistics came from there. kept: batches whose statistics are there now; a run that is interrupted loses
    the others.

    Args:
        run: `cache.run_key`.
        folder: where statistics are: `cache.place()`; None keeps nothing.
        note: told of files that are ignored, and of a disk that is full.
    """

    def __init__(self, run: bytes, folder: Path | None, note: Note = lambda text: None) -> None:
        self.taken = self.kept = 0
        self._run, self._folder, self._note = run, folder, note
        self._written = 0
        if folder is not None:
            cache.evict(folder)

    def gather(self, look: ObserveChunk, batches: Iterable[Batch]) -> Statistics:
        """`calibrate.gather` that runs only what is not on disk. What has been asked of `batches` is kept, up to its last chunk."""
        seen = self.known(batches)
        parts = (each if isinstance(each, Part) else part([each], look(each.batches, each.start)) for each in seen)
        return whole(self.keep(parts))

    def known(self, batches: Iterable[Batch]) -> Iterator[Part | Chunk]:
        """The batches in order: what is known of them, or a chunk that has to run."""
        folder = self._folder
        if folder is None:
            yield from cut_chunks(batches)
            return
        chunks = (
            Chunk(batches=chunk, start=start, key=cache.chunk_key(self._run, chunk, start))
            for start, chunk in cut(batches, CHUNK)
        )
        held: deque[Chunk] = deque()
        while _reaches(held, 1, chunks):
            stored = cache.read(folder, held[0].key, self._note)
            if stored is not None:
                keys, found = stored
                self.kept += found.batches  # they are, should the reading be interrupted
                if _are(held, keys, chunks):
                    self.taken += found.batches
                    size = _size([held.popleft() for _ in keys])
                    yield Part(keys=keys, size_bytes=size, found=found, stored=True)
                    continue
                self.kept -= found.batches
            yield held.popleft()

    def keep(self, parts: Iterable[Part]) -> Iterator[Statistics]:
        """Write each part as soon as it is there, merged with those before it. The statistics of what is not merged any further."""
        waiting: list[Part] = []  # sizes are falling powers of two
        for new in parts:
            merged, halves = new, []
            while waiting and _fit(waiting[-1], merged):
                halves.append(merged.keys[0])
                merged = _merged(waiting.pop(), merged)
            if not merged.stored and self._write(merged, halves) and not new.stored:
                self.kept += new.found.batches
            waiting.append(merged)
            if not merged.grows:
                yield from (each.found for each in waiting)
                waiting.clear()
        yield from (each.found for each in waiting)

    def _write(self, made: Part, halves: Iterable[str]) -> bool:
        """Whether it is on disk now. A disk that is full ends the cache, and not the calibration."""
        if self._folder is None:
            return False
        try:
            self._written += cache.write(self._folder, made.keys, made.found)
        except OSError as error:
            self._note(
                f"calibration cache: {self._folder}: {error.strerror or error}; nothing more is kept of this run"
            )
            self._folder = None
            return False
        cache.remove(self._folder, halves)
        if self._written > LOOK_EVERY_BYTES:
            cache.evict(self._folder)
            self._written = 0
        return True

    def interrupted(self) -> str:
        """What to tell someone who pressed Ctrl-C."""
        if self._folder is None and not self.kept:
            return "interrupted; the calibration cache is off, so no batch is kept"
        return f"interrupted; {self.kept} batches are kept, run again to go on"


def _reaches(held: deque[Chunk], count: int, chunks: Iterator[Chunk]) -> bool:
    """Whether `count` chunks are held, after another one was read if need be."""
    if len(held) < count and (chunk := next(chunks, None)) is not None:
        held.append(chunk)
    return len(held) >= count


def _are(held: deque[Chunk], keys: Sequence[str], chunks: Iterator[Chunk]) -> bool:
    """Whether the chunks that are held, and those that follow, have these keys. Reads up to the first that has not."""
    return all(_reaches(held, number, chunks) and held[number - 1].key == key for number, key in enumerate(keys, 1))


def _fit(left: Part, right: Part) -> bool:
    """Whether neighbours, the left of which grows, are the halves of a part that a file may hold."""
    return len(left.keys) == len(right.keys) and right.full and left.size_bytes + right.size_bytes <= MOST_BYTES


def _merged(left: Part, right: Part) -> Part:
    return Part(
        keys=left.keys + right.keys,
        size_bytes=left.size_bytes + right.size_bytes,
        found=statistics.merge(left.found, right.found),
        stored=False,
    )


def _size(chunks: Iterable[Chunk]) -> int:
    return sum(array.nbytes for chunk in chunks for batch in chunk.batches for array in batch.values())
