"""Which nodes are slower in int8 than in float on this very CPU and no other: timed, not looked up.

Conv of many groups, or of three spatial axes: their integer kernel copies the input position by position, and the float one of a
CPU may be good or bad at it. A RegNet whose groups have 8 channels is slower in int8 on one server and 1.15 times as fast on
another.

Products of two activations: on a core with AMX the scores of attention, 1500 tokens by 1500 of 32 or 64 numbers each, take five to
eight times as long in integers as in float, and twice as fast at 512 tokens; what follows the Softmax is always fast.

Each kind (sizes, groups, strides, the input's size) is timed once, both ways, as ONNX Runtime's profiler sees the kernel alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from exporter import graph, place, products
from exporter.batches import Array
from exporter.calibrate import cache
from exporter.graph import Shape
from exporter.target import Target, is_here
from runtime import cpu
from runtime.kernels import trace

RUNS = 7
MOST_KINDS, MOST_ELEMENTS = 64, 1 << 22  # of an input: what is left is decided by the target's table
LEAST_MS = 0.02  # of the slower side: what takes less is noise, and is decided by the target's table
# int8 over float, Q and DQ aside: below it neighbours in int8 and a smaller file decide, and of products the search. Scores of
# 1,500 tokens take 5 to 8 times as long, those of 128 to 512 tokens 0.7 to 1.4 times: a busy machine is not to decide those
SLOWER = {"Conv": 1.1, "MatMul": 3.0}
OPSET, IR_VERSION = 17, 8


@dataclass(frozen=True, slots=True)
class Kind:
    """A node as its kernels see it: the sizes of what it multiplies by, of its input, and attributes.

    A Conv has a batch of 1; a product as many matrices as MOST_ELEMENTS hold, for each takes as long as another.
    """

    weight: tuple[int, ...]
    x: tuple[int, ...]
    attributes: tuple[tuple[str, tuple[int, ...] | int], ...]
    op_type: str = "Conv"


def on(target: Target, model: ir.Model, shapes: Mapping[str, Shape], costs: Path | None = None) -> Target:
    """The target with what its table knows too little of timed here, where it is this machine.

    Args:
        target: what the export is for.
        model: the prepared graph.
        shapes: of its tensors on a batch.
        costs: a cost table of another export, which is followed: what it has a cost of was in int8 there.

    Raises:
        PacklightError: ONNX Runtime refuses a model made of such nodes.
    """
    asked = [node for node in model.graph if place.copies(node, target) or _is_product(node, target)]
    if not asked or (costs is None and not is_here(target)):
        return target
    if costs is not None:
        known = _in(costs)
        return replace(target, slower={node.name or "": node.name not in known for node in asked})
    kinds = {node.name or "": kind for node in asked if (kind := _kind(node, shapes)) is not None}
    times = _timed([*dict.fromkeys(kinds.values())][:MOST_KINDS], target)
    told = {kind: taken for kind, taken in times.items() if max(taken) >= LEAST_MS}
    slower = {
        name: told[kind][1] > SLOWER[kind.op_type] * told[kind][0] for name, kind in kinds.items() if kind in told
    }
    return replace(target, slower=slower)


def _is_product(node: ir.Node, target: Target) -> bool:
    return target.activations_matmul and graph.is_product(node)


def _in(costs: Path) -> frozenset[str]:
    """The nodes of a cost table; none of a file that is none, which `search` refuses."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return frozenset(json.loads(costs.read_text(encoding="utf-8"))["nodes"])
    return frozenset()


def _timed(kinds: Sequence[Kind], target: Target) -> dict[Kind, tuple[float, float]]:
    """{kind: ms in float, in int8}; remembered for this CPU and these libraries, so that the next export decides the same."""
    home = cache.place()
    said = json.dumps([cache.versions(), cache.kind_of_cpu(), cpu.name(), sorted(target.session.items())])
    path = None if home is None else home.parent / "kinds" / f"{hashlib.sha256(said.encode()).hexdigest()}.json"
    known: dict[str, tuple[float, float]] = {}
    if path is not None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            known = {key: (float(a), float(b)) for key, (a, b) in json.loads(path.read_text(encoding="utf-8")).items()}
    new = [kind for kind in kinds if repr(kind) not in known]
    if new:
        in_float, in_int8 = (_times(new, target, int8) for int8 in (False, True))
        known |= {repr(kind): (in_float[kind], in_int8[kind]) for kind in new if kind in in_float and kind in in_int8}
        if path is not None:
            with contextlib.suppress(OSError):
                cache.put(path, json.dumps(known).encode())
    return {kind: known[repr(kind)] for kind in kinds if repr(kind) in known}


