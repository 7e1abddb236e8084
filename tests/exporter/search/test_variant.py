"""exporter.search.variant: the int8 graph of another plan is the one that the quantizer would make of it."""

from __future__ import annotations

import numpy as np
import pytest

from exporter import graph, place, quantize
from exporter.calibrate import distinguish, observe
from exporter.recipe import Rule
from exporter.search import variant
from exporter.target import X86_VNNI
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
