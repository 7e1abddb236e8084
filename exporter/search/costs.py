"""What each node takes in float, int8 and dynamic int8: profiled here, or the target's table. A value that can be written and read.

    predicted ms of a plan = Σ over nodes of its ms at its precision + Σ over tensors of the Q or DQ where they cross

Measured: one profiled run of the float graph, one of the int8 graph and one of that with every layer dynamic that may be, node
by node as they really ran, fused and with their layouts. A node that was fused into another has no time of its own, and its host's
covers both. What finds the range of a dynamic layer's input counts with the layer, the first of those that read it.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from exporter import graph, place, products, weights
from exporter.batches import Batch
from exporter.dynamic import PRODUCT
from exporter.errors import RecipeError
from exporter.graph import DEQUANTIZE, QUANTIZE, Shape
from exporter.place import Plan
from exporter.target import Cost, Target
from runtime import cpu
from runtime.explain import ADDED
from runtime.kernels import Kernel, trace
from runtime.manifest import canonical

FORMAT = 3
RUNS = 10
ENOUGH_ELEMENTS = 20_000  # below it what a crossing takes is its fixed cost


# Where a target says no cost of layers (int8 always saves), nanoseconds of a multiply-add: ViT-S and EfficientNet-Lite0 on
# x86 with VNNI, by `measure`. A depthwise Conv moves more than it multiplies.
LAYER = Cost(float_ns=0.022, int8_ns=0.0065)
DEPTHWISE = Cost(float_ns=0.06, int8_ns=0.055)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCost:
    """Milliseconds of one node on one thread, in float, in int8 and as a dynamic layer, which is 0 where it is none in any plan.

    A node that is float in every plan has 0 for all.
    """

    float_ms: float
    int8_ms: float
    dynamic_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The cost of every node of one graph.

    graph: SHA-256 of the prepared graph that it is for; target: the name of its target.
    nodes: of the static plan's int8 nodes and dynamic layers; others are float in every plan.
    where: the CPU and ONNX Runtime that were timed, or the target's table ("predicted").
    timed: {`name_of` a plan: time of its int8 model over that of the static plan's}.
    fp32: the same of the FP32 model; None where it was not timed.
    faster: layers that together make the whole model faster in float, as timed; others are taken to be no faster in float.
    quantize_ns, dequantize_ns: of an element of a tensor that crosses; crossing_ns: of either, whatever its size.
    """

    graph: str
    target: str
    where: str
    measured: bool
    nodes: Mapping[str, NodeCost]
    faster: tuple[str, ...]
    timed: Mapping[str, float]
    fp32: float | None
    quantize_ns: float
    dequantize_ns: float
    crossing_ns: float

    def to_json(self) -> str:
        return canonical({"format": FORMAT, **{name: getattr(self, name) for name in self.__slots__}})


def name_of(float_layers: Sequence[str], dynamic_layers: Sequence[str] = (), opened: bool = False) -> str:
    """A short name of a plan that differs from the static one by these layers, and by whether its gates are open."""
    said = "\n".join((*float_layers, *(f"dynamic {name}" for name in dynamic_layers), *["gates open"][:opened]))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def fingerprint(model: ir.Model) -> str:
    """SHA-256 of a graph's bytes."""
    return hashlib.sha256(graph.to_bytes(model)).hexdigest()


def measure(
    model: ir.Model,
    plan: Plan,
    int8: ir.Model,
    batch: Batch,
    target: Target,
    shapes: Mapping[str, Shape],
    dynamic: ir.Model | None = None,
    runs: int = RUNS,
) -> Costs:
    """Profile the float, the int8 and the dynamic graph on one batch, here, on one thread.

    Args:
        model: the prepared graph.
        plan, int8: the plan with the most int8 nodes, and its int8 graph.
        batch: what both run on.
        target: its session entries, and crossings where the int8 graph has too few to be timed.
        shapes: of the tensors on that batch.
        dynamic: the graph with every layer dynamic that may be; None where there is none.
        runs: behind each median.
    """
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        taken = []
        (int8, there), path = products.ready(int8, target), Path(folder) / "model.onnx"
        graphs = [(model, {}), (int8, there.session)]
        if dynamic is not None:
            laid_dynamic, there = products.ready(dynamic, target)
            graphs.append((laid_dynamic, there.session))
        for each, entries in graphs:
            weights.place(graph.to_bytes(each), path)
            taken.append(trace(path, batch, entries=entries, runs=runs).kernels)
    in_float, in_int8 = map(_by_node, taken[:2])
    in_dynamic = _by_node(taken[-1])
    laid = {node.name for node in (dynamic or int8).graph if node.op_type == PRODUCT}
    crossing = _crossing_times(int8, taken[1], shapes)
    quantize = _per_element(crossing[QUANTIZE], target.quantize_ns)
    found = {
        name: NodeCost(
            float_ms=in_float.get(name, 0.0),
            int8_ms=in_int8.get(name, 0.0),
            dynamic_ms=in_dynamic.get(name, 0.0) if name in laid else 0.0,
        )
        for name in sorted((*plan.int8, *plan.dynamic))
    }
    return Costs(
        graph=fingerprint(model),
        target=target.name,
        where=f"{cpu.name()}, onnxruntime {ort.__version__}",
        measured=True,
        nodes=found,
        faster=(),
        timed={},
        fp32=None,
        quantize_ns=quantize,
        dequantize_ns=_per_element(crossing[DEQUANTIZE], target.dequantize_ns * quantize / target.quantize_ns),
        crossing_ns=target.crossing_ns,
    )


