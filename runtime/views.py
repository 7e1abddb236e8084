"""Our values as text for a terminal of 80 columns. Drift is never shown without the share of integer MACs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Console, Group, RenderableType
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from runtime import compare as compares
from runtime import evaluate as evaluates
from runtime.bench import Timing
from runtime.compare import Comparison
from runtime.evaluate import Evaluation
from runtime.explain import Explanation
from runtime.exported import number
from runtime.gate import Verdict, coverage, device_text, errors, here, numbers
from runtime.printable import json, lines, printable
from runtime.printable import middle as _middle

if TYPE_CHECKING:
    from runtime.drift import Array

WIDTH = 80
SHOWN = 20  # nodes that changed


def show(view: RenderableType) -> None:
    """Print a view, at most 80 columns wide, in colour only on a terminal."""
    console = Console(highlight=False, soft_wrap=False)
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    segments = [Segment(lines(part.text), part.style) for part in console.render(view)]
    console.print(Segments(segments), end="")


def show_json(text: str) -> None:
    """Print canonical JSON with nothing in it that a terminal would obey."""
    print(json(text), end="")


def verdict(value: Verdict, name: str) -> RenderableType:
    """The verdict, its limits, the drift of each output."""
    parts: list[RenderableType] = [
        Text(
            f"{printable(name)}: {'met' if value.met else 'NOT MET'}", style="bold green" if value.met else "bold red"
        ),
        Text(f"{coverage(value.integer_macs)}; {device_text(value)}"),
    ]
    if not value.lines:
        parts.append(Text("no limit was asked for"))
    else:
        limits = _table("limit", "found", "limit is", "met")
        for line in value.lines:
            met = Text("yes") if line.met else Text("NO", style="bold red")
            limits.add_row(middle(line.what, 40), number(line.found), number(line.limit), met)
        parts.append(limits)
    parts.append(_errors(value))
    unmet = (line for line in value.lines if line.cause and not line.met)
    parts += [Text(f"{printable(line.what)}: {printable(line.cause)}", style="red") for line in unmet]
    outputs = _table("output", "SNR dB", "varying", "cosine", "max abs", "same top-1", "integer MACs")
    for o in value.drift.outputs:
        outputs.add_row(middle(o.name, 16), *numbers(o), _percent(value.integer_macs))
    return Group(
        *parts,
        outputs,
        Text(printable(f"{value.model} on {here(value)}")),
        *(Text(f"note: {printable(note)}", style="yellow") for note in value.notes),
    )


def _errors(value: Verdict) -> Table:
    """The three errors apart, each by its worst output."""
    table = _table("error", "SNR dB", "integer MACs", "of what, against what")
    for name, snr, meaning in errors(value):
        table.add_row(name, snr, _percent(value.integer_macs), meaning)
    return table


def timing(value: Timing, name: str) -> RenderableType:
    """The medians and their ratio, and under which circumstances."""
    table = _table("", "median ms")
    table.add_row("int8", f"{value.int8_ms:.3f}")
    table.add_row("fp32", "left off" if value.fp32_ms is None else f"{value.fp32_ms:.3f}")
    speed = "" if value.ratio is None else f": int8 is {value.ratio:.2f}x as fast as fp32"
    threads = "ONNX Runtime's choice of threads" if value.threads is None else f"threads {value.threads}"
    foot = f"{value.cpu}, {threads}, {value.rounds} rounds in turn, onnxruntime {value.onnxruntime}"
    return Group(Text(f"{printable(name)}{speed}", style="bold"), table, Text(foot))


def explanation(value: Explanation, name: str) -> RenderableType:
    """Every node as it ran, with the plan's precision and the number of its reason; below, each reason once."""
    head = (
        f"{printable(name)}: {coverage(value.integer_macs)} ({value.macs / 1e6:.3f} M MACs, {value.ms:.3f} ms in nodes)"
    )
    table = _table("node", "kernel", "types", "ms", "M MACs", "plan", "why")
    reasons: dict[str, int] = {}
    for node in value.nodes:
        kernel, planned = node.kernel, node.planned
        style = "green" if kernel.integer else "yellow" if kernel.macs else ""
        plan = (
            (middle(planned.precision, 8), str(reasons.setdefault(planned.reason, len(reasons) + 1)))
            if planned
            else ("", "")
        )
        macs = f"{kernel.macs / 1e6:.3f}" if kernel.macs else ""
        names = (middle(kernel.node, 22), Text(middle(kernel.kernel, 16), style=style), middle(kernel.types, 12))
        table.add_row(*names, f"{kernel.ms:.3f}", macs, *plan)
    legend = [Text(f"{number}  {printable(reason)}") for reason, number in reasons.items()]
    return Group(Text(head, style="bold"), table, *legend)


def comparison(value: Comparison) -> RenderableType:
    """Every number of both bundles and its verdict, then the nodes that changed."""
    head = f"{printable(value.new)} against {printable(value.old)}: {printable(compares.headline(value))}"
    table = _table("what", "old", "new", "better by", "bounds", "samples", "verdict")
    for what, *rest in compares.rows_of(value):
        table.add_row(middle(what, 18), *rest[:-1], rest[-1].replace(compares.TOO_FEW, "too few"))
    changed = [
        f"{kind} {printable(node)}" for kind, all_ in (("plan", value.plan), ("kernel", value.kernels)) for node in all_
    ]
    more = [f"and {len(changed) - SHOWN} nodes more"] if len(changed) > SHOWN else []
    return Group(
        Text(head, style="bold green" if value.met else "bold red"),
        table,
        *(Text(line) for line in (*changed[:SHOWN], *more)),
        *(Text(f"note: {printable(note)}", style="yellow") for note in value.notes),
    )


def evaluation(value: Evaluation, name: str) -> RenderableType:
    """Every number with its bounds and limit, then the worst samples."""
    head = f"{printable(name)} on {value.samples} samples: {'met' if value.met else 'NOT MET'}"
    table = _table("what", "found", "bounds", "limit is", "verdict")
    for what, *rest in evaluates.rows_of(value):
        table.add_row(middle(what, 28), *rest)
    worst = _table("worst samples", "SNR dB", "same", "metric FP32", "metric int8")
    for sample, *rest in evaluates.worst_of(value):
        worst.add_row(middle(sample, 32), *rest)
    style = "bold green" if value.met else "bold red"
    return Group(Text(head, style=style), Text(coverage(value.integer_macs)), table, worst)


def outputs(values: Mapping[str, Array]) -> RenderableType:
    """What came out of a run: one line per output."""
    table = _table("output", "dtype", "shape", "min", "mean", "max")
    for name, array in values.items():
        row = [f"{f(array):.6g}" for f in (np.min, np.mean, np.max)] if array.size else ["", "", ""]
        table.add_row(middle(name, 24), str(array.dtype), "x".join(map(str, array.shape)), *row)
    return table


def outputs_table(values: Mapping[str, Array]) -> dict[str, object]:
    """The same for machines: dtype, shape and all values in C order, where NaN and ±inf are strings."""
    return {
        name: {
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "values": [_strict(v) for v in array.ravel().tolist()],
        }
        for name, array in values.items()
    }


def middle(name: str, width: int) -> str:
    """A name for a cell of at most `width` characters; see printable.middle."""
    return _middle(printable(name), width)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(columns):
        text = column in ("kernel", "types", "plan", "dtype", "shape", "met", "of what, against what") or place == 0
        table.add_column(column, justify="left" if text else "right", no_wrap=True)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _strict(value: float) -> float | str:
    return "nan" if math.isnan(value) else value
