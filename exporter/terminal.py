"""The progress of an export on a terminal: a spinner for each stage, a bar where batches are counted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def _console() -> Console:
    """A console on a copy of stderr: while a tracer works, stderr itself is kept quiet, and the bars go on."""
    if not sys.stderr.isatty():
        return Console(stderr=True)
    return Console(file=open(os.dup(sys.stderr.fileno()), "w", encoding="utf-8"))  # Terminal closes it


class Terminal:
    """Draws the stages on stderr: a spinner and the stage's name, and a bar where batches are counted."""

    def __init__(self) -> None:
        self._console = _console()
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
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
        self._bars.add_task(text, total=1)

    def note(self, text: str) -> None:
        self._console.print(f"note: {text}", style="dim", markup=False, soft_wrap=True)

    def each(self, items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
        self._end()
        bar = self._bars.add_task(text, total=total)
        count = 0
        for count, item in enumerate(items, start=1):
            yield item
            self._bars.update(bar, completed=count)
        self._bars.update(bar, total=count)

    def _end(self) -> None:
        for task in self._bars.tasks:
            if not task.finished:
                self._bars.update(
                    task.id, total=task.total or task.completed or 1, completed=task.total or task.completed or 1
                )
