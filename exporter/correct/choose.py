"""Try each correction, quantize, and keep it only if the int8 outputs come closer to FP32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from exporter import graph, quantize
from exporter.batches import Array, Batch
from exporter.calibrate import Ranges
from exporter.correct import bias, rounding
from exporter.correct.rounding import Paired
from exporter.errors import QuantizeError
from exporter.place import Plan
from exporter.qparams import Rounded
from exporter.target import Target
from runtime import drift

WORTH_DB = 0.1  # a smaller gain is not worth a changed model


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What one correction did to the worst output's SNR on calibration batches, and whether it was kept."""

    name: str
    before_db: float
    after_db: float
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """The int8 graph after the corrections that helped, and the record of all that were tried.

    pair_rule: every layer whose kernel pairs keeps the pair rule (`rounding`), whether the target asks for it or not.
    paired: what the rule did to each layer, where the target asks for it.
    """

    int8: ir.Model
    pair_rule: bool
    paired: tuple[Paired, ...]
    corrections: tuple[Correction, ...]


def improve(
    model: ir.Model,
    plan: Plan,
    ranges: Ranges,
    means: Mapping[tuple[str, int], Array],
    target: Target,
    batches: Sequence[Batch],
) -> Corrected:
    """Quantize with and without each correction and keep the better.

    Args:
        model, plan, ranges: as for `quantize.to_int8`.
        means: channel means of `bias.channels`.
        target: whether weights must keep the pair rule.
        batches: calibration batches to compare on; reported drift uses others.

    Raises:
        QuantizeError: see `quantize.to_int8`; or codes came out that break the rule.
    """
    rounded, paired = rounding.under_pair_rule(model, plan) if target.pairs_in_int16 else ({}, ())
    plain = quantize.to_int8(model, plan, ranges, rounded)
    weights = quantize.weights(plain)
    pair_rule = not _breaks_pair_rule(model, plan, weights)
    if target.pairs_in_int16 and not pair_rule:
        raise QuantizeError(
            "the int8 weights", found="codes that break the pair rule", expected="codes that keep it",
            do="report the model to us",
        )  # fmt: skip
    expected = list(map(graph.runner(model), batches))
    before = _snr_db(plain, expected, batches)
    better = quantize.to_int8(bias.correct(model, plan, means, weights), plan, ranges, rounded)
    after = _snr_db(better, expected, batches)
    kept = after > before + WORTH_DB
    tried = Correction(name="bias", before_db=before, after_db=after, kept=kept)
    return Corrected(
        int8=better if kept else plain,
        pair_rule=pair_rule,
        paired=paired,
        corrections=(tried,),
    )


def _breaks_pair_rule(model: ir.Model, plan: Plan, weights: Mapping[str, Rounded]) -> bool:
    """Whether a kernel that adds pairs in int16 could saturate at any layer."""
    return any(
        (weight := weights.get(value.name or "")) is None or rounding.breaks_pair_rule(node, weight.codes)
        for node, value in rounding.paired_layers(model, plan)
    )


def _snr_db(int8: ir.Model, expected: Sequence[Batch], batches: Sequence[Batch]) -> float:
    run = graph.runner(int8)
    return drift.measure(zip(expected, map(run, batches), strict=True)).worst_snr_db
