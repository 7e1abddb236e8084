from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator

from exporter import graph
from exporter.calibrate import Range, observe
from exporter.calibrate.observe import representatives
from exporter.errors import CalibrationError
from tests import models
from tests.exporter import graphs, stages

NEG = graphs.model("(float[N,M] x) => (float[N,M] y) { [n] y = Neg(x) }")
Arrays = list[dict[str, np.ndarray]]


def low_high(found: Range) -> tuple[float, float]:
    return found.low, found.high


def test_streaming_equals_numpy_over_everything_also_for_ragged_and_empty_batches() -> None:
    sizes = [(2, 3), (5, 1), (1, 7), (0, 3), (4, 0)]
    batches: Arrays = [{"x": graphs.noise(n, *size)} for n, size in enumerate(sizes)]
    found = observe(NEG, ("x", "y"), iter(batches)).ranges
    everything = np.concatenate([batch["x"].ravel() for batch in batches])
    assert low_high(found.tensors["x"]) == (everything.min(), everything.max())
    assert low_high(found.tensors["y"]) == (-everything.max(), -everything.min())
    assert found.tensors["x"].elements == everything.size == 18
    assert (found.batches, found.method) == (5, "minmax")


def test_every_tensor_of_a_network_has_the_range_that_onnxruntimes_own_calibrator_finds(tmp_path: Path) -> None:
    model, batches = stages.prepared("residual").model, list(models.batches("residual", 1, 4))
    names = stages.plan("residual").tensors

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    (tmp_path / "m.onnx").write_bytes(graph.to_bytes(model))
    calibrator = create_calibrator(
        tmp_path / "m.onnx", augmented_model_path=str(tmp_path / "a.onnx"), calibrate_method=CalibrationMethod.MinMax
    )
    calibrator.collect_data(Reader())
    theirs = calibrator.compute_data()
    ours = observe(model, names, iter(batches)).ranges.tensors
    seen_through = representatives(model, names)
    assert len(names) >= 8
    for name in names:
        low, high = (float(np.squeeze(end)) for end in theirs[seen_through[name]].range_value)
        assert low_high(ours[name]) == pytest.approx((low, high), rel=1e-5, abs=1e-6), (
            name
        )  # ORT fuses the two graphs apart


def test_order_of_batches_does_not_change_the_ranges() -> None:
    model, names = stages.prepared("transformer").model, stages.plan("transformer").tensors
    batches = list(models.batches("transformer", 2, 4))
    texts = {
        observe(model, names, iter(order)).ranges.to_json()
        for order in (batches, batches[::-1], batches[2:] + batches[:2])
    }
    assert len(texts) == 1


def test_batches_are_read_one_by_one_and_once() -> None:
    alive: list[int] = []

    def stream() -> Iterator[dict[str, np.ndarray]]:
        for number in range(5):
            alive.append(number)
            yield {"x": np.full((1, 2), number, np.float32)}

    assert low_high(observe(NEG, ("x",), stream()).ranges.tensors["x"]) == (0.0, 4.0)
    assert alive == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("bad", "kind"), [(0.0, "infinity"), (-1.0, "NaN")])
def test_nan_and_infinity_inside_the_network_name_batch_17_and_the_tensor(bad: float, kind: str) -> None:
    """log 0 is -infinity and log -1 is NaN: no input is to blame, an inner tensor is."""
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { [l] logs = Log(x)\n [t] y = Tanh(logs) }")
    batches: Arrays = [{"x": np.full((2, 4), 1 + n, np.float32)} for n in range(20)]
    batches[17]["x"][1, 3] = bad
    with pytest.raises(CalibrationError) as error:
        observe(model, ("x", "logs", "y"), iter(batches))
    assert (error.value.batch, error.value.tensor) == (17, "logs")
    assert str(error.value).startswith(f"calibration batch 17: tensor 'logs': found {kind}, expected finite numbers")


def test_mask_constant_does_not_become_a_range() -> None:
    model = graphs.model(
        "(float[N,4] x, float[N,4] mask) => (float[N,4] y) { k = Sub(one, mask)\n"
        " m = Mul(k, lowest)\n [a] s = Add(x, m)\n y = Softmax(s) }",
        {"one": np.float32(1), "lowest": np.float32(models.FLOAT32_LOWEST)},
    )
    x = graphs.noise(0, 2, 4)
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], np.float32)
    found = observe(model, ("s", "y"), iter([{"x": x, "mask": mask}])).ranges.tensors
    real = x[mask == 1]
    assert low_high(found["s"]) == (real.min(), real.max())
    assert (found["s"].elements, found["s"].masked) == (8, 2)
    assert found["y"].masked == 0


def test_transformer_with_a_mask_has_no_range_near_the_mask() -> None:
    ranges = observe(
        stages.prepared("transformer").model, stages.plan("transformer").tensors, models.batches("transformer", 3, 3)
    ).ranges
    assert max(max(-found.low, found.high) for found in ranges.tensors.values()) < 100


def test_tensor_that_never_held_a_value_is_refused_by_name() -> None:
    batches: Arrays = [{"x": np.zeros((0, 3), np.float32)}] * 2
    with pytest.raises(CalibrationError, match="tensor 'x': found no value in 2 batches") as error:
        observe(NEG, ("x",), iter(batches))
    assert error.value.tensor == "x"
    masked = {"x": np.full((1, 3), models.FLOAT32_LOWEST, np.float32)}
    with pytest.raises(CalibrationError, match="found no value in 1 batches"):
        observe(NEG, ("x",), iter([masked]))


def test_no_batches_are_refused() -> None:
    with pytest.raises(CalibrationError, match="calibration: no batches"):
        observe(NEG, ("x",), iter([]))


def test_batch_that_the_graph_refuses_is_named() -> None:
    model = graphs.model("(float[N,4] x) => (float[M] y) { y = Reshape(x, eight) }", {"eight": np.array([8])})
    batches: Arrays = [{"x": np.zeros((2, 4), np.float32)}, {"x": np.zeros((3, 4), np.float32)}]
    with pytest.raises(CalibrationError, match="calibration batch 1: ONNX Runtime cannot run it") as error:
        observe(model, ("y",), iter(batches))
    assert error.value.batch == 1


def test_means_per_channel_are_numpys_over_everything() -> None:
    batches: Arrays = [{"x": graphs.noise(n, size, 3)} for n, size in enumerate((2, 5, 0, 1))]
    observed = observe(NEG, ("x", "y"), iter(batches), (("y", 1),))
    expected = -np.concatenate([batch["x"] for batch in batches]).mean(0, dtype=np.float64)
    np.testing.assert_allclose(observed.means["y", 1], expected, rtol=1e-12)
    assert [*observed.means] == [("y", 1)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5), min_size=1, max_size=5))
def test_observe_is_min_and_max_whatever_the_batches(rows: list[list[float]]) -> None:
    batches = [{"x": np.array([row], np.float32)} for row in rows]
    found = observe(NEG, ("x",), iter(batches)).ranges.tensors["x"]
    flat = [value for row in rows for value in row]
    assert low_high(found) == (min(flat), max(flat))
