"""Budgets as people say them: "snr>=25dB", "same-top1>=0.995", "top1 drop<=0.5%", "speedup>=1.8" -> limits."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from exporter.batches import Batch
from exporter.errors import RecipeError

Run = Callable[[Batch], Batch]
Evaluate = Callable[[Run], Mapping[str, float]]
Accepts = Callable[[Run], bool]

# What people say -> the key of [budget], and the side of the limit
LIMITS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "snr": ("min_snr_db", ">="),
        "cosine": ("min_cosine", ">="),
        "max-abs": ("max_abs", "<="),
        "same-top1": ("min_same_top1", ">="),
        "integer-macs": ("min_integer_macs", ">="),
        "speedup": ("min_speedup", ">="),
    }
)
# A plan is sought on calibration batches and judged on others: by how much its SNR must exceed the limit
MARGIN_DB = 0.5
_SAID = re.compile(
    r"(?P<name>[\w.-]+)(?P<drop>\s+drop)?\s*(?P<sign>>=|<=)\s*(?P<value>[+-]?[\d.]+(?:e[+-]?\d+)?)\s*(?P<unit>%|dB|x)?",
    re.I,
)
_UNITS = {"snr": ("db", ""), "speedup": ("x", "")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """How far a metric of the user's own may fall below FP32's: by `most` of it, in its own unit or as a share of FP32's."""

    metric: str
    most: float
    share: bool

    def allows(self, fp32: float, int8: float) -> bool:
        return int8 >= self.least(fp32)

    def least(self, fp32: float) -> float:
        """What the metric may fall to."""
        return fp32 - self.most * (abs(fp32) if self.share else 1.0)

    def __str__(self) -> str:
        return f"{self.metric} drop<={100 * self.most:g}%" if self.share else f"{self.metric} drop<={self.most:g}"


def parse(texts: Iterable[str]) -> tuple[dict[str, float], tuple[Drop, ...]]:
    """({key of [budget]: limit}, drops of metrics).

    Raises:
        RecipeError: a text that says no limit, an unknown name, the wrong side, two limits on one thing.
    """
    limits: dict[str, float] = {}
    drops: list[Drop] = []
    for text in texts:
        said = _SAID.fullmatch(text.strip())
        if said is None:
            raise _refused(text, "no limit", 'one such as "snr>=25dB", "same-top1>=0.995", "top1 drop<=0.5%"')
        name, sign, unit = said["name"], said["sign"], (said["unit"] or "").lower()
        try:
            value = float(said["value"])
        except ValueError:
            raise _refused(text, f"{said['value']!r}", "a number") from None
        if said["drop"]:
            if sign != "<=" or unit not in ("", "%") or value < 0:
                raise _refused(text, f"{sign}{said['value']}{unit}", "<= and a number, or a share in %")
            drops.append(Drop(metric=name, most=value / 100 if unit else value, share=bool(unit)))
            continue
        key, side = LIMITS.get(name.lower(), ("", ""))
        if not key:
            near = difflib.get_close_matches(name.lower(), LIMITS, n=1, cutoff=0.4)
            raise _refused(
                text,
                repr(name),
                f"one of {', '.join(LIMITS)}, or METRIC drop",
                f"did you mean {near[0]!r}?" if near else "",
            )
        units = _UNITS.get(name.lower(), ("%", "") if side == ">=" else ("",))
        if sign != side or unit not in units:
            raise _refused(
                text,
                f"{sign}{said['value']}{unit}",
                f"{side} and a number{f' in {units[0]}'.replace('db', 'dB') if units[0] else ''}",
            )
        if key in limits:
            raise _refused(text, "a second limit on it", "one")
        limits[key] = value / 100 if unit == "%" else value
    if len({drop.metric for drop in drops}) < len(drops):
        raise _refused(", ".join(map(str, drops)), "two limits on one metric", "one")
    return limits, tuple(drops)


def metrics(evaluate: Evaluate, run: Run) -> dict[str, float]:
    """What evaluate() returns for a model.

    Raises:
        RecipeError: no {metric: number}.
    """
    found: Any = evaluate(run)
    try:
        return {str(name): float(value) for name, value in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise RecipeError(
            "evaluate()", found=f"{type(found).__name__} {str(found)[:80]}", expected="{metric: number}",
            do='return a dict, as in {"top1": 0.91}',
        ) from error  # fmt: skip


def acceptable(drops: Sequence[Drop], evaluate: Evaluate, fp32: Run) -> Accepts:
    """Whether a model's metrics drop no further below FP32's than allowed.

    Raises:
        RecipeError: a metric that evaluate() does not return.
    """
    reference = metrics(evaluate, fp32)
    for drop in drops:
        if drop.metric not in reference:
            near = difflib.get_close_matches(drop.metric, reference, n=1, cutoff=0.4)
            raise _refused(
                str(drop), f"evaluate() returns {', '.join(reference)}", f"a metric called {drop.metric!r}",
                f"did you mean {near[0]!r}?" if near else "",
            )  # fmt: skip

    def accepts(run: Run) -> bool:
        found = metrics(evaluate, run)
        return all(drop.allows(reference[drop.metric], found[drop.metric]) for drop in drops)

    return accepts


def _refused(text: str, found: str, expected: str, do: str = "") -> RecipeError:
    return RecipeError(f"--budget {text!r}", found=found, expected=expected, do=do)
