"""The two edits that rewrites are made of: a new initializer, and new nodes in the place of old ones."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from exporter.batches import Array


def initializer(model: ir.Model, name: str, array: Array) -> ir.Value:
    """Register `array` as an initializer under `name`, or `name_1`, `name_2`... where that is taken."""
    taken = model.graph.initializers
    unique = (
        name
        if name not in taken
        else next(f"{name}_{i}" for i in range(1, len(taken) + 2) if f"{name}_{i}" not in taken)
    )
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
