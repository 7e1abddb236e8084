"""When two runs are one model: the measure that trace and every rewrite are held to."""

from __future__ import annotations

from collections.abc import Mapping

from exporter.batches import Array
from runtime import drift

# 60 dB is a relative error of 1e-3: a wrong graph falls below 40. Two float32 orders of summation stay above 100 dB in most
# networks, and at 68 on a picture of a LeViT whose batch norms divide by next to nothing: 85 and 130 on two others
EQUAL_SNR_DB = 60.0
# on values that no data has (a negated image) rounding can be amplified beyond that; a wrong branch is still far below
ALIKE_SNR_DB = 30.0
# an output that is zero but for rounding has no SNR worth the name
EQUAL_MAX_ABS = 1e-6


def difference(
    reference: Mapping[str, Array], candidate: Mapping[str, Array], least_snr_db: float = EQUAL_SNR_DB
) -> str:
    """How `candidate` differs from `reference`, as a clause that names the worst output; empty when they are equal.

    Equal means: the same names, dtypes and shapes, and each output within least_snr_db or EQUAL_MAX_ABS.
    """
    for name, value in reference.items():
        if name not in candidate:
            return f"no output {name!r}"
        other = candidate[name]
        if value.shape != other.shape:
            return f"{name!r} has shape {list(other.shape)} instead of {list(value.shape)}"
        if value.dtype != other.dtype:
            return f"{name!r} has dtype {other.dtype} instead of {value.dtype}"
    measured = drift.measure([(reference, candidate)])
    for output in measured.outputs:
        if output.snr_db < least_snr_db and not output.max_abs <= EQUAL_MAX_ABS:
            return f"{output.name!r} differs: SNR {output.snr_db:.1f} dB, largest error {output.max_abs:.3g}"
    return ""
