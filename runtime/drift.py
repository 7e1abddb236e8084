"""Compare two streams of outputs: (reference, candidate) batches -> Drift. docs/drift.md says when each number misleads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.errors import PacklightError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
BLOCK = 1 << 20  # elements turned to float64 at a time: 8 MB an array, whatever the size of the outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDrift:
    """How far one output is from its reference, over all batches. SNR in dB; max_abs, mean_abs, rms in the output's own unit."""

    name: str
    snr_db: float
    cosine: float
    max_abs: float
    mean_abs: float
    rms: float
    same_top1: float | None
    elements: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """The drift of every output, in the reference's order."""

    outputs: tuple[OutputDrift, ...]
    batches: int

    @property
    def worst_snr_db(self) -> float:
        """The smallest SNR of all outputs, dB; inf when there is no output."""
        return min((output.snr_db for output in self.outputs), default=math.inf)


def measure(pairs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]]) -> Drift:
    """Drift of candidate outputs against their reference, accumulated over all batches in float64.

    With r the reference, c the candidate and e = r - c over all elements of all batches:

        snr_db    = 20 log10(‖r‖ / ‖e‖)         inf when e = 0; -inf when r = 0 and e != 0
        cosine    = r·c / (‖r‖ ‖c‖)             1 when e = 0; 0 when only one of r, c is 0
        max_abs   = max |e|, mean_abs = mean |e|, rms = sqrt(mean e²)
        same_top1 = share of rows with argmax r = argmax c; only for float outputs [rows, columns >= 2], else None

    Where both hold the same infinity or both NaN, the element agrees and counts as 0. Where only one is finite, snr_db is
    -inf, cosine 0, max_abs, mean_abs and rms inf: a candidate with NaN is as bad as can be, and never unmeasurable.

    Args:
        pairs: (reference, candidate) per batch, each {output: array} with the same names and shapes; any numeric or
            boolean dtype, any shape. The names of the first batch hold for all.

    Raises:
        PacklightError: no batch, or names or shapes that differ.

    Source: SNR as ONNX Runtime's qdq_loss_debug.compute_signal_to_quantization_noice_ratio computes it.
    """
    found = total(pairs)
    if not found.batches:
        raise PacklightError("drift of no batches", do="give at least one (reference, candidate) pair")
    return found.drift()


def total(pairs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]], start: int = 0) -> Totals:
    """What `measure` adds up, of some of the batches; `start` is the number of the first, for messages. May be empty."""
    sums: dict[str, _Sums] = {}
    batches = 0
    for batches, (reference, candidate) in enumerate(pairs, start=1):
        if batches == 1:
            sums = {name: _Sums() for name in reference}
        for side in (reference, candidate):
            if side.keys() != sums.keys():
                raise PacklightError(
                    f"batch {start + batches - 1}", found=_names(side), expected=f"outputs {_names(sums)}"
                )
        for name, one in sums.items():
            r, c = np.asarray(reference[name]), np.asarray(candidate[name])
            if r.shape != c.shape:
                where = f"batch {start + batches - 1}, output {name}"
                raise PacklightError(
                    where, found=f"shape {list(c.shape)}", expected=f"{list(r.shape)} of the reference"
                )
            with np.errstate(invalid="ignore", over="ignore"):  # inf is how a disagreement in kind is counted
                one.add(r, c)
    return Totals(sums=sums, batches=batches)


