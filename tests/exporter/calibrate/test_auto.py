from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporter import graph, quantize, varies
from exporter.calibrate import Range, Ranges, auto, methods, observe
from exporter.errors import CalibrationError
from exporter.place import Plan
from runtime import drift
from tests import models
from tests.exporter import stages

NAME = "residual"
BATCHES = list(models.batches(NAME, 1, 12))


@functools.cache
def prepared() -> tuple[ir.Model, Plan, dict[str, Ranges]]:
    model, plan = stages.prepared(NAME).model, stages.plan(NAME)
    return model, plan, auto.candidates(model, observe(model, plan.tensors, BATCHES, (), True))


@functools.cache
def int8() -> ir.Model:
    model, plan, given = prepared()
    return quantize.to_int8(model, plan, given["minmax"])


@functools.cache
def folds() -> tuple[auto.Fold, ...]:
    model, plan, _ = prepared()
    return auto.crossed(model, int8(), plan.tensors, BATCHES)


@functools.cache
def chosen() -> auto.Chosen:
    return auto.choose(int8(), prepared()[2], folds())


@pytest.mark.parametrize("method", methods.METHODS)
def test_patched_model_is_the_quantized_one(method: str) -> None:
    model, plan, given = prepared()
    patched = ir.serde.deserialize_model(onnx.load_from_string(auto.patcher(model, int8())(given[method])))
    again = quantize.to_int8(model, plan, given[method])
    for batch in BATCHES[:2]:
        for name, array in graph.runner(again)(batch).items():
            np.testing.assert_array_equal(graph.runner(patched)(batch)[name], array)


def test_snr_is_that_of_drift_with_the_activations_alone_rounded() -> None:
    model, _, given = prepared()
    only_activations = auto.with_real_weights(model, int8())
    kinds = [
        graph.constant(node.inputs[0]) is None for node in only_activations.graph if node.op_type == "DequantizeLinear"
    ]
    assert any(kinds)
    run, real = graph.runner(only_activations), graph.runner(model)
    against = varies.grounds(model, list(map(real, BATCHES)), BATCHES)
    expected = drift.measure(((real(batch), run(batch)) for batch in BATCHES), against).worst_snr_db
    assert auto.evaluator(model, int8(), BATCHES)(given["minmax"]).snr_db == pytest.approx(expected, abs=1e-3)


def test_auto_is_no_worse_than_the_method_it_began_from_and_says_so() -> None:
    found = chosen()
    assert found.snr_db >= found.single_db[found.best]
    assert found.ranges.method == "auto"
    assert set(found.ranges.tensors) == set(prepared()[1].tensors)
    assert len(found.notes()) == 1 + len(found.changed)
    assert found.evaluations <= auto.EVALUATIONS


def test_auto_is_deterministic() -> None:
    again = auto.choose(int8(), prepared()[2], folds())
    assert again.ranges.to_json() == chosen().ranges.to_json()
    assert again.choices == chosen().choices


def test_budget_of_evaluations_is_kept() -> None:
    assert auto.choose(int8(), prepared()[2], folds(), evaluations=7).evaluations == 7


def test_one_bad_range_is_taken_from_the_other_method() -> None:
    """Method a is right but for one tensor, b is wrong but for that one: neither alone is best."""
    model, _, given = prepared()
    good = given["minmax"]
    tensors = auto._used(int8(), good)
    wide = {n: replace(r, low=r.low * 40, high=r.high * 40) for n, r in good.tensors.items()}
    victim = tensors[2]
    a = replace(good, tensors={**good.tensors, victim: wide[victim]})
    b = replace(good, tensors={**wide, victim: good.tensors[victim]})
    both = {"a": a, "b": b}
    found = auto.choose(int8(), both, [auto.Fold(given=both, measure=auto.evaluator(model, int8(), BATCHES))])
    assert found.best == "a"
    assert [choice.tensor for choice in found.changed if choice.method == "b"] == [victim]
    assert found.changed[0].gain_db > 3


def test_error_of_one_batch_is_of_one_part() -> None:
    noise = np.full((16, 1), 1e-3)
    noise[3] = 1.0
    errors = auto.Errors(signal=np.ones((16, 1)), noise=noise)
    assert errors.snr_db == pytest.approx(10 * np.log10(16 / 1.015))
    np.testing.assert_allclose(np.delete(errors.parts_db, 3), 30)
    assert errors.parts_db[3] == pytest.approx(10 * np.log10(2 / 1.001))
    assert len(auto.Errors(signal=np.ones((3, 1)), noise=np.ones((3, 1))).parts_db) == 3


