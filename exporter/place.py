"""Graph + rules + Target -> Plan: each node int8, dynamic or float, and why.

Layers (Conv, Gemm, MatMul) hold the MACs and are int8 wherever an integer kernel exists that is no slower; where integer
kernels save on some layers only (target.layer), those are placed by cost like the rest. Around the layers placement is the
cheapest plan under the target's measured costs. It is a minimum cut: every node stands on the int8 or the float side, a node
pays for its kernel on its side, and a tensor that crosses pays for a QuantizeLinear or a DequantizeLinear, once however many
nodes read it. So an Add between two int8 Conv is int8, and the same Add before a LayerNormalization is not. Dynamic layers
(exporter/dynamic.py, recurrent.py) are those that a rule or the search names; they read and write real numbers: the float side.

Rounding costs accuracy, which has no nanoseconds: an int8 kernel that rounds where float would not pays for one more
QuantizeLinear. MatMul and Gemm count as makers of real numbers: their integer kernels can write float.

Source: minimum cut as an exact optimum for two labels, Greig et al. 1989; solved by networkx.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import networkx as nx
import numpy as np
import onnx_ir as ir

from exporter import gates, graph, rulebook, weight_only
from exporter.batches import Array
from exporter.errors import RecipeError
from exporter.graph import Shape
from exporter.numerics.formats import FLOAT, W8A8, W8A8_DYNAMIC, W8A32, Scheme, Word
from exporter.recipe import Rule
from exporter.target import NO_KERNEL, Cost, Target

# Layers whose integer kernel writes float as well as codes: their output needs no DequantizeLinear of its own
FLOAT_OUTPUT = ("MatMul", "Gemm")
REMOVABLE = ("Relu", "Clip")
# Layers that take the Relu or Clip behind them along: a Conv writes codes in any case, and ONNX Runtime fuses a float
# Relu into a Gemm before it looks for an integer kernel, and then finds none
FOLDING = ("Conv", "Gemm")
LSTM = "LSTM"
# The file has these nodes in integers; they are float to the rest of the plan, for they read and write what they do
GIVEN = "in integers as the file has it"
# They read a tensor's shape, which its codes have too: no value crosses to them
SHAPE_READERS = ("Shape", "Size")
NONE_REFUSED: Mapping[str, str] = MappingProxyType({})
NONE_CHOSEN: Mapping[str, Scheme] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One line of the plan. macs is for the observed batch."""

    node: str
    op_type: str
    scheme: Scheme
    reason: str
    macs: int

    @property
    def precision(self) -> Word:
        return self.scheme.word


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A decision for every node, in graph order, and the tensors whose ranges the int8 nodes need.

    refused: {node: why the quantizer did not take it}, which holds for every plan of the same graph (`accept`).
    """

    decisions: tuple[Decision, ...]
    tensors: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def int8(self) -> tuple[str, ...]:
        return self.of(W8A8)

    @property
    def dynamic(self) -> tuple[str, ...]:
        return self.of(W8A8_DYNAMIC)

    def of(self, scheme: Scheme) -> tuple[str, ...]:
        """The nodes of a scheme."""
        return tuple(decision.node for decision in self.decisions if decision.scheme == scheme)

    @property
    def float_layers(self) -> tuple[Decision, ...]:
        """Nodes with MACs that compute in float: each has its reason."""
        return tuple(decision for decision in self.decisions if not decision.scheme.in_integers and decision.macs)

    @property
    def integer_share(self) -> float:
        """The share of MACs that are in integers, 0..1."""
        macs = sum(decision.macs for decision in self.decisions)
        return sum(decision.macs for decision in self.decisions if decision.scheme.in_integers) / max(1, macs)

    @property
    def given(self) -> tuple[str, ...]:
        """Nodes that the file has in integers."""
        return tuple(decision.node for decision in self.decisions if decision.reason == GIVEN)

    def told(self) -> Plan:
        """The plan as people read it: what the file has in integers is int8, and its crossings are no nodes."""
        return replace(
            self,
            decisions=tuple(
                replace(each, scheme=W8A8) if each.reason == GIVEN else each
                for each in self.decisions
                if each.op_type not in graph.CROSSINGS or each.reason != GIVEN
            ),
        )

    def noted(self, notes: Mapping[str, str]) -> Plan:
        """The plan with what later stages did to a node, {node: note}, behind its reason."""
        decisions = (
            replace(d, reason=f"{d.reason}; {notes[d.node]}") if d.node in notes else d for d in self.decisions
        )
        return replace(self, decisions=tuple(decisions))

    def to_text(self) -> str:
        lines = ["# node | op_type | precision | reason"]
        fields = ((d.node, d.op_type, d.precision, d.reason) for d in self.decisions)
        lines += [" | ".join(" ".join(text.split()).replace("|", "/") for text in each) for each in fields]
        return "\n".join(lines) + "\n"


def decide(
    model: ir.Model,
    target: Target,
    rules: Sequence[Rule],
    shapes: Mapping[str, Shape],
    layers: Mapping[str, Scheme] = NONE_CHOSEN,
    not_taken: Mapping[str, str] = NONE_REFUSED,
) -> Plan:
    """Place every node of the prepared graph.

    Args:
        model: the prepared graph; every tensor has a type, every node a name.
        target: what the CPU can do, and at what cost.
        rules: first match wins, by node name or op_type (`*` and `?` match any text).
        shapes: the shape of every tensor on one real batch (`graph.shapes`): sizes decide what a crossing costs.
        layers: {node: its scheme}, whatever it costs, as a search asks; no patterns, and before the rules.
        not_taken: {node: why the quantizer does not take it}: float, whatever a rule says.

    Raises:
        RecipeError: a rule that matches no node, or asks for int8 or dynamic where there is no such kernel.
    """
    nodes = list(model.graph)
    ruled = rulebook.matched(rules, nodes)
    for node in nodes:
        if node.name and node.name in layers:
            ruled[node] = Rule(match=node.name, precision=layers[node.name].word, why="search")
    refused = {node: not_taken.get(node.name or "") or _refusal(node, target) for node in nodes}
    ruled = {node: r for node, r in ruled.items() if r.scheme != W8A8 or not _overruled(node, not_taken, layers)}
    for node, rule in ruled.items():
        if why := refused[node] if rule.scheme == W8A8 else REFUSAL[rule.scheme](node, target):
            raise RecipeError(
                f"rule {rule.match!r} asks for {rule.precision}", found=f"{node.op_type} {node.name}: {why}",
                expected=rule.scheme.takes, where="rules",
            )  # fmt: skip
    chosen = _cut(nodes, target, ruled, refused, shapes)
    decisions = tuple(
        Decision(
            node=node.name or "",
            op_type=node.op_type,
            scheme=_scheme(node, chosen, ruled),
            reason=_reason(node, node in chosen, ruled.get(node), refused[node], target),
            macs=graph.macs(node, shapes),
        )
        for node in nodes
    )
    needed = dict.fromkeys(
        value.name
        for node in nodes
        if node in chosen
        for value in (*graph.activations(node), *node.outputs)
        if value.name and value.dtype == ir.DataType.FLOAT
    )
    return Plan(decisions=decisions, tensors=tuple(name for name in needed if name), refused=dict(not_taken))


def not_dynamic(node: ir.Node, target: Target) -> str:
    """Why a node cannot be dynamic on the target; empty when it can."""
    if node.domain or node.op_type not in target.dynamic:
        menu = f"for {', '.join(target.dynamic)} only" if target.dynamic else "not on its menu"
        return f"dynamic int8 is {menu} on {target.name}"
    if node.op_type == LSTM:
        return _lstm_refusal(node)
    if refused := _refusal(node, target):
        return refused
    weight = graph.constant(node.inputs[1])
    if weight is None:
        return "a product of two activations: dynamic int8 multiplies by a constant matrix"
    return "" if weight.ndim == 2 and weight.dtype == np.float32 else "dynamic int8 multiplies by a float32 matrix"


def _overruled(node: ir.Node, not_taken: Collection[str], layers: Mapping[str, Scheme]) -> bool:
    """Whether no rule can make a node int8: the quantizer does not take it, or what it folds into is float."""
    maker = node.inputs[0].producer() if node.op_type in REMOVABLE and node.inputs[0] is not None else None
    return node.name in not_taken or (
        maker is not None and (maker.name in not_taken or layers.get(maker.name or "") == FLOAT)
    )


def _lstm_refusal(node: ir.Node) -> str:
    weights = [graph.constant(value) for value in node.inputs[1:3]]
    if any(weight is None or weight.dtype != np.float32 for weight in weights):
        return "dynamic int8 multiplies by float32 weights that are known now"
    return "dynamic int8 takes steps first, and its batches come first" if node.attributes.get_int("layout", 0) else ""


def _scheme(node: ir.Node, chosen: Collection[ir.Node], ruled: Mapping[ir.Node, Rule]) -> Scheme:
    if node in chosen:
        return W8A8
    return ruled[node].scheme if node in ruled and ruled[node].scheme != W8A8 else FLOAT


def _refusal(node: ir.Node, target: Target) -> str:
    """Why this node cannot be int8 on the target whatever its neighbours are; empty when it can."""
    op = node.op_type
    if graph.in_integers(node):
        return GIVEN
    if node.domain or not (op in target.layers or op in target.elementwise or op in target.movers):
        return NO_KERNEL.get(op, f"no integer kernel for {op}")
    first = node.inputs[0]
    if first is None or first.dtype != ir.DataType.FLOAT:
        known = first is not None and first.dtype is not None
        return f"computes on {first.dtype.name.lower()} tensors" if known else "the type of its input is unknown"  # type: ignore[union-attr]
    if op not in FLOAT_OUTPUT and any(r.graph is not node.graph for out in node.outputs for r in graph.consumers(out)):
        return "a branch or loop body reads its output, in float"
    if not graph.activations(node):
        return "all its inputs are constant"
    weight = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if op in ("Conv", "Gemm"):
        return _layer_refusal(node, weight)
    if op == "MatMul":
        if first.is_initializer():
            return "its first factor is the constant one: the integer kernel packs the second"
        if weight is not None and weight.ndim != 2:
            return f"its weight has rank {weight.ndim}: the integer kernel takes one scale per column of a matrix"
        if weight is None and not target.activations_matmul:
            return "a product of two activations: its integer kernel saves little and rounds both factors"
    if op in target.movers and first.is_initializer():
        return "it reads a constant table"
    if op in REMOVABLE:
        return _removable_refusal(node)
    return gates.refusal(node, target.movers) if op == gates.GATE else ""


def _layer_refusal(node: ir.Node, weight: Array | None) -> str:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None:
        return "its weight is computed at run time"
    if bias is not None and graph.constant(bias) is None:
        return "its bias is computed at run time"
    if node.op_type != "Gemm":
        return ""
    scaled = node.attributes.get_float("alpha", 1.0) != 1 or (
        bias is not None and node.attributes.get_float("beta", 1.0) != 1
    )
    if scaled or node.attributes.get_int("transA", 0) == 1:
        return "the integer kernel takes alpha = beta = 1 and A as it is"
    columns = weight.shape[0 if node.attributes.get_int("transB", 0) else 1]
    if bias is not None and graph.constant(bias).shape != (columns,):  # type: ignore[union-attr]
        return "its bias is not one number per column"
    return ""


def _slow(node: ir.Node, target: Target) -> str:
    """Why the layer's integer kernel takes longer than the float one; empty where it does not. A rule may ask for it."""
    slower = target.slower.get(node.name or "")
    if slower is not None:
        return "its integer kernel is slower here, as timed" if slower else ""
    if not copies(node, target):
        return ""
    weight = graph.constant(node.inputs[1])
    assert weight is not None
    if graph.is_depthwise(weight.shape, node.attributes.get_int("group", 1)):
        return "depthwise: its integer kernel here multiplies one value at a time, and is slower"
    channels = weight.shape[1]
    return f"{channels} input channels a group: its integer kernel copies them position by position, and is slower"


