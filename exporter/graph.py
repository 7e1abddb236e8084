"""The few questions others ask of a graph: its inputs, order, constants, shapes, MACs, and its outputs when run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporter import ops, weights
from exporter.batches import Array, Batch
from runtime import session
from runtime.errors import BundleError, PacklightError
from runtime.manifest import Tensor

Shape = tuple[int, ...]
# ONNX Runtime would round the weight of a float layer between Q/DQ at load, with one scale for all its channels
AS_WRITTEN = session.without(session.NO_ENTRIES, "WeightBiasQuantization")
CROSSINGS = (QUANTIZE, DEQUANTIZE) = ("QuantizeLinear", "DequantizeLinear")


class RunError(PacklightError):
    """ONNX Runtime could not load or run a graph of ours; the stage that asked says what that means, where it knows."""


def tensors(values: Iterable[ir.Value]) -> tuple[Tensor, ...]:
    """Name, dtype and shape of graph inputs or outputs; a dimension without a name is called `<tensor>_<axis>`."""
    return tuple(
        Tensor(
            name=_name(value),
            dtype=str(value.dtype.numpy()) if value.dtype is not None else "float32",
            shape=tuple(_dimension(dim, f"{value.name}_{axis}") for axis, dim in enumerate(value.shape or ())),
        )
        for value in values
    )


def _dimension(dim: int | ir.SymbolicDim, otherwise: str) -> int | str:
    """A size >= 0 or a name; files also write -1 and an empty name, which mean that there is none."""
    if isinstance(dim, int):
        return dim if dim >= 0 else otherwise
    return dim.value or otherwise


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def inputs(model: ir.Model) -> tuple[Tensor, ...]:
    """The inputs that a caller must give (initializers that old files list as inputs are not among them)."""
    return tensors(value for value in model.graph.inputs if not value.is_initializer())


def optional(model: ir.Model) -> tuple[Tensor, ...]:
    """The inputs with a default: initializers that are listed as inputs."""
    return tensors(value for value in model.graph.inputs if value.is_initializer())


def settled(model: ir.Model, given: Collection[str]) -> tuple[ir.Model, dict[str, Array]]:
    """A graph in which no input has a default, and the defaults that were taken out: {input: array}.

    An initializer that is listed as an input is a weight, and a constant from now on, where every initializer is listed (files
    of IR version 3, and tools that list them all) or a layer reads it; else it is an input, as is each of `given`.
    """
    listed = [value.name for value in model.graph.inputs if value.is_initializer()]
    if not listed:
        return model, {}
    clone = model.clone()
    every = model.ir_version < 4 or len(listed) == len(clone.graph.initializers)
    defaults: dict[str, Array] = {}
    for name in listed:
        value = clone.graph.initializers[name or ""]
        weight = any(use.idx and _reads_weights(use.node) for use in value.uses())
        if value.name in given or not (weight or (every and len(listed) > 1) or value.const_value is None):
            assert value.const_value is not None
            defaults[value.name or ""] = value.const_value.numpy()
            clone.graph.initializers.pop(value.name or "")
            value.const_value = None
        else:
            clone.graph.inputs.remove(value)
    return clone, defaults


def _reads_weights(node: ir.Node) -> bool:
    """Whether it reads an initializer as a weight of its own, behind its first input."""
    facts = ops.of(op(node))
    return any(facts.weights) and not facts.integer


def recurs(model: ir.Model) -> bool:
    """Whether a layer goes through a sequence by itself: ONNX Runtime's kernels of these end the process on an empty batch."""
    return any(op(node) in ops.RECURRENT for each in model.graphs() for node in each)


def with_defaults(model: ir.Model, defaults: Mapping[str, Array]) -> ir.Model:
    """A clone whose inputs have these defaults: a caller may leave them out."""
    if not defaults:
        return model
    clone = model.clone()
    for value in clone.graph.inputs:
        name = value.name or ""
        if name in defaults:
            value.const_value = ir.tensor(defaults[name], name=name)
            clone.graph.register_initializer(value)
    return clone


