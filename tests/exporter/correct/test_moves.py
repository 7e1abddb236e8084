from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporter import graph
from exporter.correct import moves
from exporter.correct.slots import FIXED, Slots, scaled
from runtime import drift
from tests import models
from tests.exporter import graphs, stages

Batch = dict[str, np.ndarray]


def conv(seed: int, outputs: int, inputs: int, size: int = 3) -> np.ndarray:
    return graphs.noise(seed, outputs, inputs, size, size)


TWO = {"v": conv(1, 6, 3), "b": graphs.noise(2, 6), "w": conv(3, 4, 6), "slope": np.full((6, 1, 1), 0.3, np.float32)}
PICTURE = {"x": graphs.noise(0, 2, 3, 12, 12)}


def between(body: str, outputs: str = "float[N,4,P,Q] y") -> ir.Model:
    """Two Conv of 3 -> 6 -> 4 channels, and what stands between h and g."""
    text = f"(float[N,3,12,12] x) => ({outputs}) {{ [first] h = Conv <pads=[1,1,1,1]> (x, v, b) {body} [second] y = Conv (g, w) }}"
    return graphs.model(text, {**TWO, **CONSTANTS})


CONSTANTS = {
    "k1": conv(5, 6, 6, 1), "k3": conv(6, 6, 6),
    "low": np.float32(0), "high": np.float32(6), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "one": np.float32(1),
    "sizes": np.array([1, 1, 2, 2], np.float32), "shift": graphs.noise(4, 6, 1, 1), "split": np.array([2, 4]),
}  # fmt: skip
MOVE = {
    "relu": "g = Relu (h)",
    "leaky relu": "g = LeakyRelu <alpha=0.1> (h)",
    "relu by a slope per channel": "g = PRelu (h, slope)",
    "a pool": "g = MaxPool <kernel_shape=[2,2], strides=[2,2]> (h)",
    "a resize": 'g = Resize <mode="linear"> (h, , sizes)',
    "zeros around it": "g = Pad (h, pads)",
    "a constant per channel": "g = Add (h, shift)",
    "a factor": "g = Mul (h, shift)",
    "a gate of other values": "p = GlobalAveragePool (h) k = Conv (p, k1) s = Sigmoid (k) g = Mul (h, s)",
    "a residual": "r = Relu (h) c = Conv <pads=[1,1,1,1]> (r, k3) g = Add (c, h)",
    "its parts in another order": "a, b2 = Split <axis=1> (h, split) g = Concat <axis=1> (b2, a)",
}
STAY = {
    "hardswish": "g = HardSwish (h)",
    "gelu": "g = Gelu (h)",
    "clip at 6": "g = Clip (h, low, high)",
    "sigmoid": "g = Sigmoid (h)",
    "a sum with a constant for all": "g = Add (h, one)",
    "a product with itself": "g = Mul (h, h)",
    "ones around it": "g = Pad (h, pads, one)",
}


def found(model: ir.Model, batch: Batch) -> Slots:
    return moves.find(model, graph.shapes(model, batch))


def moved(model: ir.Model, batch: Batch, seed: int = 0) -> tuple[ir.Model, Slots, np.ndarray]:
    """With scales 1/8 .. 8, so that a wrong one shows."""
    slots = found(model, batch)
    scales = 2.0 ** np.random.default_rng(seed).uniform(-3, 3, slots.count)
    scales[FIXED] = 1
    return scaled(model, slots, scales), slots, scales


def is_equal(before: ir.Model, after: ir.Model, batch: Batch) -> bool:
    return drift.measure([(graph.runner(before)(batch), graph.runner(after)(batch))]).worst_snr_db > 110


