"""Two bundles of one model -> what became better and worse beyond noise, by paired tests: the same samples, rounds in turn.

Each line is new less old, with bounds, and one of four verdicts; `margin` is the loss that is none:

    same                        low >= -margin      not worse by more than the margin, and that is sure
    better                      the same, low > 0 and high > margin
    worse                       high < 0, and not same
    too few samples to tell     everything else
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime import confidence, gate
from runtime import drift as drifts
from runtime import manifest as manifests
from runtime import samples as own
from runtime.bench import CPU_SECONDS, rounds_in_turn, seconds
from runtime.bundle import Bundle, require_opened
from runtime.confidence import Interval
from runtime.errors import BundleError
from runtime.explain import PLAN, PLAN_BYTES, read_plan
from runtime.exported import number
from runtime.kernels import kernels
from runtime.manifest import DATA, Manifest, Tensor, canonical
from runtime.outcome import FAILURE, MET, WARNING, Case, Outcome
from runtime.printable import code
from runtime.samples import Sample
from runtime.scores import NOTHING_ASKED, Asked, Scores, score

if TYPE_CHECKING:
    from runtime.drift import Array
    from runtime.probe import Probe

SAME, BETTER, WORSE, TOO_FEW = "same", "better", "worse", "too few samples to tell"
SNR_MARGIN_DB, SHARE_MARGIN, METRIC_MARGIN = 0.5, 0.005, 0.005  # metric: of the reference's value
TIME_MARGIN, SIZE_MARGIN, MACS_MARGIN = 0.05, 0.01, 0.001
SEED = 0
SHOWN = 50  # nodes of a page


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One number of both: new less old where more is better (for size and time the share that is saved), and its bounds.

    samples: how many pairs are behind it; None where it is counted and not sampled.
    """

    what: str
    old: float
    new: float
    low: float
    found: float
    high: float
    margin: float
    verdict: str
    samples: int | None

    def __str__(self) -> str:
        bounds = "" if self.samples is None else f", {self.low:+.4g} .. {self.high:+.4g} from {self.samples} samples"
        return f"{self.what}: {self.verdict}, {self.old:.6g} -> {self.new:.6g} ({self.found:+.4g}{bounds})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two bundles of one model. plan, kernels: one line a node that is another; notes: what no line says."""

    old: str
    new: str
    lines: tuple[Difference, ...]
    plan: tuple[str, ...]
    kernels: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def worse(self) -> tuple[Difference, ...]:
        return tuple(line for line in self.lines if line.verdict == WORSE)

    @property
    def undecided(self) -> tuple[Difference, ...]:
        return tuple(line for line in self.lines if line.verdict == TOO_FEW)

    @property
    def met(self) -> bool:
        """Whether nothing is worse beyond noise."""
        return not self.worse

    def fields(self) -> dict[str, object]:
        """All fields, and `met`."""
        return {"met": self.met, **{name: getattr(self, name) for name in self.__slots__}}

    def to_json(self) -> str:
        return canonical(self.fields())


def compare(
    old: Bundle, new: Bundle, data: str | Path | None = None, asked: Asked = NOTHING_ASKED, rounds: int = 60
) -> Comparison:
    """Compare two bundles here, on the same samples and in turn.

    Args:
        old: the baseline. new: what is to be judged.
        data: samples, see `samples.read`; None takes the rows of both probes, which are few.
        asked: the user's metric and labels.
        rounds: timed calls of each, in turn; 0 for none.

    Raises:
        BundleError: they are not bundles of one model; says which difference.
        PacklightError: see `samples.read` and `scores.score`.
    """
    for each in (old, new):
        require_opened(each, "compare")
    require_one_model(old, new)
    probes = _probes(old, new)
    ran = [kernels(each, probes[-1].inputs, runs=1) for each in (old, new)]
    sizes = [each.model.stat().st_size for each in (old, new)]
    lines = [
        _counted("size_bytes", *sizes, saved=True, margin=SIZE_MARGIN),
        _counted("integer_macs", *(each.integer_macs for each in ran), saved=False, margin=MACS_MARGIN),
    ]
    notes = []
    if _runs_alike(old, new):
        notes.append(f"{new.model.name} is the same file: the same outputs in the same time")
    else:
        scores = _scores(old, new, probes, data, asked)
        lines += [*_of_outputs(scores), *_of_metric(scores)]
        if rounds:
            lines.append(speed(old, new, probes[-1].inputs, rounds))
    first, second = ({node.node: node.kernel for node in each.kernels} for each in ran)
    return Comparison(
        old=old.manifest.name,
        new=new.manifest.name,
        lines=tuple(lines),
        plan=tuple(_changed(*(_plan(each) for each in (old, new)))),
        kernels=tuple(_changed(first, second)),
        notes=tuple(notes),
    )