def renamed_axes(model: ir.Model, named: Iterable[Tensor]) -> ir.Model:
    """The graph, or a clone in which inputs have the dimensions of `named`, and names that these no longer have are nowhere."""
    before, after = inputs(model), tuple(named)
    kept = {dim for tensor in after for dim in tensor.shape}
    lost = {dim for tensor in before for dim in tensor.shape if isinstance(dim, str)} - kept
    if not lost:
        return model
    clone = model.clone()
    for each in clone.graphs():
        for value in (*each.inputs, *(out for node in each for out in node.outputs)):
            if value.shape is not None:
                dims = (None if isinstance(d, ir.SymbolicDim) and d.value in lost else d for d in value.shape)
                value.shape = ir.Shape(dims)
    return clone


def outputs(model: ir.Model) -> tuple[Tensor, ...]:
    return tensors(model.graph.outputs)


def to_bytes(model: ir.Model) -> bytes:
    """The file's bytes, the same for the same model; weights too many for protobuf lie beside them (`weights`)."""
    return bytes(ir.serde.serialize_model(weights.outside(model)).SerializeToString(deterministic=True))


def runner(model: ir.Model, threads: int | None = None, optimize: bool = True) -> Callable[[Batch], dict[str, Array]]:
    """A function that runs the graph in ONNX Runtime; without optimize node by node, as it is written.

    Raises:
        RunError: ONNX Runtime refuses the graph (here, or when called, the batch).
    """
    try:
        opened = session.open_session(to_bytes(model), threads=threads, entries=AS_WRITTEN, optimize=optimize)
    except BundleError as error:
        raise RunError(str(error)) from error
    names = [output.name for output in opened.get_outputs()]
    wanted = [value.name for value in opened.get_inputs()]
    defaults = [value.name for value in opened.get_overridable_initializers()]

    def run(batch: Batch) -> dict[str, Array]:
        try:
            return dict(
                zip(
                    names,
                    opened.run(names, {name: batch[name] for name in (*wanted, *(d for d in defaults if d in batch))}),
                    strict=True,
                )
            )
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise RunError(str(error).splitlines()[0][:300]) from error

    return run


def constant(value: ir.Value | None) -> Array | None:
    """The array behind an initializer, else None."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def op(node: ir.Node) -> str:
    """What the node computes: its op_type, or `domain.op_type` where another domain has borrowed the name of an ONNX operator."""
    return f"{node.domain}.{node.op_type}" if node.domain and onnx.defs.has(node.op_type) else node.op_type


def is_product(node: ir.Node | None) -> bool:
    """Whether a node is a MatMul of two activations, as in attention."""
    return node is not None and op(node) == "MatMul" and all(constant(each) is None for each in node.inputs)


def in_integers(node: ir.Node) -> bool:
    """Whether the file has the node in integers: on codes, or between DequantizeLinear and QuantizeLinear.

    A layer is, where it multiplies real numbers of codes by real numbers of codes; its output may be real.
    """
    if node.op_type.startswith("QLinear") or node.op_type in (*ops.INTEGER, QUANTIZE, DEQUANTIZE):
        return True
    real = [value for value in activations(node) if value.dtype in (ir.DataType.FLOAT, None)]
    if not real or any(value.producer() is None or value.producer().op_type != DEQUANTIZE for value in real):  # type: ignore[union-attr]
        return False
    if node.op_type in ("Conv", "Gemm", "MatMul"):
        return node.inputs[0] in real and node.inputs[1] in real
    return all(reader.op_type == QUANTIZE for value in node.outputs for reader in consumers(value))


def with_outputs(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A clone whose outputs are exactly the named tensors: made by a node, given, or constant."""
    clone = model.clone()
    values = {value.name: value for node in clone.graph for value in node.outputs}
    values |= {value.name: value for value in (*clone.graph.initializers.values(), *clone.graph.inputs)}
    clone.graph.outputs[:] = [values[name] for name in names]
    return clone


