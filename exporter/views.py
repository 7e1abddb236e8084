"""The exporter's values as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from exporter.target import Fact, Target
from runtime.cpu import Cpu


def targets(listed: Sequence[Target], here: Target, cpu: Cpu) -> RenderableType:
    """A line a target, and which one this machine is."""
    table = _table("target", "for", "weights", "costs measured on")
    for each in listed:
        weights = "8 bits, pair rule" if each.pairs_in_int16 else "8 bits"
        table.add_row(Text(each.name, style="bold" if each is here else ""), each.summary, weights, each.costs_from)
    summed = "pairs of u8·s8 products in int16" if cpu.pairs_in_int16 else "u8·s8 products in int32"
    flags = f", {' '.join(cpu.flags)}" if cpu.flags else ""
    return Group(table, Text(f"this machine: {here.name} ({cpu.name}{flags}; its kernels sum {summed})"))


def facts(name: str, listed: Sequence[Fact]) -> RenderableType:
    """What a target says, and under each fact why."""
    lines: list[RenderableType] = [Text(name, style="bold")]
    for fact in listed:
        lines += [Text(f"{fact.what}: {fact.value}"), Padding(Text(fact.why, style="dim"), (0, 0, 0, 4))]
    return Group(*lines)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
