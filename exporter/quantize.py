"""graph + Plan + Ranges -> int8 graph. The only module that speaks ONNX Runtime's quantizer and its options.

ONNX Runtime's `quantize_static` rewrites the graph with our ranges and our choice of nodes; it is never patched. What
it cannot do is done on the graph afterwards, and then the graph is held against the plan, node by node.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    create_calibrator,
    quantize_static,
)
from onnxruntime.quantization.calibrate import TensorData, TensorsData, save_tensors_data

from exporter import dynamic, gates, graph, lower, widen
from exporter import weights as large
from exporter.batches import Array, Batch
from exporter.calibrate import Range, Ranges
from exporter.errors import CalibrationError, QuantizeError
from exporter.graph import DEQUANTIZE, QUANTIZE
from exporter.numerics.formats import W8A8
from exporter.numerics.quantized import Grid, QuantizedTensor, decode, per_channel
from exporter.place import FLOAT_OUTPUT, REMOVABLE, SHAPE_READERS, Plan
from exporter.prepare import edit
from exporter.quiet import quiet

OWN = (QUANTIZE, DEQUANTIZE)
ONNXRUNTIME_METHODS = MappingProxyType(
    {
        "minmax": CalibrationMethod.MinMax,
        "percentile": CalibrationMethod.Percentile,
        "entropy": CalibrationMethod.Entropy,
    }
)
NOTHING_ROUNDED: Mapping[str, QuantizedTensor] = MappingProxyType({})


def to_int8(
    model: ir.Model,
    plan: Plan,
    ranges: Ranges,
    rounded: Mapping[str, QuantizedTensor] = NOTHING_ROUNDED,
    gates_on_codes: bool = True,
) -> ir.Model:
    """Quantize the nodes that the plan calls int8: activations uint8 per tensor, weights int8 symmetric per channel.

    Layers of other schemes are laid around them (`lower.lay`): dynamic ones take the range of their activation as they run. Of a
    plan with neither the graph comes out as it is.

    Args:
        model: the prepared graph, which is not changed.
        plan: from `place.decide` on this graph.
        ranges: a range for each of `plan.tensors`.
        rounded: {weight initializer: its codes}, which come out as they are; other weights are rounded to nearest.
        gates_on_codes: see `gates.read`; without it every int8 node stands between Q/DQ pairs, whose scales may still change.

    Raises:
        QuantizeError: ONNX Runtime refused, the result does not follow the plan, a scale that float32 cannot hold, a bias that
            int32 cannot.
    """
    quantized = model.clone()
    if plan.int8:
        ranges = gates.widen(model, plan.int8, ranges)
        static = {name: weight for name, weight in rounded.items() if name in _read_by(model, plan.int8)}
        quantized = _rewrite(_own_weights(model, plan), plan, ranges, static)
        _read_real_values(quantized, model, plan)
        _check_plan(quantized, model, plan)
        widen.biases(quantized, model)
        if gates_on_codes:
            gates.read(quantized, plan.int8)
        _check_numbers(quantized, model)
    lower.lay(quantized, model, plan, rounded)
    return quantized


def ranges_by_onnxruntime(
    model: ir.Model, tensors: Sequence[str], batches: Iterable[Batch], method: str, percentile: float = 99.99
) -> Ranges:
    """Ranges by ONNX Runtime's own calibrators, unchanged: the reference that people know.

    Its graph runs unoptimized. Percentile cuts one share of |x| and lays the same threshold on both sides; entropy tries one
    threshold only, the largest. Values are not counted: `elements` and `masked` are 0, and a mask's -3.4e38 is a value.

    Args:
        model: the prepared graph.
        tensors: the tensors whose ranges are wanted (`plan.tensors`).
        batches: read once; those with NaN are accepted, as ONNX Runtime does.
        method: "minmax", "percentile" or "entropy".
        percentile: for that method.

    Raises:
        CalibrationError: another method, no batches, or what ONNX Runtime raises, in its words.

    Warns:
        RuntimeWarning: percentile and entropy hold every activation of every batch in memory.
    """
    if method not in ONNXRUNTIME_METHODS:
        known = ", ".join(ONNXRUNTIME_METHODS)
        raise CalibrationError("engine onnxruntime: method", found=repr(method), expected=f"one of {known}")
    if method != "minmax":
        warnings.warn(
            f"engine onnxruntime: its {method} holds every activation of every batch in memory; "
            'engine = "packlight" does not',
            RuntimeWarning,
            stacklevel=2,
        )
    reader = _Reader(batches)
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder, quiet():
        path = Path(folder) / "fp32.onnx"
        large.place(graph.to_bytes(model), path)
        try:
            calibrator = create_calibrator(
                path,
                augmented_model_path=str(Path(folder) / "augmented.onnx"),
                calibrate_method=ONNXRUNTIME_METHODS[method],
                extra_options={"percentile": percentile},  # the other methods do not read it
            )
            calibrator.collect_data(reader)
            found = calibrator.compute_data()
        except Exception as error:  # it raises ValueError, AssertionError, and onnxruntime's, which share no base
            if reader.failed is not None:
                raise reader.failed from None
            raise CalibrationError(
                "ONNX Runtime's calibrator refused the graph or the data",
                found=f"{type(error).__name__}: {str(error)[:200]}",
                do='use engine = "packlight"',
            ) from error
    missing = [name for name in tensors if name not in found]
    if missing:
        raise CalibrationError(
            f"tensor {missing[0]!r}", found="no range by ONNX Runtime", expected="one", tensor=missing[0]
        )
    ends = {name: [float(np.squeeze(end)) for end in found[name].range_value] for name in tensors}
    return Ranges(
        tensors={name: Range(low=low, high=high, elements=0, masked=0) for name, (low, high) in ends.items()},
        batches=reader.count,
        method=f"onnxruntime {method}",
    )


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches as ONNX Runtime asks for them; it may swallow what they raise, so that is kept."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = iter(batches)
        self.count = 0
        self.failed: Exception | None = None

    def get_next(self) -> dict[str, Array] | None:
        try:
            batch = next(self._batches, None)
        except Exception as error:
            self.failed = error
            raise
        self.count += batch is not None
        return None if batch is None else dict(batch)


def weights(quantized: ir.Model) -> dict[str, QuantizedTensor]:
    """{weight of the prepared graph: its codes and scales, as they came out}."""
    found: dict[str, QuantizedTensor] = {}
    for node in quantized.graph:
        codes = graph.constant(node.inputs[0]) if node.op_type == DEQUANTIZE else None
        scale = graph.constant(node.inputs[1]) if codes is not None else None
        if codes is None or scale is None or codes.dtype != np.int8 or scale.ndim > 1:
            continue
        axis = node.attributes.get_int("axis", 1) if scale.ndim else 0
        channels = np.broadcast_to(scale, codes.shape[axis] if scale.ndim else codes.shape[0])
        found[edit.quantized_name(node)] = per_channel(codes, channels, axis)
    return dynamic.weights(quantized) | found


def _read_by(model: ir.Model, names: Sequence[str]) -> set[str | None]:
    """What the named nodes read."""
    nodes = set(names)
    return {value.name for node in model.graph if node.name in nodes for value in node.inputs if value is not None}


def _own_weights(model: ir.Model, plan: Plan) -> ir.Model:
    """A clone in which an initializer that int8 and float nodes share is a float one of its own to the latter.

    ONNX Runtime's quantizer rounds it for all its readers.
    """
    int8 = set(plan.int8)
    clone = model.clone()
    for value in list(clone.graph.initializers.values()):
        array = graph.constant(value)
        others = [(usage.node, usage.idx) for usage in value.uses() if usage.node.name not in int8]
        if array is None or array.dtype != np.float32 or len(others) in (0, len(value.uses())):
            continue
        copy = edit.initializer(clone, f"{value.name}_float", array)
        for node, index in others:
            node.replace_input_with(index, copy)
    return clone


def _rewrite(model: ir.Model, plan: Plan, ranges: Ranges, rounded: Mapping[str, QuantizedTensor]) -> ir.Model:
    # what no int8 node reads need not go through the quantizer, which copies all of it
    read = _read_by(model, plan.int8)
    beside = {name: tensor for name, tensor in large.heavy(model).items() if name not in read}
    given = ir.serde.serialize_model(large.inside(large.without(model, beside) if beside else model))
    for initializer in given.graph.initializer:
        if initializer.name in rounded:  # rounding code · scale to nearest gives the code again
            initializer.CopyFrom(onnx.numpy_helper.from_array(decode(rounded[initializer.name]), initializer.name))
    given.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")  # ORT then knows that shapes are inferred
    op_types = sorted({decision.op_type for decision in plan.decisions if decision.scheme == W8A8})
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder, quiet():
        cache, out = Path(folder) / "ranges.json", Path(folder) / "int8.onnx"
        save_tensors_data(
            TensorsData(
                CalibrationMethod.MinMax,
                {
                    name: TensorData(lowest=np.float32(r.low), highest=np.float32(r.high))
                    for name, r in ranges.tensors.items()
                },
            ),
            cache,
        )
        try:
            quantize_static(
                given,
                out,
                None,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=op_types,
                nodes_to_quantize=list(plan.int8),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                calibration_cache_path=cache,
                # a mover that the plan calls int8 is int8 even where nothing before it is
                extra_options={
                    "ForceQuantizeNoInputCheck": True,
                    "TensorQuantOverrides": {
                        **{name: _override(weight) for name, weight in rounded.items()},
                        **{name: _kept(grid) for name, grid in ranges.kept.items() if name in plan.tensors},
                    },
                },
            )
        except Exception as error:  # the quantizer raises ValueError, KeyError, TypeError, AssertionError, RuntimeError
            raise QuantizeError(
                "ONNX Runtime's quantizer refused the graph",
                found=f"{type(error).__name__}: {str(error)[:200]}",
                do="keep the node it names float with a rule, and report the model to us",
            ) from error
        made = ir.serde.deserialize_model(onnx.load(out))
        large.restore(made, beside)
        if any(
            attribute.type == ir.AttributeType.GRAPH for node in made.graph for attribute in node.attributes.values()
        ):
            made.graph.sort()  # ONNX Runtime puts a DequantizeLinear behind the branch that reads it
        return made


def _kept(grid: Grid) -> list[dict[str, object]]:
    """ONNX Runtime's way to say the scale and zero point of a tensor."""
    scale, zero_point = np.array(grid.scale, np.float32), np.array(grid.zero_point, np.uint8)
    return [{"quant_type": QuantType.QUInt8, "scale": scale, "zero_point": zero_point}]


