"""Compare two streams of outputs: (reference, candidate) batches -> Drift. docs/drift.md says when each number misleads."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtime import sets
from runtime.errors import PacklightError
from runtime.exact import Exact
from runtime.judged import Judged, Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
BLOCK = 1 << 20  # elements turned to float64 at a time: 8 MB an array, whatever the size of the outputs
# What varies by less than this share of an output's rms does not vary: 16 roundings of a float32
NOTHING_VARIES = 2.0**-20
WHOLE = Part()
# The SNR of an output may be above that of what varies in it by that much, before the latter decides between plans: the aim for the
# one is an error that nobody sees, and a tenth of the signal may well be constant
HIDDEN_DB = 10.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ground:
    """What an output is held against: how, in which parts, and what of it is `constant`.

    constant: what does not vary from input to input, for an output of any batch: sizes as the output's, or 1. None: each part says
    how much of it varies, or nothing is known of that.
    """

    judged: Judged
    constant: Array | None = None


def grounds(judged: Mapping[str, Judged]) -> dict[str, Ground]:
    """What a device holds outputs against: their parts, and how much varies in each, as the manifest's `judged` says."""
    return {name: Ground(judged=each) for name, each in judged.items()}


NOTHING_KNOWN: Mapping[str, Ground] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class PartDrift:
    """Some elements of an output by themselves (`judged.Part`).

    snr_db: of their numbers. varying_db: of what varies in them; None where nothing does, or where it is not known.
    """

    part: Part
    snr_db: float
    varying_db: float | None
    rms: float
    elements: int

    @property
    def judged_db(self) -> float:
        """SNR of what varies, where something does; else of the numbers themselves."""
        return self.snr_db if self.varying_db is None else self.varying_db

    @property
    def constant(self) -> bool:
        """Whether nothing in it varies, and that is known."""
        return self.part.varying_rms is not None and self.varying_db is None

    @property
    def where(self) -> str:
        """ "channels 4..8": which elements, empty for all. Axis 1 is called channels, the others by their number."""
        if self.part.axis is None:
            return ""
        runs = ", ".join(
            f"{start}" if stop == start + 1 else f"{start}..{stop - 1}" for start, stop in self.part.runs[:3]
        )
        more = ", ..." if len(self.part.runs) > 3 else ""
        return f"{'channels' if self.part.axis == 1 else f'axis {self.part.axis}'} {runs}{more}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDrift:
    """How far one output is from its reference, over all batches. SNR in dB; max_abs, mean_abs, rms in the output's own unit.

    by, axis, batched: how it is judged (`judged.Judged`). equal: share of equal elements. matched: of a set, the share of the
    reference's items that have a partner; shapes may differ then, and the other numbers are over batches in which they do not.
    parts: the same elements once more, the whole first and then part by part, where it is known what of them varies.
    """

    name: str
    snr_db: float
    cosine: float
    max_abs: float
    mean_abs: float
    rms: float
    same_top1: float | None
    elements: int
    by: str = "reals"
    axis: int = 0
    batched: bool = False
    equal: float | None = None
    matched: float | None = None
    parts: tuple[PartDrift, ...] = ()

    @property
    def worst(self) -> PartDrift | None:
        """The part with the smallest SNR of what varies, or of its numbers where they are constant."""
        return min(self.parts, key=lambda part: part.judged_db, default=None)

    @property
    def varying_db(self) -> float:
        """SNR of what varies, in the worst part; of the numbers where that is not known."""
        return self.snr_db if self.worst is None else self.worst.judged_db

    @property
    def constant(self) -> bool:
        """Whether nothing in it varies from input to input."""
        return bool(self.parts) and all(part.constant for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """The drift of every output, in the reference's order."""

    outputs: tuple[OutputDrift, ...]
    batches: int

    @property
    def worst_snr_db(self) -> float:
        """The smallest SNR of all outputs of real numbers, dB, by which plans are compared; inf when there is none.

        What varies in each part counts with HIDDEN_DB more. Outputs and parts that are constant count where all are.
        """
        reals = [output for output in self.outputs if output.by == "reals"]
        found = [min([output.snr_db, *_varying(output)]) for output in reals if not output.constant]
        return min(found or [output.varying_db for output in reals], default=math.inf)


def _varying(output: OutputDrift) -> list[float]:
    return [part.judged_db + HIDDEN_DB for part in output.parts if part.varying_db is not None]


def measure(
    pairs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]], against: Mapping[str, Ground] = NOTHING_KNOWN
) -> Drift:
    """Drift of candidate outputs against their reference, accumulated over all batches in float64.

    With r the reference, c the candidate and e = r - c over all elements of all batches:

        snr_db    = 20 log10(‖r‖ / ‖e‖)         inf when e = 0; -inf when r = 0 and e != 0
        cosine    = r·c / (‖r‖ ‖c‖)             1 when e = 0; 0 when only one of r, c is 0
        max_abs   = max |e|, mean_abs = mean |e|, rms = sqrt(mean e²)
        same_top1 = share of rows with argmax r = argmax c; only for float outputs [rows, columns >= 2], else None
        equal     = share of elements with r = c
        varying_db = 20 log10(‖r - m‖ / ‖e‖)    of each part, m what is constant of it (`Ground`)

    Where both hold the same infinity or both NaN, the element agrees and counts as 0. Where only one is finite, snr_db is
    -inf, cosine 0, max_abs, mean_abs and rms inf: a candidate with NaN is as bad as can be, and never unmeasurable.

    Args:
        pairs: (reference, candidate) per batch, each {output: array} with the same names; any numeric or boolean dtype, any
            shape; where sizes differ the output is a set. The names of the first batch hold for all.
        against: {output: what is known of it}; others are judged by their kind of number, as a whole.

    Raises:
        PacklightError: no batch, or names or shapes that differ.

    Source: SNR as ONNX Runtime's qdq_loss_debug.compute_signal_to_quantization_noice_ratio computes it.
    """
    found = total(pairs, against=against)
    if not found.batches:
        raise PacklightError("drift of no batches", do="give at least one (reference, candidate) pair")
    return found.drift()


