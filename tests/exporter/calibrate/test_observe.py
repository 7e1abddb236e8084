from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod
from onnxruntime.quantization.calibrate import create_calibrator

from exporter import graph, quantize
from exporter.calibrate import Range, distinguish, observe, statistics
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


def test_node_that_made_the_first_nan_is_named_not_the_one_where_it_was_seen() -> None:
    model = graphs.model(
        "(float[N,4] x) => (float[N,4] y) { [root] r = Sqrt(x)\n [twice] t = Add(r, r)\n [squash] y = Tanh(t) }"
    )
    batches: Arrays = [{"x": np.ones((1, 4), np.float32)}, {"x": np.full((1, 4), -1, np.float32)}]
    with pytest.raises(CalibrationError) as error:
        observe(model, ("y",), iter(batches))
    assert (error.value.batch, error.value.tensor) == (1, "y")
    assert "Sqrt 'root' makes the first in 'r'" in str(error.value)


def test_first_bad_batch_of_a_chunk_is_the_one_that_is_told() -> None:
    batches: Arrays = [{"x": np.full((1, 2), np.nan if n in (3, 5) else 1, np.float32)} for n in range(8)]
    with pytest.raises(CalibrationError) as error:
        observe(NEG, ("x",), iter(batches))
    assert error.value.batch == 3


SMALL = graphs.model(
    "(float[N,4] x) => (float[N,2] y) { [r] h = Reshape(x, shape)\n [t] k = Transpose<perm=[0,2,1]>(h)\n"
    " [n] m = Neg(k)\n [a] z = Relu(m)\n [s] y = ReduceSum<keepdims=0>(z, axis) }",
    {"shape": np.array([-1, 2, 2]), "axis": np.array([1])},
)


def test_moved_tensors_are_looked_at_once_and_a_relu_is_seen_through() -> None:
    same = representatives(SMALL, ("x", "h", "k", "m", "z", "y"))
    assert same == {"x": "x", "h": "x", "k": "x", "m": "z", "z": "z", "y": "y"}
    x = graphs.noise(3, 5, 4)
    found = observe(SMALL, tuple(same), iter([{"x": x}])).ranges.tensors
    assert low_high(found["k"]) == (x.min(), x.max())
    assert low_high(found["m"]) == (max(0, -x.max()), -x.min())


def test_statistics_are_the_same_bytes_whatever_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = stages.prepared("residual").model, stages.plan("residual")
    batches = list(models.batches("residual", 1, 11))
    keys = ((plan.tensors[0], 1),)
    texts = set()
    for workers in (1, 3):
        monkeypatch.setattr(sys.modules[representatives.__module__], "_cores", lambda count=workers: count)
        texts.add(statistics.to_bytes(observe(model, plan.tensors, iter(batches), keys, True)))
    assert len(texts) == 1


def test_int8_model_is_byte_for_byte_that_of_onnxruntimes_own_minmax() -> None:
    """Without graph optimizations, for theirs has none: a fused kernel may sum in another order."""
    model, plan = stages.prepared("residual").model, stages.plan("residual")
    batches = list(models.batches("residual", 1, 4))
    ours = observe(model, plan.tensors, iter(batches), optimize=False).ranges
    theirs = quantize.ranges_by_onnxruntime(model, plan.tensors, iter(batches), "minmax")
    first, second = (graph.to_bytes(quantize.to_int8(model, plan, distinguish(model, r))) for r in (ours, theirs))
    assert first == second
    assert theirs.batches == 4


def test_optimized_run_gives_nearly_the_scales_of_onnxruntimes_minmax() -> None:
    model, plan = stages.prepared("residual").model, stages.plan("residual")
    batches = list(models.batches("residual", 1, 4))
    ours = distinguish(model, observe(model, plan.tensors, iter(batches)).ranges)
    theirs = distinguish(model, quantize.ranges_by_onnxruntime(model, plan.tensors, iter(batches), "minmax"))
    for name, found in ours.tensors.items():
        assert low_high(found) == pytest.approx(low_high(theirs.tensors[name]), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_onnxruntimes_histogram_methods_warn_of_their_memory(method: str) -> None:
    model, plan = stages.prepared("residual").model, stages.plan("residual")
    with pytest.warns(RuntimeWarning, match="holds every activation of every batch in memory"):
        found = quantize.ranges_by_onnxruntime(model, plan.tensors, models.batches("residual", 1, 3), method)
    assert set(found.tensors) == set(plan.tensors)


def test_method_that_onnxruntime_does_not_have_is_refused() -> None:
    with pytest.raises(CalibrationError, match="engine onnxruntime: method: found 'mse'"):
        quantize.ranges_by_onnxruntime(NEG, ("x",), [], "mse")


def test_nan_in_a_weight_is_found_though_a_clip_would_hide_it() -> None:
    model = graphs.model(
        "(float[N,2] x) => (float[N,2] y) { [m] z = MatMul(x, w)\n [c] y = Clip(z, low, high) }",
        {"w": np.array([[1, np.nan], [1, 1]], np.float32), "low": np.float32(0), "high": np.float32(6)},
    )
    with pytest.raises(CalibrationError, match="tensor 'z': found NaN") as error:
        observe(model, ("z", "y"), iter([{"x": np.ones((1, 2), np.float32)}]))
    assert "MatMul 'm' makes the first in 'z'" in str(error.value)


def test_numbers_as_large_as_a_mask_are_values_and_its_constants_are_not() -> None:
    x = graphs.noise(0, 4, 3) * np.float32(1e32)
    found = observe(NEG, ("x",), iter([{"x": x}])).ranges.tensors["x"]
    assert low_high(found) == (x.min(), x.max()) and found.masked == 0
    lowest = np.finfo(np.float32).min
    for masks in ([lowest], [-lowest], [lowest, lowest / 2, 0.0], [lowest, -lowest]):
        scores = graphs.noise(1, 8, 8) + np.resize(np.float32([*masks, 0]), (8, 8))
        found = observe(NEG, ("x",), iter([{"x": scores}])).ranges.tensors["x"]
        counted = scores[np.abs(scores) < 1e30]
        assert low_high(found) == (counted.min(), counted.max()) and found.masked == 64 - counted.size