def _kind(node: ir.Node, shapes: Mapping[str, Shape]) -> Kind | None:
    x, weight = (shapes.get(value.name or "") if value is not None else None for value in node.inputs[:2])
    if x is None or weight is None or not all((*x, *weight)):
        return None
    if graph.is_product(node):
        return _product(x, weight)
    if math.prod(x[1:]) > MOST_ELEMENTS:
        return None
    attributes: list[tuple[str, tuple[int, ...] | int]] = [("group", node.attributes.get_int("group", 1))]
    for name in ("kernel_shape", "strides", "dilations", "pads"):
        if name in node.attributes:
            attributes.append((name, tuple(node.attributes[name].as_ints())))
    return Kind(tuple(weight), (1, *x[1:]), tuple(attributes))


def _product(first: Shape, second: Shape) -> Kind | None:
    """Matrices [.., M, K] x [.., K, N], of which a few are as good as all of them."""
    if len(first) != len(second) or len(first) < 3 or first[:-2] != second[:-2]:
        return None
    rows, depth, columns = first[-2], first[-1], second[-1]
    largest = max(rows * depth, depth * columns, rows * columns)
    if largest > MOST_ELEMENTS:
        return None
    matrices = min(math.prod(first[:-2]), MOST_ELEMENTS // largest)
    return Kind((matrices, depth, columns), (matrices, rows, depth), (), "MatMul")


def _times(kinds: Iterable[Kind], target: Target, int8: bool) -> dict[Kind, float]:
    """{kind: ms of its kernel}, all in one model."""
    made = _Model(np.random.default_rng(0))
    names = {f"kind_{number}": kind for number, kind in enumerate(kinds)}
    for name, kind in names.items():
        made.add(name, kind, int8)
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(made.proto().SerializeToString())
        found = trace(path, made.feed, entries=products.entries(target) if int8 else {}, runs=RUNS)
    return {
        names[kernel.node]: kernel.ms
        for kernel in found.kernels
        if kernel.node in names and (not int8 or kernel.integer)
    }


class _Model:
    """Nodes beside each other, each with inputs and an output of its own."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.feed: dict[str, Array] = {}

    def add(self, name: str, kind: Kind, int8: bool) -> None:
        x, y = self.input(f"{name}_x", kind.x), f"{name}_y"
        self.outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, None))
        if kind.op_type == "MatMul":
            self.product(name, x, self.input(f"{name}_b", kind.weight), y, int8)
            return
        weight = self.rng.standard_normal(kind.weight).astype(np.float32)
        attributes: dict[str, Any] = {
            key: list(value) if isinstance(value, tuple) else value for key, value in kind.attributes
        }
        if not int8:
            self.nodes.append(
                helper.make_node("Conv", [x, self.constant(f"{name}_w", weight)], [y], name, **attributes)
            )
            return
        scale, zero = self.constant(f"{name}_s", np.float32(0.05)), self.constant(f"{name}_z", np.uint8(128))
        wide = self.constant(f"{name}_t", np.float32(0.05 * math.sqrt(math.prod(kind.weight[1:]))))
        codes = self.constant(f"{name}_w", np.clip(np.rint(weight * 30), -127, 127).astype(np.int8))
        each = self.constant(f"{name}_v", np.full(kind.weight[0], 1 / 30, np.float32))
        none = self.constant(f"{name}_n", np.zeros(kind.weight[0], np.int8))
        self.pair(f"{name}_in", x, scale, zero)
        self.nodes.append(helper.make_node("DequantizeLinear", [codes, each, none], [f"{name}_f"], axis=0))
        self.nodes.append(helper.make_node("Conv", [f"{name}_in", f"{name}_f"], [f"{name}_c"], name, **attributes))
        self.pair(y, f"{name}_c", wide, zero)

    def product(self, name: str, first: str, second: str, out: str, int8: bool) -> None:
        """As it ships: the second factor's codes are signed, and it writes real numbers."""
        read = [first, second]
        if int8:
            scale, read = self.constant(f"{name}_s", np.float32(0.05)), [f"{name}_first", f"{name}_second"]
            self.pair(read[0], first, scale, self.constant(f"{name}_z", np.uint8(128)))
            self.pair(read[1], second, scale, self.constant(f"{name}_n", np.int8(0)))
        self.nodes.append(helper.make_node("MatMul", read, [out], name))

    def input(self, name: str, shape: tuple[int, ...]) -> str:
        self.feed[name] = self.rng.standard_normal(shape).astype(np.float32)
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
        return name

    def pair(self, out: str, x: str, scale: str, zero: str) -> None:
        self.nodes.append(helper.make_node("QuantizeLinear", [x, scale, zero], [f"{out}_q"]))
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{out}_q", scale, zero], [out]))

    def constant(self, name: str, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def proto(self) -> onnx.ModelProto:
        made = helper.make_graph(self.nodes, "kinds", self.inputs, self.outputs, self.constants)
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
