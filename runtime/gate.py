"""What the numbers mean: drift + coverage + budget -> Verdict, and its views for machines. Drift never stands without coverage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from runtime import drift as drifts
from runtime.bundle import Bundle
from runtime.drift import Drift
from runtime.errors import DriftExceeded, PacklightError
from runtime.kernels import kernels
from runtime.manifest import Budget, canonical


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One limit held against what was found: `what` is the metric and its output, as in "snr_db logits"."""

    what: str
    found: float
    limit: float
    met: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.found:.6g} ({'at most' if _is_ceiling(self.what) else 'at least'} {self.limit:.6g})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a bundle meets its budget here, and every number behind it.

    `drift` is int8 here against the recorded FP32, `device` int8 here against the int8 recorded at export; `exact` says
    that the latter are equal element by element. `integer_macs` is the share, 0..1, of MACs in integer kernels.
    """

    met: bool
    lines: tuple[Line, ...]
    drift: Drift
    integer_macs: float
    device: Drift
    exact: bool

    def require(self) -> None:
        """Raise DriftExceeded, naming each limit that is not met."""
        if not self.met:
            unmet = "; ".join(str(line) for line in self.lines if not line.met)
            raise DriftExceeded(f"budget not met, with {coverage(self.integer_macs)}", verdict=self, found=unmet)

    def to_json(self) -> str:
        """Canonical JSON of all fields; ±inf as in manifest.canonical."""
        return canonical(self)


def check(bundle: Bundle) -> Verdict:
    """Run the bundle's own probe here and judge it by the bundle's own budget. Needs neither exporter nor FP32 model."""
    probes = bundle.probes()
    here = [bundle.run(probe.inputs) for probe in probes]
    found = drifts.measure((probe.fp32, outputs) for probe, outputs in zip(probes, here, strict=True))
    device = drifts.measure((probe.int8, outputs) for probe, outputs in zip(probes, here, strict=True))
    return judge(found, kernels(bundle, probes[0].inputs).integer_macs, device, bundle.manifest.budget)


def judge(drift: Drift, integer_macs: float, device: Drift, budget: Budget) -> Verdict:
    """Hold drift and coverage against a budget; each limit on a metric is one line per output.

    min_same_top1 holds for the outputs that have one (see drift.measure).

    Raises:
        PacklightError: min_same_top1 is asked for and no output looks like classes, so the limit would hold nothing.
    """
    lines = tuple(_lines(drift, integer_macs, budget))
    exact = all(output.max_abs == 0 for output in device.outputs)
    met = all(line.met for line in lines)
    return Verdict(met=met, lines=lines, drift=drift, integer_macs=integer_macs, device=device, exact=exact)


def coverage(integer_macs: float) -> str:
    """The share as every text says it beside drift."""
    return f"{100 * integer_macs:.1f} % of MACs in integer kernels"


def junit(verdict: Verdict, name: str) -> str:
    """JUnit XML: one test case a limit, the measured numbers as properties."""
    from html import escape  # here: `import runtime` need not load its table of entities

    worst = verdict.drift.worst_snr_db
    cases = "".join(
        f'  <testcase classname="{escape(name)}" name="{escape(line.what)}">'
        + ("" if line.met else f'<failure message="{escape(f"{line}, with {coverage(verdict.integer_macs)}")}"/>')
        + "</testcase>\n"
        for line in verdict.lines
    )
    failures = sum(not line.met for line in verdict.lines)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<testsuite name="packlight {escape(name)}" tests="{len(verdict.lines)}" failures="{failures}">\n'
        "  <properties>\n"
        f'    <property name="integer_macs" value="{verdict.integer_macs:.6g}"/>\n'
        f'    <property name="worst_snr_db" value="{worst:.6g}"/>\n'
        f'    <property name="exact" value="{str(verdict.exact).lower()}"/>\n'
        f"  </properties>\n{cases}</testsuite>\n"
    )


def markdown(verdict: Verdict, name: str) -> str:
    """A page for a pull request or a job summary: the verdict, the limits, the drift of each output with its coverage."""
    limits = [
        f"| {_cell(line.what)} | {line.found:.6g} | {line.limit:.6g} | {'yes' if line.met else '**no**'} |"
        for line in verdict.lines
    ]
    outputs = [
        f"| {_cell(o.name)} | {o.snr_db:.2f} | {o.cosine:.6f} | {o.max_abs:.4g} | "
        f"{'' if o.same_top1 is None else f'{100 * o.same_top1:.2f} %'} | {100 * verdict.integer_macs:.1f} % |"
        for o in verdict.drift.outputs
    ]
    return "\n".join(
        [
            f"## {name}: {'met' if verdict.met else 'not met'}",
            "",
            f"{coverage(verdict.integer_macs)}; {device_text(verdict)}.",
            "",
            *(
                ["| limit | found | limit is | met |", "|---|---|---|---|", *limits]
                if limits
                else ["No limit was asked for."]
            ),
            "",
            "| output | SNR dB | cosine | max abs | same top-1 | integer MACs |",
            "|---|---|---|---|---|---|",
            *outputs,
            "",
        ]
    )


def device_text(verdict: Verdict) -> str:
    """How the int8 outputs here compare with those recorded at export, in words."""
    if verdict.exact:
        return "int8 outputs equal those recorded at export"
    return f"int8 outputs differ from those recorded at export: SNR {verdict.device.worst_snr_db:.1f} dB between them"


def _lines(drift: Drift, integer_macs: float, budget: Budget) -> Iterator[Line]:
    for limit_name in (field.name for field in fields(budget)):
        limit: float | None = getattr(budget, limit_name)
        if limit is None:
            continue
        metric = limit_name.removeprefix("min_")
        if metric == "integer_macs":
            yield _line(metric, integer_macs, limit)
            continue
        found = [(o.name, value) for o in drift.outputs if (value := getattr(o, metric)) is not None]
        if not found:
            shape = "a float output of shape [rows, classes]"
            raise PacklightError(f"budget {limit_name}", found="no such output", expected=shape, do="drop the limit")
        for name, value in found:
            yield _line(f"{metric} {name}", value, limit)


def _line(what: str, found: float, limit: float) -> Line:
    return Line(what=what, found=found, limit=limit, met=found <= limit if _is_ceiling(what) else found >= limit)


def _is_ceiling(what: str) -> bool:
    return what.split()[0] == "max_abs"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