def unsquashed(model: ir.Model) -> ir.Model:
    """The model, or a clone whose outputs are what their last Softmax, LogSoftmax or Sigmoid reads, under the same names.

    Probabilities of an input that a network is sure of say nothing: all the error of a batch is in the few that it is not
    sure of. Whoever compares two versions of a model on few batches compares these. What nodes that select read is among the
    outputs, too (`with_read`).
    """
    if not any(map(squashing, model.graph.outputs)) and not selections(model)[0]:
        return model
    clone = with_read(model)
    for position, output in enumerate(clone.graph.outputs):
        node = squashing(output)
        source = node.inputs[0] if node is not None else None
        if node is None or source is None:
            continue
        same = ir.node("Identity", [source], name=f"{node.name}_unsquashed")
        same.outputs[0].type, same.outputs[0].shape = source.type or output.type, output.shape
        clone.graph.insert_after(node, same)
        clone.graph.outputs[position] = same.outputs[0]
        name, output.name = output.name, f"{output.name}_squashed"
        same.outputs[0].name = name
    RemoveUnusedNodesPass()(clone)
    return clone


def selections(model: ir.Model) -> tuple[dict[str, ir.Value], list[ir.Value]]:
    """What nodes that select read, and the outputs that are sets: which items they hold, or in which order, depends on numbers.

    The first is {name: tensor} of the real numbers that go into a TopK, a NonMaxSuppression and the like, and into what follows
    them up to the next layer, where an output is a set; and of those that an integer or boolean output is made of, by an ArgMax
    or a Greater. Names are those of the reader and its input, the same in a quantized graph.
    """
    behind: dict[ir.Value, None] = {}
    read: dict[str, ir.Value] = {}
    sets = []
    for node in model.graph:
        follows = any(value in behind for value in node.inputs if value is not None)
        facts = ops.of(op(node))
        if not facts.selects and (not follows or op(node) in ops.LAYERS or facts.reads_shape):
            continue
        behind |= dict.fromkeys(node.outputs)
        for number, value in enumerate(node.inputs):
            maker = None if value is None else value.producer()
            if value is None or maker is None or value in behind:
                continue
            if value.dtype != ir.DataType.FLOAT and op(maker) != "DequantizeLinear":
                continue
            if op(node) not in ("QuantizeLinear", "DequantizeLinear"):
                read[f"{node.name} reads {number}"] = value
    sets = [output for output in model.graph.outputs if output in behind]
    read = (read if sets else {}) | _decided(model, sets)
    once: dict[ir.Value, str] = {}
    for name in sorted(read):  # by name: a quantized graph has its nodes in another order, and rounds for each reader
        once.setdefault(_real(read[name]), name)
    return {name: read[name] for name in once.values()}, sets


def _decided(model: ir.Model, sets: Sequence[ir.Value]) -> dict[str, ir.Value]:
    """{name: tensor} of the real numbers that decide integer and boolean outputs, but for what is an output itself."""
    shown = {_real(output) for output in model.graph.outputs}
    whole = (each for each in model.graph.outputs if each.dtype is not None and not each.dtype.is_floating_point())
    left = [each for each in whole if each not in sets]
    seen, read = set(left), dict[str, ir.Value]()
    while left:
        node = left.pop().producer()
        if node is None or op(node) in ("Shape", "Size"):
            continue
        for number, value in enumerate(node.inputs):
            maker = None if value is None else value.producer()
            if value is None or maker is None or value in seen:
                continue
            if op(node) not in ("QuantizeLinear", "DequantizeLinear") and (
                value.dtype == ir.DataType.FLOAT or op(maker) == "DequantizeLinear"
            ):
                if _real(value) not in shown:
                    read[f"{node.name} reads {number}"] = value
                continue
            seen.add(value)
            left.append(value)
    return read


def _real(value: ir.Value) -> ir.Value:
    """The tensor behind its roundings."""
    maker = value.producer()
    while maker is not None and op(maker) in ("QuantizeLinear", "DequantizeLinear") and maker.inputs[0] is not None:
        value = maker.inputs[0]
        maker = value.producer()
    return value


