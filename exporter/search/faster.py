"""Which layers make the model faster in float: proved by timing whole models in turn.

Where the static plan is clearly faster than FP32, candidates are those that the profile calls faster by themselves. Where it is
not, as in a model of a tenth of a millisecond, calls and layouts are most of the time and a profile is no guide: then whole models
are timed of every group turned float, and of everything float but one group. The fastest is what later plans start from.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from exporter import graph, products
from exporter.batches import Batch
from exporter.progress import Progress
from exporter.search import costs as prices
from exporter.search.costs import Costs
from exporter.search.plans import NONE, STATIC, Choice, Plans
from exporter.target import Target
from runtime.bench import CPU_SECONDS, WARM_UP, medians_ms
from runtime.session import NO_ENTRIES, open_session

SAVED = 0.01  # share of the plan's predicted ms that a group of layers must save to be tried in float
PROVED = 0.03  # share of the model's time that all of them together must save
HARDLY = 0.1  # the static plan must be faster than FP32 by that, or no layer is taken to be faster in int8
SURE = 0.01  # the same of one plan among many, timed twice: and by how much plans differ that are as good as another
MOST_MACS = 0.2  # of the int8 layers' MACs: a plan that is mostly float is not what was asked for
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 3.0, 10, 1000
SESSIONS, SHORT_SECONDS = (
    5,
    0.002,
)  # a model that takes less than that is timed in so many sessions, and their median counts
GLANCE_SECONDS = 0.3  # of timing for one plan among many
MOST_GLANCES, MOST_GLANCE_SECONDS, FINALISTS = 64, 40.0, 3

Ratio = Callable[[Choice, float], float]  # a plan, seconds to take -> its time over that of the static plan


def settle(
    plans: Plans,
    costs: Costs,
    fp32: float,
    ratio: Ratio,
    tell: Progress,
    most_seconds: float = MOST_GLANCE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Costs:
    """The costs with the layers that are float from now on because the model is faster so.

    Args:
        plans: to choose from.
        costs: from `costs.measure`.
        fp32: time of the FP32 model over that of the static plan.
        ratio: times a plan beside the static one.
        tell: told of the plans that are timed, where they are many.
        most_seconds, clock: that many may take, and by which clock.
    """
    costs = _as_timed(plans, costs, frozenset(plans.layers), frozenset(plans.static.int8), fp32)
    if fp32 > 1 + HARDLY:
        floats, taken = _by_profile(plans, costs, ratio)
    else:
        floats, taken = _by_models(plans, costs, ratio, tell, most_seconds, clock)
    found = replace(prices.settled(costs, plans.in_order(floats)), fp32=fp32)
    if not floats:
        return found
    return _as_timed(plans, replace(found, timed={prices.name_of(found.faster): taken}), floats, floats, taken)


def _by_profile(plans: Plans, costs: Costs, ratio: Ratio) -> tuple[frozenset[str], float]:
    """Groups that the profile calls faster in float, all together, and the time of that plan over the static one's."""
    ms = partial(_ms, plans, costs)
    base, groups = ms(NONE), plans.groups()
    macs = {d.node: d.macs for d in plans.static.decisions}
    most = MOST_MACS * math.fsum(macs[name] for name in plans.layers)
    saved = {group: base - ms(group) for group in groups}
    chosen = NONE
    for group in sorted(groups, key=lambda group: -saved[group]):
        wider = chosen | group
        if saved[group] > SAVED * base and math.fsum(macs[name] for name in wider) <= most:
            chosen = wider
    taken = ratio(Choice(floats=chosen), SECONDS) if chosen else 1.0
    return (chosen, taken) if taken <= 1 - PROVED else (NONE, 1.0)


