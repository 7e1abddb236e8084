"""exporter.dynamic: layers that take the range of each input as they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic

from exporter import dynamic, graph, lint, place, quantize, rulebook
from exporter.calibrate import Ranges, observe
from exporter.correct import bias
from exporter.errors import RecipeError
from exporter.numerics.formats import FLOAT, W8A8_DYNAMIC
from exporter.numerics.quantized import nearest, per_channel
from exporter.place import Plan
from exporter.recipe import Rule
from exporter.target import PORTABLE, X86_VNNI
from runtime.drift import measure
from runtime.explain import ADDED
from runtime.kernels import Kernels, trace
from tests import models
from tests.exporter import graphs, stages

Array = NDArray[Any]

TWO = """(float[N,16] x) => (float[N,8] y, float[N,8] z) {
    [first] a = MatMul(x, w1)
    [second] b = Gemm<transB = 1>(x, w2, c2)
    [third] y = MatMul(a, w3)
    [fourth] z = MatMul(b, w3)
}"""
WEIGHTS = {
    "w1": graphs.noise(1, 16, 12), "w2": graphs.noise(2, 12, 16), "c2": graphs.noise(3, 12), "w3": graphs.noise(4, 12, 8),
}  # fmt: skip
NAMES = ("first", "second", "third", "fourth")


def planned(model: ir.Model, batch: Mapping[str, Array], names: tuple[str, ...] = NAMES) -> Plan:
    products = [node.name or "" for node in model.graph if all(graph.constant(each) is None for each in node.inputs)]
    return place.decide(
        model,
        X86_VNNI,
        (),
        graph.shapes(model, batch),
        dict.fromkeys(names, W8A8_DYNAMIC) | dict.fromkeys(products, FLOAT),
    )


def ran(model: ir.Model, batch: Mapping[str, Array], folder: Path) -> Kernels:
    path = folder / "model.onnx"
    path.write_bytes(graph.to_bytes(model))
    return trace(path, batch, entries=X86_VNNI.session, runs=1)


def test_dynamic_layer_reads_and_writes_real_numbers_and_needs_no_range() -> None:
    model, batch = graphs.model(TWO, WEIGHTS), {"x": graphs.noise(0, 4, 16)}
    plan = planned(model, batch, ("first", "second"))
    assert graphs.precisions(plan) == {"first": "dynamic", "second": "dynamic", "third": "int8", "fourth": "int8"}
    assert set(plan.tensors) == {"a", "b", "y", "z"}
    assert (plan.int8, plan.dynamic, plan.float_layers) == (("third", "fourth"), ("first", "second"), ())


@pytest.mark.parametrize("bias", [True, False])
def test_nearest_codes_give_the_bits_of_onnxruntimes_own_dynamic_quantizer(bias: bool, tmp_path: Path) -> None:
    text = "(float[N,64] x) => (float[N,32] y) { [one] a = MatMul(x, w) [two] y = Add(a, b) }"
    weights = {"w": graphs.noise(1, 64, 32), "b": graphs.noise(2, 32) * np.float32(bias)}
    proto, batch = graphs.proto(text, weights), {"x": graphs.noise(3, 50, 64)}
    model = ir.serde.deserialize_model(proto)
    ours = model.clone()
    dynamic.lay(ours, model, ["one"], {})
    onnx.save(proto, tmp_path / "float.onnx")
    quantize_dynamic(
        tmp_path / "float.onnx",
        tmp_path / "theirs.onnx",
        per_channel=True,
        reduce_range=False,
        weight_type=QuantType.QInt8,
    )
    theirs = ir.load(tmp_path / "theirs.onnx")
    assert graph.runner(ours)(batch)["y"].tobytes() == graph.runner(theirs)(batch)["y"].tobytes()
    assert not np.array_equal(graph.runner(ours)(batch)["y"], graph.runner(model)(batch)["y"])


def test_output_is_code_times_scale_of_this_input_alone() -> None:
    """x = (code - zero_point) · s with s = (max - min) / 255 over the input and 0, as ONNX defines it."""
    text = "(float[N,6] x) => (float[N,3] y) { [one] y = Gemm<transB = 1>(x, w, c) }"
    weights = {"w": graphs.noise(1, 3, 6), "c": graphs.noise(2, 1, 3)}
    model = graphs.model(text, weights)
    for factor in (1.0, 1000.0):
        x = graphs.noise(3, 5, 6) * np.float32(factor)
        laid = model.clone()
        dynamic.lay(laid, model, ["one"], {})
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        scale = np.float32((high - low) / 255)
        zero = np.rint(np.float32(-low) / scale)
        codes = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
        w = nearest(weights["w"], 0)
        expected = (codes @ w.codes.T.astype(np.float64)) * scale * w.scale + weights["c"]
        assert graph.runner(laid)({"x": x})["y"] == pytest.approx(expected, rel=1e-4, abs=1e-4 * factor)


def test_given_codes_come_out_as_they_are_whichever_way_the_weight_lies() -> None:
    model = graphs.model(TWO, WEIGHTS)
    given = {
        name: replace(
            nearest(WEIGHTS[name], axis), scale=np.linspace(0.5, 1, WEIGHTS[name].shape[axis], dtype=np.float32)
        )
        for name, axis in (("w1", 1), ("w2", 0), ("w3", 1))
    }
    laid = model.clone()
    dynamic.lay(laid, model, NAMES, given)
    found = quantize.weights(laid)
    assert found.keys() == given.keys()
    for name, weight in given.items():
        assert np.array_equal(found[name].codes, weight.codes)
        assert np.array_equal(found[name].scale, weight.scale)
        assert found[name].channel_axis == weight.channel_axis
    stored = [str(value.name) for value in laid.graph.initializers.values() if value.dtype == ir.DataType.INT8]
    assert sorted(stored) == ["w1_dynamic", "w2_dynamic_turned", "w3_dynamic"]  # w3 once, though two layers read it


def test_layers_that_read_one_tensor_share_its_codes() -> None:
    model = graphs.model(TWO, WEIGHTS)
    laid = model.clone()
    dynamic.lay(laid, model, NAMES, {})
    assert graphs.op_types(laid).count("DynamicQuantizeLinear") == 3  # of x, a and b
    assert graphs.op_types(laid).count("MatMulInteger") == 4
    onnx.checker.check_model(ir.serde.serialize_model(laid))


def test_codes_are_those_of_the_static_graph() -> None:
    """Rounding by hand and ONNX Runtime's are one, so a layer that a rule makes dynamic has the codes that it had."""
    model, batches = stages.prepared("transformer").model, list(models.batches("transformer", 0, 2))
    static = stages.plan("transformer")
    ranges = observe(model, static.tensors, batches).ranges
    names = tuple(d.node for d in static.decisions if d.op_type == "Gemm" and d.precision == "int8")
    plan = planned(model, batches[0], names)
    before, after = (quantize.weights(quantize.to_int8(model, each, ranges)) for each in (static, plan))
    assert len(names) == 4
    for name, weight in after.items():
        assert np.array_equal(weight.codes, before[name].codes)
        assert np.array_equal(weight.scale, before[name].scale)