def merge(first: Totals, second: Totals) -> Totals:
    """The totals of both. Exact: shards of the batches, merged in any order, give the bits of one pass."""
    if not first.batches or not second.batches:
        return first if first.batches else second
    if first.sums.keys() != second.sums.keys():
        raise PacklightError("merge", found=_names(second.sums), expected=f"outputs {_names(first.sums)}")
    return Totals(
        sums={name: one.merged(second.sums[name]) for name, one in first.sums.items()},
        batches=first.batches + second.batches,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over some batches, of each output."""

    sums: Mapping[str, _Sums]
    batches: int

    def drift(self) -> Drift:
        return Drift(outputs=tuple(one.result(name) for name, one in self.sums.items()), batches=self.batches)


class _Exact:
    """A sum of float64 that is rounded once, when it is read, so that the order of what is added does not matter.

    Every finite float64 is a whole number of 2^-1074, the smallest one; Python's integers have no end.
    """

    UNIT = 1 << 1074

    def __init__(self, whole: int = 0, other: float = 0.0) -> None:
        self.whole, self.other = whole, other

    def add(self, term: float) -> None:
        if math.isfinite(term):
            above, below = term.as_integer_ratio()
            self.whole += above * (self.UNIT // below)
        else:
            self.other += term

    def merged(self, second: _Exact) -> _Exact:
        return _Exact(self.whole + second.whole, self.other + second.other)

    def value(self) -> float:
        if self.other != 0.0:  # inf or NaN
            return self.other
        try:
            return self.whole / self.UNIT
        except OverflowError:
            return math.inf if self.whole > 0 else -math.inf


class _Sums:
    """What one output needs to remember of the batches it has seen."""

    def __init__(self) -> None:
        self.rr, self.cc, self.rc, self.ee, self.abs_sum = _Exact(), _Exact(), _Exact(), _Exact(), _Exact()
        self.abs_max = 0.0
        self.elements = self.rows = self.same_rows = 0
        self.class_like = True

    def add(self, reference: Array, candidate: Array) -> None:
        for r, c in _blocks(reference, candidate):
            e = np.abs(r - c)
            # not r @ r: BLAS cuts a long product among threads, and the last bits depend on how many there are
            self.rr.add(float(np.square(r).sum()))
            self.cc.add(float(np.square(c).sum()))
            self.rc.add(float((r * c).sum()))
            self.ee.add(float(np.square(e).sum()))
            self.abs_sum.add(float(e.sum()))
            self.abs_max = max(self.abs_max, float(e.max()))
            self.elements += e.size
        self.class_like &= _class_like(reference)
        if self.class_like and reference.size:
            self.rows += reference.shape[0]
            self.same_rows += int((reference.argmax(axis=1) == candidate.argmax(axis=1)).sum())

    def merged(self, second: _Sums) -> _Sums:
        both = _Sums()
        for name in ("rr", "cc", "rc", "ee", "abs_sum"):
            setattr(both, name, getattr(self, name).merged(getattr(second, name)))
        both.abs_max = max(self.abs_max, second.abs_max)
        both.elements = self.elements + second.elements
        both.rows, both.same_rows = self.rows + second.rows, self.same_rows + second.same_rows
        both.class_like = self.class_like and second.class_like
        return both

    def result(self, name: str) -> OutputDrift:
        rr, cc, rc, ee = (total.value() for total in (self.rr, self.cc, self.rc, self.ee))
        return OutputDrift(
            name=name,
            snr_db=_snr_db(rr, ee),
            cosine=1.0 if ee == 0 else _cosine(rr, cc, rc),
            max_abs=self.abs_max,
            mean_abs=self.abs_sum.value() / self.elements if self.elements else 0.0,
            rms=math.sqrt(ee / self.elements) if self.elements else 0.0,
            same_top1=self.same_rows / self.rows if self.class_like and self.rows else None,
            elements=self.elements,
        )


def _blocks(reference: Array, candidate: Array) -> Iterator[tuple[Array, Array]]:
    """Both arrays as float64 vectors, block by block, with agreeing non-finite elements as 0 and disagreeing ones as inf, 0."""
    r_flat, c_flat = reference.reshape(-1), candidate.reshape(-1)
    for start in range(0, r_flat.size, BLOCK):
        r = r_flat[start : start + BLOCK].astype(np.float64)
        c = c_flat[start : start + BLOCK].astype(np.float64)
        if not (np.isfinite(r).all() and np.isfinite(c).all()):
            agree = (r == c) | (np.isnan(r) & np.isnan(c))
            finite = np.isfinite(r) & np.isfinite(c)
            r = np.where(finite, r, 0.0)
            c = np.where(finite, c, np.where(agree, 0.0, np.inf))
        yield r, c


def _class_like(array: Array) -> bool:
    return array.ndim == 2 and array.shape[1] >= 2 and np.issubdtype(array.dtype, np.floating)


def _snr_db(rr: float, ee: float) -> float:
    if ee == 0.0:
        return math.inf
    if rr == 0.0 or math.isinf(ee):
        return -math.inf
    return 10.0 * (math.log10(rr) - math.log10(ee))


def _cosine(rr: float, cc: float, rc: float) -> float:
    if rr == 0.0 or cc == 0.0 or math.isinf(rr + cc):
        return 0.0
    return max(-1.0, min(1.0, rc / (math.sqrt(rr) * math.sqrt(cc))))


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
