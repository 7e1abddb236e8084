"""Q/DQ that a file came with -> a float graph, and what they say: codes of weights, grids of tensors.

1. DequantizeLinear over constants, also behind QuantizeLinear and nodes that move codes   becomes   the weight, in real numbers.
2. QuantizeLinear and the DequantizeLinear behind it, of one scale and zero point, also with nodes that move codes between
   them, go, and the tensor has their grid. Where values of a batch reach so far beyond the codes that cutting them is more than
   rounding, a Relu or Clip stays in their place: the network was trained with it.
3. Any other QuantizeLinear and DequantizeLinear, and every integer operator, stays as it is.

A grid is one of uint8 codes; int8 codes are uint8 codes with the zero point 128 higher, and no number changes. Of others, as of 16
bits, nothing is left: they are calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from exporter import graph, ops
from exporter.batches import Array, Batch
from exporter.graph import DEQUANTIZE, QUANTIZE
from exporter.numerics.quantized import Grid
from exporter.prepare import edit
from runtime import session
from runtime.errors import BundleError

DOMAINS = ("", "com.microsoft")
# Nodes whose outputs hold codes of their first input, and its grid
MOVERS = ops.CARRIES | {"Clip"}
ENDS: Mapping[ir.DataType, tuple[int, int]] = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT4: (-8, 7),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Taken:
    """What a file's Q/DQ said.

    grids: {tensor: its uint8 codes}. scales: of constants, float32 ascending.
    types: {initializer that was codes: their type}.
    """

    grids: Mapping[str, Grid]
    scales: Array
    types: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Pair:
    """A QuantizeLinear, what moves its codes, and the DequantizeLinear behind; (code - zero_point) · scale, low <= code <= high."""

    quantize: ir.Node
    movers: tuple[ir.Node, ...]
    dequantize: tuple[ir.Node, ...]
    scale: float
    zero_point: int
    dtype: ir.DataType
    low: int
    high: int

    def real(self, code: float) -> float:
        return (code - self.zero_point) * self.scale


def is_quantized(model: ir.Model) -> bool:
    """Whether a QuantizeLinear or DequantizeLinear is in the graph."""
    return any(_is(node, QUANTIZE) or _is(node, DEQUANTIZE) for node in model.graph)


def take(model: ir.Model, batch: Batch) -> Taken:
    """Rules 1 and 2, in place.

    Args:
        batch: on which it is seen whether values reach beyond the codes.
    """
    scales, types = _fold(model)
    pairs = [pair for node in model.graph if (pair := _pair(node)) is not None]
    beyond = _beyond(model, pairs, batch)
    grids: dict[ir.Value, Grid] = {}
    for pair in pairs:
        for value in _strip(model, pair, beyond.get(pair.quantize, (False, False))):
            _note(grids, value, _grid(pair.scale, pair.zero_point, pair.dtype))
    RemoveUnusedNodesPass()(model)
    for node in model.graph:
        if _is(node, DEQUANTIZE) and (found := _parameters(node)) is not None:
            _note(grids, node.outputs[0], _grid(*found))
    named = {value.name: grid for value, grid in grids.items() if value.name}
    return Taken(grids=named, scales=np.unique(np.concatenate([np.zeros(0, np.float32), *scales])), types=types)


def _is(node: ir.Node, op_type: str) -> bool:
    return node.op_type == op_type and node.domain in DOMAINS


def _note(grids: dict[ir.Value, Grid], value: ir.Value, grid: Grid | None) -> None:
    """Of two grids of a tensor the coarser one, which cuts less."""
    known = grids.get(value)
    if grid is not None and (known is None or known.scale < grid.scale):
        grids[value] = grid


def _grid(scale: float, zero_point: int, dtype: ir.DataType) -> Grid | None:
    if dtype not in (ir.DataType.UINT8, ir.DataType.INT8):
        return None
    return Grid(scale=scale, zero_point=zero_point + 128 * (dtype == ir.DataType.INT8))


def _parameters(node: ir.Node) -> tuple[float, int, ir.DataType] | None:
    """Scale, zero point and type of the codes, where a QuantizeLinear or DequantizeLinear has one constant scale."""
    scale = graph.constant(node.inputs[1])
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    zero_point = graph.constant(zero)
    if scale is None or scale.size != 1 or (zero is not None and zero_point is None):
        return None
    codes = node.inputs[0] if node.op_type == DEQUANTIZE else node.outputs[0]
    said = node.attributes.get_int("output_dtype", 0) if node.op_type == QUANTIZE else 0
    dtype = (
        zero.dtype if zero is not None else ir.DataType(said) if said else codes.dtype if codes is not None else None
    )
    if dtype is None and node.op_type == QUANTIZE:
        dtype = ir.DataType.UINT8
    number = float(scale.reshape(-1)[0])
    if dtype is None or dtype not in ENDS or not np.isfinite(number) or number < np.finfo(np.float32).tiny:
        return None
    return number, 0 if zero_point is None else int(zero_point.reshape(-1)[0]), dtype


def _fold(model: ir.Model) -> tuple[list[Array], dict[str, str]]:
    """Rule 1."""
    scales: list[Array] = []
    types: dict[str, str] = {}
    for node in [node for node in model.graph if _is(node, DEQUANTIZE)]:
        value, cone = node.outputs[0], _cone(node)
        array = None if cone is None or value.is_graph_output() else _run(model, cone, value)
        if array is None:
            continue
        scale, codes, name = graph.constant(node.inputs[1]), node.inputs[0], value.name or ""
        if scale is not None:
            scales.append(scale.astype(np.float32).reshape(-1))
        value.name = edit.free_name(model, f"{name}_folded")
        weight = edit.initializer(model, name, array)
        ir.convenience.replace_all_uses_with(value, weight)
        blocks = " in blocks" if node.attributes.get_int("block_size", 0) else ""
        dtype = codes.dtype if codes is not None else None
        types[weight.name or ""] = f"{dtype.name.lower() if dtype is not None else 'integer'}{blocks}"
    RemoveUnusedNodesPass()(model)
    return scales, types


def _cone(node: ir.Node) -> list[ir.Node] | None:
    """The nodes that make a DequantizeLinear's output of constants alone, in order; None where something else is among them."""
    found: list[ir.Node] = []
    for value in node.inputs:
        if value is None or graph.constant(value) is not None:
            continue
        maker = value.producer()
        if maker is None or not (_is(maker, QUANTIZE) or maker.op_type in (*MOVERS, "Cast")):
            return None
        before = _cone(maker)
        if before is None:
            return None
        found += [each for each in before if each not in found]
    return [*found, node]


