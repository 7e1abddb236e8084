"""exporter.search.variant: the int8 graph of another plan is the one that the quantizer would make of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from exporter import correct, graph, place, quantize
from exporter.calibrate import distinguish, observe
from exporter.correct import bias
from exporter.recipe import Rule
from exporter.search import variant
from exporter.search.plans import Choice, Plans
from exporter.target import PORTABLE, X86_VNNI, Target
from tests import models
from tests.exporter import stages


@pytest.mark.parametrize("name", ["residual", "transformer", "upsampler"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_variant_computes_bit_for_bit_what_the_quantizers_graph_does(name: str, seed: int) -> None:
    model, plan = stages.prepared(name).model, stages.plan(name)
    batches = list(models.batches(name, 0, 4))
    ranges = distinguish(model, observe(model, plan.tensors, batches).ranges)
    known = variant.pairs(quantize.to_int8(model, plan, ranges))
    layers = [d.node for d in plan.decisions if d.macs and d.precision == "int8"]
    floats = np.random.default_rng(seed).choice(layers, size=min(seed * 2, len(layers) - 1), replace=False)
    rules = [Rule(match=str(layer), precision="float", why="test") for layer in floats]
    other = place.decide(model, X86_VNNI, rules, graph.shapes(model, batches[0]))

    ours, theirs = (
        graph.runner(each) for each in (variant.of(model, other, known), quantize.to_int8(model, other, ranges))
    )
    for batch in batches:
        expected = theirs(batch)
        assert {key: value.tobytes() for key, value in ours(batch).items()} == {
            key: value.tobytes() for key, value in expected.items()
        }


def test_variant_leaves_the_prepared_graph_as_it_is() -> None:
    model, plan = stages.prepared("residual").model, stages.plan("residual")
    before = graph.to_bytes(model)
    ranges = observe(model, plan.tensors, models.batches("residual", 0, 2)).ranges
    variant.of(model, plan, variant.pairs(quantize.to_int8(model, plan, ranges)))
    assert graph.to_bytes(model) == before


@pytest.mark.parametrize("name", ["residual", "transformer", "upsampler"])
@pytest.mark.parametrize("target", [X86_VNNI, PORTABLE])
@pytest.mark.parametrize(("count", "dynamic"), [(0, 0), (1, 0), (0, 9), (1, 9), (1, 2)])
def test_plan_that_is_measured_is_the_one_that_ships(name: str, target: Target, count: int, dynamic: int) -> None:
    """With biases and codes corrected: bit for bit, and the layer that is float has its own weights."""
    model, batches = stages.prepared(name).model, list(models.batches(name, 0, 6))
    shapes = graph.shapes(model, batches[0])
    plan = place.decide(model, target, (), shapes)
    found = observe(model, plan.tensors, batches, bias.channels(model, plan))
    ranges = distinguish(model, found.ranges)
    corrected = replace(correct.improve(model, plan, ranges, found.means, target, batches), shifted=True)
    ranges, means = corrected.ranges, corrected.means
    plain = correct.under(model, plan, ranges, means, corrected, gates_on_codes=False)
    source = partial(correct.source, model, means=means, corrected=corrected)
    plans = Plans(model, plan, plain, source, target, (), shapes)
    floats = frozenset(plans.layers[:count])
    choice = Choice(floats=floats).with_dynamic(plans.dynamic & set(plans.layers[:dynamic]))
    if dynamic and not choice.dynamic:
        return  # no linear layer to be dynamic
    measured = graph.runner(plans.int8(choice))
    shipped = graph.runner(correct.under(model, plans.plan(choice), ranges, means, corrected))
    for batch in batches:
        theirs = shipped(batch)
        assert {key: value.tobytes() for key, value in measured(batch).items()} == {
            key: value.tobytes() for key, value in theirs.items()
        }
    if floats:
        int8 = correct.under(model, plans.plan(choice), ranges, means, corrected)
        (layer,) = (node for node in int8.graph if node.name in floats)
        own = next(node for node in source(plan).graph if node.name in floats)
        assert np.array_equal(graph.constant(layer.inputs[1]), graph.constant(own.inputs[1]))  # type: ignore[arg-type]
