from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from exporter import graph, quantize
from exporter.calibrate import observe
from exporter.correct import bias
from exporter.numerics.quantized import QuantizedTensor, decode, per_channel
from exporter.place import Plan
from tests.exporter import graphs

Batch = dict[str, np.ndarray]


def layer(body: str, weight: np.ndarray, shape: str, out: str, bias_size: int = 4) -> ir.Model:
    weights = {"w": weight, "b": graphs.noise(9, bias_size)}
    return graphs.model(f"(float[N,{shape}] x) => (float[N,{out}] y) {{ {body} }}", weights)


LAYERS = {
    "conv": (layer("[l] y = Conv(x, w, b)", graphs.noise(1, 4, 3, 3, 3), "3,6,6", "4,4,4"), (8, 3, 6, 6)),
    "conv without bias": (layer("[l] y = Conv(x, w)", graphs.noise(1, 4, 3, 3, 3), "3,6,6", "4,4,4"), (8, 3, 6, 6)),
    "grouped": (layer("[l] y = Conv<group=2>(x, w, b)", graphs.noise(1, 4, 2, 3, 3), "4,6,6", "4,4,4"), (8, 4, 6, 6)),
    "gemm": (layer("[l] y = Gemm(x, w, b)", graphs.noise(1, 6, 4), "6", "4"), (64, 6)),
    "gemm, transposed": (layer("[l] y = Gemm<transB=1>(x, w, b)", graphs.noise(1, 4, 6), "6", "4"), (64, 6)),
    "matmul and add": (
        layer("[l] p = MatMul(x, w)\n [a] y = Add(p, b)", graphs.noise(1, 6, 4), "5,6", "5,4"),
        (16, 5, 6),
    ),
}


def coarse(model: ir.Model) -> dict[str, QuantizedTensor]:
    """Weights rounded down to steps of 1/4: an error with a mean, as no real grid is so unkind to have."""
    weight = graph.constant(model.graph.initializers["w"])
    node = graphs.node(model, "l")
    axis = 0 if node.op_type == "Conv" or node.attributes.get_int("transB", 0) else 1
    scale = np.full(weight.shape[axis], 0.25, np.float32)
    return {"w": per_channel(np.floor(weight / 0.25).astype(np.int8), scale, axis)}


def with_weights(model: ir.Model, rounded: dict[str, QuantizedTensor]) -> ir.Model:
    clone = model.clone()
    clone.graph.initializers["w"].const_value = ir.tensor(decode(rounded["w"]))
    return clone


def data(shape: tuple[int, ...], seed: int) -> Batch:
    return {"x": graphs.noise(seed, *shape) + 1}  # E[x] = 1: where it is 0 there is nothing to correct


def mean_error(reference: ir.Model, candidate: ir.Model, batch: Batch) -> np.ndarray:
    """|mean over everything but output channels|, [channels]."""
    error = graph.runner(candidate)(batch)["y"] - graph.runner(reference)(batch)["y"]
    axis = 1 if error.ndim == 4 else -1
    return np.abs(np.moveaxis(error, axis, 0).reshape(error.shape[axis], -1).mean(1))


def corrected(model: ir.Model, batch: Batch, rounded: dict[str, QuantizedTensor]) -> tuple[ir.Model, Plan]:
    plan, _ = graphs.planned(model, batch, l="int8")  # also a grouped Conv, which placement finds too slow
    means = observe(model, ["x"], iter([batch]), bias.channels(model, plan)).means
    return bias.correct(model, plan, means, rounded), plan


@pytest.mark.parametrize("name", LAYERS)
def test_mean_error_of_the_output_is_gone_on_the_data_it_was_taken_from(name: str) -> None:
    model, shape = LAYERS[name]
    batch, rounded = data(shape, 2), coarse(model)
    better, _ = corrected(model, batch, rounded)
    before, after = (mean_error(model, with_weights(m, rounded), batch) for m in (model, better))
    assert before.max() > 0.3
    if "conv" in name or name == "grouped":  # E[x] is over all positions, the kernel sees the middle ones more often
        assert after.max() < before.max() / 3
    else:
        assert after.max() < 1e-4


@pytest.mark.parametrize("name", ["gemm", "conv", "matmul and add"])
def test_mean_error_falls_on_data_it_has_not_seen(name: str) -> None:
    model, shape = LAYERS[name]
    rounded = coarse(model)
    better, _ = corrected(model, data(shape, 2), rounded)
    before, after = (mean_error(model, with_weights(m, rounded), data(shape, 3)).mean() for m in (model, better))
    assert after < before / 2


