"""int8 graph -> nearly equal graph in a smaller file: large weights that are still float become int8 codes, where outputs bear it.

    Gather(table, i)    becomes    Mul(Cast(Gather(codes, i)), scale)    the table stays codes in memory, too
    layer(x, W)         becomes    layer(x, Mul(Cast(codes), scale))     ONNX Runtime folds it into W at load

Such a layer, an LSTM for one, computes in float as before and in the same time; its file is smaller. An .ort file is written
behind the folding, so there only tables are smaller.

A DequantizeLinear in the place of Cast and Mul has the same bits and is worse (onnxruntime 1.31). Before a layer it is not
folded: it runs in every inference, W is not packed, and an LSTM took 9 % longer. Behind a Gather of 128 rows of 384 it took
1.8 times the time of the float Gather, where Cast and Mul take 0.9: its kernel goes scale by scale.

Codes are symmetric, -127..127:

    code = rint(w / scale), scale = max|w| / 127 over the elements that share it

They share it along a table's rows (one scale a column) and along the sums of a layer (one scale an output). Tables of
all-MiniLM-L6-v2 alone, SNR of its embedding: one scale a table 26 dB, one a row 39 dB, one a column 43 dB, and 39 dB with the
scale of least squared error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter import bear, graph, ops
from exporter.batches import Array, Batch
from exporter.numerics.quantized import symmetric
from exporter.prepare import edit
from runtime import drift
from runtime.drift import NOTHING_KNOWN, Ground

# a smaller float weight is not worth two more nodes
LEAST_BYTES = 16 << 10
# a smaller table is folded as a layer's weight is: its memory is not worth two nodes behind each Gather, 1 µs each
TABLE_BYTES = 128 << 10
BEHIND = "int8, a scale a column, real numbers behind the Gather"
AT_LOAD = "int8, real numbers again at load"
IN_FLOAT = "int8, computes in float"
# op_type -> the inputs that are weights
WEIGHTS: Mapping[str, tuple[int, ...]] = {name: ops.of(name).weights for name in ("Gather", *ops.LAYERS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What became of one large float weight.

    readers: nodes; op_type: of the first. before, after: bytes in the file; equal where it stays float, and `why` says so.
    alone_db: the worst output's SNR with this weight alone as codes; None where it was not tried alone.
    """

    name: str
    readers: tuple[str, ...]
    op_type: str
    before: int
    after: int
    alone_db: float | None
    why: str

    @property
    def kept(self) -> bool:
        return self.after < self.before

    def __str__(self) -> str:
        sizes = f"{self.before / 1e6:.2f}" + (f" -> {self.after / 1e6:.2f}" if self.kept else "")
        return f"{self.name}, {self.op_type} {self.readers[0]}: {sizes} MB, {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """The graph with the codes that were kept, and every large float weight, largest first.

    before_db, after_db: the worst output's SNR; None where no weight could be codes.
    """

    int8: ir.Model
    stored: tuple[Stored, ...]
    before_db: float | None
    after_db: float | None

    @property
    def notes(self) -> dict[str, str]:
        """{node: what became of its weights}, for the plan."""
        found: dict[str, str] = {}
        for each in self.stored:
            for node in each.readers:
                found[node] = "; ".join(filter(None, (found.get(node), f"{each.name} {each.why}")))
        return found


def weights(
    int8: ir.Model,
    expected: Sequence[Batch],
    batches: Sequence[Batch],
    left: Collection[str] = (),
    aim_db: float = bear.AIM_DB,
    floor_db: float = -math.inf,
    against: Mapping[str, Ground] = NOTHING_KNOWN,
) -> Shrunk:
    """Turn large float weights into codes, as many as the outputs bear.

    See `bear.most`.

    Args:
        int8: the quantized graph, which is not changed.
        expected: outputs of the FP32 graph on each batch.
        batches: calibration batches to compare on.
        left: nodes whose weights stay as they are, for instance because a rule calls the node float.
        aim_db: an SNR that is enough.
        floor_db: one that is required: a graph that has it keeps it.
        against: what each output is held against.

    Raises:
        RunError: ONNX Runtime cannot run the graph, as it is or with codes.
    """
    found = _large(int8)
    refused = {name: why for name in found if (why := _refusal(int8, name, left))}
    names = [name for name in found if name not in refused]

    def snr_db(chosen: Collection[str]) -> float:
        run = graph.runner(_with_codes(int8, chosen))
        return drift.measure(zip(expected, map(run, batches), strict=True), against).worst_snr_db

    if not names:
        stored = tuple(_stored(int8, name, why, None) for name, why in refused.items())
        return Shrunk(int8=int8, stored=stored, before_db=None, after_db=None)
    borne = bear.most(names, snr_db, aim_db, floor_db)
    refused |= {
        name: f"float: as int8 it costs too much, SNR {borne.alone_db[name]:.1f} dB"
        for name in names
        if name not in borne.chosen
    }
    return Shrunk(
        int8=_with_codes(int8, borne.chosen),
        stored=tuple(_stored(int8, name, refused.get(name, ""), borne.alone_db.get(name)) for name in found),
        before_db=borne.before_db,
        after_db=borne.after_db,
    )


def _large(model: ir.Model) -> list[str]:
    """Names of the float weights worth storing as codes, largest first."""
    sizes: dict[str, int] = {}
    for name, value in model.graph.initializers.items():
        array = graph.constant(value)
        if array is None or array.dtype != np.float32 or array.ndim < 2 or array.nbytes < LEAST_BYTES:
            continue
        if any(_is_weight(*use) for use in _uses(value)):
            sizes[name] = array.nbytes
    return sorted(sizes, key=lambda name: -sizes[name])


def _uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    return [(usage.node, usage.idx) for usage in value.uses()]


def _is_weight(node: ir.Node, index: int) -> bool:
    return not node.domain and index in WEIGHTS.get(node.op_type, ())


def _refusal(model: ir.Model, name: str, left: Collection[str]) -> str:
    """Why a weight must stay float; empty where it need not."""
    value = model.graph.initializers[name]
    if value.is_graph_output():
        return "float: it is an output of the model"
    for node, index in _uses(value):
        if not _is_weight(node, index):
            return f"float: {node.op_type} {node.name} reads it too"
        if node.name in left:
            return f"float: {node.name} is to be left alone"
    array = graph.constant(value)
    return "" if array is not None and np.isfinite(array).all() else "float: it holds NaN or infinity"


def _stored(model: ir.Model, name: str, refused: str, alone_db: float | None) -> Stored:
    value = model.graph.initializers[name]
    array = graph.constant(value)
    assert array is not None
    node, index = _first_use(value)
    shared = _shared_axes(node, index, array.ndim)
    scales = math.prod(size for axis, size in enumerate(array.shape) if axis not in shared)
    how = IN_FLOAT if node.op_type != "Gather" else BEHIND if _is_table(model, node, array, shared) else AT_LOAD
    return Stored(
        name=name,
        readers=tuple(each.name or "" for each in graph.consumers(value)),
        op_type=node.op_type,
        before=array.nbytes,
        after=array.nbytes if refused else array.size + 4 * scales,
        alone_db=alone_db,
        why=refused or how,
    )


def _with_codes(model: ir.Model, names: Collection[str]) -> ir.Model:
    """A clone in which the named weights are codes."""
    clone = model.clone()
    for name in names:
        value = clone.graph.initializers[name]
        array = graph.constant(value)
        assert array is not None
        shared = _shared_axes(*_first_use(value), array.ndim)
        codes, scale = _rounded(array, shared)
        stored = edit.initializer(clone, f"{name}_codes", codes)
        scales = edit.initializer(clone, f"{name}_scale", scale)
        for node in [node for node, _ in _uses(value) if _is_table(clone, node, array, shared)]:
            _read_behind(clone, node, stored, scales)
        if value.uses():
            cast, real = _real(clone, name, stored, scales)
            clone.graph.insert_before(clone.graph[0], [cast, real])
            for node, index in _uses(value):
                node.replace_input_with(index, real.outputs[0])
        del clone.graph.initializers[name]
    return clone


def _first_use(value: ir.Value) -> tuple[ir.Node, int]:
    """The use that decides which elements share a scale: a Gather's, for there the choice is small."""
    uses = _uses(value)
    return next((use for use in uses if use[0].op_type == "Gather"), uses[0])


