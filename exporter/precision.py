"""A graph of half, bfloat16 or double tensors -> the same graph computed in float32: what int8 is made from, and held against.

1. float16 and bfloat16 become float32 everywhere: tensors, weights, and the attributes that name a type (a Cast's `to`).
   The CPU provider computes float16 by silent casts and refuses most of bfloat16; float32 holds every value of both.
2. float64 becomes float32 where it is joined to a layer by other float64 tensors. What is double beside that (times, positions)
   stays: its digits may be needed. Values beyond float32, such as a mask's -1.8e308, become its largest.
3. Inputs and outputs of the graph keep their type, by a Cast. bfloat16 ones become float32: numpy has no bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, NameFixPass, ShapeInferencePass

from exporter import ops
from exporter.batches import Array

FLOAT, DOUBLE, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BFLOAT16
HALVES = (ir.DataType.FLOAT16, BFLOAT16)

# ONNX's names for attributes whose number is a type
TYPE_ATTRIBUTES = frozenset(
    {"to", "dtype", "output_dtype", "output_datatype", "precision", "softmax_precision", "stash_type"}
)


def to_float32(model: ir.Model) -> tuple[ir.Model, tuple[str, ...]]:
    """The graph computed in float32, and what was done, a sentence each.

    The model itself, and nothing said, where it needs nothing of that.
    """
    kinds = set(_kinds(model))
    if not kinds & {*HALVES, DOUBLE}:
        return model, ()
    clone = model.clone()
    if clone.functions:
        InlinePass()(clone)
    doubles = _joined_to_layers(clone) if DOUBLE in kinds else set()
    found = [kind for kind in (*HALVES, DOUBLE) if kind in kinds and (kind != DOUBLE or doubles)]
    if not found:
        return model, ()
    said = [f"{_names(found)} computed in float32"]
    plain = [value.name for value in (*clone.graph.inputs, *clone.graph.outputs) if value.dtype == BFLOAT16]
    if plain:
        said.append(f"{', '.join(map(str, plain))} given as float32, for numpy has no bfloat16")
    _convert(clone, doubles)
    NameFixPass()(clone)
    return clone, tuple(said)


def with_ends(model: ir.Model, kinds: Mapping[str, ir.DataType]) -> ir.Model:
    """The float32 graph with other types at its ends, by a Cast each: {input or output: its type}."""
    clone = model.clone()
    for value in clone.graph.inputs:
        if (kind := kinds.get(value.name or "")) is not None and value.dtype == FLOAT:
            cast = _read_single(value)
            value.dtype = kind
            if cast is not None:
                clone.graph.insert_before(clone.graph[0], [cast])
    for value in dict.fromkeys(clone.graph.outputs):
        if (kind := kinds.get(value.name or "")) is not None and value.dtype == FLOAT:
            _written(clone, value, kind)
    NameFixPass()(clone)
    return clone


def _names(kinds: Sequence[ir.DataType]) -> str:
    return ", ".join("float64" if kind == DOUBLE else kind.name.lower() for kind in kinds)


def _kinds(model: ir.Model) -> Iterator[ir.DataType]:
    """The types that tensors of the model have, or that its nodes make."""
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values(), *graph.outputs):
            if value.dtype is not None:
                yield value.dtype
        for node in graph:
            yield from _kinds_of(node)
    for function in model.functions.values():
        for node in function:
            yield from _kinds_of(node)


def _kinds_of(node: ir.Node) -> Iterator[ir.DataType]:
    yield from (value.dtype for value in node.outputs if value.dtype is not None)
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            yield attribute.as_tensor().dtype
        elif attribute.name in TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT:
            yield ir.DataType(attribute.as_int())


def _joined_to_layers(model: ir.Model) -> set[ir.Value]:
    """The float64 tensors that nodes other than Cast join, over any number of them, to one that a layer reads or makes."""
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    beside: dict[ir.Value, set[ir.Value]] = {}
    found: list[ir.Value] = []
    for graph in model.graphs():
        for node in graph:
            bodies = [
                attribute.as_graph()
                for attribute in node.attributes.values()
                if attribute.type == ir.AttributeType.GRAPH
            ]
            ends = [value for body in bodies for value in (*body.inputs, *body.outputs)]
            tensors = (*node.inputs, *node.outputs, *ends)
            doubles = [value for value in tensors if value is not None and value.dtype == DOUBLE]
            if node.op_type in ops.LAYERS and not node.domain:
                found += doubles
            if node.op_type != "Cast":
                for value in doubles:
                    beside.setdefault(value, set()).update(doubles)
    joined: set[ir.Value] = set()
    while found:
        value = found.pop()
        if value not in joined:
            joined.add(value)
            found += beside.get(value, ())
    return joined


def _convert(model: ir.Model, doubles: set[ir.Value]) -> None:
    def is_wide(value: ir.Value) -> bool:
        return value.dtype in HALVES or value in doubles

    ends = [value for value in model.graph.inputs if is_wide(value)]
    results = [value for value in dict.fromkeys(model.graph.outputs) if is_wide(value) and value not in ends]
    kept = {value: value.dtype for value in (*ends, *results) if value.dtype not in (BFLOAT16, None)}
    for graph in model.graphs():
        for node in graph:
            chosen = any(value in doubles for value in node.outputs)
            for name, attribute in list(node.attributes.items()):
                if not attribute.is_ref():
                    node.attributes[name] = _attribute(attribute, chosen)
        values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
        for value in dict.fromkeys(values):
            if is_wide(value) and not (value in kept and value in ends):
                value.type = _single(value.type)
                if value.const_value is not None:
                    value.const_value = ir.tensor(_rounded(value.const_value.numpy()), name=value.name)
    before = [cast for value in ends if value in kept if (cast := _read_single(value)) is not None]
    if before:
        model.graph.insert_before(model.graph[0], before)
    for value in results:
        if value in kept:
            _written(model, value, kept[value])


def _read_single(value: ir.Value) -> ir.Node | None:
    """A Cast behind a graph input, which all its readers read; None where there are none."""
    readers = list(value.uses())
    if not readers:
        return None
    cast = ir.node("Cast", [value], {"to": FLOAT}, name=f"{value.name}_to_float32")
    single = cast.outputs[0]
    single.name, single.dtype, single.shape = f"{value.name}_float32", FLOAT, value.shape
    for usage in readers:
        usage.node.replace_input_with(usage.idx, single)
    return cast


def _written(model: ir.Model, value: ir.Value, kind: ir.DataType) -> None:
    """A Cast to the type that an output had, under the output's name."""
    name = value.name
    value.name = f"{name}_float32"
    cast = ir.node("Cast", [value], {"to": kind}, name=f"{name}_to_{kind.name.lower()}")
    made = cast.outputs[0]
    made.name, made.dtype, made.shape = name, kind, value.shape
    model.graph.append(cast)
    for position, output in enumerate(model.graph.outputs):
        if output is value:
            model.graph.outputs[position] = made