def _override(weight: QuantizedTensor) -> list[dict[str, object]]:
    """ONNX Runtime's way to say a weight's scale: one entry per channel, the first with the axis."""
    entries: list[dict[str, object]] = [
        {"quant_type": QuantType.QInt8, "scale": scale, "zero_point": np.int8(0)} for scale in weight.scale
    ]
    entries[0]["axis"] = weight.channel_axis
    return entries


def _read_real_values(quantized: ir.Model, model: ir.Model, plan: Plan) -> None:
    """Let float readers read a tensor before its rounding, wherever it exists in float anyway.

    x -> QuantizeLinear -> DequantizeLinear -> {int8 node, float node}   becomes   float node reads x,
    when x is a graph input, or made by a float node, or by a MatMul or Gemm, whose integer kernels write float.
    It is closer to FP32 and spares a DequantizeLinear. A Conv must not: its kernel writes codes alone. Where a tensor is in
    codes alone, Shape and Size read these, which have its shape: a DequantizeLinear for them alone would be wasted.
    """
    int8 = set(plan.int8)
    makers = {value.name: node for node in model.graph for value in node.outputs}
    for reader in [node for node in quantized.graph if node.op_type == DEQUANTIZE]:
        writer = reader.inputs[0].producer() if reader.inputs[0] is not None else None
        if writer is None or writer.op_type != QUANTIZE or writer.inputs[0] is None:
            continue
        real, rounded = writer.inputs[0], reader.outputs[0]
        maker = makers.get(_original(real, rounded))
        shapes = [usage for usage in rounded.uses() if usage.node.op_type in SHAPE_READERS]
        others = {usage.node.name for usage in rounded.uses() if usage not in shapes}
        in_int8 = maker is not None and maker.name in int8
        codes_alone = maker is not None and in_int8 and maker.op_type not in FLOAT_OUTPUT
        if codes_alone or (in_int8 and others and others <= int8):
            for usage in shapes:
                usage.node.replace_input_with(usage.idx, writer.outputs[0])
        if codes_alone:
            continue
        for usage in list(rounded.uses()):
            if usage.node.op_type not in OWN and usage.node.name not in int8:
                usage.node.replace_input_with(usage.idx, real)
        if rounded.is_graph_output():
            name = rounded.name
            quantized.graph.outputs[quantized.graph.outputs.index(rounded)] = real
            rounded.name, real.name = f"{name}_rounded", name
            real.type, real.shape = rounded.type, rounded.shape
    RemoveUnusedNodesPass()(quantized)