def _crossing_times(
    int8: ir.Model, kernels: Iterable[Kernel], shapes: Mapping[str, Shape]
) -> dict[str, tuple[float, int]]:
    """{QuantizeLinear, DequantizeLinear: (nanoseconds, elements)} over those of at least ENOUGH_ELEMENTS."""
    found = {QUANTIZE: (0.0, 0), DEQUANTIZE: (0.0, 0)}
    nodes = {node.name: node for node in int8.graph}
    for kernel in kernels:
        node = nodes.get(kernel.node)
        source = node.inputs[0] if node is not None and kernel.kernel in found else None
        maker = source.producer() if source is not None else None
        real = maker.inputs[0] if kernel.kernel == DEQUANTIZE and maker is not None else source
        elements = math.prod(shapes.get(real.name or "", (0,))) if real is not None else 0
        if elements >= ENOUGH_ELEMENTS:
            taken, counted = found[kernel.kernel]
            found[kernel.kernel] = (taken + kernel.ms * 1e6, counted + elements)
    return found


def _by_node(kernels: Iterable[Kernel]) -> dict[str, float]:
    """{node of the prepared graph: ms of all kernels that ran for it}."""
    times: dict[str, float] = {}
    for kernel in kernels:
        name = ADDED.sub("", kernel.node)
        times[name] = times.get(name, 0.0) + kernel.ms
    return times


def _per_element(taken: tuple[float, int], otherwise: float) -> float:
    return taken[0] / taken[1] if taken[1] else otherwise


def settled(costs: Costs, faster: Sequence[str]) -> Costs:
    """The costs with the layers that were shown to be faster in float. The others' float time is at least that of int8:

    what a kernel takes by itself says too little of a model to call it faster; noise alone would find some.
    """
    kept = set(faster)
    nodes = {
        name: each if name in kept else replace(each, float_ms=max(each.float_ms, each.int8_ms))
        for name, each in costs.nodes.items()
    }
    return replace(costs, nodes=nodes, faster=tuple(faster))


def from_table(model: ir.Model, plan: Plan, target: Target, shapes: Mapping[str, Shape]) -> Costs:
    """The costs that the target's table predicts: for CPUs that are not here."""
    return Costs(
        graph=fingerprint(model),
        target=target.name,
        where=f"predicted from the table of {target.name} ({target.costs_from})",
        measured=False,
        nodes={
            name: _by_table(node, target, shapes)
            for node in model.graph
            if (name := node.name or "") in {*plan.int8, *plan.dynamic}
        },
        faster=(),
        timed={},
        fp32=None,
        quantize_ns=target.quantize_ns,
        dequantize_ns=target.dequantize_ns,
        crossing_ns=target.crossing_ns,
    )


def _by_table(node: ir.Node, target: Target, shapes: Mapping[str, Shape]) -> NodeCost:
    if node.op_type in target.layers and target.layer is None:
        weight = shapes.get(node.inputs[1].name or "", ()) if node.inputs[1] is not None else ()
        depthwise = node.op_type == "Conv" and graph.is_depthwise(weight, node.attributes.get_int("group", 1))
        per, amount = (DEPTHWISE if depthwise else LAYER), graph.macs(node, shapes)
        float_ms, int8_ms = per.float_ns * amount / 1e6, per.int8_ns * amount / 1e6
        return NodeCost(float_ms=float_ms, int8_ms=int8_ms, dynamic_ms=_dynamic_by_table(node, int8_ms, target, shapes))
    if node.op_type not in (*target.layers, *target.elementwise, *target.movers):
        return NodeCost(float_ms=0.0, int8_ms=0.0)
    price = place.cost(node, target, shapes)
    float_ms, int8_ms = price.float_ns / 1e6, price.int8_ns / 1e6
    return NodeCost(float_ms=float_ms, int8_ms=int8_ms, dynamic_ms=_dynamic_by_table(node, int8_ms, target, shapes))