def copies(node: ir.Node, target: Target) -> bool:
    """Whether the target's table has a Conv float: its integer kernel copies few channels a group, position by position.

    So do grouped Conv and those of three spatial axes; plain ones, and on most targets depthwise ones, have other kernels.
    """
    weight = graph.constant(node.inputs[1]) if node.op_type == "Conv" else None
    if weight is None:
        return False
    groups = node.attributes.get_int("group", 1)
    if graph.is_depthwise(weight.shape, groups):
        return not target.depthwise
    return (groups > 1 or weight.ndim > 4) and weight.shape[1] < target.copied_channels


def _removable_refusal(node: ir.Node) -> str:
    value = node.inputs[0]
    assert value is not None
    producer = value.producer()
    if producer is None or producer.op_type not in ("Conv", "Gemm", "Add", "Mul", "MatMul"):
        return f"no integer kernel for {node.op_type}, and no layer before it to fold into"
    if len(value.uses()) != 1 or value.is_graph_output():
        return f"no integer kernel for {node.op_type}, and what it reads is read elsewhere too"
    if node.op_type == "Clip":
        low, high = (graph.constant(node.inputs[i]) if len(node.inputs) > i else None for i in (1, 2))
        for bound, value_at in ((low, 1), (high, 2)):
            if bound is None and len(node.inputs) > value_at and node.inputs[value_at] is not None:
                return "its bounds are computed at run time"
        if (low is not None and low.reshape(()) > 0) or (high is not None and high.reshape(()) < 0):
            return "its bounds leave 0 out: codes saturate only around 0"
    return ""


