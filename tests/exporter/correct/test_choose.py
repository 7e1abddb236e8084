from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from exporter import correct, graph, quantize
from exporter.calibrate import observe
from exporter.correct import bias, choose, rounding
from exporter.target import PORTABLE, X86_VNNI
from runtime import drift
from tests.exporter import graphs

Batches = list[dict[str, np.ndarray]]


def improve(model: ir.Model, batches: Batches) -> correct.Corrected:
    plan, ranges = graphs.planned(model, *batches)
    means = observe(model, plan.tensors, iter(batches), bias.channels(model, plan)).means
    return correct.improve(model, plan, ranges, means, PORTABLE, batches)


def gemm(columns: int = 4) -> ir.Model:
    weights = {"w": graphs.noise(1, 64, columns), "b": graphs.noise(2, columns)}
    return graphs.model(f"(float[N,64] x) => (float[N,{columns}] y) {{ [g] y = Gemm(x, w, b) }}", weights)


def test_correction_that_helps_is_kept() -> None:
    """Inputs around 5 with little spread: nearly all of the error is its mean."""
    batches: Batches = [{"x": 5 + graphs.noise(n, 32, 64) / 10} for n in range(4)]
    found = improve(gemm(), batches)
    tried = found.corrections[0]
    assert tried.name == "bias" and tried.kept
    assert tried.after_db > tried.before_db + 1


def test_correction_that_does_not_help_is_not_kept() -> None:
    """Inputs around 0 with E[x] taken from other data: it would shift what stands right."""
    model = gemm()
    batches: Batches = [{"x": graphs.noise(n, 256, 64)} for n in range(2)]
    plan, ranges = graphs.planned(model, *batches)
    wrong = {("x", -1): np.full(64, 50.0)}
    found = correct.improve(model, plan, ranges, wrong, X86_VNNI, batches)
    tried = found.corrections[0]
    assert not tried.kept and tried.after_db < tried.before_db
    assert not found.shifted


def _plain(model: ir.Model, batches: Batches) -> ir.Model:
    plan, ranges = graphs.planned(model, *batches)
    return quantize.to_int8(model, plan, ranges)


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_what_is_kept_is_never_worse_than_what_was_there(offset: float) -> None:
    batches: Batches = [{"x": offset + graphs.noise(n, 64, 64)} for n in range(3)]
    found = improve(gemm(), batches)
    before = found.corrections[0].before_db
    for tried in found.corrections:
        assert tried.before_db == before
        assert tried.kept == (tried.after_db > tried.before_db + 0.1)
        before = tried.after_db if tried.kept else before
    assert snr(found.int8, gemm(), batches) > snr(_plain(gemm(), batches), gemm(), batches) - 0.5


def test_correction_of_weights_is_kept_though_the_rounding_of_an_activation_hides_it() -> None:
    """x is known to half a step of 50: what the outputs lose by it is far more than what any weight does."""
    model = gemm()
    batches: Batches = [{"x": 5 + graphs.noise(n, 32, 64) / 10} for n in range(4)]
    plan, ranges = graphs.planned(model, *batches)
    coarse = replace(ranges, tensors={**ranges.tensors, "x": replace(ranges.tensors["x"], low=-6375.0, high=6375.0)})
    means = observe(model, plan.tensors, iter(batches), bias.channels(model, plan)).means
    found = correct.improve(model, plan, coarse, means, X86_VNNI, batches)
    assert found.shifted and found.corrections[0].after_db > 40
    assert snr(found.int8, model, batches) < 10


def correlated(count: int) -> Batches:
    """Inputs in which eight directions of 64 hold nearly all."""
    mix = graphs.noise(7, 8, 64)
    return [{"x": graphs.noise(n, 64, 8) @ mix + graphs.noise(n + 99, 64, 64) / 100} for n in range(count)]


def test_weights_fitted_to_correlated_inputs_are_kept_and_come_closer_on_other_batches() -> None:
    model, batches = gemm(), correlated(9)
    found = improve(model, batches[:6])
    fitted = found.corrections[2]
    assert (fitted.name, fitted.kept, found.pair_rule) == ("gptq", True, True)
    assert fitted.after_db > fitted.before_db + 0.5
    assert snr(found.int8, model, batches[6:]) > snr(_plain(model, batches[:6]), model, batches[6:]) + 0.5
    assert [effect.node for effect in found.paired] == ["g"]


def snr(int8: ir.Model, model: ir.Model, batches: Batches) -> float:
    run, reference = graph.runner(int8), graph.runner(model)
    return drift.measure((reference(each), run(each)) for each in batches).worst_snr_db


@pytest.mark.parametrize(("count", "fitted", "compared"), [(1, "", "0"), (2, "0", "1"), (7, "01346", "25")])
def test_weights_are_compared_on_batches_they_were_not_fitted_to(count: int, fitted: str, compared: str) -> None:
    seen, unseen = choose.apart([{"x": np.array(n)} for n in range(count)])
    assert ["".join(str(each["x"]) for each in part) for part in (seen, unseen)] == [fitted, compared]


def test_scale_search_reaches_layers_that_the_pair_rule_does_not_ask_about() -> None:
    text = """(float[N,4,5,5] x) => (float[N,2,3,3] y) {
        [deep] h = Conv <group=4> (x, v)
        [flat] y = Conv (h, w)
    }"""
    model = graphs.model(text, {"v": graphs.noise(0, 4, 1, 3, 3), "w": graphs.noise(1, 2, 4, 1, 1)})
    plan, _ = graphs.planned(model, {"x": graphs.noise(2, 1, 4, 5, 5)})
    paired, _ = rounding.under_pair_rule(model, plan)
    found = rounding.at_best_scale(model, plan, pair_rule=True)
    assert ([*paired], [*found]) == (["w"], ["v", "w"])
    np.testing.assert_array_equal(found["w"].codes, paired["w"].codes)


def test_one_batch_alone_fits_no_weights() -> None:
    *others, fitted = improve(gemm(), correlated(1)).corrections
    assert [tried.name for tried in others] == ["bias", "scale"] and not any(tried.why for tried in others)
    assert (fitted.name, fitted.kept, fitted.after_db) == (
        "gptq",
        False,
        None,
    ) and "one calibration batch" in fitted.why