def test_shift_is_the_formula_by_hand() -> None:
    """b' = b - (Ŵ - W) E[x], with W = [1.1, -0.6], Ŵ = [1, -0.5] and E[x] = [2, 3]."""
    model = graphs.model(
        "(float[N,2] x) => (float[N,1] y) { [l] y = Gemm(x, w, b) }",
        {"w": np.array([[1.1], [-0.6]], np.float32), "b": np.array([10], np.float32)},
    )
    plan, _ = graphs.planned(model, {"x": np.ones((1, 2), np.float32)})
    rounded = {"w": per_channel(np.array([[2], [-1]], np.int8), np.array([0.5], np.float32), 1)}
    found = bias.correct(model, plan, {("x", -1): np.array([2.0, 3.0])}, rounded)
    expected = 10 - ((1 - 1.1) * 2 + (-0.5 + 0.6) * 3)
    np.testing.assert_allclose(graph.constant(graphs.node(found, "l").inputs[2]), [expected], rtol=1e-6)


def test_exact_weights_and_the_model_itself_are_left_alone() -> None:
    model, shape = LAYERS["gemm"]
    before = graph.to_bytes(model)
    exact = {"w": per_channel(np.zeros((6, 4), np.int8), np.ones(4, np.float32), 1)}
    corrected(model, data(shape, 2), exact)
    assert graph.to_bytes(model) == before
    untouched, _ = corrected(model, data(shape, 2), {})
    assert graph.to_bytes(untouched) == before


def test_matmul_whose_output_is_read_twice_or_added_to_an_activation_has_no_bias_to_correct() -> None:
    for body in (
        "[l] p = MatMul(x, w)\n t = Tanh(p)\n q = Add(p, b)\n y = Add(q, t)",
        "[l] p = MatMul(x, w)\n y = Add(p, p)",
    ):
        model = layer(body, graphs.noise(1, 6, 4), "5,6", "5,4")
        found, _ = corrected(model, data((4, 5, 6), 2), coarse(model))
        assert graph.to_bytes(found) == graph.to_bytes(model)


def test_channels_are_asked_for_the_inputs_of_int8_layers_alone() -> None:
    model = graphs.model(
        "(float[N,3,6,6] x) => (float[N,4] y) { [c] c = Conv(x, w)\n"
        " [p] p = GlobalAveragePool(c)\n [f] f = Flatten(p)\n [g] y = Gemm(f, v) }",
        {"w": graphs.noise(1, 4, 3, 3, 3), "v": graphs.noise(2, 4, 4)},
    )
    batch = {"x": graphs.noise(0, 2, 3, 6, 6)}
    assert bias.channels(model, graphs.planned(model, batch)[0]) == (("x", 1), ("f", -1))
    assert bias.channels(model, graphs.planned(model, batch, g="float")[0]) == (("x", 1),)


def test_bias_correction_leaves_the_int8_graph_on_its_plan() -> None:
    model, shape = LAYERS["conv without bias"]
    batch = data(shape, 2)
    plan, ranges = graphs.planned(model, batch)
    better, _ = corrected(model, batch, quantize.weights(quantize.to_int8(model, plan, ranges)))
    assert graphs.op_types(quantize.to_int8(better, plan, ranges)).count("Conv") == 1


def test_one_tensor_read_along_two_axes_has_a_mean_along_each() -> None:
    model = graphs.model(
        "(float[N,3,4,6] x) => (float[N,5,4,6] y, float[N,3,4,2] z) { [c] y = Conv(x, w)\n [m] p = MatMul(x, v)\n z = Add(p, b) }",
        {"w": graphs.noise(1, 5, 3, 1, 1), "v": graphs.noise(2, 6, 2), "b": graphs.noise(3, 2)},
    )
    batch = {"x": 2 + graphs.noise(0, 2, 3, 4, 6)}
    plan, _ = graphs.planned(model, batch)
    assert bias.channels(model, plan) == (("x", 1), ("x", -1))
    means = observe(model, plan.tensors, iter([batch]), bias.channels(model, plan)).means
    np.testing.assert_allclose(means["x", 1], batch["x"].mean((0, 2, 3), dtype=np.float64))
    np.testing.assert_allclose(means["x", -1], batch["x"].mean((0, 1, 2), dtype=np.float64))


def test_scalar_added_to_a_matmul_is_no_bias_of_its_columns() -> None:
    model = graphs.model(
        "(float[N,5,6] x) => (float[N,5,1] y) { [l] p = MatMul(x, w)\n y = Add(p, b) }",
        {"w": graphs.noise(1, 6, 1), "b": np.float32(2).reshape(())},
    )
    found, _ = corrected(model, data((4, 5, 6), 2), coarse(model))
    assert graph.to_bytes(found) == graph.to_bytes(model)