def test_kernels_are_integer_and_are_the_plans_layers(tmp_path: Path) -> None:
    model, batch = stages.prepared("transformer").model, next(models.batches("transformer", 0, 1))
    names = tuple(d.node for d in stages.plan("transformer").decisions if d.op_type == "Gemm" and d.precision == "int8")
    plan = planned(model, batch, names)
    found = ran(quantize.to_int8(model, plan, Ranges(tensors={}, batches=1, method="none")), batch, tmp_path)
    layers = {ADDED.sub("", kernel.node): kernel for kernel in found.kernels if kernel.integer}
    assert set(layers) == set(names)
    assert {kernel.kernel for kernel in layers.values()} == {"DynamicQuantizeMatMul"}
    assert {name: kernel.macs for name, kernel in layers.items()} == {
        d.node: d.macs for d in plan.decisions if d.node in names
    }
    assert {ADDED.sub("", kernel.node) for kernel in found.kernels} <= {d.node for d in plan.decisions}


def test_kernels_behind_shared_codes_are_integer_too(tmp_path: Path) -> None:
    model = graphs.model(TWO, WEIGHTS)
    laid = model.clone()
    dynamic.lay(laid, model, ("first", "second"), {})
    found = ran(laid, {"x": graphs.noise(0, 4, 16)}, tmp_path)
    integer = {ADDED.sub("", kernel.node): (kernel.kernel, kernel.macs) for kernel in found.kernels if kernel.integer}
    assert integer == {"first": ("MatMulIntegerToFloat", 768), "second": ("MatMulIntegerToFloat", 768)}
    assert {ADDED.sub("", kernel.node) for kernel in found.kernels} == set(NAMES)


def test_input_that_reaches_ten_times_as_far_costs_the_others_nothing() -> None:
    text = "(float[N,32] x) => (float[N,8] y) { [one] y = MatMul(x, w) }"
    model = graphs.model(text, {"w": graphs.noise(1, 32, 8)})
    batches = [{"x": graphs.noise(seed, 4, 32) * np.float32(30 if seed == 0 else 1)} for seed in range(8)]
    static, ranges = graphs.planned(model, *batches)
    expected = list(map(graph.runner(model), batches[1:]))

    def snr_db(plan: Plan) -> float:
        run = graph.runner(quantize.to_int8(model, plan, ranges))
        return measure(zip(expected, map(run, batches[1:]), strict=True)).worst_snr_db

    assert snr_db(static) < 25
    assert snr_db(planned(model, batches[0], ("one",))) > 38


