"""The static plan and those with some of its layers turned float: each plan, and its int8 graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from exporter import gates, place
from exporter.graph import Shape
from exporter.place import Plan
from exporter.recipe import Rule
from exporter.search import variant
from exporter.target import Target

MOST_UNITS = 48  # of layers: more of them are taken together
NONE: frozenset[str] = frozenset()


class Plans:
    """Plans by the layers that are float in them; each is decided once.

    layers: those that may turn float, in graph order: int8 in the static plan, and not because a rule says so.
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
            static, int8: the plan to start from, and its int8 graph with Q/DQ around every gate.
            source: a plan -> the prepared graph with the biases that are corrected under it (`correct.source`).
            target, rules, shapes: those with which `place.decide` made the plan.
        """
        self.model, self.static, self.shapes = model, static, shapes
        self._source, self._target, self._rules = source, target, tuple(rules)
        self._known = variant.pairs(int8)
        self._plans = {NONE: static}
        asked = place.ruled(model, rules, "int8")
        before = {reader.name: value.producer() for reader in model.graph for value in reader.inputs[:1] if value}
        kept = asked | {maker.name for name in asked if (maker := before.get(name)) is not None}
        self.layers = tuple(d.node for d in static.decisions if d.macs and d.precision == "int8" and d.node not in kept)

        weights = {node.name: node.inputs[1] for node in model.graph if node.name in self.layers}
        self._sharing = {
            name: [
                each
                for each in self.layers
                if each == name or (weights[each] is weights[name] and _fixed(weights[name]))
            ]
            for name in self.layers
        }

    def plan(self, floats: frozenset[str]) -> Plan:
        if floats not in self._plans:
            self._plans[floats] = place.decide(self.model, self._target, self._rules, self.shapes, floats)
        return self._plans[floats]

    def int8(self, floats: frozenset[str]) -> ir.Model:
        """As the quantizer would make it, and the gates read as `quantize.to_int8` does."""
        plan = self.plan(floats)
        made = variant.of(self._source(plan), plan, self._known)
        gates.read(made, plan.int8)
        return made

    def groups(self) -> list[frozenset[str]]:
        """Layers one by one, by twos and by fours: neighbours that are float together need no Q/DQ between them.

        Layers that share a weight are float together, or the file would hold it twice.
        """
        unit = max(1, math.ceil(len(self.layers) / MOST_UNITS))
        sizes = [size for size in (unit, 2 * unit, 4 * unit) if size <= len(self.layers)]
        chunks = [self.layers[at : at + size] for size in sizes for at in range(0, len(self.layers), size)]
        return list(dict.fromkeys(frozenset(one for name in chunk for one in self._sharing[name]) for chunk in chunks))


def _fixed(weight: ir.Value | None) -> bool:
    return weight is not None and weight.is_initializer()
