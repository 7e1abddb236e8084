"""The progress of an export on a terminal: a spinner for each stage; bar, time left and, of batches, samples per second."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from runtime.printable import printable

T = TypeVar("T")


def _console() -> Console:
    """A console on a copy of stderr: while a tracer works, stderr itself is kept quiet, and the bars go on."""
    if not sys.stderr.isatty():
        return Console(stderr=True)
    return Console(file=open(os.dup(sys.stderr.fileno()), "w", encoding="utf-8"))  # Terminal closes it


class _Rate(ProgressColumn):
    """Samples per second: of the last half minute, or of the whole when it has ended."""

    def render(self, task: Task) -> Text:
        samples = task.fields["samples"]
        if samples is None:
            return Text("")
        if task.finished_time:
            rate = samples / task.finished_time
        elif task.speed and task.completed:
            rate = task.speed * samples / task.completed
        else:
            return Text("")
        return Text(f"{rate:,.{0 if rate >= 10 else 1}f} samples/s", style="progress.data.speed")


class _Line(ProgressColumn):
    """The name of a stage, and behind it what is known of its batches, where it has any."""

    def __init__(self) -> None:
        super().__init__()
        left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
        self._counted = BarColumn(bar_width=20), MofNCompleteColumn(), _Rate(), left

    def render(self, task: Task) -> Text | Table:
        name = Text(task.description)
        if "samples" not in task.fields:
            return name
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(name, *(column(task) for column in self._counted))
        return line


class Terminal:
    """Draws the stages on stderr: a spinner and the stage's name, and a bar where batches or plans are counted."""

    def __init__(self) -> None:
        self._console = _console()
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            _Line(),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Terminal:
        self._bars.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if failure[0] is None:
            self._end()
        self._bars.stop()
        if self._console.file is not sys.stderr:
            self._console.file.close()

    def stage(self, text: str) -> None:
        self._end()
        self._bars.add_task(printable(text), total=1)

    def note(self, text: str) -> None:
        self._console.print(f"note: {printable(text)}", style="dim", markup=False, soft_wrap=True)

    def each(
        self, items: Iterable[T], text: str, total: int | None = None, samples: Callable[[T], int] | None = None
    ) -> Iterator[T]:
        self._end()
        bar = self._bars.add_task(printable(text), total=total, samples=None if samples is None else 0)
        count = seen = 0
        for count, item in enumerate(items, start=1):
            yield item
            seen += 0 if samples is None else samples(item)
            self._bars.update(bar, completed=count, samples=None if samples is None else seen)
        self._bars.update(bar, total=count)

    def _end(self) -> None:
        for task in self._bars.tasks:
            if not task.finished:
                self._bars.update(
                    task.id, total=task.total or task.completed or 1, completed=task.total or task.completed or 1
                )