def require_one_model(old: Bundle, new: Bundle) -> None:
    """Refuse a baseline of another model.

    Raises:
        BundleError: other inputs or outputs; another FP32 model, by its hash and by its outputs below SAME_MODEL_DB; or nothing to
            tell by: no FP32 model and no common probe.
    """
    before, now = old.manifest, new.manifest
    for role in ("inputs", "outputs"):
        was, is_ = ([_unnamed(tensor) for tensor in getattr(each, role)] for each in (before, now))
        if was != is_:
            _refuse(old, found=f"{role} {_told(was)}", expected=f"{_told(is_)}, as in {new.path}")
    if (known := _fp32(before)) and known == _fp32(now):
        return
    compared = [
        drifts.measure(pairs, drifts.grounds(now.judged))
        for pairs in (_pairs(old, new.probes()), _pairs(new, old.probes()), _common(old, new))
        if pairs
    ]
    if not compared:
        do = "keep model.fp32.onnx in one of the bundles"
        _refuse(old, found="no FP32 model and another probe", expected="something to know the model by", do=do)
    for output in compared[0].outputs:
        at_least, found = (gate.SAME_MODEL_DB, output.snr_db) if output.by == "reals" else (
            gate.SAME_LIMIT, (output.equal if output.by == "equal" else output.matched) or 0.0
        )  # fmt: skip
        if found < at_least:
            said = f"FP32 outputs {output.name} that agree to {found:.4g} with those of {new.path}"
            _refuse(
                old,
                found=said,
                expected=f"at least {at_least:g}, which one model has",
                do="compare with its own baseline",
            )


def _refuse(old: Bundle, *, found: str, expected: str, do: str = "give a bundle of the same model") -> None:
    raise BundleError(f"baseline {old.path}", path=str(old.path), found=found, expected=expected, do=do)


def _unnamed(tensor: Tensor) -> tuple[str, str, tuple[int, ...]]:
    return tensor.name, tensor.dtype, tuple(-1 if isinstance(size, str) else size for size in tensor.shape)