def _original(real: ir.Value, rounded: ir.Value) -> str | None:
    """The tensor's name in the prepared graph: ORT renames what feeds a QuantizeLinear only at graph outputs."""
    return rounded.name if rounded.is_graph_output() else real.name


def _check_plan(quantized: ir.Model, model: ir.Model, plan: Plan) -> None:
    """Hold the int8 graph against the plan, node by node.

    1. Every node of the prepared graph is there; a Relu or Clip that is int8 may have folded into the QuantizeLinear.
    2. Each real tensor that an int8 node reads comes from a DequantizeLinear.
    3. Each real tensor that it makes goes to a QuantizeLinear alone; MatMul and Gemm may make real numbers.
    4. A float node reads no rounded weight, and a dynamic layer, which is float as yet, none either.
    """
    prepared = {node.name: node for node in model.graph}
    found = {node.name: node for node in quantized.graph if node.op_type not in OWN}
    for decision in plan.decisions:
        node, before = found.get(decision.node), prepared[decision.node]
        if before.op_type in OWN:  # of the file, and float
            continue
        removable = decision.scheme == W8A8 and decision.op_type in REMOVABLE
        if node is None and not removable:
            raise _astray(before, "it is gone from the int8 graph")
        if node is None or removable:
            continue
        if decision.scheme != W8A8:
            if any(_is_rounded_weight(value) for value in node.inputs):
                raise _astray(before, f"it is planned {decision.scheme} and reads a rounded weight")
            continue
        for was, now in zip(before.inputs, node.inputs, strict=True):
            if _is_data(before, was) and (now is None or _producer_type(now) != DEQUANTIZE):
                raise _astray(before, f"it reads {was.name if was is not None else ''} in float")
        if node.op_type in FLOAT_OUTPUT:
            continue
        for was, now in zip(before.outputs, node.outputs, strict=True):
            readers = {usage.node.op_type for usage in now.uses()}
            if was.dtype == ir.DataType.FLOAT and (was.uses() or was.is_graph_output()) and readers != {QUANTIZE}:
                raise _astray(before, f"it writes {was.name} in float")


