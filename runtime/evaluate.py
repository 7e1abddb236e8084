"""A bundle on the user's own data: FP32 beside int8, each limit held against its bound, and the samples that drift most.

A limit is met when its bound meets it: "snr >= 25 dB" where the interval's lower end does, from as many samples as there are.
One that what was found meets and its bound does not is not met, for want of samples, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime import confidence
from runtime import manifest as manifests
from runtime import samples as own
from runtime.bundle import Bundle, require_opened
from runtime.confidence import Interval
from runtime.errors import BundleError
from runtime.exported import number
from runtime.gate import coverage
from runtime.kernels import kernels
from runtime.manifest import canonical
from runtime.outcome import FAILURE, Case, Outcome
from runtime.outcome import MET as OK
from runtime.printable import code
from runtime.scores import NOTHING_ASKED, Asked, OutputScores, Scores, score

if TYPE_CHECKING:
    from collections.abc import Callable

    from runtime.drift import Array

    _Statistic = Callable[[Array], Array]
MET, NOT_MET, TOO_FEW = "met", "not met", "too few samples to tell"
SEED = 0
WORST = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounded:
    """One number of int8 on the samples, its bounds, and the limit that it is held against; None where none was asked for."""

    what: str
    low: float
    found: float
    high: float
    limit: float | None
    verdict: str

    def __str__(self) -> str:
        asked = "" if self.limit is None else f", asked {self.limit:g}: {self.verdict}"
        return f"{self.what}: {self.found:.6g} ({self.low:.6g} .. {self.high:.6g}){asked}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One sample: SNR of its worst output of real numbers in dB, the smallest share that is the same, the metric of both."""

    name: str
    snr_db: float
    same: float | None
    fp32_metric: float | None
    int8_metric: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """int8 against FP32 on the samples. worst: those that drift most, the worst first, at most as many as were asked for."""

    model: str
    samples: int
    integer_macs: float
    lines: tuple[Bounded, ...]
    worst: tuple[Judged, ...]

    @property
    def met(self) -> bool:
        return all(line.verdict == MET for line in self.lines if line.limit is not None)

    def to_json(self) -> str:
        """Canonical JSON of all fields, and `met`."""
        return canonical({"met": self.met, **{name: getattr(self, name) for name in self.__slots__}})


def evaluate(bundle: Bundle, data: str | Path, asked: Asked = NOTHING_ASKED, worst: int = WORST) -> Evaluation:
    """Run FP32 and int8 on every sample, one at a time.

    Args:
        bundle: with its FP32 model.
        data: see `samples.read`.
        asked: the user's metric and labels.
        worst: how many samples to name.

    Raises:
        BundleError: the bundle is without its FP32 model.
        PacklightError: see `samples.read` and `scores.score`.
    """
    require_opened(bundle, "eval")
    reference = bundle.reference()
    if reference is None:
        place = bundle.path / manifests.FP32
        raise BundleError(
            str(place), path=str(place), found="nothing", expected="the FP32 model, to compare with",
            do="copy that file too; packlight check needs it not",
        )  # fmt: skip
    first = next(iter(own.read(data, bundle.manifest)))
    scores = score(
        own.read(data, bundle.manifest),
        lambda sample: reference(sample.inputs),
        [bundle.run],
        bundle.manifest.judged,
        asked,
    )
    return Evaluation(
        model=bundle.model.name,
        samples=len(scores.names),
        integer_macs=kernels(bundle, first.inputs, runs=1).integer_macs,
        lines=tuple(_lines(scores, bundle)),
        worst=tuple(_worst(scores, worst)),
    )


def _lines(scores: Scores, bundle: Bundle) -> Iterator[Bounded]:
    budget = bundle.manifest.budget
    for output in scores.outputs:
        if output.by == "reals":
            yield _real(f"snr_db {output.name}", output, _snr_db, budget.min_snr_db)
            yield _real(f"cosine {output.name}", output, _cosine, budget.min_cosine)
            most = float(output.max_abs.max())  # of these samples; what another one has, nobody knows
            yield held(f"max_abs {output.name}", Interval(low=most, found=most, high=most), budget.max_abs, most=True)
        if output.share is not None:
            name = {"reals": "same_top1", "equal": "equal", "set": "matched"}[output.by]
            limit = budget.min_same_top1 if output.by != "set" else None
            yield held(f"{name} {output.name}", share(output.share[:, 0]), limit)
    if scores.metric is not None:
        for name, column in (("metric fp32", 0), ("metric int8", 1)):
            yield held(name, share(scores.metric[:, column]), None)
        change = scores.metric[:, 1] - scores.metric[:, 0]
        found = mean(change) if len(change) >= confidence.FEWEST else _unknown(float(change.mean()))
        yield held("metric int8 - fp32", found, None)


def share(column: Array) -> Interval:
    """A mean over samples: Wilson's interval where each is yes or no, else by bootstrap, which few samples do not bear."""
    if ((column == 0) | (column == 1)).all():
        return confidence.wilson(int(column.sum()), len(column))
    return mean(column) if len(column) >= confidence.FEWEST else _unknown(float(column.mean()))