def cost(node: ir.Node, target: Target, shapes: Mapping[str, Shape]) -> Cost:
    """Nanoseconds of the node's kernel on each side; elementwise int8 rounds its output, and pays for it."""
    if node.op_type in target.layers:
        return _layer_cost(node, target, shapes)
    amount = max(_elements(value, shapes) for value in (*graph.activations(node), *node.outputs))
    if node.op_type in target.movers:
        per, rounding = target.movers[node.op_type], 0.0
    else:
        exact = node.op_type in (*REMOVABLE, gates.GATE)  # its codes are its input's: nothing is rounded
        per, rounding = target.elementwise[node.op_type], 0.0 if exact else target.quantize_ns
    return Cost(float_ns=per.float_ns * amount, int8_ns=(per.int8_ns + rounding) * amount)


def _layer_cost(node: ir.Node, target: Target, shapes: Mapping[str, Shape]) -> Cost:
    """Nanoseconds of a layer's kernel on each side: MACs, and in int8 its outputs and the packing of a constant weight."""
    assert target.layer is not None
    per, macs = target.layer, graph.macs(node, shapes)
    weight = node.inputs[1]
    packed = 0.0
    if node.op_type in FLOAT_OUTPUT and weight is not None and weight.is_initializer():
        each = per.transposed_ns if node.attributes.get_int("transB", 0) else per.weight_ns
        packed = each * _elements(weight, shapes)
    written = per.output_ns * _elements(node.outputs[0], shapes)
    return Cost(float_ns=per.float_ns * macs, int8_ns=per.int8_ns * macs + written + packed)


