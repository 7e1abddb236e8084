"""What an export of a language model asked, decided and measured, as one value; its text for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from exporter.causal.distill import Distilled
from exporter.causal.proof import Proved
from runtime.exported import Line
from runtime.language_manifest import Loss
from runtime.manifest import canonical

WIDTH, LABEL = 80, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageReport:
    """formats: {format: how many of the weights' numbers have it}. fp32_bytes, bytes: of the weights."""

    name: str
    architecture: str
    scheme: str
    parameters: int
    layers: int
    context: int
    proved: Proved
    formats: Mapping[str, int]
    calibration: str
    loss: Loss
    lines: tuple[Line, ...]
    met: bool
    fp32_bytes: int
    bytes: int
    distilled: Distilled | None
    notes: tuple[str, ...]

    def to_json(self) -> str:
        return canonical(self)

    def __str__(self) -> str:
        return "\n".join(_render(self))


def _render(report: LanguageReport) -> Iterator[str]:
    loss, proved = report.loss, report.proved
    part = "" if proved.layers == report.layers else f" (its first {proved.layers} layers)"
    lengths = " and ".join(map(str, proved.lengths))
    total = sum(report.formats.values())
    shares = ", ".join(f"{name} {100 * count / total:.0f} %" for name, count in report.formats.items())
    unknown = f", {loss.unknown} of them unknown" if loss.unknown else ""
    yield from _row(
        "asked", f"{report.name}, a {report.architecture} of {report.parameters / 1e6:,.1f} M (scheme {report.scheme})"
    )
    for note in report.notes:
        yield from _row("note", note)
    yield from _row(
        "traced",
        f"equals transformers{part} at {lengths} tokens, from the cache, over {proved.greedy_steps} greedy tokens and in "
        "a batch of two lengths",
    )
    yield from _row("decided", f"weights: {shares}; context {report.context}")
    yield from _row(
        "data", f"rounding fitted to {report.calibration}" if report.calibration else "no rounding was fitted"
    )
    if (learnt := report.distilled) is not None:
        yield from _row(
            "trained",
            f"block scales and norms, {learnt.steps} steps: KL {learnt.before:.4f} -> {learnt.after:.4f} on windows that "
            f"they were not trained on, {'kept' if learnt.kept else 'not kept'}",
        )
    yield from _row(
        "loss",
        f"perplexity {loss.fp32_perplexity:.2f} -> {loss.perplexity:.2f} ({100 * loss.rise:+.1f} %), KL {loss.kl:.4f}, same "
        f"top-1 {100 * loss.same_top1:.1f} %, over {loss.tokens} tokens{unknown} of {loss.text} that nothing was fitted to",
    )
    yield from _row(
        "size",
        f"{report.fp32_bytes / 1e6:,.2f} MB -> {report.bytes / 1e6:,.2f} MB ({report.bytes / report.fp32_bytes:.3f} of FP32's)",
    )
    if report.lines:
        yield from _row("budget", "; ".join(map(str, report.lines)))
    yield from _row("verdict", "met" if report.met else "NOT MET")


def _row(label: str, text: str) -> list[str]:
    parts = textwrap.wrap(text, WIDTH - LABEL)
    return [f"{label if number == 0 else '':<{LABEL}}{part}" for number, part in enumerate(parts)]
