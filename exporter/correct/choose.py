"""Try each correction, and keep it only if the outputs come closer to FP32 on batches it was not fitted to.

"smooth" changes the rounding of activations: int8 outputs are compared. The others change that of weights: outputs are compared
with rounded weights and real activations, as ranges are with real weights (`calibrate.auto`). Beside an error that the search
mends later a correction does not show. In PP-LCNet the rounding of one activation alone leaves 24 dB; bias correction takes
that of the weights from 28 to 35 dB, and int8 outputs from 25.5 to 24.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import onnx_ir as ir

from exporter import graph, optional, proof, quantize, varies
from exporter.batches import Array, Batch
from exporter.calibrate import Interval, Ranges, intervals
from exporter.correct import bias, gptq, layers, rounding, smooth
from exporter.correct.rounding import Paired
from exporter.correct.smooth import Moved
from exporter.errors import QuantizeError
from exporter.numerics.quantized import QuantizedTensor, decode
from exporter.place import Plan
from exporter.prepare import edit
from exporter.quantize import NOTHING_ROUNDED
from exporter.target import Target
from runtime import drift

WORTH_DB = 0.1  # a smaller gain is not worth a changed model
SMOOTH_WORTH_DB = 0.3  # ... and it must be beyond luck where all ranges change: 0.2 dB was, on other batches, gone
# ... and worth the room above each channel that it takes away, where the largest of few values says little of those to come:
# 0.3 dB for 320 samples of a perceptron cost 9 dB on other writers' digits
FEW_VALUES, FEW_WORTH_DB = 4096, 1.0
EVERY = 3  # of the batches one in so many is kept from what is fitted to the others


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What one correction did to the worst output's SNR on calibration batches (`graph.unsquashed`), and whether it was kept.

    The SNR is of int8 outputs for "smooth", and with real activations for the others. They are tried one on the other, "smooth"
    first: `before` is with those that were kept before it. The codes of "scale" (`pairing.fit`) and "gptq" come with the
    biases that go with them, if these help.

    why: it could not be tried, and has no `after_db` (without outputs to compare no `before_db`), or be quantized.
    """

    name: str
    before_db: float | None
    after_db: float | None
    kept: bool
    why: str = ""

    @property
    def rounded(self) -> str:
        """What is rounded in the outputs that are compared."""
        return "all" if self.name == "smooth" else "weights alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrected:
    """The int8 graph after the corrections that helped, and the record of all that were tried.

    pair_rule: every layer whose kernel pairs keeps the pair rule (`rounding`), whether the target asks for it or not.
    paired: what the rule did to each layer, where the target asks for it.
    rounded: {weight initializer: its codes}, of every weight that is not rounded to nearest.
    shifted: whether biases take out the mean of the weights' rounding.
    moved: the scales that moved through the prepared graph; None where they stayed.
    ranges, means: those that were given, or of the graph with the scales moved.
    """

    int8: ir.Model
    ranges: Ranges
    means: Mapping[tuple[str, int], Array]
    moved: Moved | None
    rounded: Mapping[str, QuantizedTensor]
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
    told_apart: Mapping[str, Interval] | None = None,
    kept: Mapping[str, QuantizedTensor] = NOTHING_ROUNDED,
) -> Corrected:
    """Quantize with and without each correction and keep the better.

    Args:
        model, plan, ranges: as for `quantize.to_int8`.
        means: channel means of `bias.channels`.
        target: whether weights must keep the pair rule.
        batches: calibration batches, some for weights to be fitted to and some to compare on; reported drift uses others.
        told_apart: see `smooth.find`; None asks the model.
        kept: {weight initializer: codes that the file came with}. They stay, but for pairs that break the rule where it is asked
            for. Scales move through no graph of which anything is kept.

    Raises:
        QuantizeError: see `quantize.to_int8`; or codes came out that break the rule.
    """
    pairs = target.pairs_in_int16
    seen, unseen = apart(batches)
    expected = list(map(graph.runner(graph.unsquashed(model)), unseen))
    against = varies.grounds(graph.unsquashed(model), expected, unseen)

    given, firm = rounding.kept(model, plan, kept, pair_rule=pairs)

    def nearest(ground: _Ground) -> tuple[_Ground, Mapping[str, QuantizedTensor], ir.Model]:
        """The codes rounded to nearest, which the quantizer makes itself where no pair rule is asked for; the int8 graph."""
        rounded = {**(rounding.under_pair_rule(ground.model, plan)[0] if pairs else {}), **given}
        return ground, rounded, quantize.to_int8(ground.model, plan, ground.ranges, rounded)

    def db(model: ir.Model) -> float:
        run = graph.runner(graph.unsquashed(model))
        return drift.measure(zip(expected, map(run, unseen), strict=True), against).worst_snr_db

    tried: list[Correction] = []
    ground, plain, int8 = nearest(_Ground(model=model, ranges=ranges, means=means, moved=None))

    def smoothed() -> tuple[Correction, tuple[_Ground, Mapping[str, QuantizedTensor], ir.Model]] | None:
        if kept or ranges.kept:
            return None
        apart_from = intervals(model) if told_apart is None else told_apart
        moved = _smoothed(ground, plan, apart_from, seen, unseen, expected)
        if moved is None:
            return None
        other = nearest(moved)
        before, after = db(int8), db(other[2])
        few = smooth.fewest_values(ground.model, plan, batches) < FEW_VALUES
        worth = after > before + (FEW_WORTH_DB if few else SMOOTH_WORTH_DB)
        return Correction(name="smooth", before_db=before, after_db=after, kept=worth), other

    smooth_step = optional.attempt(smoothed, None)
    if smooth_step.value is not None:
        tried.append(smooth_step.value[0])
        ground, plain, int8 = smooth_step.value[1] if tried[0].kept else (ground, plain, int8)
    elif smooth_step.why:
        tried.append(_untried("smooth", None, smooth_step.why))
    codes = quantize.weights(int8)

    def corrected(rounded: Mapping[str, QuantizedTensor], shifted: bool) -> ir.Model:
        return bias.correct(ground.model, plan, ground.means, {**codes, **rounded}) if shifted else ground.model

    def measured(rounded: Mapping[str, QuantizedTensor], shifted: bool) -> _Weights:
        changed = _with_weights(corrected(rounded, shifted), plan, {**codes, **rounded})
        return _Weights(rounded=rounded, shifted=shifted, snr_db=db(changed))

    def either(rounded: Mapping[str, QuantizedTensor]) -> _Weights:
        without = measured(rounded, shifted=False)
        shifted = optional.attempt(lambda: measured(rounded, shifted=True), without).value
        return max((shifted, without), key=lambda each: each.snr_db)

    def fitted() -> _Weights:
        if not seen:
            raise QuantizeError("there is one calibration batch, and none to fit weights to")
        found = gptq.rounded(ground.model, plan, seen, pair_rule=pairs)  # of layers that saw inputs
        return either({**plain, **found, **firm})

    start = optional.attempt(lambda: measured(plain, shifted=False), None)
    first = best = start.value or _Weights(rounded=plain, shifted=False, snr_db=math.nan)
    steps: Mapping[str, Callable[[_Weights], _Weights]] = {
        "bias": lambda before: measured(before.rounded, shifted=True),
        "scale": lambda _: either({**rounding.at_best_scale(ground.model, plan, pair_rule=pairs), **firm}),
        "gptq": lambda _: fitted(),
    }
    for name, make in steps.items():
        step = partial(make, best)
        after = optional.attempt(step, None) if start.value is not None else optional.Tried(value=None, why=start.why)
        if after.value is None:
            tried.append(_untried(name, best.snr_db, after.why))
        else:
            best = _better(name, best, after.value, tried)

    def finished(weights: _Weights) -> tuple[ir.Model, bool]:
        """The int8 graph, and whether it keeps the pair rule, as it must where the target asks for it."""
        made = int8
        if weights is not first:
            source = corrected(weights.rounded, weights.shifted)
            made = quantize.to_int8(source, plan, ground.ranges, weights.rounded)
        pair_rule = not _breaks_pair_rule(model, plan, quantize.weights(made))
        if pairs and not pair_rule:
            raise QuantizeError(
                "the int8 weights", found="codes that break the pair rule", expected="codes that keep it",
                do="report the model to us",
            )  # fmt: skip
        return made, pair_rule

    last = optional.attempt(lambda: finished(best), None)
    if last.value is None and best is not first:
        best = first
        tried = [
            replace(each, kept=False, why=last.why) if each.kept and each.name != "smooth" else each for each in tried
        ]
    int8, pair_rule = last.value or finished(first)
    return Corrected(
        int8=int8,
        ranges=ground.ranges,
        means=ground.means,
        moved=ground.moved,
        rounded=best.rounded,
        shifted=best.shifted,
        pair_rule=pair_rule,
        paired=rounding.effects(ground.model, plan, best.rounded) if pairs else (),
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

    model is the prepared graph; ranges and means are those of `corrected`. Dynamic layers have the codes that they had in the
    corrected graph, whichever way these were rounded.
    """
    int8, dynamic = set(plan.int8), set(plan.dynamic)
    read = {value.name for node in model.graph if node.name in int8 for value in node.inputs if value is not None}
    by_hand = {node.inputs[1].name for node in model.graph if node.name in dynamic and node.inputs[1] is not None}
    rounded = {name: weight for name, weight in corrected.rounded.items() if name in read}
    rounded |= {name: weight for name, weight in quantize.weights(corrected.int8).items() if name in by_hand}
    return quantize.to_int8(source(model, plan, means, corrected), plan, ranges, rounded, gates_on_codes)


def source(model: ir.Model, plan: Plan, means: Mapping[tuple[str, int], Array], corrected: Corrected) -> ir.Model:
    """The prepared graph with the scales moved, and the biases that go with the corrected weights of the layers that the
    plan has in integers.
    """
    if corrected.moved is not None:
        model = corrected.moved.graph(model)
    return bias.correct(model, plan, means, quantize.weights(corrected.int8)) if corrected.shifted else model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Ground:
    """The float graph to quantize, equal to the prepared one, and what calibration found of its tensors."""

    model: ir.Model
    ranges: Ranges
    means: Mapping[tuple[str, int], Array]
    moved: Moved | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Weights:
    """Codes of weights, with or without the biases that go with them, and the worst output's SNR with real activations."""

    rounded: Mapping[str, QuantizedTensor]
    shifted: bool
    snr_db: float


def _with_weights(model: ir.Model, plan: Plan, weights: Mapping[str, QuantizedTensor]) -> ir.Model:
    """A clone whose int8 layers multiply by the numbers that the codes stand for."""
    clone = model.clone()
    made: dict[ir.Value, ir.Value] = {}
    for node, _, weight in list(layers.weighted(clone, plan)):
        rounded = weights.get(weight.name or "")
        if rounded is None:
            continue
        if weight not in made:
            made[weight] = edit.initializer(clone, f"{weight.name}_rounded", decode(rounded))
        node.replace_input_with(1, made[weight])
    return clone


def _smoothed(
    ground: _Ground, plan: Plan, told_apart: Mapping[str, Interval], seen: Sequence[Batch], unseen: Sequence[Batch],
    expected: Sequence[Batch],
) -> _Ground | None:  # fmt: skip
    """The graph with the scales of `smooth` moved; None where nothing can move, or where float32 does not bear it."""
    found = smooth.find(ground.model, plan, ground.ranges, told_apart, seen, unseen)
    if found is None:
        return None
    moved, ranges = found
    model = moved.graph(ground.model)
    if proof.difference(expected[0], graph.runner(graph.unsquashed(model))(unseen[0])):
        return None
    return _Ground(model=model, ranges=ranges, means=moved.means(ground.means), moved=moved)


def _untried(name: str, before_db: float | None, why: str) -> Correction:
    before = None if before_db is None or math.isnan(before_db) else before_db
    return Correction(name=name, before_db=before, after_db=None, kept=False, why=why)


def _better(name: str, before: _Weights, after: _Weights, tried: list[Correction]) -> _Weights:
    kept = after.snr_db > before.snr_db + WORTH_DB
    tried.append(Correction(name=name, before_db=before.snr_db, after_db=after.snr_db, kept=kept))
    return after if kept else before


def apart(batches: Sequence[Batch]) -> tuple[Sequence[Batch], Sequence[Batch]]:
    """(batches to fit weights to, others to compare on): every EVERYth is of the latter; a single batch is no two."""
    if len(batches) < 2:
        return (), batches
    every = min(EVERY, len(batches))
    return [each for number, each in enumerate(batches, 1) if number % every], batches[every - 1 :: every]


def _breaks_pair_rule(model: ir.Model, plan: Plan, weights: Mapping[str, QuantizedTensor]) -> bool:
    """Whether a kernel that adds pairs in int16 could saturate at any layer."""
    return any(
        (weight := weights.get(value.name or "")) is None or rounding.breaks_pair_rule(node, weight.codes)
        for node, value in rounding.paired_layers(model, plan)
    )