def _elements(value: ir.Value, shapes: Mapping[str, Shape]) -> int:
    return math.prod(shapes.get(value.name or "", ()))


def _cut(
    nodes: Sequence[ir.Node],
    target: Target,
    ruled: Mapping[ir.Node, Rule],
    refused: Mapping[ir.Node, str],
    shapes: Mapping[str, Shape],
) -> set[ir.Node]:
    """The int8 side of the minimum cut. An edge u -> v is paid when u is int8 and v is float."""
    network = nx.DiGraph()
    network.add_nodes_from(("int8", "float"))
    for node in nodes:
        rule = ruled.get(node)
        always = node.op_type in target.layers and target.layer is None
        by_default = FLOAT if _slow(node, target) else W8A8 if always else None
        side = FLOAT if refused[node] else rule.scheme if rule is not None else by_default
        if side is not None and side != W8A8:
            network.add_edge(node, "float")  # without a capacity: never cut
        elif side is not None:
            network.add_edge("int8", node)
        else:
            price = cost(node, target, shapes)
            network.add_edge("int8", node, capacity=_picoseconds(price.float_ns))
            network.add_edge(node, "float", capacity=_picoseconds(price.int8_ns))
        if node.op_type in REMOVABLE and not refused[node]:
            producer = node.inputs[0].producer() if node.inputs[0] is not None else None
            network.add_edge(node, producer)  # it folds into an int8 layer or not at all
            if rule is None and producer is not None and producer.op_type in FOLDING:
                network.add_edge(producer, node)
    values = [value for node in nodes for value in node.outputs]
    values += dict.fromkeys(v for n in nodes for v in graph.activations(n) if v.producer() is None)
    for value in values:
        if value.dtype == ir.DataType.FLOAT:
            _add_crossing(network, value, target, _elements(value, shapes))
    try:
        chosen, _ = nx.minimum_cut(network, "int8", "float")[1]
    except nx.NetworkXUnbounded as error:
        raise RecipeError(
            "rules contradict each other",
            found="a Relu or Clip asked to be int8 behind a layer asked to be float",
            expected="both int8 or both float: the one folds into the other",
            where="rules",
        ) from error
    return {node for node in nodes if network.has_node(node) and node in chosen}


