"""Calibration and held-out batches, which do not meet."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from exporter import axes
from exporter.batches import RANDOM, Array, Batch, digest, peek, read
from exporter.errors import CalibrationError
from runtime.manifest import Tensor

LOOKED = 32  # batches, for one with values in every input
BLANK = 64  # elements of an input that are all one number: no picture, no sound


class Split:
    """Calibration and held-out batches that do not meet.

    A held-out batch whose bytes calibration has seen is left out and counted in `repeated`; if that leaves none, they are
    used after all and `overlapping` says so, for then drift is optimistic. Without held-out data every fourth
    calibration batch is kept apart for it, MOST_APART at most. Streams are read once: the first batch of each here, so
    that a mistake is found before the long work, then the rest of calibration, then the rest of the held-out data.

    first: the first calibration batch with values in every input, as far as there is one among LOOKED. kept: batches like it.

    Args:
        calibration, heldout: see `batches.read`.
        tensors, optional: the graph's inputs without and with a default; `given` are those of the latter that the first
            batches have.
        loose: equal names of dimensions are equal sizes only where the data agree (`tensors`): a file's names.
        filled: batches that are empty in an input in which the first is not are left out.

    Raises:
        CalibrationError: no calibration data, nothing to measure drift on, or the first batch of either is not one for
            this graph; see `batches.read`.
    """

    EVERY = 4
    KEPT = 8  # calibration batches kept in memory at least, for choosing between corrections and ranges
    KEPT_MOST, KEPT_BYTES = 64, 48 << 20  # more of them as long as they are small
    MOST_APART = 64  # batches kept in memory and apart, for want of held-out data
    MOST_REPEATED = 32  # repeated batches kept in memory, should there be no others

    def __init__(
        self,
        calibration: Any,
        heldout: Any,
        tensors: Sequence[Tensor],
        optional: Sequence[Tensor] = (),
        loose: bool = False,
        filled: bool = False,
    ) -> None:
        self.random = any(isinstance(given, str) and given == RANDOM for given in (calibration, heldout))
        # a stream of files knows how many there are, not how many it will skip; a generator knows nothing
        self.total, self.total_heldout = _length(calibration), _length(heldout)
        if heldout is None and self.total is not None:
            self.total_heldout = min(self.total // self.EVERY, self.MOST_APART)
            self.total -= self.total_heldout
        self._left_out: dict[str, int] = {}
        held = axes.nameless(tensors) if loose else tensors
        stream = read(calibration, held, "calibration", self._left_out, optional)
        self.first, self._stream = _with_values(*peek(stream, "calibration", calibration))
        self._heldout: Iterator[Batch] | None = None
        firsts = [self.first]
        if heldout is not None:
            stream = read(heldout, held, "heldout", self._left_out, optional)
            first, self._heldout = peek(stream, "heldout", heldout)
            firsts.append(first)
        self.tensors = axes.agreeing(tensors, firsts) if loose else tuple(tensors)
        self.given = {tensor.name for tensor in optional if any(tensor.name in first for first in firsts)}
        self._defaults: Batch = {}
        self._kept_names: set[str] | None = None
        if loose:
            self._stream = _of_one_size(self._stream, self.tensors, "calibration")
            self._heldout = self._heldout and _of_one_size(self._heldout, self.tensors, "heldout")
        if filled:
            self._stream = self._with_values_only(self._stream)
            self._heldout = self._heldout and self._with_values_only(self._heldout)
        if heldout is None:
            self._stream = _enough(self._stream, self.EVERY)
        self.kept: list[Batch] = []
        self.repeated = 0
        self.overlapping = False
        self._apart: list[Batch] = []
        self._seen: set[str] = set()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was in batches and went to no input."""
        return tuple(f"left out of batches: {what} ({count} of them)" for what, count in sorted(self._left_out.items()))

    @property
    def alike(self) -> str:
        """Why drift says nothing: nothing varies in what was calibrated, nor in held-out data, which are of the same; or empty."""
        if self._heldout is not None and not self.overlapping:
            return ""
        if len(self.kept) > 1 and len(self._seen) == 1 and all(map(_of_one_row, self.kept[0].values())):
            return "every sample is the same"
        numbers = [array for batch in self.kept for array in batch.values()]
        if any(array.size >= BLANK for array in numbers) and all(map(_of_one_number, numbers)):
            return "every sample is one number"
        return ""

    def _with_values_only(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        for batch in stream:
            if _emptier(batch, self.first):
                why = "those without values, which recurrent layers cannot run"
                self._left_out[why] = self._left_out.get(why, 0) + 1
            else:
                yield batch

    def fill(self, defaults: Batch) -> None:
        """From now on batches have these inputs, and of those with a default no others: by `defaults`, where they have none."""
        self._defaults, self._kept_names = defaults, {*defaults, *(tensor.name for tensor in self.tensors)}
        self.first = self._filled(self.first)

    def _filled(self, batch: Batch) -> Batch:
        if self._kept_names is None:
            return batch
        return {name: value for name, value in {**batch, **self._defaults, **batch}.items() if name in self._kept_names}

    def calibration(self) -> Iterator[Batch]:
        for number, batch in enumerate(map(self._filled, self._stream)):
            apart = self._heldout is None and len(self._apart) < self.MOST_APART
            if apart and number % self.EVERY == self.EVERY - 1:
                self._apart.append(batch)
                continue
            self._seen.add(digest(batch))
            room = len(self.kept) < (self.KEPT_MOST if self._small(batch) else self.KEPT)
            if room and not _emptier(batch, self.first):  # nothing can be compared on nothing
                self.kept.append(batch)
            yield batch
        if not self.kept:
            self.kept.append(self.first)

    def _small(self, batch: Batch) -> bool:
        """Whether KEPT_MOST batches like this one would fit."""
        return sum(array.nbytes for array in batch.values()) * self.KEPT_MOST <= self.KEPT_BYTES

    def heldout(self) -> Iterator[Batch]:
        stream = iter(self._apart) if self._heldout is None else map(self._filled, self._heldout)
        repeated: list[Batch] = []
        self.overlapping = True
        for batch in stream:
            if digest(batch) in self._seen:
                self.repeated += 1
                repeated += [batch] * (len(repeated) < self.MOST_REPEATED)
            else:
                self.overlapping = False
                yield batch
        if self.overlapping:
            yield from repeated


def _of_one_row(array: Array) -> bool:
    return array.ndim == 0 or bool((array == array[:1]).all())


def _of_one_number(array: Array) -> bool:
    return bool((array == array.reshape(-1)[:1]).all())


def _with_values(first: Batch, stream: Iterator[Batch]) -> tuple[Batch, Iterator[Batch]]:
    """The first of LOOKED batches with values in every input, else the first; and the stream."""
    head: list[Batch] = []
    for batch in itertools.islice(stream, LOOKED):
        head.append(batch)
        if all(array.size for array in batch.values()):
            return batch, itertools.chain(head, stream)
    return first, itertools.chain(head, stream)


def _emptier(batch: Batch, other: Batch) -> bool:
    return any(other[name].size and not array.size for name, array in batch.items())


def _length(given: Any) -> int | None:
    """How many batches there are, where it is known; a path is no list of its letters."""
    return None if isinstance(given, str | Path) else operator.length_hint(given, 0) or None


def _enough(stream: Iterator[Batch], least: int) -> Iterator[Batch]:
    """The same stream, known to hold `least` batches."""
    head = list(itertools.islice(stream, least))
    if len(head) < least:
        raise CalibrationError(
            "heldout: no data, and too few calibration batches to keep one apart",
            found=str(len(head)),
            expected=f"at least {least}",
            do="give held-out batches of their own, or more calibration batches",
        )
    return itertools.chain(head, stream)


def _of_one_size(stream: Iterator[Batch], tensors: Sequence[Tensor], role: str) -> Iterator[Batch]:
    for number, batch in enumerate(stream):
        axes.check(batch, tensors, f"{role} batch {number}", number)
        yield batch
