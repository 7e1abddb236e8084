"""Let a linear layer over a tensor of more than two axes be a Gemm: MatMul(x, W) + b, with W and b constant.

x [..., K] -> Reshape [-1, K] -> Gemm(W [K, N], b [N]) -> Reshape [..., N]

The integer kernel of Gemm adds the bias in int32 and writes float at once. A MatMul leaves an Add behind, which in float
takes a tenth of the product's time, and ONNX Runtime may fuse that Add into the GELU behind it, which then takes twice
as long. MiniLM with 128 tokens takes 8 % less time, ViT-S 10 %. Layers that read one tensor share its Reshape. Where two
axes or more have no fixed size, their sizes are read at run time.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array
from exporter.prepare import edit, gemm


def rewrite(model: ir.Model) -> int:
    rows: dict[ir.Value, ir.Value] = {}
    matched = 0
    for node in [node for node in model.graph if graph.op(node) == "MatMul"]:
        found = _bias(node)
        if found is None:
            continue
        add, bias = found
        x, weight = node.inputs
        assert x is not None
        assert weight is not None
        if x not in rows:
            rows[x] = _rows(model, x, node)
        shift = edit.initializer(model, f"{node.name}_bias", bias)
        layer = ir.node("Gemm", [rows[x], weight, shift], name=f"{node.name}_gemm")
        before, shape = add.outputs[0], _shape(model, x, node, bias.size)
        back = ir.node("Reshape", [layer.outputs[0], shape], _attributes(shape), name=f"{node.name}_axes")
        edit.replace(model, [node, add], [layer, back], before, back.outputs[0])
        layer.outputs[0].name, layer.outputs[0].dtype = edit.free_name(model, f"{node.name}_rows"), ir.DataType.FLOAT
        matched += 1
    return matched


def _bias(node: ir.Node) -> tuple[ir.Node, Array] | None:
    """The Add of one constant per column that alone reads the product, and that constant, float32 [N]."""
    x, product = node.inputs[0], node.outputs[0]
    weight, uses = graph.constant(node.inputs[1]), product.uses()
    if x is None or x.shape is None or len(x.shape) < 3 or weight is None or weight.ndim != 2:
        return None
    if weight.dtype != np.float32 or len(uses) != 1 or product.is_graph_output():
        return None
    (usage,) = uses
    add = usage.node
    if graph.op(add) != "Add" or add.graph is not node.graph:
        return None
    bias = graph.constant(add.inputs[1 - usage.idx])
    shift = None if bias is None else gemm.per_column(bias, weight.shape[1], len(x.shape))
    return None if shift is None else (add, shift)


def _rows(model: ir.Model, x: ir.Value, reader: ir.Node) -> ir.Value:
    """x as a matrix; the node stands before the first that reads it so."""
    weight = graph.constant(reader.inputs[1])
    assert weight is not None
    shape = edit.initializer(model, f"{x.name}_rows_shape", np.array([-1, weight.shape[0]], np.int64))
    node = ir.node("Reshape", [x, shape], name=f"{reader.name}_rows")
    model.graph.insert_before(reader, node)
    node.outputs[0].name, node.outputs[0].dtype = edit.free_name(model, f"{x.name}_rows"), ir.DataType.FLOAT
    return node.outputs[0]


def _attributes(shape: ir.Value) -> dict[str, int]:
    """Sizes that are computed may be 0, as of an empty sequence, which Reshape else takes for that of its input."""
    return {} if shape.is_initializer() else {"allowzero": 1}


def _shape(model: ir.Model, x: ir.Value, node: ir.Node, columns: int) -> ir.Value:
    """[..., N] for Reshape: a constant, with -1 for an axis without a fixed size; computed where there are several."""
    assert x.shape is not None
    sizes = [size if isinstance(size, int) else -1 for size in x.shape[:-1]]
    if sizes.count(-1) <= 1:
        return edit.initializer(model, f"{node.name}_shape", np.array([*sizes, columns], np.int64))
    last = edit.initializer(model, f"{node.name}_columns", np.array([columns], np.int64))
    leading = ir.node("Shape", [x], {"start": 0, "end": -1}, name=f"{node.name}_leading")
    whole = ir.node("Concat", [leading.outputs[0], last], {"axis": 0}, name=f"{node.name}_sizes")
    model.graph.insert_before(node, [leading, whole])
    for each in (leading, whole):
        each.outputs[0].name, each.outputs[0].dtype = edit.free_name(model, each.name or ""), ir.DataType.INT64
    return whole.outputs[0]
