"""Which method for which tensor, by what the int8 model's outputs say.

The best single method is where the search begins. Then groups of neighbouring tensors, an eighth of all at first and
half as many in every round, try the other methods; a change that brings the outputs closer to FP32 stays. A method that is best
for a tensor alone may be wrong for the model, so nothing is decided by the tensor's own error.

Batches that ranges were made from fit them: what clips most looks best there, and costs most on the next batch that reaches
further. So ranges are made from one half of the batches for this, judged on the other, and the other way round (`crossed`). Of
methods that differ by less than CLOSE_DB the widest is taken, for the same reason. What ships are the ranges from all data.

A few batches are a small sample, and a batch or two often hold half of the squared error: among dozens of changes one that
happens to be lucky there looks best. So the batches are dealt out to PARTS parts, and a change must help on every part, which
luck with one batch cannot do.

An evaluation does not quantize again: scales and zero points of the int8 model are replaced. Weights and biases are the real
ones: what is compared is the rounding of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir

from exporter import graph, varies, weights
from exporter.batches import Array, Batch
from exporter.calibrate import methods
from exporter.calibrate.domain import distinguish
from exporter.calibrate.observe import observe
from exporter.calibrate.ranges import Range, Ranges
from exporter.calibrate.statistics import Statistics
from exporter.errors import CalibrationError
from exporter.prepare import edit
from exporter.varies import Moving
from runtime import session

EVALUATIONS = 48  # runs of the int8 model over the batches, at most
PARTS = 8  # of the batches, each judged by itself
HIGHEST_DB = 300.0  # stands for a model without error
GROUPS = 8
CLOSE_DB = 0.5  # so much better must a method be than the first, which clips nothing
SUFFIX = "_scale"  # as the quantizer names a tensor's scale; its zero point beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The method of one tensor. gain_db: what changing to it brought to the worst output's SNR, median over the parts of the
    batches, together with `together` - 1 other tensors; 0 where it was not changed."""

    tensor: str
    method: str
    gain_db: float
    together: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """ranges: method "auto". single_db: {method: SNR of the worst output, dB}, on batches that its ranges are not from.

    best: the single method that was begun from. snr_db: with the chosen ranges. choices: of tensors whose range the int8 model
    uses.
    """

    ranges: Ranges
    best: str
    single_db: Mapping[str, float]
    snr_db: float
    choices: tuple[Choice, ...]
    evaluations: int

    @property
    def changed(self) -> tuple[Choice, ...]:
        """The tensors that do better with another method than the best single one."""
        return tuple(choice for choice in self.choices if choice.method != self.best)

    def notes(self) -> tuple[str, ...]:
        """For the plan: what won, and by how much."""
        singles = ", ".join(f"{method} {value:.2f}" for method, value in self.single_db.items())
        lines = [
            f"ranges: {self.best} for all is the best single method ({singles} dB); "
            f"{len(self.changed)} of {len(self.choices)} tensors changed, {self.snr_db:.2f} dB"
        ]
        for choice in self.changed:
            others = f", with {choice.together - 1} others" if choice.together > 1 else ""
            lines.append(f"{choice.tensor}: {choice.method}, {choice.gain_db:+.2f} dB{others}")
        return tuple(lines)


def candidates(model: ir.Model, found: Statistics, percentile: float = methods.PERCENTILE) -> dict[str, Ranges]:
    """{method: its ranges}, cut to what readers distinguish."""
    return {name: distinguish(model, methods.ranges(found, name, percentile)) for name in methods.METHODS}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fold:
    """{method: ranges} from some batches, and their errors on others."""

    given: Mapping[str, Ranges]
    measure: Callable[[Ranges], Errors]