def total(
    pairs: Iterable[tuple[Mapping[str, Array], Mapping[str, Array]]],
    start: int = 0,
    against: Mapping[str, Ground] = NOTHING_KNOWN,
) -> Totals:
    """What `measure` adds up, of some of the batches; `start` is the number of the first, for messages. May be empty."""
    sums: dict[str, _Sums] = {}
    batches = 0
    for batches, (reference, candidate) in enumerate(pairs, start=1):
        if batches == 1:
            sums = {name: _Sums(against.get(name)) for name in reference}
        for side in (reference, candidate):
            if side.keys() != sums.keys():
                raise PacklightError(
                    f"batch {start + batches - 1}", found=_names(side), expected=f"outputs {_names(sums)}"
                )
        for name, one in sums.items():
            r, c = np.asarray(reference[name]), np.asarray(candidate[name])
            if r.ndim != c.ndim:
                where = f"batch {start + batches - 1}, output {name}"
                raise PacklightError(
                    where, found=f"shape {list(c.shape)}", expected=f"{list(r.shape)} of the reference"
                )
            with np.errstate(invalid="ignore", over="ignore"):  # inf is how a disagreement in kind is counted
                one.add(r, c)
    return Totals(sums=sums, batches=batches)


def batch_snr_db(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> float:
    """SNR in dB of the worst output of real numbers of one batch; inf where there is none, or where sizes differ."""
    found = [math.inf]
    for name, r in ((name, np.asarray(each)) for name, each in reference.items()):
        c = np.asarray(candidate[name])
        if r.shape == c.shape and np.issubdtype(r.dtype, np.floating):
            with np.errstate(invalid="ignore", over="ignore"):
                sums = [(np.square(a).sum(), np.square(a - b).sum()) for a, b in _blocks(r, c)]
            found.append(_snr_db(*(float(sum(each)) for each in zip(*sums, strict=True))) if sums else math.inf)
    return min(found)


def merge(first: Totals, second: Totals) -> Totals:
    """The totals of both. Exact: shards of the batches, merged in any order, give the bits of one pass."""
    if not first.batches or not second.batches:
        return first if first.batches else second
    if first.sums.keys() != second.sums.keys():
        raise PacklightError("merge", found=_names(second.sums), expected=f"outputs {_names(first.sums)}")
    return Totals(
        sums={name: one.merged(second.sums[name]) for name, one in first.sums.items()},
        batches=first.batches + second.batches,
        worst=min(first.worst, second.worst, key=Worst.place),
    )


class Worst(NamedTuple):
    """The batch with the smallest SNR (`batch_snr_db`), the first of equals: its number, and its inputs where they are at hand."""

    snr_db: float
    number: int
    inputs: Mapping[str, Array] | None = None

    def place(self) -> tuple[float, int]:
        """What batches are ordered by."""
        return self.snr_db, self.number


NO_BATCH = Worst(math.inf, sys.maxsize)


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over some batches, of each output; and the worst batch, where somebody looked for it."""

    sums: Mapping[str, _Sums]
    batches: int
    worst: Worst = NO_BATCH

    def drift(self) -> Drift:
        return Drift(outputs=tuple(one.result(name) for name, one in self.sums.items()), batches=self.batches)


class _Sums:
    """What one output needs to remember of the batches it has seen."""

    def __init__(self, ground: Ground | None = None) -> None:
        self.rr, self.cc, self.rc, self.ee, self.abs_sum = Exact(), Exact(), Exact(), Exact(), Exact()
        self.abs_max = 0.0
        self.elements = self.rows = self.same_rows = 0
        self.same = self.elsewhere = 0
        self.items = self.partners = 0
        self.class_like = True
        self.ground = ground
        self.judged = ground.judged.by if ground is not None else ""
        self.parts = [_PartSums(each) for each in ground.judged.parts] if ground is not None else []

    def by(self, reference: Array, candidate: Array) -> str:
        """How the output is judged: as was said, else by its kind of number; as a set from the first sizes that differ on."""
        if reference.shape != candidate.shape:
            return "set"
        return self.judged or ("reals" if np.issubdtype(reference.dtype, np.floating) else "equal")

    def add(self, reference: Array, candidate: Array) -> None:
        self.judged = self.by(reference, candidate)
        if self.judged == "set":
            how = self.ground.judged if self.ground is not None else Judged(by="set")
            partners, items = sets.partners(
                *(sets.items(each, how.axis, how.batched) for each in (reference, candidate))
            )
            self.partners += partners
            self.items += items
        if reference.shape != candidate.shape:
            self.elsewhere += max(reference.size, candidate.size)
            return
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
            self.same += int((e == 0).sum())
        self._add_parts(reference, candidate)
        self.class_like &= _class_like(reference) and self.judged == "reals"
        if self.class_like and reference.size:
            self.rows += reference.shape[0]
            self.same_rows += int((reference.argmax(axis=1) == candidate.argmax(axis=1)).sum())

    def _add_parts(self, reference: Array, candidate: Array) -> None:
        if not self.parts or self.judged != "reals" or self.ground is None:
            return
        constant = None if self.ground.constant is None else fitted(self.ground.constant, reference.shape)
        for part in self.parts:
            if (where := inside(part.part, reference.shape)) is not None:
                part.add(reference, candidate, constant, where)

    def merged(self, second: _Sums) -> _Sums:
        both = _Sums(self.ground)
        for name in ("rr", "cc", "rc", "ee", "abs_sum"):
            setattr(both, name, getattr(self, name).merged(getattr(second, name)))
        both.abs_max = max(self.abs_max, second.abs_max)
        for name in ("elements", "rows", "same_rows", "same", "elsewhere", "items", "partners"):
            setattr(both, name, getattr(self, name) + getattr(second, name))
        both.class_like = self.class_like and second.class_like
        both.judged = "set" if "set" in (self.judged, second.judged) else self.judged or second.judged
        both.parts = [one.merged(other) for one, other in zip(self.parts, second.parts, strict=True)]
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
            by=self.judged or "reals",
            axis=self.ground.judged.axis if self.ground is not None else 0,
            batched=self.ground is not None and self.ground.judged.batched,
            equal=self.same / every if (every := self.elements + self.elsewhere) else 1.0,
            matched=(self.partners / self.items if self.items else 1.0) if self.judged == "set" else None,
            parts=tuple(part.result() for part in self.parts if part.elements),
        )


class _PartSums:
    """The same of one part, and of what varies in it."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.rr, self.vv, self.ee = Exact(), Exact(), Exact()
        self.elements = 0
        self.is_known = part.varying_rms is not None

    def add(self, reference: Array, candidate: Array, constant: Array | None, where: tuple[Array | slice, ...]) -> None:
        reals, others = reference[where], candidate[where]
        fixed = None if constant is None else np.broadcast_to(constant, reference.shape)[where]
        self.is_known |= fixed is not None
        for start, (r, c) in zip(range(0, reals.size, BLOCK), _blocks(reals, others), strict=True):
            self.rr.add(float(np.square(r).sum()))
            self.ee.add(float(np.square(r - c).sum()))
            if fixed is not None:
                self.vv.add(float(np.square(r - fixed.flat[start : start + BLOCK]).sum()))
            self.elements += r.size

    def merged(self, second: _PartSums) -> _PartSums:
        both = _PartSums(self.part)
        for name in ("rr", "vv", "ee"):
            setattr(both, name, getattr(self, name).merged(getattr(second, name)))
        both.elements = self.elements + second.elements
        both.is_known = self.is_known or second.is_known
        return both

    def result(self) -> PartDrift:
        rr, vv, ee = (total.value() for total in (self.rr, self.vv, self.ee))
        if self.part.varying_rms is not None:
            vv = self.part.varying_rms**2 * self.elements
        if vv <= NOTHING_VARIES**2 * rr:
            vv = 0.0
        varying = math.sqrt(vv / self.elements) if self.is_known and math.isfinite(vv) else None
        return PartDrift(
            part=Part(axis=self.part.axis, runs=self.part.runs, varying_rms=varying),
            snr_db=_snr_db(rr, ee),
            varying_db=_snr_db(vv, ee) if varying else None,
            rms=math.sqrt(ee / self.elements),
            elements=self.elements,
        )


def inside(part: Part, shape: tuple[int, ...]) -> tuple[Array | slice, ...] | None:
    """A part's elements in an array of that shape; None where it does not reach there."""
    axis, runs = part.axis, part.runs
    if axis is None:
        return ()
    if axis >= len(shape) or runs[-1][1] > shape[axis]:
        return None
    chosen = slice(*runs[0]) if len(runs) == 1 else np.concatenate([np.arange(*run) for run in runs])
    return (*(slice(None),) * axis, chosen)


def fitted(constant: Array, shape: tuple[int, ...]) -> Array:
    """The constant part for an output of that shape: its mean along axes whose size is another, or over all where the rank is."""
    if constant.ndim != len(shape):
        return np.asarray(constant.mean() if constant.size else 0.0)
    for axis, size in enumerate(shape):
        if constant.shape[axis] not in (1, size):
            constant = constant.mean(axis=axis, keepdims=True)
    return constant


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
