"""What bundles give on other CPUs: `packlight check` on each device that tests/devices has, and in wasm.

    python -m benchmarks.devices                    # samples digits and lite0, exported for portable and for x86-vnni
    python -m benchmarks.devices build/lite0 ...    # your bundles

Prints a Markdown table. q is the device error in units of the quantization error; the three SNR are of the worst output.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import exporter
import runtime
from exporter.source import from_file
from tests import devices
from tests.devices import web
from tests.devices.guest import ROOT

DEVICES = ("full", "avx512", "avx2", "cortex-a53", "cortex-a76", "wasm")
SAMPLES, PRESETS = ("digits", "lite0"), ("portable", "x86-vnni")
BATCHES = 4  # of each sample's held-out ones, spread evenly: an emulated core takes seconds for each
ERRORS = ("quantization", "kernel", "device")


def made(folder: Path) -> Iterator[Path]:
    """The samples' bundles."""
    for name, preset in itertools.product(SAMPLES, PRESETS):
        sample = from_file(str(ROOT / "samples" / name))
        assert sample.calibration is not None
        assert sample.heldout is not None
        heldout = list(sample.heldout())
        exporter.export(
            sample.source(),
            exporter.load_recipe(preset),
            calibration=sample.calibration(),
            heldout=heldout[:: max(1, len(heldout) // BATCHES)],
            out=folder / f"{name}-{preset}",
        )
        yield folder / f"{name}-{preset}"


def checked(device: str, bundle: Path, folder: Path) -> Mapping[str, Any]:
    """The device's verdict, as its JSON says it."""
    if device != "wasm":
        return devices.check(device, bundle)
    page = folder / "page"
    if not page.exists():
        web.set_up(bundle, page)
    return web.check_in_node(page, bundle)[1]


def row(verdict: Mapping[str, Any]) -> str:
    """The cells of one verdict."""
    worst = max(map(float, verdict["q"].values()))
    snr = (
        min((float(each["snr_db"]) for each in (verdict[error] or {"outputs": []})["outputs"]), default=float("nan"))
        for error in ERRORS
    )
    words = ("yes" if verdict[key] else "no" for key in ("met", "exact"))
    numbers = " | ".join(f"{each:.1f}" for each in snr)
    return f"{' | '.join(words)} | {worst:.2f} | {numbers} | {100 * verdict['integer_macs']:.1f} %"


def compare(bundles: Sequence[Path], folder: Path) -> None:
    """Print the table."""
    print("| bundle | target | device | met | exact | q | quantization dB | kernel dB | device dB | integer MACs |")
    print(f"|{'---|' * 10}")
    for bundle in bundles or made(folder):
        about = runtime.load(bundle).manifest
        for device in DEVICES:
            print(f"| {about.name} | {about.target} | {device} | {row(checked(device, bundle, folder))} |", flush=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="packlight-devices-") as folder:
        compare([Path(each) for each in sys.argv[1:]], Path(folder))


if __name__ == "__main__":
    main()
