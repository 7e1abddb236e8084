"""How fast, here: a bundle -> Timing, int8 and FP32 taken in turn in one run, so that a drifting machine hits both alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from runtime import cpu
from runtime import manifest as manifests
from runtime.bundle import Bundle
from runtime.errors import PacklightError
from runtime.session import open_session

WARM_UP = 2


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


def measure(bundle: Bundle, rounds: int = 30) -> Timing:
    """Time a bundle: A B A B ..., `rounds` times each, medians.

    FP32 runs as ONNX Runtime would run it by itself, without the session entries that the manifest asks for int8.

    Raises:
        PacklightError: rounds < 1.
    """
    if rounds < 1:
        raise PacklightError("rounds", found=str(rounds), expected="1 or more")
    feed = dict(bundle.probes()[0].inputs)
    turns: list[Callable[[], object]] = [lambda: bundle.run(feed)]
    if (reference := bundle.path / manifests.FP32).exists():
        session = open_session(reference, threads=bundle.threads, providers=bundle.providers)
        turns.append(lambda: session.run(None, feed))
    medians = medians_ms(turns, rounds)
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


def medians_ms(turns: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Milliseconds of one call of each, taken in turn: A B A B ..., medians over the rounds."""
    times: list[list[float]] = [[] for _ in turns]
    for number in range(WARM_UP + rounds):
        for turn, taken in zip(turns, times, strict=True):
            start = time.perf_counter()
            turn()
            if number >= WARM_UP:
                taken.append(time.perf_counter() - start)
    return [float(np.median(taken)) * 1e3 for taken in times]