def crossed(
    model: ir.Model,
    int8: ir.Model,
    tensors: Sequence[str],
    batches: Sequence[Batch],
    percentile: float = methods.PERCENTILE,
) -> tuple[Fold, ...]:
    """Ranges from every other batch, judged on those between, and the other way round.

    A single batch is judged by its own ranges, and so are all where one half leaves a tensor without a value, or has not the
    parts that vary in the other: nothing varies in one batch of a row.

    Args:
        model: the prepared graph.
        int8: it, quantized with the ranges of any of the methods (`quantize.to_int8`).
        tensors: whose ranges are wanted.
        batches: calibration batches (`Split.kept`); reported drift uses others.
        percentile: see `candidates`.

    Raises:
        CalibrationError: no batches.
    """
    halves = [half for half in (batches[::2], batches[1::2]) if half]
    if not halves:
        raise CalibrationError("the method of the ranges", found="0 batches to compare on", expected="one or more")

    def ranges(part: Sequence[Batch]) -> dict[str, Ranges]:
        return candidates(model, observe(model, tensors, part, (), True), percentile)

    try:
        given = list(map(ranges, halves))
    except CalibrationError:
        halves, given = [batches], [ranges(batches)]
    seen = [_seen(model, half) for half in halves]
    if len({tuple(part.output for part in each.parts) for each in seen}) > 1:
        given, seen = [ranges(batches)], [_seen(model, batches)]
    return tuple(
        Fold(given=g, measure=_evaluator(model, int8, on)) for g, on in zip(given, reversed(seen), strict=True)
    )


def choose(
    int8: ir.Model, given: Mapping[str, Ranges], folds: Sequence[Fold], evaluations: int = EVALUATIONS
) -> Chosen:
    """Try methods on groups of tensors and keep what brings the worst output closer to FP32. Deterministic.

    Args:
        int8: the prepared graph, quantized with the ranges of any of the methods.
        given: {method: ranges} that may ship (`candidates`), first the one that clips nothing.
        folds: `crossed`, with the same methods.
        evaluations: how many times the int8 model may be run over the batches, that of each method included.
    """
    search = _Search(given, _used(int8, next(iter(given.values()))), folds)
    groups = search.split(search.tensors, GROUPS)
    while groups and search.count < evaluations:
        ranked = []
        for group in groups:
            gain = search.improve(group, evaluations)
            ranked.append((-gain, group))
        ranked.sort(key=lambda pair: pair[0])  # stable: the graph's order among equals
        groups = [half for _, group in ranked if len(group) > 1 for half in search.split(group, 2)]
    return search.result()


class _Search:
    """The state of one search: what each tensor has now, and how good that is."""

    def __init__(self, given: Mapping[str, Ranges], tensors: Sequence[str], folds: Sequence[Fold]) -> None:
        self.given, self.tensors, self.folds = given, tuple(tensors), folds
        names = list(next(iter(given.values())).tensors)
        found = {method: self.measure(dict.fromkeys(names, method)) for method in given}
        self.single = {method: errors.snr_db for method, errors in found.items()}
        self.count = len(given)
        self.order = sorted(given, key=lambda method: -self.single[method])  # stable: the plainest first among equals
        first, highest = next(iter(given)), self.order[0]
        self.best = highest if self.single[highest] > self.single[first] + CLOSE_DB else first
        self.now, self.snr_db = found[self.best].parts_db, self.single[self.best]
        self.method = dict.fromkeys(names, self.best)
        self.gain: dict[str, tuple[float, int]] = {}

    def split(self, tensors: Sequence[str], parts: int) -> list[tuple[str, ...]]:
        return [tuple(part.tolist()) for part in np.array_split(np.array(tensors, object), parts) if len(part)]

    def improve(self, group: Sequence[str], most: int) -> float:
        """Try every other method on the group and keep the best that helps on every part; the highest gain seen, dB."""
        tried = {self._ends(self.method, group)}
        start, highest, gain = self.now, -np.inf, 0.0
        before = self.method
        for method in self.order:
            trial = before | dict.fromkeys(group, method)
            ends = self._ends(trial, group)
            if ends in tried or self.count >= most:
                continue
            tried.add(ends)
            self.count += 1
            errors = self.measure(trial)
            parts = errors.parts_db
            value = float(np.median(parts - start))
            highest = max(highest, value)
            if (parts > start).all() and value > gain:
                gain, self.now, self.method, self.snr_db = value, parts, trial, errors.snr_db
        if gain:
            self.gain |= dict.fromkeys(group, (gain, len(group)))
        return highest

    def result(self) -> Chosen:
        nothing = (0.0, 1)
        return Chosen(
            ranges=_ranges(self.given, self.method),
            best=self.best,
            single_db=self.single,
            snr_db=self.snr_db,
            choices=tuple(
                Choice(
                    tensor=name,
                    method=self.method[name],
                    gain_db=self.gain.get(name, nothing)[0],
                    together=self.gain.get(name, nothing)[1],
                )
                for name in self.tensors
            ),
            evaluations=self.count,
        )

    def _ends(self, trial: Mapping[str, str], group: Sequence[str]) -> tuple[tuple[float, float], ...]:
        found = [self.given[trial[name]].tensors[name] for name in group]
        return tuple((each.low, each.high) for each in found)

    def measure(self, trial: Mapping[str, str]) -> Errors:
        """Of tensors by these methods, on the batches of all folds."""
        parts = [fold.measure(_ranges(fold.given, trial)) for fold in self.folds]
        return Errors(
            signal=np.concatenate([part.signal for part in parts]), noise=np.concatenate([part.noise for part in parts])
        )


