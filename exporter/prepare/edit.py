"""The edits that rewrites are made of: a name, a new initializer, and new nodes in the place of old ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir

from exporter.batches import Array

# what ONNX Runtime's quantizer puts behind the name of a tensor to name its codes, scale and zero point
QUANTIZER_SUFFIXES = (
    "_scale",
    "_zero_point",
    "_quantized",
    "_QuantizeLinear_Input",
    "_QuantizeLinear_Output",
    "_DequantizeLinear_Output",
)


def stems(name: str | None) -> Iterator[str]:
    """The tensors for which the quantizer would make up `name`: `x_quantized` and `x` for `x_quantized_scale`."""
    suffix = next((each for each in QUANTIZER_SUFFIXES if name and name.endswith(each)), None)
    if name and suffix:
        yield name.removesuffix(suffix)
        yield from stems(name.removesuffix(suffix))


def quantized_name(dequantize: ir.Node) -> str:
    """The name, before the quantizer, of the constant behind one of its DequantizeLinear."""
    return (dequantize.outputs[0].name or "").removesuffix("_DequantizeLinear_Output")


def free_name(model: ir.Model, name: str) -> str:
    """`name`, or `name_1`, `name_2`... where the graph, or one inside it, has such a tensor, or one called as its scale."""
    # others neither are the name, with or without a number, nor have it as a stem
    names = {value.name for value in tensors(model) if value.name is not None and value.name.startswith(name)}
    taken = names | {stem for each in names for stem in stems(each)}
    return unused(name, taken)


def unused(name: str, taken: Collection[str | None]) -> str:
    """`name`, or the first of `name_1`, `name_2`... that is not taken."""
    return next(each for each in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2))) if each not in taken)


def tensors(model: ir.Model) -> Iterator[ir.Value]:
    """Every tensor: inputs, initializers, and what nodes make, in the graphs of branches and loops too."""
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def initializer(model: ir.Model, name: str, array: Array) -> ir.Value:
    """Register `array` as an initializer under `free_name(name)`."""
    unique = free_name(model, name)
    value = ir.val(
        unique,
        ir.DataType(ir.DataType.from_numpy(array.dtype)),
        list(array.shape),
        const_value=ir.tensor(array, name=unique),
    )
    model.graph.register_initializer(value)
    return value


def replace(model: ir.Model, old: Sequence[ir.Node], new: Sequence[ir.Node], before: ir.Value, after: ir.Value) -> None:
    """Put `new` in the place of `old`; `after` takes the name, type, shape and readers of `before`."""
    name = before.name
    after.type, after.shape = before.type, before.shape
    ir.convenience.replace_nodes_and_values(model.graph, old[-1], old, new, [before], [after])
    after.name = name
