"""Try each correction, quantize, and keep it only if the int8 outputs come closer to FP32 on batches it was not fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from exporter import graph, quantize
from exporter.batches import Array, Batch
from exporter.calibrate import Ranges
from exporter.correct import bias, gptq, rounding
from exporter.correct.rounding import Paired
from exporter.errors import QuantizeError
from exporter.place import Plan
from exporter.qparams import Rounded
from exporter.target import Target
from runtime import drift

WORTH_DB = 0.1  # a smaller gain is not worth a changed model
EVERY = 3  # of the batches one in so many is kept from what is fitted to the others


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What one correction did to the worst output's SNR on calibration batches (`graph.unsquashed`), and whether it was kept.

    They are tried one on the other: `before` is with those that were kept before it. The codes of "scale" (`rounding.fit`)
    and "gptq" come with the biases that go with them, if these help.
    """

    name: str
    before_db: float
    after_db: float
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """The int8 graph after the corrections that helped, and the record of all that were tried.

    pair_rule: every layer whose kernel pairs keeps the pair rule (`rounding`), whether the target asks for it or not.
    paired: what the rule did to each layer, where the target asks for it.
    rounded: {weight initializer: its codes}, of every weight that is not rounded to nearest.
    shifted: whether biases take out the mean of the weights' rounding.
    """

    int8: ir.Model
    rounded: Mapping[str, Rounded]
    shifted: bool
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
        batches: calibration batches, some for weights to be fitted to and some to compare on; reported drift uses others.

    Raises:
        QuantizeError: see `quantize.to_int8`; or codes came out that break the rule.
    """
    pairs = target.pairs_in_int16
    nearest = rounding.under_pair_rule(model, plan)[0] if pairs else {}
    seen, unseen = apart(batches)
    expected = list(map(graph.runner(graph.unsquashed(model)), unseen))

    def measured(rounded: Mapping[str, Rounded], corrected: ir.Model, shifted: bool) -> _Candidate:
        int8 = quantize.to_int8(corrected, plan, ranges, rounded)
        return _Candidate(rounded=rounded, shifted=shifted, int8=int8, snr_db=_snr_db(int8, expected, unseen))

    def with_bias(plain: _Candidate) -> _Candidate:
        weights = quantize.weights(plain.int8)
        return measured(plain.rounded, bias.correct(model, plan, means, weights), shifted=True)

    def either(rounded: Mapping[str, Rounded]) -> _Candidate:
        plain = measured(rounded, model, shifted=False)
        return max(with_bias(plain), plain, key=lambda each: each.snr_db)

    tried: list[Correction] = []
    kept = measured(nearest, model, shifted=False)
    kept = _better("bias", kept, with_bias(kept), tried)
    kept = _better("scale", kept, either(rounding.at_best_scale(model, plan, pair_rule=pairs)), tried)
    if seen:
        kept = _better("gptq", kept, either(gptq.rounded(model, plan, seen, pair_rule=pairs)), tried)
    pair_rule = not _breaks_pair_rule(model, plan, quantize.weights(kept.int8))
    if pairs and not pair_rule:
        raise QuantizeError(
            "the int8 weights", found="codes that break the pair rule", expected="codes that keep it",
            do="report the model to us",
        )  # fmt: skip
    return Corrected(
        int8=kept.int8,
        rounded=kept.rounded,
        shifted=kept.shifted,
        pair_rule=pair_rule,
        paired=rounding.effects(model, plan, kept.rounded) if pairs else (),
        corrections=tuple(tried),
    )


def under(
    model: ir.Model,
    plan: Plan,
    ranges: Ranges,
    means: Mapping[tuple[str, int], Array],
    corrected: Corrected,
    gates_on_codes: bool = True,
) -> ir.Model:
    """The int8 graph of a plan with fewer int8 nodes than the corrected one, with the corrections that were kept.

    Dynamic layers have the codes that they had in the corrected graph, whichever way these were rounded.
    """
    int8, dynamic = set(plan.int8), set(plan.dynamic)
    read = {value.name for node in model.graph if node.name in int8 for value in node.inputs if value is not None}
    by_hand = {node.inputs[1].name for node in model.graph if node.name in dynamic and node.inputs[1] is not None}
    rounded = {name: weight for name, weight in corrected.rounded.items() if name in read}
    rounded |= {name: weight for name, weight in quantize.weights(corrected.int8).items() if name in by_hand}
    return quantize.to_int8(source(model, plan, means, corrected), plan, ranges, rounded, gates_on_codes)


def source(model: ir.Model, plan: Plan, means: Mapping[tuple[str, int], Array], corrected: Corrected) -> ir.Model:
    """The prepared graph with the biases that go with the corrected weights, of the layers that the plan has in integers."""
    return bias.correct(model, plan, means, quantize.weights(corrected.int8)) if corrected.shifted else model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Candidate:
    rounded: Mapping[str, Rounded]
    shifted: bool
    int8: ir.Model
    snr_db: float


def _better(name: str, before: _Candidate, after: _Candidate, tried: list[Correction]) -> _Candidate:
    kept = after.snr_db > before.snr_db + WORTH_DB
    tried.append(Correction(name=name, before_db=before.snr_db, after_db=after.snr_db, kept=kept))
    return after if kept else before


def apart(batches: Sequence[Batch]) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """(batches to fit weights to, others to compare on): every EVERYth is of the latter; a single batch is no two."""
    if len(batches) < 2:
        return (), batches
    every = min(EVERY, len(batches))
    return [each for number, each in enumerate(batches, 1) if number % every], batches[every - 1 :: every]


def _breaks_pair_rule(model: ir.Model, plan: Plan, weights: Mapping[str, Rounded]) -> bool:
    """Whether a kernel that adds pairs in int16 could saturate at any layer."""
    return any(
        (weight := weights.get(value.name or "")) is None or rounding.breaks_pair_rule(node, weight.codes)
        for node, value in rounding.paired_layers(model, plan)
    )


def _snr_db(int8: ir.Model, expected: Sequence[Batch], batches: Sequence[Batch]) -> float:
    run = graph.runner(graph.unsquashed(int8))
    return drift.measure(zip(expected, map(run, batches), strict=True)).worst_snr_db
