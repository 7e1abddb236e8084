from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from exporter import correct, graph, quantize
from exporter.calibrate import intervals, observe
from exporter.correct import bias, choose, smooth
from exporter.correct.choose import apart
from exporter.target import PORTABLE, X86_VNNI, Target
from tests.exporter import graphs

Batches = list[dict[str, np.ndarray]]
OUTLIERS = (3, 17)


def outlying() -> ir.Model:
    """LayerNormalization with two channels 60 times as large as the others, which a layer reads with small weights."""
    gain, weight = np.abs(graphs.noise(1, 64)) + 0.5, graphs.noise(2, 64, 32)
    gain[[*OUTLIERS]] *= 60
    weight[[*OUTLIERS]] /= 60
    text = "(float[N,64] x) => (float[N,32] y) { [n] n = LayerNormalization <axis=-1> (x, gain, shift) [g] y = Gemm (n, w, b) }"
    return graphs.model(text, {"gain": gain, "shift": graphs.noise(3, 64) / 10, "w": weight, "b": graphs.noise(4, 32)})


def batches(count: int, channels: int = 64) -> Batches:
    return [{"x": graphs.noise(n, 32, channels)} for n in range(count)]


def improve(model: ir.Model, given: Batches, target: Target = X86_VNNI) -> correct.Corrected:
    plan, ranges = graphs.planned(model, *given, target=target)
    means = observe(model, plan.tensors, iter(given), bias.channels(model, plan)).means
    return correct.improve(model, plan, ranges, means, target, given)


def snr(found: np.ndarray, expected: np.ndarray) -> float:
    return float(10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum()))


def gain(corrected: correct.Corrected) -> float:
    tried = corrected.corrections[0]
    assert tried.name == "smooth"
    return tried.after_db - tried.before_db


@pytest.mark.parametrize("target", [X86_VNNI, PORTABLE])
def test_outliers_of_channels_move_into_the_weights_and_outputs_come_closer(target: Target) -> None:
    found = improve(outlying(), batches(9), target)
    assert gain(found) > 3 and found.corrections[0].kept and found.moved is not None
    assert found.pair_rule or target is not PORTABLE
    run, reference = graph.runner(found.int8), graph.runner(outlying())
    other = {"x": graphs.noise(99, 64, 64)}
    assert snr(run(other)["y"], reference(other)["y"]) > found.corrections[0].after_db - 1


def test_scales_from_few_values_must_win_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = outlying(), batches(9)
    plan, _ = graphs.planned(model, *given, target=X86_VNNI)
    assert smooth.fewest_values(model, plan, given) == 9 * 32
    wins = gain(improve(model, given))
    for few, worth, kept in ((9 * 32, wins + 1, True), (9 * 32 + 1, wins + 1, False), (9 * 32 + 1, wins - 1, True)):
        monkeypatch.setattr(choose, "FEW_VALUES", few)
        monkeypatch.setattr(choose, "FEW_WORTH_DB", worth)
        assert improve(model, given).corrections[0].kept is kept


def test_int8_graph_has_the_nodes_that_it_had() -> None:
    model, given = outlying(), batches(9)
    plan, ranges = graphs.planned(model, *given)
    assert graphs.op_types(improve(model, given).int8) == graphs.op_types(quantize.to_int8(model, plan, ranges))


def test_scales_are_the_formula_by_hand() -> None:
    largest, weight = np.array([4.0, 9.0, 5.0, 0.0]), np.array([1.0, 4.0, 0.0, 1.0])
    np.testing.assert_allclose(smooth.scale(largest, weight), [2.0, 1.5, 5.0, np.nan])
    np.testing.assert_allclose(smooth.scale(largest, weight, 1.0), [4.0, 9.0, 5.0, np.nan])


def found_in(model: ir.Model, given: Batches) -> tuple[smooth.Moved, np.ndarray, float, float]:
    """The scales of n, and its range before and after."""
    plan, ranges = graphs.planned(model, *given)
    made = smooth.find(model, plan, ranges, intervals(model), *apart(given))
    assert made is not None
    moved, after = made
    before, now = ranges.tensors["n"], after.tensors["n"]
    return moved, moved.scales[moved.slots.of["n"].reshape(-1)], before.high - before.low, now.high - now.low


def test_outliers_have_the_largest_scales_and_the_tensor_stays_as_large_as_it_was() -> None:
    given = batches(9)
    moved, scales, before, after = found_in(outlying(), given)
    assert {*np.argsort(scales)[-2:].tolist()} == {*OUTLIERS}
    made = graph.runner(graph.with_outputs(moved.graph(outlying()), ["n"]))
    whole = np.concatenate([made(batch)["n"] for batch in given])
    assert whole.max() - whole.min() == pytest.approx(after, rel=1e-5)
    assert np.abs(whole).max() == pytest.approx(before / 2, rel=0.3)