def _by_models(
    plans: Plans, costs: Costs, ratio: Ratio, tell: Progress, most_seconds: float, clock: Callable[[], float]
) -> tuple[frozenset[str], float]:
    """The fastest by the time of its whole model; of those that are as fast the one with most multiply-adds in integers."""
    every = frozenset(plans.layers)
    groups = plans.groups()
    tried = [floats for floats in dict.fromkeys([*groups, *(every - each for each in groups)]) if NONE < floats < every]
    tried = sorted(tried, key=partial(_ms, plans, costs))[:MOST_GLANCES]
    glanced: dict[frozenset[str], float] = {}
    end = clock() + most_seconds
    for floats in tell.each(tried, "time plans with fewer int8 layers", len(tried)):
        if clock() < end:
            glanced[floats] = ratio(Choice(floats=floats), GLANCE_SECONDS)
    macs = {d.node: d.macs for d in plans.static.decisions}

    def of_the_fastest(taken: Mapping[frozenset[str], float]) -> frozenset[str]:
        near = (floats for floats in taken if taken[floats] <= min(taken.values()) * (1 + SURE))
        return min(near, key=lambda floats: (sum(macs[name] for name in floats), taken[floats]))

    fast = sorted((floats for floats in glanced if glanced[floats] < 1), key=lambda floats: glanced[floats])
    if not fast:
        return NONE, 1.0
    finalists = dict.fromkeys([of_the_fastest(glanced), *fast[: FINALISTS - 1]])
    timed = {floats: ratio(Choice(floats=floats), SECONDS) for floats in finalists}
    best = of_the_fastest(timed)
    if timed[best] > 1 - SURE:
        return NONE, 1.0
    return best, timed[best]


def _ms(plans: Plans, costs: Costs, floats: frozenset[str]) -> float:
    return prices.predict(plans.model, plans.plan(Choice(floats=floats)), costs, plans.shapes)


def _as_timed(plans: Plans, costs: Costs, floats: frozenset[str], nodes: frozenset[str], taken: float) -> Costs:
    """The float times of these nodes, scaled so that the plan with these float layers takes in the prediction what it took."""
    laid = math.fsum(costs.nodes[name].float_ms for name in sorted(nodes))
    rest = _ms(plans, costs, floats) - laid
    factor = max(0.0, taken * _ms(plans, costs, NONE) - rest) / max(laid, 1e-9)
    scaled = {name: replace(costs.nodes[name], float_ms=factor * costs.nodes[name].float_ms) for name in nodes}
    return replace(costs, nodes={**costs.nodes, **scaled})


def beside(plans: Plans, batch: Batch, target: Target) -> Ratio:
    """Times plans beside the static one, here."""
    static = plans.int8(STATIC)
    return lambda choice, seconds: ratio(static, plans.int8(choice), batch, target, seconds=seconds)


def ratio(
    int8: ir.Model,
    other: ir.Model,
    batch: Batch,
    target: Target,
    entries: Mapping[str, str] | None = None,
    seconds: float = SECONDS,
) -> float:
    """Time of the other model over that of the first: medians in turn for about so many of the CPU's seconds, on one thread.

    Both run as they would ship (`products.ready`). Short ones are opened several times: where a session's memory lies decides as
    much as a tenth of so little. FP32 took .97 of the time of one R-Net in int8 in six of eight sessions, 1.04 and 1.14 in two.

    entries: the other's session entries; None are the target's, with which the first runs.
    """
    (first, there), (second, elsewhere) = (products.ready(each, target) for each in (int8, other))
    given = (
        (graph.to_bytes(first), there.session),
        (graph.to_bytes(second), elsewhere.session if entries is None else entries),
    )
    found: list[float] = []
    while len(found) < SESSIONS:
        sessions = [open_session(content, threads=1, entries=each) for content, each in given]
        feed = {value.name: batch[value.name] for value in sessions[0].get_inputs()}
        turns = [partial(session.run, None, feed) for session in sessions]
        once = math.fsum(medians_ms(turns, 1, CPU_SECONDS)) / 1e3
        short = once < SHORT_SECONDS
        int8_ms, other_ms = medians_ms(turns, _rounds(once, seconds / SESSIONS if short else seconds), CPU_SECONDS)
        found.append(other_ms / int8_ms)
        if not short:
            break
    return statistics.median(found)


def _rounds(once: float, seconds: float) -> int:
    """How often two models are run that take `once` together."""
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(once, 1e-6))))


def takes_seconds(static_ms: float) -> float:
    """About what it takes to time a plan beside the static one."""
    once = 2 * static_ms / 1e3
    return once * (2 * WARM_UP + 1 + _rounds(once, SECONDS))


def fp32_ratio(int8: ir.Model, fp32: ir.Model, batch: Batch, target: Target) -> float:
    """Time of the FP32 graph over that of the static plan; as ONNX Runtime would run it by itself, without session entries."""
    return ratio(int8, fp32, batch, target, NO_ENTRIES)