def test_bias_takes_out_the_mean_of_a_dynamic_layers_rounding() -> None:
    text = "(float[N,64] x) => (float[N,16] y) { [one] y = Gemm(x, w, c) }"
    model = graphs.model(text, {"w": graphs.noise(1, 64, 16), "c": graphs.noise(2, 16)})
    batch = {"x": graphs.noise(3, 200, 64) + 3}
    plan = planned(model, batch, ("one",))
    ranges, means = Ranges(tensors={}, batches=1, method="none"), {("x", -1): batch["x"].mean(0).astype(np.float64)}
    assert bias.channels(model, plan) == (("x", -1),)
    plain = quantize.to_int8(model, plan, ranges)
    better = quantize.to_int8(bias.correct(model, plan, means, quantize.weights(plain)), plan, ranges)
    expected = graph.runner(model)(batch)["y"]
    errors = [np.abs((graph.runner(each)(batch)["y"] - expected).mean(0)).max() for each in (plain, better)]
    assert errors[1] < errors[0] / 5


def test_rule_makes_a_layer_dynamic_and_its_reason_is_in_the_plan() -> None:
    model, batch = graphs.model(TWO, WEIGHTS), {"x": graphs.noise(0, 4, 16)}
    rules = [Rule(match="Gemm", precision="dynamic", why="speech has outliers")]
    plan = place.decide(model, X86_VNNI, rules, graph.shapes(model, batch))
    assert plan.dynamic == ("second",)
    assert "second | Gemm | dynamic | rule 'Gemm': speech has outliers" in plan.to_text()
    assert rulebook.given(model, rules, W8A8_DYNAMIC) == {"second"}


@pytest.mark.parametrize(
    ("text", "weight", "says"),
    [
        ("(float[4,4] x) => (float[4,4] y) { [n] y = MatMul(x, x) }", (), "product of two activations"),
        ("(float[4,4] x) => (float[2,4,4] y) { [n] y = MatMul(x, w) }", (2, 4, 4), "its weight has rank 3"),
        ("(float[4,4] x) => (float[4,4] y) { [n] y = Gemm<alpha = 2.0>(x, w) }", (4, 4), "alpha = beta = 1"),
        ("(float[4,4] x) => (float[4,4] y) { [n] y = Tanh(x) }", (), "dynamic int8 is for Gemm, MatMul, LSTM only"),
        ("(float[1,4,8] x) => (float[1,2,6] y) { [n] y = Conv(x, w) }", (2, 4, 3), "for Gemm, MatMul, LSTM only"),
    ],
)
def test_rule_for_a_node_that_cannot_be_dynamic_is_refused(text: str, weight: tuple[int, ...], says: str) -> None:
    model = graphs.model(text, {"w": graphs.noise(1, *weight)} if weight else {})
    batch = {"x": graphs.noise(0, *((1, 4, 8) if "Conv" in text else (4, 4)))}
    rules = [Rule(match="n", precision="dynamic", why="test")]
    with pytest.raises(RecipeError, match=f"rule 'n' asks for dynamic: .*{says}"):
        place.decide(model, X86_VNNI, rules, graph.shapes(model, batch))


def test_plan_of_dynamic_layers_alone_has_no_static_node() -> None:
    model, batch = graphs.model(TWO, WEIGHTS), {"x": graphs.noise(0, 4, 16)}
    nothing = Ranges(tensors={}, batches=1, method="none")
    plan = planned(model, batch)
    assert (plan.int8, plan.tensors) == ((), ())
    assert "QuantizeLinear" not in graphs.op_types(quantize.to_int8(model, plan, nothing))


def test_weight_that_a_dynamic_and_a_static_layer_share_has_one_set_of_codes() -> None:
    model, batch = graphs.model(TWO, WEIGHTS), {"x": graphs.noise(0, 4, 16)}
    plan = planned(model, batch, ("third",))
    ranges = observe(model, plan.tensors, [batch]).ranges
    given = {"w3": per_channel(np.full((12, 8), 3, np.int8), np.full(8, 0.5, np.float32), 1)}
    int8 = quantize.to_int8(model, plan, ranges, given)
    codes = [array for value in int8.graph.initializers.values() if (array := graph.constant(value)) is not None]
    assert sum(array.dtype == np.int8 and array.shape == (12, 8) and bool((array == 3).all()) for array in codes) == 2


def test_dynamic_layer_is_held_against_the_pair_rule() -> None:
    model = graphs.model(TWO, WEIGHTS)
    laid = model.clone()
    wide = per_channel(np.full((16, 12), 100, np.int8), np.ones(12, np.float32), 1)
    dynamic.lay(laid, model, ("first",), {"w1": wide})
    (found,) = lint.check(laid, PORTABLE)
    assert (found.rule, found.node, found.severity) == ("pair-rule", "first", "error")
    assert lint.check(laid, X86_VNNI) == ()
