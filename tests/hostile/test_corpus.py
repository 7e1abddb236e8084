"""Every case of the corpus: an error of ours, or right; in time, in little memory, and without a foreign word."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from runtime import manifest, npz, probe
from runtime.errors import PacklightError
from runtime.peak import held
from tests.hostile.corpus import Case, cases
from tests.runtime import models, test_npz

SECONDS, BYTES = 10, 512_000_000
FUZZ_SECONDS = int(os.environ.get("PACKLIGHT_FUZZ_SECONDS", "60"))


class TookTooLong(BaseException):
    """No boundary takes it for an error of its own."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*told: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def forget_peak() -> int:
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")
    return held("VmRSS")


def fault(case: Case, folder: Path) -> str:
    """What is wrong with how a case ended; empty where nothing is."""
    folder.mkdir()
    before = forget_peak()
    try:
        with limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.act(folder)
    except PacklightError as error:
        if not str(error).isprintable() or len(str(error)) > 500:
            return "a message that is no line of ours"
    except TookTooLong:
        return f"longer than {SECONDS} s"
    except BaseException as error:  # whatever it is: that is what is looked for
        return f"{type(error).__name__}: {error}"[:300]
    grown = held("VmHWM") - before
    return f"{grown} bytes of memory" if grown > BYTES else ""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_bundle(tmp_path_factory.mktemp("good") / "tiny")


def test_every_input_of_the_corpus_is_an_error_of_ours_or_right(good: Path, tmp_path: Path) -> None:
    every, start = cases(good), time.monotonic()
    faults = {}
    for number, case in enumerate(every):
        if said := fault(case, tmp_path / str(number)):
            faults[f"{case.kind}: {case.name}"] = said
    counted = Counter(case.kind for case in every)
    print(f"{len(every)} cases of {len(counted)} kinds in {time.monotonic() - start:.0f} s", dict(counted))
    assert faults == {}
    assert len(every) >= 400 and len({(case.kind, case.name) for case in every}) == len(every)


@pytest.mark.slow
def test_random_changes_of_manifest_probe_and_arrays_are_errors_of_ours_or_right(good: Path, tmp_path: Path) -> None:
    rng, end, count = np.random.default_rng(16), time.monotonic() + FUZZ_SECONDS, 0
    texts = (good / manifest.MANIFEST).read_bytes()
    seeds = [
        texts,
        (good / manifest.PROBE).read_bytes(),
        test_npz.saved(x=np.arange(9.0)),
        test_npz.saved(packed=True, x=np.ones(99)),
    ]
    while time.monotonic() < end:
        which = int(rng.integers(len(seeds)))
        content = bytearray(seeds[which])
        for _ in range(int(rng.integers(1, 6))):
            at, kind = int(rng.integers(len(content))), int(rng.integers(4))
            if kind == 0:
                content[at] = int(rng.integers(256))
            elif kind == 1:
                del content[at : at + int(rng.integers(1, 40))]
            elif kind == 2:
                content[at:at] = content[at : at + int(rng.integers(1, 40))]
            else:
                content[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8))
            content = content or bytearray(b"x")
        with limited(SECONDS):
            try:
                if which == 0:
                    text = bytes(content).decode("utf-8", "surrogateescape")
                    assert manifest.loads(manifest.dumps(manifest.loads(text, "m")), "m") == manifest.loads(text, "m")
                elif which == 1:
                    probe.read_probe(Path("p"), bytes(content))
                else:
                    npz.arrays(bytes(content))
            except PacklightError:
                pass
            except ValueError:
                assert which > 1
        count += 1
    print(f"{count} inputs")
    assert count > 10_000