def _dynamic_by_table(node: ir.Node, int8_ms: float, target: Target, shapes: Mapping[str, Shape]) -> float:
    """The static kernel, and finding the range and rounding of its input, shared by all dynamic layers that read it."""
    if place.not_dynamic(node, target) or node.inputs[0] is None:
        return 0.0
    readers = [reader for reader in graph.consumers(node.inputs[0]) if reader.op_type in target.layers]
    sharing = [reader for reader in readers if not place.not_dynamic(reader, target)]
    elements = math.prod(shapes.get(node.inputs[0].name or "", ()))
    codes = (target.range_ns + target.quantize_ns) * elements + target.crossing_ns
    return int8_ms + codes / len(sharing) / 1e6


def read(text: str, model: ir.Model, plan: Plan, target: Target, where: str) -> Costs:
    """Costs that `to_json` wrote.

    Raises:
        RecipeError: not such a file, or one of another graph, target or static plan.
    """
    try:
        given = json.loads(text)
        if given.pop("format") != FORMAT:
            raise ValueError("another format")
        nodes = {name: NodeCost(**each) for name, each in given.pop("nodes").items()}
        found = Costs(nodes=nodes, faster=tuple(given.pop("faster")), **given)
        _require_times(found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RecipeError(where, found=f"{type(error).__name__}: {error}"[:200], expected="a cost table") from error
    if found.graph != fingerprint(model):
        raise RecipeError(
            where, found="the costs of another graph", expected=f"those of graph {fingerprint(model)[:12]}",
            do="measure again: leave --costs out",
        )  # fmt: skip
    if found.target != target.name or not found.nodes.keys() >= {*plan.int8, *plan.dynamic}:
        raise RecipeError(
            where, found=f"the costs of another plan, for {found.target}", expected=f"those of this one, for {target.name}",
            do="measure again: leave --costs out",
        )  # fmt: skip
    return found


def _require_times(found: Costs) -> None:
    """Refuse a time that is none, and a name that is no text, wherever it stands."""
    per_node = [getattr(node, field.name) for node in found.nodes.values() for field in fields(node)]
    times = [*per_node, *found.timed.values(), found.quantize_ns, found.dequantize_ns, found.crossing_ns]
    for time in [*times, 0.0 if found.fp32 is None else found.fp32]:
        if isinstance(time, bool) or not isinstance(time, int | float) or not -1e15 < time < 1e15:
            raise ValueError(f"{str(time)[:40]}, where a time is expected")
    if not all(isinstance(text, str) for text in (found.graph, found.target, found.where, *found.faster)):
        raise ValueError("something else than a text")


def predict(model: ir.Model, plan: Plan, costs: Costs, shapes: Mapping[str, Shape]) -> float:
    """Milliseconds of the nodes that plans can choose about, under this plan: differences between plans are what it tells."""
    int8, dynamic = set(plan.int8), set(plan.dynamic)

    def ms(name: str, found: NodeCost) -> float:
        if name in dynamic:  # where a rule kept the layer static when it was timed, it takes what that takes
            return found.dynamic_ms or found.int8_ms
        return found.int8_ms if name in int8 else found.float_ms

    nodes = (ms(name, costs.nodes[name]) for node in model.graph if (name := node.name or "") in costs.nodes)
    return math.fsum(nodes) + math.fsum(_crossings(model, int8, costs, shapes))


def _crossings(model: ir.Model, int8: set[str], costs: Costs, shapes: Mapping[str, Shape]) -> Iterator[float]:
    """Milliseconds of each tensor whose producer and readers stand on different sides, as `place` counts them."""
    values = [value for node in model.graph for value in node.outputs] + list(model.graph.inputs)
    for value in values:
        if value.dtype != ir.DataType.FLOAT or value.is_initializer():
            continue
        maker, readers = place.ends(value)
        codes = maker is not None and maker.name in int8
        read = [reader is not None and reader.name in int8 for reader in readers]
        elements = math.prod(shapes.get(value.name or "", ()))
        if not codes and any(read):
            yield (costs.quantize_ns * elements + costs.crossing_ns) / 1e6
        if codes and not all(read):
            yield (costs.dequantize_ns * elements + costs.crossing_ns) / 1e6