def _told(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {dtype}{list(shape)}".replace("-1", "?") for name, dtype, shape in tensors)


def _fp32(about: Manifest) -> tuple[str, ...]:
    """Hashes of the FP32 model and its weights, listed also where a device has left them off."""
    names = (manifests.FP32, manifests.FP32 + DATA)
    return tuple(about.files[name].sha256 for name in names if name in about.files)


def _pairs(with_model: Bundle, probes: Sequence[Probe]) -> list[tuple[Mapping[str, Array], Mapping[str, Array]]]:
    run = with_model.reference()
    return [] if run is None else [(probe.fp32, run(probe.inputs)) for probe in probes]


def _common(old: Bundle, new: Bundle) -> list[tuple[Mapping[str, Array], Mapping[str, Array]]]:
    seen = {_key(probe.inputs): probe for probe in old.probes()}
    return [(seen[key].fp32, probe.fp32) for probe in new.probes() if (key := _key(probe.inputs)) in seen]


def _key(inputs: Mapping[str, Array]) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(inputs.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.digest()


def _runs_alike(old: Bundle, new: Bundle) -> bool:
    same = old.manifest.files[old.model.name].sha256 == new.manifest.files[new.model.name].sha256
    weights = [each.manifest.files.get(each.model.name + DATA) for each in (old, new)]
    return same and weights[0] == weights[1] and old.manifest.session == new.manifest.session


def _probes(old: Bundle, new: Bundle) -> list[Probe]:
    """The batches of both, each once; the last one is of `new`."""
    both = {_key(probe.inputs): probe for probe in (*new.probes()[::-1], *old.probes())}
    return list(both.values())[::-1]


def _scores(old: Bundle, new: Bundle, probes: Sequence[Probe], data: str | Path | None, asked: Asked) -> Scores:
    fp32 = new.reference() or old.reference()
    models = [old.run, new.run]
    if fp32 is not None:
        reference: Callable[[Sample], Mapping[str, Array]] = lambda sample: fp32(sample.inputs)  # noqa: E731
        samples = own.read(data, new.manifest) if data is not None else _rows(probes, new.manifest)
        return score(samples, reference, models, new.manifest.judged, asked)
    if data is not None:
        _refuse(old, found="no FP32 model in either bundle", expected=f"{manifests.FP32}, to run on --data")
    recorded = {f"probe {at}": probe for at, probe in enumerate(probes)}
    whole = (Sample(name=name, inputs=probe.inputs) for name, probe in recorded.items())
    return score(whole, lambda sample: recorded[sample.name].fp32, models, new.manifest.judged, asked)


def _rows(probes: Sequence[Probe], about: Manifest) -> Iterator[Sample]:
    """The probes' rows where the first axis of every input is open, else their batches."""
    open_ = all(tensor.shape and isinstance(tensor.shape[0], str) for tensor in about.inputs)
    for at, probe in enumerate(probes):
        sizes = {len(array) for array in probe.inputs.values() if array.ndim}
        if not open_ or len(sizes) != 1:
            yield Sample(name=f"probe {at}", inputs=probe.inputs)
            continue
        for row in range(*sizes):
            rows = {name: array[row : row + 1] for name, array in probe.inputs.items()}
            yield Sample(name=f"probe {at}:{row}", inputs=rows)


def _of_outputs(scores: Scores) -> Iterator[Difference]:
    """SNR of real numbers, by bootstrap over samples; the share that is the same, by Newcombe's interval where it is yes or no."""
    samples = len(scores.names)
    for output in scores.outputs:
        if output.by == "reals":
            columns = np.column_stack([output.rr, output.ee])
            found = confidence.of_sums(columns, _snr_gain, np.random.default_rng(SEED))
            with np.errstate(all="ignore"):
                snr = [_db(output.rr.sum(), each) for each in output.ee.sum(axis=0)]
            yield judged(f"snr_db {output.name}", (snr[0], snr[1]), found, SNR_MARGIN_DB, samples)
        if output.share is not None:
            name = {"reals": "same_top1", "equal": "equal", "set": "matched"}[output.by]
            yield _share(f"{name} {output.name}", output.share, samples)


def _share(what: str, share: Array, samples: int) -> Difference:
    means = (float(share[:, 0].mean()), float(share[:, 1].mean()))
    if ((share == 0) | (share == 1)).all():
        found = confidence.paired_shares(share[:, 0] == 1, share[:, 1] == 1)
        return judged(what, means, found, SHARE_MARGIN, samples, fewest=0)
    found = confidence.of_sums(
        share[:, 1:] - share[:, :1], lambda sums: sums[:, 0] / samples, np.random.default_rng(SEED)
    )
    return judged(what, means, found, SHARE_MARGIN, samples)


def _of_metric(scores: Scores) -> Iterator[Difference]:
    if (metric := scores.metric) is None:
        return
    samples, means = len(metric), metric.mean(axis=0)
    columns = metric[:, 2:] - metric[:, 1:2]
    found = confidence.of_sums(columns, lambda sums: sums[:, 0] / samples, np.random.default_rng(SEED))
    yield judged("metric", (float(means[1]), float(means[2])), found, METRIC_MARGIN * abs(float(means[0])), samples)


def speed(old: Bundle, new: Bundle, feed: Mapping[str, Array], rounds: int) -> Difference:
    """Time in turn: the median over rounds of log(old / new), as the share of time that is saved, by bootstrap over rounds."""
    clock = CPU_SECONDS if old.threads == new.threads == 1 else time.perf_counter
    calls = [partial(seconds, partial(each.run, feed), clock) for each in (old, new)]
    # who is second finds warm what both use: each is first in half of the rounds
    first, then = rounds_in_turn(calls, rounds - rounds // 2), rounds_in_turn(calls[::-1], rounds // 2)[::-1]
    times = np.hstack([first, then])
    ratios = np.log(np.maximum(times[0], 1e-9) / np.maximum(times[1], 1e-9))
    logs = confidence.of_median(ratios, np.random.default_rng(SEED))
    found = Interval(low=-math.expm1(-logs.low), found=-math.expm1(-logs.found), high=-math.expm1(-logs.high))
    medians = np.median(times, axis=1) * 1e3
    return judged("median_ms", (float(medians[0]), float(medians[1])), found, TIME_MARGIN, rounds)


def judged(
    what: str,
    values: tuple[float, float],
    found: Interval,
    margin: float,
    samples: int,
    fewest: int = confidence.FEWEST,
) -> Difference:
    """The verdict of an interval, see the module; of fewer samples than `fewest` only that they are too few."""
    if samples < fewest:
        verdict = TOO_FEW
    elif found.low >= -margin:
        verdict = BETTER if found.low > 0 and found.high > margin else SAME
    else:
        verdict = WORSE if found.high < 0 else TOO_FEW
    return Difference(
        what=what, old=values[0], new=values[1], low=found.low, found=found.found, high=found.high, margin=margin,
        verdict=verdict, samples=samples,
    )  # fmt: skip


def _counted(what: str, old: float, new: float, *, saved: bool, margin: float) -> Difference:
    """A number without noise; of a size the share that is saved."""
    gain = (old - new) / max(old, 1) if saved else new - old
    verdict = WORSE if gain < -margin else BETTER if gain > margin else SAME
    return Difference(
        what=what, old=float(old), new=float(new), low=gain, found=gain, high=gain, margin=margin, verdict=verdict,
        samples=None,
    )  # fmt: skip


def _snr_gain(sums: Array) -> Array:
    """dB that `new` has more, of sums [resamples, (rr, ee of old, ee of new)]: 10 log10(ee_old / ee_new)."""
    gain: Array = 10 * (np.log10(sums[:, 1]) - np.log10(sums[:, 2]))
    return np.where(sums[:, 1] == sums[:, 2], 0.0, gain)


def _db(signal: float, error: float) -> float:
    if error == 0:
        return math.inf
    return float(10 * np.log10(signal / error)) if signal > 0 and math.isfinite(error) else -math.inf


def _plan(bundle: Bundle) -> dict[str, str]:
    if PLAN not in bundle.manifest.files:
        return {}
    return {
        node: each.precision for node, each in read_plan(bundle.path / PLAN, bundle.content(PLAN, PLAN_BYTES)).items()
    }


def _changed(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    """One line a node that is another, in the order of `new`."""
    for node in (*new, *(node for node in old if node not in new)):
        was, is_ = old.get(node, "nothing"), new.get(node, "nothing")
        if was != is_:
            yield f"{node}: {was} -> {is_}"


def outcome(found: Comparison, path: str = "") -> Outcome:
    """For CI: what is worse is a failure, what too few samples tell of is a warning."""
    levels = {WORSE: FAILURE, TOO_FEW: WARNING}
    cases = (Case(what=each.what, level=levels.get(each.verdict, MET), said=str(each)) for each in found.lines)
    return Outcome(command="compare", about=found.new, path=path, cases=tuple(cases), page=markdown(found))


def headline(found: Comparison) -> str:
    """The verdict in words, without names."""
    if found.worse:
        return f"worse in {', '.join(line.what for line in found.worse)}"
    undecided = f", too few samples to tell of {len(found.undecided)}" if found.undecided else ""
    return f"nothing is worse beyond noise{undecided}"


def markdown(found: Comparison) -> str:
    """A page for a pull request: every number of both, then the nodes that changed."""
    rows = [f"| {' | '.join((code(row[0]), *row[1:]))} |" for row in rows_of(found)]
    changed = [
        line
        for title, nodes in (("Plan", found.plan), ("Kernels", found.kernels))
        if nodes
        for line in ("", f"{title}, {len(nodes)} nodes:", "", *(f"- {code(node)}" for node in nodes[:SHOWN]))
    ]
    return "\n".join(
        [
            f"## {code(found.new)} against {code(found.old)}: {code(headline(found))}",
            "",
            "| what | old | new | better by | bounds | samples | verdict |",
            "|---|---|---|---|---|---|---|",
            *rows,
            *changed,
            *(f"\n{note}" for note in found.notes),
            "",
        ]
    )


def rows_of(found: Comparison) -> Iterator[tuple[str, ...]]:
    """What, old, new, better by, bounds, samples, verdict: as text."""
    for each in found.lines:
        bounds, samples = (
            ("", "") if each.samples is None else (f"{each.low:+.3g} .. {each.high:+.3g}", str(each.samples))
        )
        yield each.what, number(each.old), number(each.new), f"{each.found:+.3g}", bounds, samples, each.verdict