def _run(model: ir.Model, nodes: Sequence[ir.Node], value: ir.Value) -> Array | None:
    """What nodes make of constants, by ONNX Runtime; None where it cannot."""
    constants = {each.name: each for node in nodes for each in node.inputs if graph.constant(each) is not None and each}
    made = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in nodes],
        "constants",
        [],
        [onnx.helper.make_empty_tensor_value_info(value.name or "")],
        [_tensor(each) for each in constants.values()],
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    whole = onnx.helper.make_model(made, opset_imports=opsets, ir_version=model.ir_version)
    try:
        found = session.open_session(whole.SerializeToString(), threads=1, entries=graph.AS_WRITTEN).run(None, {})[0]
    except BundleError:
        return None
    except session.ORT_ERRORS:
        return None
    return np.asarray(found) if np.asarray(found).dtype.kind == "f" else None


def _tensor(value: ir.Value) -> onnx.TensorProto:
    assert value.const_value is not None
    made = ir.serde.serialize_tensor(value.const_value)
    made.name = value.name or ""
    return made


def _pair(node: ir.Node) -> _Pair | None:
    """Rule 2, where it applies to a QuantizeLinear."""
    found = _parameters(node) if _is(node, QUANTIZE) else None
    if found is None or graph.constant(node.inputs[0]) is not None:
        return None
    scale, zero_point, dtype = found
    low, high = ENDS[dtype]
    movers, dequantize, todo = list[ir.Node](), list[ir.Node](), [node.outputs[0]]
    while todo:
        value = todo.pop()
        if value.is_graph_output():
            return None
        for usage in value.uses():
            reader = usage.node
            if _is(reader, DEQUANTIZE) and usage.idx == 0 and (read := _parameters(reader)) is not None:
                if read[:2] != found[:2]:
                    return None
                dequantize.append(reader)
            elif reader.op_type in MOVERS and not reader.domain and usage.idx == 0 and reader.graph is node.graph:
                bounds = _bounds(reader) if reader.op_type == "Clip" else ENDS[dtype]
                if bounds is None:
                    return None
                low, high = max(low, bounds[0]), min(high, bounds[1])
                movers.append(reader)
                todo += reader.outputs
            else:
                return None
    return _Pair(
        quantize=node, movers=tuple(movers), dequantize=tuple(dequantize), scale=scale, zero_point=zero_point, dtype=dtype,
        low=low, high=high,
    )  # fmt: skip


