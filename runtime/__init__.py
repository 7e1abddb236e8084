"""packlight on the device: load a bundle, run it, and let it prove itself. Needs numpy and onnxruntime only."""

from __future__ import annotations

from runtime.bench import Timing
from runtime.bench import measure as bench
from runtime.bundle import Bundle
from runtime.drift import Drift
from runtime.errors import BundleError, DriftExceeded, InputError, PacklightError
from runtime.gate import Verdict, check
from runtime.kernels import Kernels, kernels
from runtime.opened import load

__all__ = [
    "Bundle",
    "BundleError",
    "Drift",
    "DriftExceeded",
    "InputError",
    "Kernels",
    "PacklightError",
    "Timing",
    "Verdict",
    "bench",
    "check",
    "kernels",
    "load",
]
