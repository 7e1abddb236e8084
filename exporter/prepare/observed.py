"""What a run says of a graph's tensors, where the file says nothing or says it wrong.

A file may carry shapes of another batch size, outputs of a wrong rank, nodes behind which nobody can infer a type. ONNX
Runtime runs it all the same, so a run is asked: on the batch, and, where sizes are free, on one with other sizes too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array, Batch


def correct(model: ir.Model, batch: Batch) -> dict[str, Array]:
    """Take out of the graph, in place, what a run contradicts; graph outputs get the dtype and rank that they have.

    A shape is contradicted by another rank, another size, or one name for two sizes. Shapes inside branches and loops are
    no outputs that could be looked at: they go. Type inference finds what was right again.

    Returns:
        The outputs on `batch`.

    Raises:
        RunError: ONNX Runtime refuses the graph or the batch.
    """
    runs = _runs(model, batch)
    _forget_inside(model)
    for value in [out for node in model.graph for out in node.outputs if out.name]:
        seen = _seen(value, runs)
        if seen and value.dtype is not None and value.dtype != _dtype(seen[0]):
            value.type = ir.TensorType(_dtype(seen[0]))
        if seen and value.shape is not None and not _holds(value, runs):
            value.shape = None
        if seen and value.is_graph_output():
            _describe(value, seen)
    outputs = {value.name or "": runs[0][value.name or ""] for value in model.graph.outputs}
    return outputs


def fill(model: ir.Model, batch: Batch) -> int:
    """Give each tensor that has no type or no shape those of a run, in place; how many there were.

    Raises:
        RunError: ONNX Runtime refuses the graph or the batch.
    """
    values = [out for node in model.graph for out in node.outputs if out.name]
    missing = [value for value in values if value.dtype is None or value.shape is None]
    if not missing:
        return 0
    runs = _runs(model, batch)
    return sum(_describe(value, _seen(value, runs)) for value in missing)


def _describe(value: ir.Value, seen: Sequence[Array]) -> bool:
    """Type and shape of one tensor from its runs, where it has none; a size that is not the same in all of them is free."""
    if not seen or (value.dtype is not None and value.shape is not None):
        return False
    if value.dtype is None:
        value.type = ir.TensorType(_dtype(seen[0]))
    if value.shape is None and len({array.ndim for array in seen}) == 1:
        sizes = zip(*(array.shape for array in seen), strict=True)
        value.shape = ir.Shape([axis[0] if len(set(axis)) == 1 else None for axis in sizes])
    return True


def _dtype(array: Array) -> ir.DataType:
    return ir.DataType.STRING if array.dtype == object else ir.DataType.from_numpy(array.dtype)


def _seen(value: ir.Value, runs: Sequence[Mapping[str, Array]]) -> list[Array]:
    """The tensor in each run; empty for a sequence, a map, or an optional that holds nothing."""
    found = [run[value.name or ""] for run in runs if (value.name or "") in run]
    return found if all(isinstance(each, np.ndarray) for each in found) else []


def _holds(value: ir.Value, runs: Sequence[Mapping[str, Array]]) -> bool:
    """Whether the declared shape is that of every run, each of its names one size in all of the run's inputs."""
    assert value.shape is not None
    for run in runs:
        array = run[value.name or ""]
        if array.ndim != len(value.shape):
            return False
        sizes: dict[str, int] = {}
        for each in value.graph.inputs if value.graph is not None else ():
            if each.shape is not None and (each.name or "") in run:
                sizes |= dict(_labels(each, run[each.name or ""]))
        for dim, size in zip(value.shape, array.shape, strict=True):
            label = dim.value if isinstance(dim, ir.SymbolicDim) else None
            if (isinstance(dim, int) and dim != size) or (label and sizes.setdefault(label, size) != size):
                return False
    return True


def _labels(value: ir.Value, array: Array) -> Iterator[tuple[str, int]]:
    for dim, size in zip(value.shape or (), array.shape, strict=False):
        if isinstance(dim, ir.SymbolicDim) and dim.value:
            yield dim.value, size


def _runs(model: ir.Model, batch: Batch) -> list[Mapping[str, Array]]:
    """Every tensor of the graph, and its inputs, on the batch and on one of other sizes."""
    names = dict.fromkeys(out.name for node in model.graph for out in node.outputs if out.name)
    names |= dict.fromkeys(value.name for value in model.graph.outputs if value.name)
    bare = graph.with_outputs(model, names)
    _forget_inside(bare)
    for value in [out for node in bare.graph for out in node.outputs]:
        value.type, value.shape = None, None
    run = graph.runner(bare)
    runs: list[Mapping[str, Array]] = [{**batch, **run(batch)}]
    for other in _resized(model, batch):
        with contextlib.suppress(graph.RunError):  # a model may take multiples of 32 only
            return [*runs, {**other, **run(other)}]
    return runs


def _forget_inside(model: ir.Model) -> None:
    """Take the shapes out of branches and bodies, but for the count and the condition of a Loop, which are scalars."""
    scalars = {
        value
        for inner in model.graphs()
        for node in inner
        if graph.op(node) == "Loop"
        for value in node.attributes["body"].as_graph().inputs[:2]
    }
    for inner in [each for each in model.graphs() if each is not model.graph]:
        for value in (*inner.inputs, *(out for node in inner for out in node.outputs)):
            value.shape = ir.Shape([]) if value in scalars else None


def _resized(model: ir.Model, batch: Batch) -> Iterator[Batch]:
    """The batch with each free axis of its inputs one larger, then twice as large; values repeat, so they stay real."""
    free = {
        value.name: [axis for axis, dim in enumerate(value.shape or ()) if not isinstance(dim, int) or dim < 0]
        for value in model.graph.inputs
        if value.name in batch
    }
    if not any(free.values()):
        return
    for times, more in ((1, 1), (2, 0)):
        yield {
            name: _stretched(array, {axis: array.shape[axis] * times + more for axis in free.get(name, ())})
            for name, array in batch.items()
        }


def _stretched(array: Array, sizes: Mapping[int, int]) -> Array:
    for axis, size in sizes.items():
        array = np.take(array, range(size), axis=axis, mode="wrap") if array.shape[axis] else array
    return array