def _shared_axes(node: ir.Node, index: int, rank: int) -> tuple[int, ...]:
    """The axes of a weight along which elements share a scale: all but a table's columns, or those that a layer sums over.

    LSTM, GRU, RNN: W, R [directions, gates * hidden, in]. Gemm: [K, N], with transB [N, K]. MatMul: [..., M, K] or
    [..., K, N]. Conv: [M, C/group, kernel...]. ConvTranspose: [C, M/group, kernel...].
    """
    every = range(rank)
    if node.op_type == "Gather":
        # what is gathered is gone from the output: columns, unless it is they
        kept = 0 if _gathered(node, rank) == rank - 1 else rank - 1
        return tuple(axis for axis in every if axis != kept)
    if node.op_type in ops.RECURRENT:
        return (2,)
    if node.op_type == "Gemm":
        return (1 if node.attributes.get_int("transB", 0) else 0,)
    if node.op_type == "MatMul":
        return (rank - 1 if index == 0 else rank - 2,)
    outputs = 0 if node.op_type == "Conv" else 1
    return tuple(axis for axis in every if axis != outputs)


def _gathered(node: ir.Node, rank: int) -> int:
    return node.attributes.get_int("axis", 0) % rank


def _is_table(model: ir.Model, node: ir.Node, array: Array, shared: Sequence[int]) -> bool:
    """Whether it is a Gather of this graph, not of a loop's body, from a large table whose columns have the scales."""
    if node.op_type != "Gather" or node.graph is not model.graph or array.nbytes < TABLE_BYTES:
        return False
    columns = array.ndim - 1
    return columns not in shared and _gathered(node, array.ndim) != columns