def test_change_that_helps_one_batch_much_and_hurts_others_is_not_kept() -> None:
    tensor, other = "x", "y"
    wide, tight = (Range(low=0.0, high=high, elements=1, masked=0) for high in (2.0, 1.0))
    a, b = (Ranges(tensors={tensor: r, other: r}, batches=16, method=m) for r, m in ((wide, "a"), (tight, "b")))

    def search(lucky: float, others: float) -> auto.Chosen:
        """Method b on x: the noise of batch 3, which holds nearly all, times `lucky`, and of others times `others`."""

        def measure(found: Ranges) -> auto.Errors:
            noise = np.full((16, 1), 1e-3)
            noise[3] = 1.0
            if found.tensors[tensor] == tight:
                noise *= np.where(np.arange(16) == 3, lucky, others)[:, None]
            if found.tensors[other] == tight:
                noise *= 4
            return auto.Errors(signal=np.ones((16, 1)), noise=noise)

        given = {"a": a, "b": b}
        found = auto._Search(given, [tensor, other], [auto.Fold(given=given, measure=measure)])
        found.improve([tensor], auto.EVALUATIONS)
        return found.result()

    assert search(lucky=0.01, others=1.1).changed == ()
    assert [(choice.tensor, choice.method) for choice in search(lucky=0.9, others=0.5).changed] == [("x", "b")]
    assert search(lucky=0.9, others=0.5).changed[0].gain_db == pytest.approx(3.01, abs=0.01)


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"), [(0, 255, 1, 0), (-255, 0, 1, 255), (1, 51, 0.2, 0), (-1, 1, 2 / 255, 128), (0, 0, 1, 0)]
)  # fmt: skip
def test_scale_and_zero_point(low: float, high: float, scale: float, zero: int) -> None:
    found = auto.scale_and_zero_point(Range(low=low, high=high, elements=1, masked=0))
    assert found == (pytest.approx(scale), zero)


def test_nothing_to_choose_from_is_refused() -> None:
    model, plan, _ = prepared()
    with pytest.raises(CalibrationError, match="found 0 batches to compare on"):
        auto.crossed(model, int8(), plan.tensors, [])


def test_ranges_are_judged_on_batches_they_are_not_from() -> None:
    model, plan, _ = prepared()
    for fold, seen, judged in zip(folds(), (BATCHES[::2], BATCHES[1::2]), (BATCHES[1::2], BATCHES[::2]), strict=True):
        given = auto.candidates(model, observe(model, plan.tensors, seen, (), True))
        assert {name: each.to_json() for name, each in fold.given.items()} == {n: r.to_json() for n, r in given.items()}
        errors, expected = fold.measure(given["mse"]), auto.evaluator(model, int8(), judged)(given["mse"])
        np.testing.assert_array_equal(errors.noise, expected.noise)


def test_single_batch_is_judged_by_its_own_ranges() -> None:
    model, plan, _ = prepared()
    (fold,) = auto.crossed(model, int8(), plan.tensors, BATCHES[:1])
    own = auto.candidates(model, observe(model, plan.tensors, BATCHES[:1], (), True))
    assert fold.given["minmax"].to_json() == own["minmax"].to_json()


@pytest.mark.parametrize(("noise", "best"), [(1.08, "minmax"), (1.2, "mse")])
def test_method_that_clips_nothing_is_taken_where_no_other_is_better_by_half_a_decibel(noise: float, best: str) -> None:
    """0.33 dB and 0.79 dB."""
    ends = {"minmax": 2.0, "mse": 1.0}
    given = {
        name: Ranges(tensors={"x": Range(low=0.0, high=high, elements=1, masked=0)}, batches=4, method=name)
        for name, high in ends.items()
    }

    def measure(found: Ranges) -> auto.Errors:
        wide = found.tensors["x"].high == ends["minmax"]
        return auto.Errors(signal=np.ones((4, 1)), noise=np.full((4, 1), noise if wide else 1.0))

    found = auto._Search(given, ["x"], [auto.Fold(given=given, measure=measure)])
    assert found.best == best


def test_halves_in_which_other_parts_vary_are_judged_together() -> None:
    model, plan, given = prepared()
    few = BATCHES[:3]
    alike = [few[0], few[1], few[0]]  # nothing varies in the first and third
    uneven = auto.crossed(model, int8(), plan.tensors, [{k: v[:1] for k, v in batch.items()} for batch in few])
    for folds in (auto.crossed(model, int8(), plan.tensors, alike), uneven):
        assert auto.choose(int8(), given, folds).evaluations > 0