def mean(column: Array) -> Interval:
    samples = len(column)
    return confidence.of_sums(column[:, None], lambda sums: sums[:, 0] / samples, np.random.default_rng(SEED))


def held(what: str, found: Interval, limit: float | None, most: bool = False) -> Bounded:
    """A number's bound against a limit: the lower one, or the upper where the limit is the most that may be."""
    verdict = ""
    if limit is not None:
        bound, value = (-found.high, -found.found) if most else (found.low, found.found)
        asked = -limit if most else limit
        verdict = MET if bound >= asked else TOO_FEW if value >= asked else NOT_MET
    return Bounded(what=what, low=found.low, found=found.found, high=found.high, limit=limit, verdict=verdict)


def _unknown(found: float) -> Interval:
    return Interval(low=-math.inf, found=found, high=math.inf)


def _real(what: str, output: OutputScores, statistic: _Statistic, limit: float | None) -> Bounded:
    columns = np.column_stack([output.rr, output.ee[:, 0], output.cc[:, 0], output.rc[:, 0]])
    if len(columns) < confidence.FEWEST:
        with np.errstate(all="ignore"):
            return held(what, _unknown(float(statistic(columns.sum(axis=0, keepdims=True))[0])), limit)
    return held(what, confidence.of_sums(columns, statistic, np.random.default_rng(SEED)), limit)


def _snr_db(sums: Array) -> Array:
    """Of sums [resamples, (rr, ee, cc, rc)], as drift.measure defines it."""
    found: Array = 10 * (np.log10(sums[:, 0]) - np.log10(sums[:, 1]))
    return np.where(sums[:, 1] == 0, np.inf, np.where(np.isinf(sums[:, 1]), -np.inf, found))


def _cosine(sums: Array) -> Array:
    found: Array = sums[:, 3] / np.sqrt(sums[:, 0] * sums[:, 2])
    return np.where(sums[:, 1] == 0, 1.0, np.where(np.isfinite(found), found, 0.0))


def _worst(scores: Scores, most: int) -> Iterator[Judged]:
    """By what the metric loses, then by the smallest share that is the same, then by SNR."""
    samples = len(scores.names)
    reals = [output for output in scores.outputs if output.by == "reals"]
    shares = [output.share[:, 0] for output in scores.outputs if output.share is not None]
    with np.errstate(all="ignore"):
        snr = [_snr_db(np.column_stack([output.rr, output.ee[:, 0]])) for output in reals]
    least_snr = np.min(snr, axis=0) if snr else np.full(samples, math.inf)
    least = np.min(shares, axis=0) if shares else None
    metric = scores.metric
    lost = np.zeros(samples) if metric is None else metric[:, 1] - metric[:, 0]
    for row in np.lexsort((least_snr, np.zeros(samples) if least is None else least, lost))[:most]:
        yield Judged(
            name=scores.names[row],
            snr_db=float(least_snr[row]),
            same=None if least is None else float(least[row]),
            fp32_metric=None if metric is None else float(metric[row, 0]),
            int8_metric=None if metric is None else float(metric[row, 1]),
        )


def outcome(found: Evaluation, name: str, path: str = "") -> Outcome:
    """For CI: one case a limit; one that only too few samples keep from being met says so."""
    cases = (
        Case(
            what=each.what, level=OK if each.verdict == MET else FAILURE, said=f"{each}, {coverage(found.integer_macs)}"
        )
        for each in found.lines
        if each.limit is not None
    )
    return Outcome(command="eval", about=name, path=path, cases=tuple(cases), page=markdown(found, name))


def markdown(found: Evaluation, name: str) -> str:
    """A page for a pull request: every number with its bounds, then the worst samples."""
    verdict = "met" if found.met else "not met"
    lines = [f"| {' | '.join((code(row[0]), *row[1:]))} |" for row in rows_of(found)]
    worst = [f"| {' | '.join((code(row[0]), *row[1:]))} |" for row in worst_of(found)]
    return "\n".join(
        [
            f"## {code(name)} on {found.samples} samples: {verdict}",
            "",
            f"{coverage(found.integer_macs)}.",
            "",
            "| what | found | bounds | limit is | verdict |",
            "|---|---|---|---|---|",
            *lines,
            "",
            "| worst samples | SNR dB | same | metric FP32 | metric int8 |",
            "|---|---|---|---|---|",
            *worst,
            "",
        ]
    )


def rows_of(found: Evaluation) -> Iterator[tuple[str, ...]]:
    """What, found, bounds, limit, verdict: as text."""
    for each in found.lines:
        limit = "" if each.limit is None else number(each.limit)
        bounds = "" if each.low == each.high else f"{each.low:.5g} .. {each.high:.5g}"
        yield each.what, number(each.found), bounds, limit, each.verdict


def worst_of(found: Evaluation) -> Iterator[tuple[str, ...]]:
    """Name, SNR, share that is the same, metric of both: as text."""
    for each in found.worst:
        rest = ("" if value is None else f"{value:.4g}" for value in (each.same, each.fp32_metric, each.int8_metric))
        yield each.name, f"{each.snr_db:.2f}", *rest
