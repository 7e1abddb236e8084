"""A held-out batch through both models: what drift compares, here and on a worker of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from exporter.batches import Array, Batch
from exporter.errors import CalibrationError
from runtime.session import ORT_ERRORS, open_session

# One thread: the sums of float nodes have one order, so the outputs have one value
THREADS = 1

Outputs = dict[str, Array]
RunBoth = Callable[[Batch, int], tuple[Outputs, Outputs]]


def runner(fp32: bytes, int8: bytes, entries: Mapping[str, str]) -> RunBoth:
    """A function (batch, its number) -> outputs of the FP32 model, outputs of the int8 model. The sessions are made here, once.

    Args:
        entries: session entries of the target, for `int8`.

    Raises:
        BundleError: ONNX Runtime refuses a model. The function: CalibrationError for a batch that a model refuses, or on which the
            FP32 model gives NaN or infinity.
    """
    reference, candidate = open_session(fp32, threads=THREADS), open_session(int8, threads=THREADS, entries=entries)
    names = [output.name for output in reference.get_outputs()]

    def run(batch: Batch, number: int) -> tuple[Outputs, Outputs]:
        try:
            wanted, got = (
                dict(zip(names, session.run(names, dict(batch)), strict=True)) for session in (reference, candidate)
            )
        except ORT_ERRORS as error:
            raise CalibrationError(
                f"held-out batch {number}: the model cannot run on it",
                found=str(error)[:200],
                expected="shapes and values that the model takes",
                batch=number,
            ) from error
        _require_finite(wanted, number)
        return wanted, got

    return run


def _require_finite(outputs: Outputs, number: int) -> None:
    for name, value in outputs.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise CalibrationError(
                f"held-out batch {number}: output {name!r} of the FP32 model",
                found="NaN or infinity",
                expected="finite numbers",
                tensor=name,
                batch=number,
            )
