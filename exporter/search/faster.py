"""Which layers make the model faster in float: candidates from the profile, proved by timing whole models in turn."""

from __future__ import annotations

import math
from functools import partial

import onnx_ir as ir
from onnxruntime import InferenceSession

from exporter import graph
from exporter.batches import Batch
from exporter.search import costs as prices
from exporter.search.costs import Costs
from exporter.search.plans import NONE, STATIC, Choice, Plans
from exporter.target import Target
from runtime.bench import CPU_SECONDS, medians_ms
from runtime.session import open_session

SAVED = 0.01  # share of the plan's predicted ms that a group of layers must save to be tried in float
PROVED = 0.03  # share of the model's time that all of them together must save
MOST_MACS = 0.2  # of the int8 layers' MACs: a plan that is mostly float is not what was asked for
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 3.0, 10, 200


def prove(plans: Plans, batch: Batch, target: Target, costs: Costs) -> tuple[str, ...]:
    """Layers that are float from now on because the model is faster so, in graph order; none where that is not proved.

    Args:
        plans: to choose from.
        batch: what both models run on.
        target: its session entries.
        costs: from `costs.measure`.
    """

    def ms(floats: frozenset[str]) -> float:
        return prices.predict(plans.model, plans.plan(Choice(floats=floats)), costs, plans.shapes)

    base, groups = ms(NONE), plans.groups()
    macs = {d.node: d.macs for d in plans.static.decisions}
    most = MOST_MACS * math.fsum(macs[name] for name in plans.layers)
    saved = {group: base - ms(group) for group in groups}
    chosen = NONE
    for group in sorted(groups, key=lambda group: -saved[group]):
        wider = chosen | group
        if saved[group] > SAVED * base and math.fsum(macs[name] for name in wider) <= most:
            chosen = wider
    if not chosen or ratio(plans.int8(STATIC), plans.int8(Choice(floats=chosen)), batch, target) > 1 - PROVED:
        return ()
    return plans.in_order(chosen)


def ratio(int8: ir.Model, other: ir.Model, batch: Batch, target: Target) -> float:
    """Time of the other model over that of the first, in turn, one thread, as the target's sessions run them."""
    sessions = [open_session(graph.to_bytes(each), threads=1, entries=target.session) for each in (int8, other)]
    return over(*sessions, batch)


def over(first: InferenceSession, other: InferenceSession, batch: Batch, most_seconds: float = SECONDS) -> float:
    """Median time of the other session over that of the first, in turn, for about so many of the CPU's seconds."""
    feed = {value.name: batch[value.name] for value in first.get_inputs()}
    turns = [partial(each.run, None, feed) for each in (first, other)]
    once = math.fsum(medians_ms(turns, 1, CPU_SECONDS)) / 1e3
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(most_seconds / max(once, 1e-6))))
    took = medians_ms(turns, rounds, CPU_SECONDS)
    return took[1] / took[0]