def _rounded(array: Array, shared: tuple[int, ...]) -> tuple[Array, Array]:
    """codes int8 in the array's shape, scale float32 > 0 of size 1 along the shared axes, leading ones left out.

    So a table's scales fit behind a Gather by whatever indices: array ≈ codes · scale.
    """
    codes, scale = symmetric(array, shared)
    leading = next(axis for axis in range(array.ndim) if axis not in shared)
    return codes, scale.reshape(scale.shape[leading:])


def _read_behind(model: ir.Model, node: ir.Node, codes: ir.Value, scale: ir.Value) -> None:
    name = node.outputs[0].name or ""
    gathered = ir.node("Gather", [codes, node.inputs[1]], node.attributes, name=node.name)
    gathered.outputs[0].name = edit.free_name(model, f"{name}_codes")
    cast, real = _real(model, name, gathered.outputs[0], scale)
    edit.replace(model, [node], [gathered, cast, real], node.outputs[0], real.outputs[0])


def _real(model: ir.Model, name: str, codes: ir.Value, scale: ir.Value) -> tuple[ir.Node, ir.Node]:
    """Cast(codes) and Mul(it, scale): the bits of a DequantizeLinear."""
    cast = ir.node("Cast", [codes], {"to": ir.DataType.FLOAT}, name=f"{name}_Cast")
    real = ir.node("Mul", [cast.outputs[0], scale], name=f"{name}_Mul")
    cast.outputs[0].name, real.outputs[0].name = (edit.free_name(model, f"{name}_{of}") for of in ("cast", "real"))
    return cast, real
