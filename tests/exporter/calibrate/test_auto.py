from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporter import graph, quantize
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
def chosen() -> auto.Chosen:
    model, _, given = prepared()
    return auto.choose(model, int8(), given, BATCHES)


@pytest.mark.parametrize("method", methods.METHODS)
def test_patched_model_is_the_quantized_one(method: str) -> None:
    model, plan, given = prepared()
    patched = ir.serde.deserialize_model(onnx.load_from_string(auto.patcher(model, int8())(given[method])))
    again = quantize.to_int8(model, plan, given[method])
    for batch in BATCHES[:2]:
        for name, array in graph.runner(again)(batch).items():
            np.testing.assert_array_equal(graph.runner(patched)(batch)[name], array)


def test_snr_is_that_of_drift() -> None:
    model, _, given = prepared()
    run, real = graph.runner(int8()), graph.runner(model)
    expected = drift.measure((real(batch), run(batch)) for batch in BATCHES).worst_snr_db
    assert auto.evaluator(model, int8(), BATCHES)(given["minmax"]).snr_db == pytest.approx(expected, abs=1e-3)


def test_auto_is_no_worse_than_the_method_it_began_from_and_says_so() -> None:
    found = chosen()
    assert found.snr_db >= found.single_db[found.best]
    assert found.ranges.method == "auto"
    assert set(found.ranges.tensors) == set(prepared()[1].tensors)
    assert len(found.notes()) == 1 + len(found.changed)
    assert found.evaluations <= auto.EVALUATIONS


def test_auto_is_deterministic() -> None:
    model, _, given = prepared()
    again = auto.choose(model, int8(), given, BATCHES)
    assert again.ranges.to_json() == chosen().ranges.to_json()
    assert again.choices == chosen().choices


def test_budget_of_evaluations_is_kept() -> None:
    model, _, given = prepared()
    assert auto.choose(model, int8(), given, BATCHES, evaluations=7).evaluations == 7


def test_one_bad_range_is_taken_from_the_other_method() -> None:
    """Method a is right but for one tensor, b is wrong but for that one: neither alone is best."""
    model, _, given = prepared()
    good = given["minmax"]
    tensors = auto._used(int8(), good)
    wide = {n: replace(r, low=r.low * 40, high=r.high * 40) for n, r in good.tensors.items()}
    victim = tensors[2]
    a = replace(good, tensors={**good.tensors, victim: wide[victim]})
    b = replace(good, tensors={**wide, victim: good.tensors[victim]})
    found = auto.choose(model, int8(), {"a": a, "b": b}, BATCHES)
    assert found.best == "a"
    assert [choice.tensor for choice in found.changed if choice.method == "b"] == [victim]
    assert found.changed[0].gain_db > 3


def test_gain_of_one_far_batch_is_in_doubt() -> None:
    signal = np.ones((8, 1))
    noise = np.full((8, 1), 1e-3)
    far = noise.copy()
    far[3] = 1.0
    gain, doubt = auto.gain_db(auto.Errors(signal=signal, noise=noise), auto.Errors(signal=signal, noise=far))
    assert gain > 20
    assert doubt > 0.8 * gain
    gain, doubt = auto.gain_db(auto.Errors(signal=signal, noise=noise / 2), auto.Errors(signal=signal, noise=noise))
    assert (gain, doubt) == (pytest.approx(3.01, abs=0.01), pytest.approx(0, abs=1e-9))


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"), [(0, 255, 1, 0), (-255, 0, 1, 255), (1, 51, 0.2, 0), (-1, 1, 2 / 255, 128), (0, 0, 1, 0)]
)  # fmt: skip
def test_scale_and_zero_point(low: float, high: float, scale: float, zero: int) -> None:
    found = auto.scale_and_zero_point(Range(low=low, high=high, elements=1, masked=0))
    assert found == (pytest.approx(scale), zero)


def test_nothing_to_choose_from_is_refused() -> None:
    model, _, given = prepared()
    with pytest.raises(CalibrationError, match="found 5 methods, 0 batches"):
        auto.choose(model, int8(), given, [])
