from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from exporter import graph
from exporter.correct import gptq, rounding
from exporter.numerics import pairing, plane
from exporter.numerics.quantized import QuantizedTensor, decode, per_channel
from tests.exporter import graphs

Array = graphs.Array


def inputs(seed: int, count: int, columns: int) -> Array:
    """Inputs of which a few directions hold most, as activations do."""
    mix = np.random.default_rng(seed).standard_normal((columns, columns)) * np.geomspace(1, 0.01, columns)[:, None]
    return (graphs.noise(seed + 1, count, columns) @ mix).astype(np.float32)


def second(x: Array) -> Array:
    """E[x x'] of one group."""
    return (x.T @ x)[None] / np.float32(len(x))


def damped(h: Array) -> Array:
    return h[0] + plane.DAMPING * np.trace(h[0]) / len(h[0]) * np.eye(len(h[0]))


def errors(rows: Array, codes: Array, scale: Array, h: Array) -> Array:
    """e' h e of each channel."""
    e = rows.astype(np.float64) - codes * scale[:, None].astype(np.float64)
    return np.einsum("ck,kl,cl->c", e, h, e)


def fitted(
    text: str, weights: dict[str, Array], *batches: dict[str, Array], pair_rule: bool = False
) -> dict[str, QuantizedTensor]:
    model = graphs.model(text, weights)
    plan, _ = graphs.planned(model, *batches)
    return gptq.rounded(model, plan, batches, pair_rule=pair_rule)


@pytest.mark.parametrize("pair_rule", [False, True])
@pytest.mark.parametrize("columns", [1, 7, 64, 100])
def test_no_channel_has_more_error_than_rounding_to_nearest(columns: int, pair_rule: bool) -> None:
    rows, h = graphs.noise(0, 12, columns), second(inputs(1, 400, columns))
    codes, scale = gptq.fit(rows, [h], pair_rule)
    nearest, _ = pairing.fit(rows, pair_rule)
    assert (errors(rows, codes, scale, damped(h)) <= errors(rows, nearest, scale, damped(h)) * (1 + 1e-9)).all()


@pytest.mark.parametrize("pair_rule", [False, True])
def test_inputs_that_go_together_lose_six_decibels_of_error(pair_rule: bool) -> None:
    rows, h = graphs.noise(0, 12, 64), second(inputs(1, 400, 64))
    codes, scale = gptq.fit(rows, [h], pair_rule)
    nearest, _ = pairing.fit(rows, pair_rule)
    assert errors(rows, codes, scale, h[0]).sum() < errors(rows, nearest, scale, h[0]).sum() / 4


def test_independent_inputs_are_rounded_to_nearest() -> None:
    rows = graphs.noise(0, 12, 33)
    codes, scale = gptq.fit(rows, [np.diag(np.geomspace(1, 9, 33))[None]], False)
    nearest, same = pairing.fit(rows, False)
    np.testing.assert_array_equal(codes, nearest)
    np.testing.assert_array_equal(scale, same)


def test_two_equal_inputs_share_one_error() -> None:
    """x1 = x2: 100.4 + 50.4 is 150.8; to nearest 150, and 151 once the second knows what the first lost."""
    rows = np.array([[100.4, 50.4, 127.0]], np.float32)
    h = np.array([[[1, 1, 0], [1, 1, 0], [0, 0, 1]]], np.float32)
    codes, scale = gptq.fit(rows, [h], False)
    assert (codes.tolist(), scale.tolist()) == ([[100, 51, 127]], [1.0])


def test_codes_are_those_of_the_papers_algorithm() -> None:
    """Frantar et al., algorithm 1, with the inverse, at the same scales."""
    rows, h = graphs.noise(3, 8, 50), second(inputs(4, 200, 50))
    codes, scale = gptq.fit(rows, [h], False)
    upper = np.linalg.cholesky(np.linalg.inv(damped(h))).T
    left, expected = rows.astype(np.float64), np.zeros(rows.shape)
    for j in range(50):
        expected[:, j] = np.clip(np.rint(left[:, j] / scale), -127, 127)
        error = (left[:, j] - expected[:, j] * scale) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("columns", [1, 2, 33, 64])
def test_pair_rule_is_kept_by_weights_that_break_it_everywhere(columns: int) -> None:
    rows = 1 + np.abs(graphs.noise(0, 12, columns)) / 10
    codes, _ = gptq.fit(rows, [second(inputs(1, 400, columns))], True)
    np.testing.assert_array_equal(pairing.keep(codes.astype(np.int32)), codes)