def test_range_that_a_method_cut_is_cut_as_far_in_the_scaled_graph() -> None:
    model, given = outlying(), batches(9)
    plan, ranges = graphs.planned(model, *given)
    half = {name: replace(each, low=each.low / 2, high=each.high / 2) for name, each in ranges.tensors.items()}
    cut = replace(ranges, tensors=half)
    (_, wide), (_, narrow) = (smooth.find(model, plan, each, {}, *apart(given)) for each in (ranges, cut))  # type: ignore[misc]
    assert narrow.tensors["n"].high == pytest.approx(wide.tensors["n"].high / 2)
    assert narrow.tensors["n"].low == pytest.approx(wide.tensors["n"].low / 2)


def test_channel_that_holds_nothing_has_the_scale_of_an_ordinary_one() -> None:
    model = outlying()
    for name in ("gain", "shift"):
        array = graph.constant(model.graph.initializers[name]).copy()  # type: ignore[union-attr]
        array[5] = 0
        model.graph.initializers[name].const_value = ir.tensor(array)
    _, scales, *_ = found_in(model, batches(6))
    assert np.isfinite(scales).all() and scales.min() > 0
    assert np.quantile(scales, 0.3) < scales[5] < np.quantile(scales, 0.7)


def test_means_are_those_of_the_scaled_tensors() -> None:
    model, given = outlying(), batches(6)
    moved, *_ = found_in(model, given)
    plan, _ = graphs.planned(model, *given)
    keys = bias.channels(model, plan)
    before, after = (observe(each, plan.tensors, iter(given), keys).means for each in (model, moved.graph(model)))
    np.testing.assert_allclose(moved.means(before)["n", -1], after["n", -1], rtol=1e-4, atol=1e-6)


def test_depthwise_weights_leave_all_to_the_values() -> None:
    """Its channels come out equally large: its weights bear any scale."""
    text = """(float[N,4,8,8] x) => (float[N,4,6,6] y) { [c] c = Conv (x, v) n = Relu (c) [d] y = Conv <group=4> (n, w) }"""
    v = graphs.noise(1, 4, 4, 1, 1) * np.array([1, 5, 25, 50], np.float32).reshape(4, 1, 1, 1)
    model = graphs.model(text, {"v": v, "w": graphs.noise(2, 4, 1, 3, 3)})
    given = [{"x": graphs.noise(n, 4, 4, 8, 8)} for n in range(6)]
    moved, *_ = found_in(model, given)
    run = graph.runner(graph.with_outputs(moved.graph(model), ["n"]))
    largest = np.max([run(batch)["n"].max(axis=(0, 2, 3)) for batch in apart(given)[0]], axis=0)
    np.testing.assert_allclose(largest, largest.max(), rtol=1e-4)


def test_nothing_is_tried_where_nothing_can_move_or_where_there_is_one_batch() -> None:
    alone = graphs.model("(float[N,64] x) => (float[N,4] y) { [g] y = Gemm (x, w) }", {"w": graphs.noise(1, 64, 4)})
    assert [each.name for each in improve(alone, batches(4)).corrections] == ["bias", "scale", "gptq"]
    found = improve(outlying(), batches(1))
    assert found.moved is None and found.corrections[0].name == "bias"


def test_scales_that_do_not_help_stay_and_ranges_and_means_with_them() -> None:
    """All channels alike, and weights that are codes as they are."""
    text = "(float[N,64] x) => (float[N,32] y) { [n] n = LayerNormalization <axis=-1> (x, gain) [g] y = Gemm (n, w) }"
    codes = np.random.default_rng(2).integers(-127, 128, (64, 32)).astype(np.float32)
    codes[0] = 127
    model = graphs.model(text, {"gain": np.ones(64, np.float32), "w": codes})
    given = batches(9)
    found = improve(model, given)
    _, ranges = graphs.planned(model, *given)
    assert not found.corrections[0].kept and found.moved is None
    assert found.ranges == ranges


def test_plan_with_fewer_int8_nodes_has_the_scales_too() -> None:
    text = """(float[N,64] x) => (float[N,8] y) {
        [n] n = LayerNormalization <axis=-1> (x, gain, shift) [g] h = Gemm (n, w, b) r = Relu (h) [l] y = Gemm (r, v) }"""
    weights = {name: graph.constant(value) for name, value in outlying().graph.initializers.items()}
    model, given = graphs.model(text, {**weights, "v": graphs.noise(8, 32, 8)}), batches(9)
    found = improve(model, given)
    assert found.moved is not None
    plan, _ = graphs.planned(model, *given, g="float")
    int8 = correct.under(model, plan, found.ranges, found.means, found)
    y, expected = (graph.runner(each)(given[0])["y"] for each in (int8, model))
    assert snr(y, expected) > 35