def _attribute(attribute: ir.Attr, doubles: bool) -> ir.Attr:
    """The attribute with float32 in the place of the other type; as it is where it has none."""

    def is_wide(kind: ir.DataType) -> bool:
        return kind in HALVES or (doubles and kind == DOUBLE)

    if attribute.type == ir.AttributeType.TENSOR and is_wide(attribute.as_tensor().dtype):
        tensor = attribute.as_tensor()
        return ir.AttrTensor(attribute.name, ir.tensor(_rounded(tensor.numpy()), name=tensor.name))
    if attribute.name in TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT:
        return ir.AttrInt64(attribute.name, FLOAT) if is_wide(ir.DataType(attribute.as_int())) else attribute
    return attribute


def _single(kind: ir.TypeProtocol | None) -> ir.TypeProtocol:
    """The type with float32 elements; sequences and optionals keep their form."""
    if isinstance(kind, ir.SequenceType | ir.OptionalType):
        return type(kind)(_single(kind.elem_type))
    return ir.TensorType(FLOAT)


def _rounded(array: Array) -> Array:
    """array -> float32, nearest; finite values beyond float32 become its largest, infinities stay."""
    limit = np.finfo(np.float32).max
    if array.dtype == np.float64:
        array = np.where(np.isfinite(array), np.clip(array, -limit, limit), array)
    return array.astype(np.float32)
