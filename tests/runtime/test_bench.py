from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest

import runtime
from runtime import bench as function
from runtime import cpu
from runtime import manifest as manifests
from runtime.bench import CPU_SECONDS, WARM_UP, medians_ms, seconds
from runtime.errors import PacklightError


def test_timing_says_what_was_measured_and_how(bundle_folder: Path) -> None:
    timing = runtime.bench(runtime.load(bundle_folder, threads=1), rounds=5)
    assert (timing.threads, timing.rounds, timing.onnxruntime) == (1, 5, ort.__version__)
    assert timing.ratio == timing.fp32_ms / timing.int8_ms
    assert 0 < timing.int8_ms < 1000


def test_cpu_is_named_as_the_system_names_it() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "model name" not in cpuinfo.read_text():
        pytest.skip("no model name in /proc/cpuinfo here")
    assert f": {cpu.name()}\n" in cpuinfo.read_text()


def test_without_fp32_there_is_no_ratio(own_bundle: Path) -> None:
    (own_bundle / manifests.FP32).unlink()
    timing = runtime.bench(runtime.load(own_bundle), rounds=1)
    assert (timing.fp32_ms, timing.ratio, timing.threads) == (None, None, None)


def test_no_rounds_is_refused(bundle_folder: Path) -> None:
    with pytest.raises(PacklightError, match="rounds: found 0, expected 1 or more"):
        function(runtime.load(bundle_folder), rounds=0)


def test_medians_are_in_turn_and_by_the_clock_that_is_given() -> None:
    now, asked = [0.0], list[str]()

    def takes(name: str, long: float) -> Callable[[], None]:
        def turn() -> None:
            asked.append(name)
            now[0] += long * (100 if len(asked) < 3 else 1)  # the first round is slow, and not counted

        return turn

    found = medians_ms([takes("a", 0.25), takes("b", 0.5)], 3, lambda: now[0])
    assert found == [250.0, 500.0]
    assert asked == ["a", "b"] * (WARM_UP + 3)


@pytest.mark.skipif(sys.platform == "win32", reason="elapsed time there")
def test_seconds_of_the_cpu_do_not_count_waiting() -> None:
    assert seconds(lambda: time.sleep(0.2), CPU_SECONDS) < 0.1
