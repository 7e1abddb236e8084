"""Plans as dots: SNR against ms, in the coordinates of an SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from exporter.search import Point

LEFT, RIGHT, TOP, BOTTOM = 60, 20, 30, 50  # room for the axes
TICKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A number of an axis, and where it stands."""

    at: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One plan."""

    x: float
    y: float
    chosen: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """dots: every plan with a finite SNR, the chosen one last. frontier: a polyline's points. across, up: the axes."""

    dots: tuple[Dot, ...]
    frontier: str
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]


def scatter(points: Sequence[Point], frontier: Sequence[Point], chosen: Point, width: int, height: int) -> Plot:
    """Every plan at (ms, SNR), within the axes; one that equals FP32 has no finite SNR, and no dot."""
    seen = [point for point in points if math.isfinite(point.snr_db)] or [chosen]
    ms, db = _Axis([p.ms for p in seen], LEFT, width - RIGHT), _Axis([p.snr_db for p in seen], height - BOTTOM, TOP)
    dots = [
        Dot(
            x=ms(point.ms),
            y=db(point.snr_db),
            chosen=point == chosen,
            text=f"{len(point.float_layers)} layers float, {len(point.dynamic_layers)} dynamic, {len(point.opened)} gates open: "
            f"{point.snr_db:.2f} dB, {point.ms:.3f} ms",
        )
        for point in sorted(seen, key=lambda point: point == chosen)
    ]
    line = " ".join(f"{ms(p.ms)},{db(p.snr_db)}" for p in frontier if math.isfinite(p.snr_db))
    return Plot(dots=tuple(dots), frontier=line, across=ms.ticks("{:.2f}"), up=db.ticks("{:.1f}"))


class _Axis:
    """Values -> pixels, the smallest at `start`, the largest at `stop`."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        self.low, self.high = min(values), max(values)
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + (self.stop - self.start) * share, 1)

    def ticks(self, form: str) -> tuple[Tick, ...]:
        values = [self.low + (self.high - self.low) * n / TICKS for n in range(TICKS + 1)]
        shown = {form.format(value): value for value in values}
        return tuple(Tick(at=self(value), text=text) for text, value in shown.items())
