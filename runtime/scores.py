"""Models beside their reference on samples, one sample at a time: what bounds are made of. Memory holds a few numbers a sample."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime import drift as drifts
from runtime.drift import Ground
from runtime.errors import InputError, PacklightError

if TYPE_CHECKING:
    from runtime.drift import Array, OutputDrift
    from runtime.judged import Judged
    from runtime.samples import Sample

    Outputs = Mapping[str, Array]
    Run = Callable[[Mapping[str, Array]], Outputs]
    Metric = Callable[[Outputs, Any], float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OutputScores:
    """One output of every sample, float64.

    by: "reals", "equal" or "set", as `drift` judges it. rr: [samples], the reference's sum of squares. ee, cc, rc:
    [samples, models], sums of squared errors, of the candidate's squares, and of products. max_abs: [samples, models].
    share: [samples, models], of rows with the same top-1, of equal elements, or of items with a partner; None where there is none.
    """

    name: str
    by: str
    rr: Array
    ee: Array
    cc: Array
    rc: Array
    max_abs: Array
    share: Array | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """Every sample's name and outputs; metric: [samples, 1 + models] of the user's function, the reference first."""

    names: tuple[str, ...]
    outputs: tuple[OutputScores, ...]
    metric: Array | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the user's own metric needs: a function (outputs, label) -> number, more is better; labels by order or by name."""

    metric: Metric | None = None
    labels: Sequence[Any] | Mapping[str, Any] | None = None


NOTHING_ASKED = Asked()


def score(
    samples: Iterable[Sample],
    reference: Callable[[Sample], Outputs],
    models: Sequence[Run],
    judged: Mapping[str, Judged],
    asked: Asked = NOTHING_ASKED,
) -> Scores:
    """Run every model on every sample.

    Raises:
        PacklightError: no sample, labels that are not one a sample, a metric that fails or is no number.
    """
    against = {name: Ground(judged=replace(each, parts=())) for name, each in judged.items()}
    names: list[str] = []
    rows: dict[str, list[list[Array]]] = {}
    by: dict[str, str] = {}
    metric: list[list[float]] = []
    for number, sample in enumerate(samples):
        names.append(sample.name)
        expected = reference(sample)
        found = [run(sample.inputs) for run in models]
        for output, values in _outputs(expected, found, against):
            rows.setdefault(output, []).append([value for _, value in values])
            if by.get(output) != "set":  # as soon as sizes differ once
                by[output] = values[0][0]
        if asked.metric is not None:
            label = _label(asked.labels, number, sample.name)
            metric.append([_measured(asked.metric, each, label, sample.name) for each in (expected, *found)])
    if not names:
        raise PacklightError("scores", found="no sample", expected="one at least")
    if isinstance(asked.labels, Sequence) and len(asked.labels) != len(names):
        raise InputError("labels", found=f"{len(asked.labels)}", expected=f"{len(names)}, one a sample")
    return Scores(
        names=tuple(names),
        outputs=tuple(_columns(name, by[name], np.array(each)) for name, each in rows.items()),
        metric=np.array(metric) if metric else None,
    )


def _outputs(
    expected: Outputs, found: Sequence[Outputs], against: Mapping[str, Ground]
) -> Iterable[tuple[str, list[tuple[str, Array]]]]:
    """Of each output, for each model, how it is judged and its numbers (rr, ee, cc, rc, max_abs, share)."""
    compared = [drifts.measure([(expected, each)], against).outputs for each in found]
    for number, name in enumerate(expected):
        yield (
            name,
            [
                (drifts_of[number].by, _numbers(expected[name], each[name], drifts_of[number]))
                for each, drifts_of in zip(found, compared, strict=True)
            ],
        )


def _numbers(reference: Array, candidate: Array, drift: OutputDrift) -> Array:
    share = {"reals": drift.same_top1, "equal": drift.equal, "set": drift.matched}[drift.by]
    products = [0.0, 0.0, 0.0]
    if drift.by == "reals":
        r, c = (np.asarray(each, np.float64).ravel() for each in (reference, candidate))
        with np.errstate(all="ignore"):
            products = [float((a * b).sum()) for a, b in ((r, r), (c, c), (r, c))]
    rr, cc, rc = products
    ee = drift.rms**2 * drift.elements
    return np.array([rr, ee, cc, rc, drift.max_abs, math.nan if share is None else share])


def _columns(name: str, by: str, values: Array) -> OutputScores:
    """values: [samples, models, 6]."""
    share = values[:, :, 5]
    return OutputScores(
        name=name,
        by=by,
        rr=values[:, 0, 0],
        ee=values[:, :, 1],
        cc=values[:, :, 2],
        rc=values[:, :, 3],
        max_abs=values[:, :, 4],
        share=None if np.isnan(share).any() else share,
    )


def _label(labels: Sequence[Any] | Mapping[str, Any] | None, number: int, name: str) -> Any:
    if labels is None:
        return None
    try:
        return labels[name] if isinstance(labels, Mapping) else labels[number]
    except (KeyError, IndexError):
        raise InputError("labels", name=name, found=f"none for {name}", expected="one a sample") from None


def _measured(metric: Metric, outputs: Outputs, label: Any, name: str) -> float:
    try:
        value = float(metric(outputs, label))
    except Exception as error:  # the user's own code
        found = f"{type(error).__name__}: {error}"[:200]
        raise PacklightError(f"--metric on {name}", found=found, expected="a number") from error
    if math.isnan(value):
        raise PacklightError(f"--metric on {name}", found="NaN", expected="a number")
    return value


def top1(outputs: Outputs, label: Any) -> float:
    """1 where the largest number of the first output is at the label's place: the metric where labels are given and no other.

    Raises:
        PacklightError: the label is no whole number.
    """
    if isinstance(label, str) or int(label) != label:
        raise PacklightError(
            "label", found=repr(label), expected="a class's number", do="give --metric file.py:function"
        )
    return float(int(np.argmax(next(iter(outputs.values())))) == int(label))


def function(named: str) -> Metric:
    """The function of `file.py:function`; the file is run, so its writer is trusted as the user is.

    Raises:
        PacklightError: no such file or function, or the file fails.
    """
    file, _, name = named.rpartition(":")
    path = Path(file)
    if not name or path.suffix != ".py" or not path.is_file():
        raise PacklightError("--metric", found=named, expected="file.py:function", do="name a file that is there")
    spec = importlib.util.spec_from_file_location(f"packlight_metric_{path.stem}", path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise PacklightError(f"--metric {named}", found=f"{type(error).__name__}: {error}"[:200]) from error
    metric = getattr(module, name, None)
    if not callable(metric):
        raise PacklightError(f"--metric {named}", found=f"no function {name}", expected="def metric(outputs, label)")
    return metric  # type: ignore[no-any-return]
