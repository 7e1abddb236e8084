"""The static plan and those with some of its layers turned float or dynamic: each plan, and its int8 graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from exporter import gates, graph, lower, place, quantize, rulebook
from exporter.graph import Shape
from exporter.numerics.formats import FLOAT, W8A8, W8A8_DYNAMIC, Scheme
from exporter.place import Plan
from exporter.recipe import Rule
from exporter.search import variant
from exporter.target import Target

MOST_UNITS = 48  # of layers: more of them are taken together
MOST_DYNAMIC = 12  # the same for groups that are tried as dynamic ones: beside those in float
NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The layers in which a plan differs from the static one; none is in both.

    opened: whether its gates are (`correct.open_gates`).
    """

    floats: frozenset[str] = NONE
    dynamic: frozenset[str] = NONE
    opened: bool = False

    @property
    def schemes(self) -> dict[str, Scheme]:
        """{layer: its scheme}."""
        return dict.fromkeys(self.dynamic, W8A8_DYNAMIC) | dict.fromkeys(self.floats, FLOAT)

    def with_floats(self, layers: frozenset[str]) -> Choice:
        return Choice(floats=self.floats | layers, dynamic=self.dynamic - layers)

    def with_dynamic(self, layers: frozenset[str]) -> Choice:
        """What is float stays float."""
        return Choice(floats=self.floats, dynamic=self.dynamic | (layers - self.floats))


STATIC = Choice()


class Plans:
    """Plans by what they choose for the layers; each is decided once.

    layers: those that may turn float, in graph order: int8 in the static plan, and not because a rule says so.
    dynamic: those of them that may be dynamic. products: those of two activations.
    """

    def __init__(
        self,
        model: ir.Model,
        static: Plan,
        int8: ir.Model,
        source: Callable[[Plan], ir.Model],
        target: Target,
        rules: Sequence[Rule],
        shapes: Mapping[str, Shape],
    ) -> None:
        """What plans are made of.

        Args:
            model: the prepared graph.
            static, int8: the plan to start from, and its int8 graph with Q/DQ around every gate. LSTM that are dynamic in it
                are so in every plan.
            source: a plan -> the prepared graph with the biases that are corrected under it (`correct.source`).
            target, rules, shapes: those with which `place.decide` made the plan.
        """
        self.model, self.static, self.shapes = model, static, shapes
        self._source, self._target, self._rules = source, target, tuple(rules)
        self._known, self._weights = variant.pairs(int8), quantize.weights(int8)
        self._plans = {STATIC: static}
        self._recurrent = {d.node: d for d in static.decisions if d.op_type == place.LSTM and d.scheme == W8A8_DYNAMIC}
        asked = rulebook.given(model, rules, W8A8)
        before = {reader.name: value.producer() for reader in model.graph for value in reader.inputs[:1] if value}
        kept = asked | {maker.name for name in asked if (maker := before.get(name)) is not None}
        self.layers = tuple(d.node for d in static.decisions if d.macs and d.scheme == W8A8 and d.node not in kept)
        self.dynamic = frozenset(
            node.name or "" for node in model.graph if node.name in self.layers and not place.not_dynamic(node, target)
        )
        weights = {node.name: node.inputs[1] for node in model.graph if node.name in self.layers}
        self.products = frozenset(
            node.name or "" for node in model.graph if node.name in self.layers and graph.is_product(node)
        )
        self._sharing = {
            name: [
                each
                for each in self.layers
                if each == name or (weights[each] is weights[name] and _fixed(weights[name]))
            ]
            for name in self.layers
        }

    def plan(self, choice: Choice) -> Plan:
        if choice not in self._plans:
            layers = dict.fromkeys(self._recurrent, W8A8_DYNAMIC) | choice.schemes
            plan = place.decide(self.model, self._target, self._rules, self.shapes, layers, self.static.refused)
            decisions = (self._recurrent.get(each.node, each) for each in plan.decisions)
            self._plans[choice] = replace(plan, decisions=tuple(decisions))
        return self._plans[choice]

    def int8(self, choice: Choice) -> ir.Model:
        """As the quantizer would make it; gates are read and other schemes are laid as `quantize.to_int8` does."""
        plan = self.plan(choice)
        made = variant.of(self._source(plan), plan, self._known)
        gates.read(made, plan.int8)
        lower.lay(made, self.model, plan, self._weights)
        return made

    def in_order(self, layers: frozenset[str]) -> tuple[str, ...]:
        return tuple(name for name in self.layers if name in layers)

    def groups(self) -> list[frozenset[str]]:
        """Layers one by one, by twos and by fours: neighbours that are float together need no Q/DQ between them.

        Layers that share a weight are float together, or the file would hold it twice.
        """
        sizes = [size for size in (self._unit, 2 * self._unit, 4 * self._unit) if size <= len(self.layers)]
        return list(dict.fromkeys(group for size in sizes for group in self._chunks(self.layers, size)))

    def units(self) -> list[frozenset[str]]:
        """The smallest groups, in graph order."""
        return list(dict.fromkeys(self._chunks(self.layers, self._unit)))

    @property
    def _unit(self) -> int:
        return max(1, math.ceil(len(self.layers) / MOST_UNITS))

    def dynamic_groups(self) -> list[frozenset[str]]:
        """Those that may be dynamic, in a few groups of neighbours."""
        layers = self.in_order(self.dynamic)
        size = max(1, math.ceil(len(layers) / MOST_DYNAMIC))
        return list(dict.fromkeys(group & self.dynamic for group in self._chunks(layers, size)))

    def _chunks(self, layers: Sequence[str], size: int) -> list[frozenset[str]]:
        chunks = [layers[at : at + size] for at in range(0, len(layers), size)]
        return [frozenset(one for name in chunk for one in self._sharing[name]) for chunk in chunks]


def _fixed(weight: ir.Value | None) -> bool:
    return weight is not None and weight.is_initializer()
