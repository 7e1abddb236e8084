"""Which Conv of many groups, or of three spatial axes, are slower in int8 than in float on this very CPU: timed, not looked up.

Their integer kernel copies the input position by position, and the float one of a CPU may be good or bad at it: a RegNet whose
groups have 8 channels is slower in int8 on one server and 1.15 times as fast on another. Each kind of Conv (sizes, groups, strides,
the input's size) is timed once, both ways, as ONNX Runtime's profiler sees the kernel alone.
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

from exporter import place
from exporter.batches import Array
from exporter.calibrate import cache
from exporter.graph import Shape
from exporter.target import Target, is_here
from runtime import cpu
from runtime.kernels import trace

RUNS = 7
MOST_KINDS, MOST_ELEMENTS = 64, 1 << 22  # of an input: what is left is decided by the target's table
SLOWER = 1.1  # int8 over float, Q and DQ aside: below it neighbours in int8 and a smaller file decide
OPSET, IR_VERSION = 17, 8


@dataclass(frozen=True, slots=True)
class Kind:
    """A Conv as its kernels see it: W's sizes, its input's with a batch of 1, and attributes."""

    weight: tuple[int, ...]
    x: tuple[int, ...]
    attributes: tuple[tuple[str, tuple[int, ...] | int], ...]


def on(target: Target, model: ir.Model, shapes: Mapping[str, Shape], costs: Path | None = None) -> Target:
    """The target with what its table has float for its groups timed here, where it is this machine.

    Args:
        target: what the export is for.
        model: the prepared graph.
        shapes: of its tensors on a batch.
        costs: a cost table of another export, which is followed: what it has a cost of was in int8 there.

    Raises:
        PacklightError: ONNX Runtime refuses a model made of such Conv.
    """
    copied = [node for node in model.graph if place.copies(node, target)]
    if not copied or (costs is None and not is_here(target)):
        return target
    if costs is not None:
        known = _in(costs)
        return replace(target, slower={node.name or "": node.name not in known for node in copied})
    kinds = {node.name or "": kind for node in copied if (kind := _kind(node, shapes)) is not None}
    times = _timed([*dict.fromkeys(kinds.values())][:MOST_KINDS], target)
    slower = {name: times[kind][1] > SLOWER * times[kind][0] for name, kind in kinds.items() if kind in times}
    return replace(target, slower=slower)


def _in(costs: Path) -> frozenset[str]:
    """The nodes of a cost table; none of a file that is none, which `search` refuses."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        return frozenset(json.loads(costs.read_text(encoding="utf-8"))["nodes"])
    return frozenset()


def _timed(kinds: Sequence[Kind], target: Target) -> dict[Kind, tuple[float, float]]:
    """{kind: ms in float, in int8}; remembered for this CPU and these libraries, so that the next export decides the same."""
    home = cache.place()
    said = json.dumps([cache.versions(), cache.kind_of_cpu(), cpu.name(), sorted(target.session.items()), SLOWER])
    path = None if home is None else home.parent / "grouped" / f"{hashlib.sha256(said.encode()).hexdigest()}.json"
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
    if x is None or weight is None or not all(x) or math.prod(x[1:]) > MOST_ELEMENTS:
        return None
    attributes: list[tuple[str, tuple[int, ...] | int]] = [("group", node.attributes.get_int("group", 1))]
    for name in ("kernel_shape", "strides", "dilations", "pads"):
        if name in node.attributes:
            attributes.append((name, tuple(node.attributes[name].as_ints())))
    return Kind(tuple(weight), (1, *x[1:]), tuple(attributes))


def _times(kinds: Iterable[Kind], target: Target, int8: bool) -> dict[Kind, float]:
    """{kind: ms of its kernel}, all in one model."""
    made = _Model(np.random.default_rng(0))
    names = {f"conv_{number}": kind for number, kind in enumerate(kinds)}
    for name, kind in names.items():
        made.add(name, kind, int8)
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(made.proto().SerializeToString())
        found = trace(path, made.feed, entries=target.session if int8 else {}, runs=RUNS)
    return {
        names[kernel.node]: kernel.ms
        for kernel in found.kernels
        if kernel.node in names and (not int8 or kernel.integer)
    }


class _Model:
    """Conv beside each other, each with an input and an output of its own."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.feed: dict[str, Array] = {}

    def add(self, name: str, kind: Kind, int8: bool) -> None:
        x, y = f"{name}_x", f"{name}_y"
        self.feed[x] = self.rng.standard_normal(kind.x).astype(np.float32)
        weight = self.rng.standard_normal(kind.weight).astype(np.float32)
        attributes: dict[str, Any] = {
            key: list(value) if isinstance(value, tuple) else value for key, value in kind.attributes
        }
        self.inputs.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, list(kind.x)))
        self.outputs.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, None))
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

    def pair(self, out: str, x: str, scale: str, zero: str) -> None:
        self.nodes.append(helper.make_node("QuantizeLinear", [x, scale, zero], [f"{out}_q"]))
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{out}_q", scale, zero], [out]))

    def constant(self, name: str, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def proto(self) -> onnx.ModelProto:
        made = helper.make_graph(self.nodes, "grouped", self.inputs, self.outputs, self.constants)
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
