"""Which layers make the model faster in float: candidates from the profile, proved by timing whole models in turn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from exporter import gates, graph, place
from exporter.batches import Batch
from exporter.graph import Shape
from exporter.place import Plan
from exporter.recipe import Rule
from exporter.search import costs as prices
from exporter.search import variant
from exporter.search.costs import Costs
from exporter.target import Target
from runtime.bench import medians_ms
from runtime.session import open_session

SAVED = 0.01  # share of the plan's predicted ms that a group of layers must save to be tried in float
PROVED = 0.03  # share of the model's time that all of them together must save
MOST_MACS = 0.2  # of the int8 layers' MACs: a plan that is mostly float is not what was asked for
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 3.0, 10, 200


def prove(
    model: ir.Model,
    plan: Plan,
    int8: ir.Model,
    groups: Sequence[frozenset[str]],
    target: Target,
    rules: Sequence[Rule],
    shapes: Mapping[str, Shape],
    batch: Batch,
    costs: Costs,
) -> tuple[str, ...]:
    """Layers that are float from now on because the model is faster so, in graph order; none where that is not proved.

    Args:
        model, plan, int8, target, rules, shapes: as for `Problem`.
        groups: neighbouring layers, that are float together.
        batch: what both models run on.
        costs: from `costs.measure`.
    """
    base = prices.predict(model, plan, costs, shapes)
    macs = {d.node: d.macs for d in plan.decisions}
    layers = [d.node for d in plan.decisions if d.macs and d.precision == "int8"]

    def under(floats: frozenset[str]) -> Plan:
        off = [Rule(match=name, precision="float", why="faster") for name in layers if name in floats]
        return place.decide(model, target, (*off, *rules), shapes)

    saved = {group: base - prices.predict(model, under(group), costs, shapes) for group in groups}
    chosen: frozenset[str] = frozenset()
    for group in sorted(groups, key=lambda group: -saved[group]):
        wider = chosen | group
        small = math.fsum(macs[name] for name in wider) <= MOST_MACS * math.fsum(macs[name] for name in layers)
        if saved[group] > SAVED * base and small and not group <= chosen:
            chosen = wider
    if not chosen:
        return ()
    other = under(chosen)
    trial = variant.of(model, other, variant.pairs(int8))
    gates.read(trial, other.int8)
    proved = ratio(int8, trial, batch, target) < 1 - PROVED
    return tuple(name for name in layers if name in chosen) if proved else ()


def ratio(int8: ir.Model, other: ir.Model, batch: Batch, target: Target) -> float:
    """Time of the other model over that of the first: medians in turn, one thread, as the target's sessions run them."""
    sessions = [open_session(graph.to_bytes(each), threads=1, entries=target.session) for each in (int8, other)]
    feed = {value.name: batch[value.name] for value in sessions[0].get_inputs()}
    turns = [lambda session=session: session.run(None, feed) for session in sessions]
    once = math.fsum(medians_ms(turns, 1)) / 1e3
    took = medians_ms(turns, max(LEAST_ROUNDS, min(MOST_ROUNDS, int(SECONDS / once))))
    return took[1] / took[0]