def test_rows_of_nothing_and_inputs_of_nothing_keep_their_codes() -> None:
    x = inputs(1, 50, 8)
    x[:, 3] = 0
    rows = graphs.noise(0, 4, 8)
    rows[2] = 0
    for h in (second(x), np.zeros((1, 8, 8), np.float32)):
        codes, scale = gptq.fit(rows, [h], False)
        nearest, _ = pairing.fit(rows, False)
        assert not codes[2].any() and scale[2] > 0
        np.testing.assert_array_equal(codes[:, 3], nearest[:, 3])


CONV = "(float[N,{cin},9,8] x) => (float[N,6,oh,ow] y) {{ [c] y = Conv <group={group}, {how}> (x, w) }}"


@pytest.mark.parametrize("group", [1, 2, 6])
@pytest.mark.parametrize(
    "how",
    [
        "pads=[1,0,2,1]",
        "strides=[2,1], pads=[1,1,1,1]",
        "dilations=[2,1]",
        'auto_pad="SAME_UPPER", strides=[2,2]',
        'auto_pad="SAME_LOWER"',
        'auto_pad="VALID"',
    ],
)
def test_columns_times_rows_are_what_conv_computes(group: int, how: str) -> None:
    weight, x = graphs.noise(0, 6, 6 // group, 3, 2), graphs.noise(1, 2, 6, 9, 8)
    model = graphs.model(CONV.format(cin=6, group=group, how=how), {"w": weight})
    node = graphs.node(model, "c")
    (columns,) = gptq.columns(node, x, weight.shape, 10**6, 0)
    rows = rounding.in_kernel_order(node, weight).reshape(group, 6 // group, -1)
    expected = np.moveaxis(graph.runner(model)({"x": x})["y"], 1, -1)
    made = np.einsum("gpk,grk->pgr", columns, rows).reshape(expected.shape)
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_positions_are_no_more_than_asked_for_and_another_batch_takes_others() -> None:
    model = graphs.model("(float[N,K] x) => (float[N,3] y) { [m] y = MatMul(x, w) }", {"w": graphs.noise(0, 4, 3)})
    x = np.repeat(np.arange(1000, dtype=np.float32)[:, None], 4, axis=1)
    first, second = (next(gptq.columns(graphs.node(model, "m"), x, (4, 3), 100, n))[0, :, 0] for n in (0, 1))
    assert 90 < len(first) <= 100 and len(set(first)) == len(first)
    assert np.diff(first).max() < 30
    assert len(set(first) & set(second)) < 20


@pytest.mark.parametrize("group", [1, 2, 32])
@pytest.mark.parametrize("pair_rule", [False, True])
def test_conv_outputs_come_closer_to_fp32(group: int, pair_rule: bool) -> None:
    weight = graphs.noise(0, 32, 32 // group, 3, 3)
    smooth = np.cumsum(np.cumsum(graphs.noise(1, 3, 32, 16, 16), axis=2), axis=3)
    text = f"(float[N,32,16,16] x) => (float[N,32,14,14] y) {{ [c] y = Conv <group={group}> (x, w) }}"
    node = graphs.node(graphs.model(text, {"w": weight}), "c")
    found = fitted(text, {"w": weight}, *({"x": each[None]} for each in smooth), pair_rule=pair_rule)["w"]
    pairs = pair_rule and group < 32  # depthwise kernels do not pair
    plain, scale = pairing.fit(rounding.in_kernel_order(node, weight), pairs)
    codes = rounding.from_kernel_order(node, plain, weight.shape)
    nearest = per_channel(codes, scale, 0)
    assert spread(text, weight, found, smooth) < spread(text, weight, nearest, smooth) / 1.5
    assert rounding.breaks_pair_rule(node, found.codes) == (not pairs)


def spread(text: str, weight: Array, rounded: QuantizedTensor, x: Array) -> float:
    """Variance of the output's error over positions; its mean is the bias's to take."""
    error = graphs.model(text, {"w": decode(rounded) - weight})
    return float(graph.runner(error)({"x": x})["y"].var(axis=(0, 2, 3)).sum())


def test_gemm_and_matmul_are_fitted_along_the_rows_of_b() -> None:
    weight, x = graphs.noise(0, 16, 5), inputs(1, 64, 16)
    gemm = "(float[N,16] x) => (float[N,5] y) { [g] y = Gemm <transB=%d> (x, w) }"
    straight = fitted(gemm % 0, {"w": weight}, {"x": x})["w"]
    turned = fitted(gemm % 1, {"w": np.ascontiguousarray(weight.T)}, {"x": x})["w"]
    assert (straight.channel_axis, turned.channel_axis) == (1, 0)
    np.testing.assert_array_equal(straight.codes, turned.codes.T)
    codes, scale = gptq.fit(weight.T, [second(x)], False)
    matmul = fitted("(float[N,16] x) => (float[N,5] y) { [m] y = MatMul(x, w) }", {"w": weight}, {"x": x})["w"]
    np.testing.assert_array_equal(matmul.codes, codes.T)
    np.testing.assert_array_equal(matmul.scale, scale)


def test_weight_of_two_layers_is_fitted_to_the_inputs_of_both() -> None:
    text = """(float[N,16] x, float[N,16] z) => (float[N,5] y, float[N,5] v) {
        [first] y = MatMul(x, w)
        [second] v = MatMul(z, w)
    }"""
    weight, x, z = graphs.noise(0, 16, 5), inputs(1, 64, 16), inputs(9, 64, 16)
    found = fitted(text, {"w": weight}, {"x": x, "z": z})
    codes, _ = gptq.fit(weight.T, [second(np.concatenate([x, z]))], False)
    assert [*found] == ["w"]
    np.testing.assert_array_equal(found["w"].codes, codes.T)


def test_layers_beyond_what_is_held_at_once_get_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: each.codes.tobytes() for name, each in two_layers().items()}
    monkeypatch.setattr(gptq, "HELD_BYTES", 4 * 200**2)
    assert {name: each.codes.tobytes() for name, each in two_layers().items()} == before
    assert [*before] == ["v", "w"]


def two_layers() -> dict[str, QuantizedTensor]:
    text = """(float[N,200] x) => (float[N,8] y) {
        [first] h = Gemm(x, v)
        [middle] r = Relu(h)
        [second] y = Gemm(r, w)
    }"""
    weights = {"v": graphs.noise(0, 200, 150), "w": graphs.noise(1, 150, 8)}
    return fitted(text, weights, *({"x": inputs(n, 64, 200)} for n in range(3)), pair_rule=True)


def digest() -> str:
    codes = two_layers()
    return hashlib.sha256(b"".join(each.codes.tobytes() + each.scale.tobytes() for each in codes.values())).hexdigest()


def test_codes_are_the_same_again_and_in_another_process() -> None:
    here = digest()
    assert digest() == here
    code = "from tests.exporter.correct import test_gptq; print(test_gptq.digest())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.split() == [here]


def test_float_layers_are_left_alone() -> None:
    text = "(float[N,16] x) => (float[N,5] y) { [m] y = MatMul(x, w) }"
    model = graphs.model(text, {"w": graphs.noise(0, 16, 5)})
    batch = {"x": inputs(1, 8, 16)}
    plan, _ = graphs.planned(model, batch, m="float")
    assert gptq.rounded(model, plan, [batch], pair_rule=False) == {}


def test_interruption_passes_through_and_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphs.model("(float[N,16] x) => (float[N,5] y) { [m] y = MatMul(x, w) }", {"w": graphs.noise(0, 16, 5)})
    batch = {"x": inputs(1, 8, 16)}
    plan, _ = graphs.planned(model, batch)
    before = graph.to_bytes(model)

    def interrupted(*_: object) -> Array:
        raise KeyboardInterrupt

    monkeypatch.setattr(gptq, "columns", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gptq.rounded(model, plan, [batch], pair_rule=False)
    assert graph.to_bytes(model) == before


def moments(*parts: Array) -> gptq.Moments:
    sums = gptq._Sums([parts[0].shape[1]])
    for each in parts:
        sums.add(each[None])
    (found,) = sums.result()
    return found


def test_moments_of_few_inputs_have_a_covariance_without_their_mean() -> None:
    x = np.array([[1, 2], [3, 6]], np.float32)
    np.testing.assert_allclose(moments(x).covariance[0], [[1, 2], [2, 4]])
    np.testing.assert_allclose(moments(x).second, second(x))


def test_covariance_of_inputs_far_from_0_is_that_of_what_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 K +- 0.01: of a difference of squares float32 keeps nothing."""
    x = (300 + 0.01 * graphs.noise(0, 4000, 6)).astype(np.float32)
    expected = np.cov(x.T.astype(np.float64), bias=True)
    found = moments(x[:1500], x[1500:1600], x[1600:]).covariance[0]
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.diag(expected).max())


@pytest.mark.parametrize("pair_rule", [False, True])
def test_layer_with_constant_inputs_has_the_nearest_codes(pair_rule: bool) -> None:
    rows, x = graphs.noise(0, 5, 8), np.full((3000, 8), 7.3, np.float32)
    codes, _ = gptq.fit(rows, [moments(x).covariance], pair_rule)
    np.testing.assert_array_equal(codes, pairing.fit(rows, pair_rule)[0])


def test_damping_rises_until_a_matrix_factors_that_is_not_definite() -> None:
    h = np.array([[[1, 2, 0], [2, 1, 0], [0, 0, 1]]], np.float32)
    factor = plane.factor(h)[0]
    np.testing.assert_allclose(factor.T @ factor, h[0] + 100 * plane.DAMPING * np.eye(3), atol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_group_whose_moments_are_no_numbers_keeps_the_nearest_codes_and_others_do_not(value: float) -> None:
    rows, good = graphs.noise(0, 12, 64), second(inputs(1, 400, 64))
    codes, _ = gptq.fit(rows, [np.concatenate([good, np.full_like(good, value)])], False)
    np.testing.assert_array_equal(codes[6:], pairing.fit(rows[6:], False)[0])
    np.testing.assert_array_equal(codes[:6], gptq.fit(rows[:6], [good], False)[0])


@pytest.mark.parametrize("columns", [40, 4096, 32768, 200_000])
@pytest.mark.parametrize("groups", [1, 2, 64])
def test_what_is_held_of_a_layer_is_within_the_budget_and_no_pair_is_cut(columns: int, groups: int) -> None:
    ends = gptq.blocks(columns, groups)
    sizes = np.diff((0, *ends))
    assert 4 * groups * (sizes**2).sum() <= gptq.HELD_BYTES and 8 * (sizes**2).max(initial=0) <= gptq.WORK_BYTES
    assert not (sizes[:-1] % 2).any() and sizes.sum() in (0, columns) and (not ends or sizes[0] >= gptq.LEAST_COLUMNS)
    assert bool(ends) == (groups * columns <= 64 * 32768)


def test_layer_in_blocks_keeps_the_pair_rule_and_comes_closer_to_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, x = graphs.noise(0, 12, 70), inputs(1, 400, 70)
    monkeypatch.setattr(gptq, "HELD_BYTES", 4 * 70 * 40)
    ends = gptq.blocks(70, 1)
    assert ends == (36, 70)
    sums = gptq._Sums(ends)
    sums.add(x[None].copy())
    blocks = [each.second for each in sums.result()]
    np.testing.assert_allclose(blocks[1][0], second(x)[0, 36:, 36:], atol=1e-3)
    codes, scale = gptq.fit(rows, blocks, True)
    nearest, _ = pairing.fit(rows, True)
    np.testing.assert_array_equal(pairing.keep(codes.astype(np.int32)), codes)
    h = second(x)[0]
    assert errors(rows, codes, scale, h).sum() < errors(rows, nearest, scale, h).sum() / 1.5


def test_columns_of_a_wide_kernel_come_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = graphs.noise(0, 6, 3, 3, 2), graphs.noise(1, 2, 6, 9, 8)
    node = graphs.node(graphs.model(CONV.format(cin=6, group=2, how="dilations=[2,1]"), {"w": weight}), "c")
    (whole,) = gptq.columns(node, x, weight.shape, 50, 0)
    monkeypatch.setattr(gptq, "SLICE_BYTES", 4 * 36 * 7)
    slices = list(gptq.columns(node, x, weight.shape, 50, 0))
    assert {each.shape[1] for each in slices[:-1]} == {7}
    np.testing.assert_array_equal(np.concatenate(slices, axis=1), whole)


@pytest.mark.parametrize(
    ("text", "weight", "shape"),
    [
        ("(float[N,16] x) => (float[N,5] y) { [m] y = MatMul(x, w) }", (16, 5), (16,)),
        ("(float[N,4,6,6] x) => (float[N,5,4,4] y) { [m] y = Conv(x, w) }", (5, 4, 3, 3), (4, 6, 6)),
    ],
)
def test_empty_batch_among_others_changes_no_code(text: str, weight: tuple[int, ...], shape: tuple[int, ...]) -> None:
    model = graphs.model(text, {"w": graphs.noise(0, *weight)})
    good = [{"x": graphs.noise(seed, 30, *shape)} for seed in (1, 2)]
    plan, _ = graphs.planned(model, *good)
    nothing = {"x": np.zeros((0, *shape), np.float32)}
    found, expected = (
        gptq.rounded(model, plan, batches, pair_rule=True)["w"].codes for batches in ([*good, nothing], good)
    )
    np.testing.assert_array_equal(found, expected)
    assert gptq.rounded(model, plan, [nothing], pair_rule=True) == {}
