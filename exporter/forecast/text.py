"""A Forecast for a terminal of 80 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator

from exporter.forecast.measure import Forecast
from runtime.drift import OutputDrift
from runtime.printable import printable
from runtime.views import middle

WIDTH = 80
LABEL = 10


def render(forecast: Forecast, name: str) -> str:
    """Which layers clip, how often, and what it does to the outputs."""
    head = f"{printable(name)} on x86 without VNNI (AVX2, or AVX512 alone)"
    lines = [head, *_row("layers", _layers(forecast))]
    if forecast.clips:
        lines += ["", *_table(forecast), ""]
    for output in forecast.drift.outputs:
        lines += _row("outputs", f"{output.name}: {_moved(output)}")
    if forecast.with_vnni is not None and forecast.without_vnni is not None:
        for before, after in zip(forecast.with_vnni.outputs, forecast.without_vnni.outputs, strict=True):
            text = f"{before.name}: SNR {_db(before.snr_db)} with VNNI, {_db(after.snr_db)} without"
            if before.same_top1 is not None and after.same_top1 is not None:
                text += f"; same top-1 {_percent(before.same_top1)}, {_percent(after.same_top1)}"
            lines += _row("FP32", text)
    batches = forecast.drift.batches
    lines += _row("data", f"{batches} batch{'es' if batches != 1 else ''}")
    if forecast.rounds_here:
        lines += _row("float", _float(forecast.rounds_here))
    if forecast.clips:
        lines += _row("do", "export for target portable or x86-avx2: its weights keep the pair rule and cannot clip")
    return "\n".join(lines)


def _layers(forecast: Forecast) -> str:
    can, do = len(forecast.layers), sum(layer.clipped > 0 for layer in forecast.layers)
    if not can:
        return "none can clip: no uint8 activation meets int8 weights that break the pair rule"
    return f"{can} can clip, for their weights break the pair rule; {do or 'none'} of them did"


def _moved(output: OutputDrift) -> str:
    if output.max_abs == 0:
        return "as with VNNI, bit for bit"
    same = "" if output.same_top1 is None else f", same top-1 {_percent(output.same_top1)}"
    return f"SNR {_db(output.snr_db)} against those with VNNI, max abs {output.max_abs:.3g}{same}"


def _float(nodes: tuple[str, ...]) -> str:
    named = ", ".join(middle(node, 24) for node in nodes[:3]) + (", ..." if len(nodes) > 3 else "")
    round_as = "nodes in float round as this CPU does" if len(nodes) > 1 else "node in float rounds as this CPU does"
    return f"{len(nodes)} {round_as}: {named}; elsewhere last bits differ"


def _table(forecast: Forecast) -> Iterator[str]:
    yield f"{'node':<32} {'kernel':<20} {'pairs':>7} {'sums clipped':>13}"
    for layer in forecast.layers:
        if layer.clipped:
            kernel = middle(layer.kernel, 20)
            yield f"{middle(layer.node, 32):<32} {kernel:<20} {layer.pairs:>7} {_percent(layer.clipped):>13}"


def _db(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "inf" if value > 0 else "-inf"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share == 0 or share >= 1e-4 else "< 0.01 %"


def _row(label: str, value: str) -> list[str]:
    return textwrap.wrap(
        value, WIDTH, initial_indent=f"{label:<{LABEL}}", subsequent_indent=" " * LABEL, break_on_hyphens=False
    )
