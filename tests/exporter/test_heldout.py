from __future__ import annotations

import numpy as np
import pytest

from exporter import graph, heldout
from exporter.errors import CalibrationError
from tests.exporter import graphs

TEXT = "(float[N,8] x) => (float[N,4] y, float[N,4] z) { [a] y = Gemm(x, w)\n [l] z = Log(y) }"
ONES, TWOS = (graph.to_bytes(graphs.model(TEXT, {"w": np.full((8, 4), value, np.float32)})) for value in (0.125, 0.25))


def test_outputs_of_both_models_come_by_name() -> None:
    one, two = heldout.runner(ONES, TWOS, {})({"x": np.ones((2, 8), np.float32)}, 0)
    assert list(one) == list(two) == ["y", "z"]
    np.testing.assert_array_equal(one["y"], np.ones((2, 4)))
    np.testing.assert_array_equal(two["y"], 2 * np.ones((2, 4)))


def test_batch_that_a_model_refuses_and_one_that_makes_infinity_are_named() -> None:
    run = heldout.runner(ONES, TWOS, {})
    with pytest.raises(CalibrationError, match="held-out batch 3: the model cannot run on it") as refused:
        run({"x": np.ones((1, 9), np.float32)}, 3)
    with pytest.raises(CalibrationError, match="held-out batch 4: output 'z' of the FP32 model: found NaN") as bad:
        run({"x": np.zeros((1, 8), np.float32)}, 4)
    assert (refused.value.batch, bad.value.batch, bad.value.tensor) == (3, 4, "z")