def _bounds(clip: ir.Node) -> tuple[int, int] | None:
    """The ends of a Clip over codes; None where one is computed at run time."""
    ends = [-(2**31), 2**31]
    for index, value in enumerate(clip.inputs[1:3]):
        array = graph.constant(value)
        if value is not None and array is None:
            return None
        if array is not None:
            ends[index] = int(array.reshape(-1)[0])
    return ends[0], ends[1]


def _beyond(model: ir.Model, pairs: Sequence[_Pair], batch: Batch) -> dict[ir.Node, tuple[bool, bool]]:
    """{QuantizeLinear: whether cutting values to its lowest code, and to its highest, is more than rounding}.

    Σ (x - cut x)² against n · scale² / 12.
    """
    given = {value.name for value in model.graph.inputs}
    names = dict.fromkeys(pair.quantize.inputs[0].name or "" for pair in pairs if pair.quantize.inputs[0] is not None)
    wanted = [name for name in names if name not in given]
    made = {**batch, **(graph.runner(graph.with_outputs(model, wanted))(batch) if wanted else {})}
    found: dict[ir.Node, tuple[bool, bool]] = {}
    for pair in pairs:
        value = pair.quantize.inputs[0]
        x = np.asarray(made[value.name or ""] if value is not None else 0, np.float64)
        noise = x.size * pair.scale**2 / 12
        below, above = np.minimum(x - pair.real(pair.low), 0), np.maximum(x - pair.real(pair.high), 0)
        maker = value.producer() if value is not None else None
        ends = any(node.outputs[0].is_graph_output() for node in pair.dequantize)  # nothing is spared there
        if maker is None or maker.op_type not in ops.SQUASHING:
            found[pair.quantize] = ends or bool((below**2).sum() > noise), ends or bool((above**2).sum() > noise)
    return found


def _strip(model: ir.Model, pair: _Pair, beyond: tuple[bool, bool]) -> list[ir.Value]:
    """Rule 2 for one pair. Returns the real tensors that had the codes."""
    x = pair.quantize.inputs[0]
    assert x is not None
    real = _cut(model, pair, x, beyond) if any(beyond) else x
    ir.convenience.replace_all_uses_with(pair.quantize.outputs[0], real)
    values = [real]
    for node in pair.movers:
        for value in node.outputs:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            values.append(value)
        if node.op_type == "Clip":
            for index, bound in enumerate(node.inputs[1:3], start=1):
                code = graph.constant(bound)
                if code is not None:
                    end = np.array(pair.real(int(code.reshape(-1)[0])), np.float32)
                    node.replace_input_with(index, edit.initializer(model, f"{node.name}_end", end))
    for node in pair.dequantize:
        source, value = node.inputs[0], node.outputs[0]
        assert source is not None
        if not value.is_graph_output():
            ir.convenience.replace_all_uses_with(value, source)
            continue
        same = ir.node("Identity", [source], name=node.name)
        edit.replace(model, [node], [same], value, same.outputs[0])
        values.append(same.outputs[0])
    return values


def _cut(model: ir.Model, pair: _Pair, x: ir.Value, beyond: tuple[bool, bool]) -> ir.Value:
    """x as far as the codes reach, at the ends beyond which it goes."""
    low, high = pair.real(pair.low), pair.real(pair.high)
    base = f"{x.name}_cut"
    if beyond == (True, False) and low == 0:
        node = ir.node("Relu", [x], name=base)
    else:
        ends = [
            edit.initializer(model, f"{base}_{name}", np.array(end, np.float32)) if there else None
            for name, end, there in (("low", low, beyond[0]), ("high", high, beyond[1]))
        ]
        node = ir.node("Clip", [x, *ends], name=base)
    made = node.outputs[0]
    made.name, made.type, made.shape = edit.free_name(model, base), x.type, x.shape
    model.graph.insert_before(pair.quantize, node)
    return made
