"""How fast, here: a bundle -> Timing, int8 and FP32 taken in turn in one run, so that a drifting machine hits both alike."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnxruntime as ort

from runtime import cpu
from runtime import manifest as manifests
from runtime.bundle import Bundle, require_opened
from runtime.errors import PacklightError
from runtime.session import open_session

WARM_UP = 2
# Seconds of the CPU on this thread: what a session of one thread takes, however busy the machine is. On Windows they come in
# steps of 16 ms.
CPU_SECONDS = time.perf_counter if sys.platform == "win32" else time.thread_time


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Median milliseconds of one call on the probe's first batch; ratio = fp32_ms / int8_ms, above 1 when int8 is faster.

    FP32 is None where model.fp32.onnx was left off; threads None is ONNX Runtime's choice.
    """

    int8_ms: float
    fp32_ms: float | None
    ratio: float | None
    threads: int | None
    rounds: int
    cpu: str
    onnxruntime: str


def measure(bundle: Bundle, rounds: int = 30, clock: Callable[[], float] = time.perf_counter) -> Timing:
    """Time a bundle: A B A B ..., `rounds` times each, medians, by a clock that gives seconds.

    FP32 runs as ONNX Runtime would run it by itself, without the session entries that the manifest asks for int8.

    Raises:
        PacklightError: rounds < 1.
    """
    require_opened(bundle, "bench")
    if not isinstance(rounds, int) or rounds < 1:
        raise PacklightError("rounds", found=repr(rounds), expected="1 or more, as an int")
    feed = dict(bundle.probes()[0].inputs)
    turns: list[Callable[[], object]] = [lambda: bundle.run(feed)]
    if (bundle.path / manifests.FP32).exists():
        with bundle.held(manifests.FP32) as reference:
            session = open_session(reference, threads=bundle.threads, providers=bundle.providers)
        turns.append(lambda: session.run(None, feed))
    medians = medians_ms(turns, rounds, clock)
    int8_ms, fp32_ms = medians[0], medians[1] if len(medians) > 1 else None
    return Timing(
        int8_ms=int8_ms,
        fp32_ms=fp32_ms,
        ratio=None if fp32_ms is None else fp32_ms / int8_ms,
        threads=bundle.threads,
        rounds=rounds,
        cpu=cpu.name(),
        onnxruntime=ort.__version__,
    )


def medians_ms(
    turns: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Milliseconds of one call of each, taken in turn: A B A B ..., medians over the rounds, by a clock that gives seconds."""
    return in_turn([partial(seconds, turn, clock) for turn in turns], rounds)


def seconds(turn: Callable[[], object], clock: Callable[[], float]) -> float:
    """How long one call takes."""
    start = clock()
    turn()
    return clock() - start


def in_turn(calls: Sequence[Callable[[], float]], rounds: int) -> list[float]:
    """Median milliseconds of calls that say how many seconds they took, made in turn."""
    return [float(np.median(taken)) * 1e3 for taken in rounds_in_turn(calls, rounds)]


def rounds_in_turn(calls: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """What each of these calls says in each round, [calls][rounds]: those of one round stand at one place, and make a pair."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(WARM_UP + rounds):
        for call, taken in zip(calls, times, strict=True):
            took = call()
            if number >= WARM_UP:
                taken.append(took)
    return times