def _add_crossing(network: nx.DiGraph, value: ir.Value, target: Target, elements: int) -> None:
    """The price of a tensor whose producer and readers stand on different sides, paid once."""
    made, read = ends(value)
    maker, readers = made or "float", [reader or "float" for reader in read]
    quantized, dequantized = ("quantize", value), ("dequantize", value)
    network.add_edge(quantized, maker, capacity=_picoseconds(target.quantize_ns * elements + target.crossing_ns))
    network.add_edge(maker, dequantized, capacity=_picoseconds(target.dequantize_ns * elements + target.crossing_ns))
    for reader in readers:
        if maker == "float" and reader == "float":
            continue
        network.add_edge(reader, quantized)
        network.add_edge(dequantized, reader)


def ends(value: ir.Value) -> tuple[ir.Node | None, list[ir.Node | None]]:
    """(node that makes a tensor, those that read its values): it crosses where they stand on different sides.

    None stands for one that is float whatever the plan: a graph input, the real numbers that a MatMul or Gemm writes; a
    graph output, a reader in the body of a branch or loop.
    """
    maker = value.producer()
    if maker is not None and maker.op_type in FLOAT_OUTPUT:
        maker = None
    readers = [node for node in graph.consumers(value) if node.op_type not in SHAPE_READERS]
    return maker, [node if node.graph is value.graph else None for node in readers] + [None] * value.is_graph_output()


def _picoseconds(nanoseconds: float) -> int:
    """Whole numbers: a minimum cut over floats may end on a rounding error."""
    return int(np.rint(nanoseconds * 1e3))


def _reason(node: ir.Node, chosen: bool, rule: Rule | None, refused: str, target: Target) -> str:
    if rule is not None:
        return f"rule {rule.match!r}: {rule.why}"
    if chosen and node.op_type in target.layers:
        return "integer kernel; weight int8 per channel" if len(graph.activations(node)) == 1 else "integer kernel"
    if chosen and node.op_type == gates.GATE:
        return "its codes are those of its input, read otherwise"
    if chosen:
        return "folds into the layer before it" if node.op_type in REMOVABLE else "its neighbours are int8"
    return refused or _slow(node, target) or "int8 costs more here than it saves, Q/DQ included"


# scheme -> why a node cannot have it on a target; empty when it can
REFUSAL: Mapping[Scheme, Callable[[ir.Node, Target], str]] = {
    W8A8: _refusal,
    W8A8_DYNAMIC: not_dynamic,
    W8A32: weight_only.refusal,
    FLOAT: lambda node, target: "",
}