def _ranges(given: Mapping[str, Ranges], trial: Mapping[str, str]) -> Ranges:
    tensors = {name: given[method].tensors[name] for name, method in trial.items()}
    return replace(next(iter(given.values())), tensors=tensors, method="auto")


def _used(int8: ir.Model, ranges: Ranges) -> list[str]:
    """The tensors whose range the int8 model uses, in the order of the ranges."""
    return [name for name in ranges.tensors if f"{name}{SUFFIX}" in int8.graph.initializers]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Errors:
    """Squares of what varies in FP32 outputs, and of what int8 outputs differ by, float64 [batches, parts of outputs]."""

    signal: Array
    noise: Array

    @property
    def snr_db(self) -> float:
        """SNR of the worst output over all batches, as `runtime.drift` defines it."""
        return float(_worst_db(self.signal.sum(axis=0), self.noise.sum(axis=0)))

    @property
    def parts_db(self) -> Array:
        """The same of PARTS parts of the batches, as many as there are batches at most: batch i is in part i modulo PARTS."""
        parts = range(min(PARTS, len(self.noise)))
        return np.array([_worst_db(self.signal[i::PARTS].sum(axis=0), self.noise[i::PARTS].sum(axis=0)) for i in parts])


def _worst_db(signal: Array, noise: Array) -> Array:
    """10 log10(signal / noise) of the worst output (last axis), within +-HIGHEST_DB so that differences are numbers."""
    smallest = 10 ** (-HIGHEST_DB / 10)
    with np.errstate(invalid="ignore", over="ignore"):
        ratio = np.where(noise > 0, signal / np.where(noise > 0, noise, 1), np.inf)
    return np.asarray(10 * np.log10(np.clip(np.nan_to_num(ratio, nan=0.0), smallest, 1 / smallest)).min(axis=-1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """Batches, what FP32 makes of them, and what of that is judged."""

    batches: Sequence[Batch]
    expected: Sequence[Mapping[str, Array]]
    parts: Sequence[Moving]


def _seen(model: ir.Model, batches: Sequence[Batch]) -> Seen:
    real = graph.unsquashed(model)
    expected = list(map(graph.runner(real), batches))
    parts = varies.moving(varies.grounds(real, expected, batches), expected)
    return Seen(batches=batches, expected=expected, parts=parts)


def evaluator(model: ir.Model, int8: ir.Model, batches: Sequence[Batch]) -> Callable[[Ranges], Errors]:
    """A function ranges -> errors of the int8 model with these ranges against FP32 (`graph.unsquashed`)."""
    return _evaluator(model, int8, _seen(model, batches))


def _evaluator(model: ir.Model, int8: ir.Model, seen: Seen) -> Callable[[Ranges], Errors]:
    batches, expected, parts = seen.batches, seen.expected, seen.parts
    names = [part.output for part in parts]
    signal = np.array([[_square(part.varying(made)) for part in parts] for made in expected])
    patch = patcher(model, graph.unsquashed(with_real_weights(model, int8)))

    def measure(ranges: Ranges) -> Errors:
        opened = session.open_session(patch(ranges), entries=graph.AS_WRITTEN)
        wanted, asked = [value.name for value in opened.get_inputs()], list(dict.fromkeys(names))
        noise = np.zeros_like(signal)
        for row, (batch, real) in enumerate(zip(batches, expected, strict=True)):
            made = dict(zip(asked, opened.run(asked, {name: batch[name] for name in wanted}), strict=True))
            noise[row] = [_square(part.of(real) - part.of(made)) for part in parts]
        return Errors(signal=signal, noise=noise)

    return measure


def with_real_weights(model: ir.Model, int8: ir.Model) -> ir.Model:
    """A clone of the int8 graph in which only activations are rounded.

    What weights' rounding does to the outputs is corrected later, in part; beside it, as it is before, the harm of a range that
    clips too much does not show.
    """
    clone = int8.clone()
    for node in list(clone.graph):
        codes = graph.constant(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        name = edit.quantized_name(node)
        real = graph.constant(model.graph.initializers.get(name))
        if codes is None or real is None or real.shape != codes.shape:
            continue
        value = ir.val(f"{name}_real", ir.DataType.FLOAT, list(real.shape), const_value=ir.tensor(real))
        clone.graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)
    return clone


def _square(values: Array) -> float:
    """Sum of squares; agreeing infinities count as 0, others make it infinite."""
    flat = np.nan_to_num(np.asarray(values, np.float64).reshape(-1), nan=0.0)
    return float(flat @ flat)


def patcher(model: ir.Model, int8: ir.Model) -> Callable[[Ranges], bytes]:
    """A function ranges -> the int8 model with their scales, as a file's bytes. Weights stay as they are.

    The model is that of `quantize.to_int8` with the same ranges, but for weights whose scale the quantizer widens for a bias.
    """
    proto = ir.serde.serialize_model(weights.outside(int8))
    initializers = {each.name: each for each in proto.graph.initializer}
    real = {name: graph.constant(value) for name, value in model.graph.initializers.items()}
    biases = list(_biases(proto, initializers))

    def patch(ranges: Ranges) -> bytes:
        for name, found in ranges.tensors.items():
            scale = initializers.get(f"{name}{SUFFIX}")
            zero = initializers.get(f"{name}_zero_point")
            if scale is not None and zero is not None:
                step, code = scale_and_zero_point(found)
                _set(scale, np.asarray(step))
                _set(zero, np.asarray(code))
        for codes, scale, source, weight in biases:
            bias = real.get(codes.name.removesuffix("_quantized"))
            if bias is not None:
                steps = _array(source) * _array(weight)
                _set(scale, steps.reshape(_array(scale).shape).astype(np.float32))
                steps = np.maximum(_array(scale), np.finfo(np.float32).tiny)  # a dead channel's product of scales is 0
                _set(codes, np.rint(bias.astype(np.float64) / steps).clip(-(2**31) + 1, 2**31 - 1).astype(np.int32))
        return bytes(proto.SerializeToString(deterministic=True))

    return patch


def scale_and_zero_point(found: Range) -> tuple[np.float32, np.uint8]:
    """scale = (high - low) / 255 and zero_point = rint(-low / scale), of the range widened to hold 0; 1 and 0 where it is 0."""
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    low, high = float(np.float32(low)), float(np.float32(high))
    scale = (high - low) / methods.STEPS
    if scale < np.finfo(np.float32).tiny:
        return np.float32(1), np.uint8(0)
    return np.float32(scale), np.uint8(np.rint(-low / scale))


Initializer = onnx.TensorProto


def _biases(
    proto: onnx.ModelProto, initializers: Mapping[str, Initializer]
) -> list[tuple[Initializer, Initializer, Initializer, Initializer]]:
    """(codes, scale) of each int32 bias, and the scales of the input and the weight of the layer that reads it."""
    makers = {name: node for node in proto.graph.node for name in node.output}
    found = []
    for node in proto.graph.node:
        parts = [makers.get(name) for name in node.input[:3]]
        if len(parts) < 3 or any(part is None or part.op_type != "DequantizeLinear" for part in parts):
            continue
        names = [parts[2].input[0], parts[2].input[1], parts[0].input[1], parts[1].input[1]]  # type: ignore[union-attr]
        if all(name in initializers for name in names) and initializers[names[0]].data_type == onnx.TensorProto.INT32:
            codes, scale, source, weight = (initializers[name] for name in names)
            found.append((codes, scale, source, weight))
    return found


def _array(initializer: Initializer) -> Array:
    return np.asarray(onnx.numpy_helper.to_array(initializer))


def _set(initializer: Initializer, array: Array) -> None:
    initializer.CopyFrom(onnx.numpy_helper.from_array(array, initializer.name))