@pytest.mark.parametrize("name", MOVE)
def test_scales_move_through_what_hands_them_on_and_outputs_stay(name: str) -> None:
    model = between(MOVE[name])
    before = graph.to_bytes(model)
    after, slots, scales = moved(model, PICTURE)
    assert is_equal(model, after, PICTURE)
    assert graph.to_bytes(model) == before
    assert len({*slots.of["g"].reshape(-1).tolist()} - {FIXED}) == 6
    inside = [graph.runner(graph.with_outputs(each, ["g"]))(PICTURE)["g"] for each in (model, after)]
    np.testing.assert_allclose(inside[1] * scales[slots.of["g"]], inside[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", STAY)
def test_nothing_moves_through_what_scales_do_not_pass(name: str) -> None:
    slots = found(between(STAY[name]), PICTURE)
    assert (slots.count, slots.of, slots.taken) == (1, {}, ())


def test_tensor_that_the_model_returns_keeps_its_scale() -> None:
    slots = found(between("g = Relu (h)", "float[N,4,P,Q] y, float[N,6,12,12] g"), PICTURE)
    assert slots.of == {} and slots.ended == {"g": "the model returns it"}


def test_layers_that_read_one_tensor_take_the_same_scales_and_one_that_cannot_keeps_them_all() -> None:
    reads = "g = Relu (h) [other] o = Conv (g, u)"
    both = graphs.model(
        "(float[N,3,12,12] x) => (float[N,4,P,Q] y, float[N,2,P,Q] o) { [first] h = Conv <pads=[1,1,1,1]> (x, v, b)"
        f" {reads} [second] y = Conv (g, w) }}",
        {**TWO, "u": conv(7, 2, 6)},
    )
    after, slots, _ = moved(both, PICTURE)
    assert is_equal(both, after, PICTURE)
    assert [each.layer for each in slots.taken if each.times.any()] == ["other", "second"]
    other = graphs.model(
        "(float[N,3,12,12] x) => (float[N,4,P,Q] y, float[N,6,P,Q] o) { [first] h = Conv <pads=[1,1,1,1]> (x, v, b)"
        " g = Relu (h) [t] o = Tanh (g) [second] y = Conv (g, w) }",
        TWO,
    )
    assert found(other, PICTURE).ended == {"g": "Tanh t reads it"}


def test_weight_that_two_layers_share_is_left_alone() -> None:
    text = """(float[N,6,12,12] x) => (float[N,6,P,Q] y) {
        h = Conv (x, u)  g = Relu (h)  f = Conv (g, w)  e = Relu (f)  y = Conv (e, w) }"""
    model = graphs.model(text, {name: conv(n, 6, 6) for n, name in enumerate("uw")})
    batch = {"x": graphs.noise(0, 1, 6, 12, 12)}
    assert found(model, batch).of == {}


@pytest.mark.parametrize("group", [2, 6])
def test_groups_take_the_scales_of_their_own_channels(group: int) -> None:
    text = f"""(float[N,3,12,12] x) => (float[N,6,P,Q] y) {{
        h = Conv <pads=[1,1,1,1]> (x, v, b)  g = Relu (h)  [grouped] y = Conv <group={group}> (g, w) }}"""
    model = graphs.model(text, {**TWO, "w": conv(3, 6, 6 // group)})
    after, slots, _ = moved(model, PICTURE)
    assert slots.count == 7 and is_equal(model, after, PICTURE)


ROWS = {"x": graphs.noise(0, 2, 5, 8)}


def test_layer_normalization_gives_its_scale_and_bias_to_the_layers_that_read_it() -> None:
    text = """(float[N,5,8] x) => (float[N,5,8] y, float[N,5,8] z) {
        n = LayerNormalization <axis=-1> (x, gain, shift)  [q] y = MatMul (n, w)
        r = Reshape (n, rows)  [k] g = Gemm <transB=1> (r, v)  z = Reshape (g, axes) }"""
    weights = {
        "gain": graphs.noise(1, 8), "shift": graphs.noise(2, 8), "w": graphs.noise(3, 8, 8), "v": graphs.noise(4, 8, 8),
        "rows": np.array([-1, 8]), "axes": np.array([-1, 5, 8]),
    }  # fmt: skip
    model = graphs.model(text, weights)
    after, slots, scales = moved(model, ROWS)
    assert is_equal(model, after, ROWS)
    gain = graph.constant(after.graph.initializers["gain"])
    assert gain is not None
    np.testing.assert_allclose(gain, weights["gain"] / scales[slots.of["n"].reshape(-1)], rtol=1e-6)


def test_residual_past_a_layer_normalization_keeps_the_scales_where_they_are() -> None:
    text = """(float[N,5,8] x) => (float[N,5,8] y) {
        n = LayerNormalization <axis=-1> (x, gain)  [l] m = MatMul (n, w)  s = Add (m, n)
        [behind] y = LayerNormalization <axis=-1> (s, other) }"""
    model = graphs.model(text, {"gain": graphs.noise(1, 8), "w": graphs.noise(2, 8, 8), "other": graphs.noise(3, 8)})
    assert found(model, ROWS).ended == {"n": "LayerNormalization behind reads it"}


def test_values_of_attention_have_scales_and_queries_and_keys_have_none() -> None:
    text = """(float[N,5,8] x) => (float[N,5,8] y) {
        [q] q = MatMul (x, a)  [k] k = MatMul (x, b)  [v] v = MatMul (x, c)
        q4 = Reshape (q, heads)  k4 = Reshape (k, heads)  v4 = Reshape (v, heads)
        qh = Transpose <perm=[0,2,1,3]> (q4)  kh = Transpose <perm=[0,2,3,1]> (k4)  vh = Transpose <perm=[0,2,1,3]> (v4)
        s = MatMul (qh, kh)  p = Softmax (s)  o = MatMul (p, vh)  t = Transpose <perm=[0,2,1,3]> (o)
        u = Reshape (t, whole)  [out] y = MatMul (u, d) }"""
    weights = {name: graphs.noise(n, 8, 8) for n, name in enumerate("abcd")}
    model = graphs.model(text, {**weights, "heads": np.array([0, 0, 2, 4]), "whole": np.array([0, 0, 8])})
    after, slots, _ = moved(model, ROWS)
    assert is_equal(model, after, ROWS)
    assert {each.constant for each in slots.taken} == {"c", "d"}
    assert slots.of["vh"].shape == (1, 2, 1, 4)


def test_flattened_picture_has_the_scale_of_a_channel_at_each_of_its_places() -> None:
    text = (
        "(float[N,3,12,12] x) => (float[N,2] y) { h = Conv (x, v, b)  r = Relu (h)  f = Flatten (r)  y = Gemm (f, w) }"
    )
    model = graphs.model(text, {**TWO, "w": graphs.noise(3, 600, 2)})
    after, slots, _ = moved(model, PICTURE)
    assert slots.count == 7 and slots.of["f"].shape == (1, 600) and is_equal(model, after, PICTURE)


def test_branch_that_reads_a_tensor_keeps_its_scales() -> None:
    text = """(float[N,3,12,12] x, bool c) => (float[N,4,P,Q] y, float[N,6,12,12] z) {
        h = Conv <pads=[1,1,1,1]> (x, v, b)  g = Relu (h)  y = Conv (g, w)
        z = If (c) <then_branch = a () => (float[N,6,12,12] s) { s = Relu (g) },
                    else_branch = b () => (float[N,6,12,12] t) { t = Exp (g) }> }"""
    model = graphs.model(text, TWO)
    assert found(model, {**PICTURE, "c": np.array(True)}).of == {}


@pytest.mark.parametrize("name", ["residual", "transformer", "upsampler"])
def test_real_graphs_compute_the_same_with_any_scales_in_other_sizes_too(name: str) -> None:
    model = stages.prepared(name).model
    batches = list(models.batches(name, 0, 3))
    after, slots, _ = moved(model, batches[0])
    assert slots.count > 1
    onnx.checker.check_model(ir.serde.serialize_model(after))
    assert graphs.op_types(after) == graphs.op_types(model)
    for batch in batches:
        assert is_equal(model, after, batch)
