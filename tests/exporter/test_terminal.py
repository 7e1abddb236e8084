from __future__ import annotations

import io
import os
import re
import sys

import pytest
from rich.console import Console

from exporter import terminal
from exporter.terminal import Terminal


class Kept(io.StringIO):
    """Can be read when it has been closed."""

    def close(self) -> None:
        pass


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal of 80 columns, as a text."""
    console = Console(file=Kept(), force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(terminal, "_console", lambda: console)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    return console


def lines(screen: Console) -> list[str]:
    """Every line that was drawn, in order."""
    said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.file.getvalue())  # type: ignore[attr-defined]
    return [line.rstrip() for line in re.split(r"[\r\n]+", said) if line.strip()]


def test_counted_batches_have_a_bar_samples_per_second_and_time(screen: Console) -> None:
    with Terminal() as progress:
        assert list(progress.each([3, 4, 5], "calibrate", 3, lambda item: item)) == [3, 4, 5]
    assert re.fullmatch(r"✓ calibrate +━{20} +3/3 +[\d,.]+ samples/s +\d\d:\d\d", lines(screen)[-1])


def test_rate_counts_samples_and_not_batches(screen: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    with Terminal() as progress:
        monkeypatch.setattr(progress._bars, "get_time", lambda: float(next(ticks)))
        for _ in progress.each(range(10), "calibrate", 10, lambda item: 32):
            pass
        (task,) = progress._bars.tasks
        assert task.finished_time is not None
        rate = terminal._Rate().render(task).plain
    assert rate == f"{320 / task.finished_time:,.0f} samples/s"


def test_number_of_batches_need_not_be_known(screen: Console) -> None:
    with Terminal() as progress:
        list(progress.each(iter(range(7)), "measure drift", samples=lambda item: 1))
    assert re.search(r"7/7 +[\d,.]+ samples/s", lines(screen)[-1])


def test_what_holds_no_samples_has_no_rate(screen: Console) -> None:
    with Terminal() as progress:
        list(progress.each(range(3), "search: 97 evaluations (40 known), 1.5 min", 3))
    assert re.fullmatch(r"✓ search: 97 evaluations \(40 known\), 1.5 min +━+ +3/3 +\d\d:\d\d", lines(screen)[-1])


def test_long_stage_takes_no_room_from_the_bars_and_nothing_exceeds_80_columns(screen: Console) -> None:
    with Terminal() as progress:
        progress.stage("write the phone's file, and prove that it is the same model")
        list(progress.each(range(20_000), "calibrate", 20_000, lambda item: 1024))
    assert max(map(len, lines(screen))) <= 80
    assert lines(screen)[-2] == "✓ write the phone's file, and prove that it is the same model"
    assert "20000/20000" in lines(screen)[-1] and "samples/s" in lines(screen)[-1]


def test_terminal_closes_its_copy_of_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = os.openpty()
    with open(outside, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        before = set(os.listdir("/dev/fd"))
        with Terminal() as progress:
            progress.stage("work")
        assert set(os.listdir("/dev/fd")) == before
        monkeypatch.undo()
    os.close(inside)