def with_read(model: ir.Model) -> ir.Model:
    """A clone with what nodes that select read as further outputs: the outputs themselves may differ in size."""
    clone = model.clone()
    for name, value in selections(clone)[0].items():
        maker = value.producer()
        assert maker is not None
        same = ir.node("Identity", [value], name=name)
        same.outputs[0].name, same.outputs[0].type = name, value.type
        clone.graph.insert_after(maker, same)
        clone.graph.outputs.append(same.outputs[0])
    return clone


def squashing(output: ir.Value) -> ir.Node | None:
    """The Softmax, LogSoftmax or Sigmoid that makes an output, also through a rounding or a Cast; None where there is none."""
    node = output.producer()
    rounds = ("DequantizeLinear", "QuantizeLinear", "Cast")
    while node is not None and op(node) in rounds and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and op(node) in ops.SQUASHING else None


def shapes(model: ir.Model, batch: Batch) -> dict[str, Shape]:
    """The shape of every tensor when the graph runs on `batch`; initializers included, sequences of tensors not."""
    found: dict[str, Shape] = {name: tuple(value.shape) for name, value in batch.items()}
    for name, value in model.graph.initializers.items():
        found[name] = tuple(value.const_value.shape.numpy()) if value.const_value is not None else ()
    names = [value.name for node in model.graph for value in node.outputs if value.name]
    ran = runner(with_outputs(model, names))(batch) if names else {}
    return found | {name: tuple(value.shape) for name, value in ran.items() if isinstance(value, np.ndarray)}


def macs(node: ir.Node, shape: Mapping[str, Shape]) -> int:
    """Multiply-accumulates of one run of the node.

    Conv: output elements x (channels per group x kernel). ConvTranspose: input elements x (output channels per group
    x kernel). MatMul, Gemm: output elements x K. LSTM, GRU, RNN: steps x batch x directions x gates x hidden x
    (input + hidden). Everything else counts 0.
    """

    def of(value: ir.Value | None) -> Shape:
        return shape.get(value.name or "", ()) if value is not None else ()

    def elements(value: ir.Value | None) -> int:
        return math.prod(of(value))

    if op(node) == "Conv":
        return elements(node.outputs[0]) * math.prod(of(node.inputs[1])[1:])
    if op(node) == "ConvTranspose":
        return elements(node.inputs[0]) * math.prod(of(node.inputs[1])[1:])
    if op(node) == "MatMul":
        return elements(node.outputs[0]) * (of(node.inputs[0]) or (0,))[-1]
    if op(node) == "Gemm":
        k_axis = 0 if node.attributes.get_int("transA", 0) else 1
        return elements(node.outputs[0]) * of(node.inputs[0])[k_axis]
    if op(node) in ("LSTM", "GRU", "RNN"):
        steps, batch = of(node.inputs[0])[:2]
        return steps * batch * math.prod(of(node.inputs[1])) + steps * batch * math.prod(of(node.inputs[2]))
    return 0


def is_depthwise(weight: Shape, groups: int) -> bool:
    """Whether a Conv has one filter a channel: W is [groups, 1, kernel...]. Its integer kernel widens first, and does not pair."""
    return weight[:2] == (groups, 1)


def is_square(node: ir.Node) -> bool:
    """Whether a Conv or ConvTranspose over two axes has one stride for both, one group, no dilation, and says its pads."""
    strides = node.attributes.get_ints("strides", [1, 1])
    return (
        strides[0] == strides[1]
        and node.attributes.get_int("group", 1) == 1
        and set(node.attributes.get_ints("dilations", [1, 1])) == {1}
        and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    )


def consumers(value: ir.Value) -> tuple[ir.Node, ...]:
    return tuple(dict.fromkeys(usage.node for usage in value.uses()))


def activations(node: ir.Node) -> tuple[ir.Value, ...]:
    """The inputs that are computed or given at run time (not constants, not absent)."""
    return tuple(value for value in node.inputs if value is not None and not value.is_initializer())