def _astray(node: ir.Node, found: str) -> QuantizeError:
    return QuantizeError(
        f"{node.op_type} {node.name}: planned int8, and is not",
        found=found,
        expected="DequantizeLinear before and QuantizeLinear behind it",
        do="keep the node float with a rule, and report the model to us",
        node=node.name or "",
    )


def _is_data(node: ir.Node, value: ir.Value | None) -> bool:
    """Whether an input holds real data: not Clip's bounds, Resize's roi and scales, Pad's value, which are settings."""
    setting = node.op_type in ("Clip", "Resize", "Pad") and value is not node.inputs[0]
    return value is not None and value.dtype == ir.DataType.FLOAT and not setting


def _is_rounded_weight(value: ir.Value | None) -> bool:
    reader = value.producer() if value is not None else None
    return reader is not None and reader.op_type == DEQUANTIZE and graph.constant(reader.inputs[0]) is not None


def _producer_type(value: ir.Value) -> str:
    producer = value.producer()
    return producer.op_type if producer is not None else ""


def _check_numbers(quantized: ir.Model, model: ir.Model) -> None:
    """Every scale is a positive normal float32, no weight code is -128, and every int32 bias holds its real value."""
    real = {name: graph.constant(value) for name, value in model.graph.initializers.items()}
    for node in quantized.graph:
        if node.op_type != DEQUANTIZE:
            continue
        codes, scale = graph.constant(node.inputs[0]), graph.constant(node.inputs[1])
        name = edit.quantized_name(node)
        sound = scale is not None and np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny)
        if scale is None or not np.all(sound):
            found = "no scale" if scale is None else f"scale {scale[~np.asarray(sound)].reshape(-1)[0]:.3g}"
            raise QuantizeError(
                f"tensor {name!r}", found=found, expected="a positive normal float32", node=_at_fault(node)
            )
        if codes is None:
            continue
        if codes.dtype == np.int8 and codes.size and codes.min() == -128:
            raise QuantizeError(
                f"weight {name!r}", found="code -128", expected="-127..127: -128 wraps on ARM", node=_at_fault(node)
            )
        bias = real.get(name)
        if codes.dtype == np.int32 and bias is not None:
            _check_bias(name, codes, scale, bias, _at_fault(node))


def _at_fault(dequantize: ir.Node) -> str:
    """The node that reads these real numbers, else the one that makes them."""
    readers = [usage.node for usage in dequantize.outputs[0].uses() if usage.node.op_type not in OWN]
    writer = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
    maker = (
        writer.inputs[0].producer() if writer is not None and writer.inputs and writer.inputs[0] is not None else None
    )
    found = readers[0] if readers else maker
    return "" if found is None else found.name or ""


def _check_bias(name: str, codes: Array, scale: Array, bias: Array, node: str = "") -> None:
    """|bias - code · scale| <= scale per channel (round to nearest is scale/2), and no code at int32's end."""
    wide = codes.astype(np.float64)
    error = np.abs(bias.astype(np.float64) - wide * scale)
    wrong = np.flatnonzero((error > scale + 1e-6 * np.abs(bias)) | (np.abs(wide) >= widen.INT32_LIMIT))
    if wrong.size:
        channel = int(wrong[0])
        raise QuantizeError(
            f"bias {name!r}, channel {channel}",
            found=f"{bias.reshape(-1)[channel]:.4g} at scale {np.broadcast_to(scale, bias.shape).reshape(-1)[channel]:.3g}",
            expected="a value that int32 holds",
            do="a dead weight channel or input: keep this layer float with a rule",
            node=node,
        )
