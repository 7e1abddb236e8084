from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter import graph, place, quantize
from exporter.calibrate import Range, observe
from exporter.errors import QuantizeError
from exporter.numerics.formats import W8A8
from exporter.numerics.quantized import decode, per_channel
from exporter.place import FLOAT_OUTPUT, REMOVABLE, Decision, Plan
from exporter.prepare import constants, edit, unshare
from exporter.recipe import Rule
from exporter.target import X86_VNNI, Target
from runtime import drift
from runtime.kernels import trace
from runtime.session import open_session
from tests import models
from tests.exporter import graphs, stages

Batch = dict[str, np.ndarray]


def to_int8(model: ir.Model, *batches: Batch, target: Target = X86_VNNI, **rules: str) -> tuple[ir.Model, Plan]:
    plan, ranges = graphs.planned(model, *batches, target=target, **rules)
    return quantize.to_int8(model, plan, ranges), plan


def network(name: str) -> tuple[ir.Model, Plan]:
    model, plan = stages.prepared(name).model, stages.plan(name)
    ranges = observe(model, plan.tensors, models.batches(name, 1, 4)).ranges
    return quantize.to_int8(model, plan, ranges), plan


def snr_db(reference: ir.Model, candidate: ir.Model, *batches: Batch) -> float:
    """Of the int8 graph as it is written: between its Q/DQ all is float, so that no kernel of this CPU can saturate."""
    session = open_session(graph.to_bytes(candidate), entries={"session.disable_quant_qdq": "1"})
    names = [output.name for output in session.get_outputs()]
    pairs = [
        (graph.runner(reference)(batch), dict(zip(names, session.run(names, dict(batch)), strict=True)))
        for batch in batches
    ]
    return drift.measure(pairs).worst_snr_db


def rule(match: str, precision: str) -> Rule:
    return Rule(match=match, precision=precision, why="test")  # type: ignore[arg-type]


def producer(value: ir.Value | None) -> str:
    made = value.producer() if value is not None else None
    return made.op_type if made is not None else ""


def codes(int8: ir.Model, dtype: type) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{initializer: (codes, scale)} of one code type."""
    found = {}
    for node in int8.graph:
        array = graph.constant(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        if array is not None and array.dtype == dtype:
            found[edit.quantized_name(node)] = (array, graph.constant(node.inputs[1]))
    return found


@pytest.mark.parametrize("name", ["residual", "transformer", "upsampler", "lstm"])
def test_int8_graph_follows_the_plan_node_by_node(name: str) -> None:
    int8, plan = network(name)
    found = {node.name: node for node in int8.graph}
    for decision, before in zip(plan.decisions, stages.prepared(name).model.graph, strict=True):
        if decision.op_type in REMOVABLE and decision.precision == "int8":
            continue
        node = found[decision.node]
        real = [value is not None and value.dtype == ir.DataType.FLOAT for value in before.inputs]
        reads = [producer(value) for value, is_real in zip(node.inputs, real, strict=True) if is_real]
        if decision.precision == "int8":
            assert set(reads) == {"DequantizeLinear"}, decision.node
            readers = {usage.node.op_type for value in node.outputs for usage in value.uses()}
            assert decision.op_type in FLOAT_OUTPUT or readers == {"QuantizeLinear"}, decision.node
        else:
            # a float node reads a rounded tensor only where an int8 kernel made it, which writes codes alone
            for value in node.inputs:
                if producer(value) == "DequantizeLinear":
                    maker = value.producer().inputs[0].producer().inputs[0].producer()
                    assert maker.name in plan.int8 and maker.op_type not in FLOAT_OUTPUT


@pytest.mark.parametrize(("name", "least"), [("residual", 25), ("transformer", 25), ("upsampler", 25), ("lstm", 25)])
def test_int8_network_stays_close_to_fp32_on_new_data(name: str, least: float) -> None:
    found = snr_db(stages.prepared(name).model, network(name)[0], *models.batches(name, 6, 3))
    assert least < found < 70  # and it is not FP32 by another name


def test_fp32_graph_is_not_changed() -> None:
    model = stages.prepared("residual").model
    before = graph.to_bytes(model)
    network("residual")
    assert graph.to_bytes(model) == before


def test_quantizing_twice_gives_the_same_bytes() -> None:
    assert graph.to_bytes(network("residual")[0]) == graph.to_bytes(network("residual")[0])


def test_float_readers_read_the_real_tensor_and_int8_readers_the_rounded_one() -> None:
    model = graphs.model(
        """(float[N,6,16] x) => (float[N,6,16] y, float[N,6,16] z) {
            [first] y = MatMul(x, w)
            [tanh] z = Tanh(x)
        }""",
        {"w": graphs.noise(1, 16, 16)},
    )
    int8, _ = to_int8(model, {"x": graphs.noise(0, 2, 6, 16)})
    assert graphs.node(int8, "tanh").inputs[0].name == "x"
    assert producer(graphs.node(int8, "first").inputs[0]) == "DequantizeLinear"
    # the integer MatMul writes float: its output is not rounded again
    assert [producer(value) for value in int8.graph.outputs] == ["MatMul", "Tanh"]
    assert [value.name for value in int8.graph.outputs] == ["y", "z"]


def test_output_of_a_conv_is_rounded_and_read_rounded() -> None:
    model = graphs.model(
        "(float[N,3,6,6] x) => (float[N,4,4,4] y, float[N,4,4,4] z) { [c] y = Conv(x, w)\n [t] z = Tanh(y) }",
        {"w": graphs.noise(1, 4, 3, 3, 3)},
    )
    int8, _ = to_int8(model, {"x": graphs.noise(0, 2, 3, 6, 6)})
    assert [value.name for value in int8.graph.outputs] == ["y", "z"]
    assert producer(int8.graph.outputs[0]) == producer(graphs.node(int8, "t").inputs[0]) == "DequantizeLinear"


def test_weights_are_int8_per_output_channel_symmetric_and_never_minus_128() -> None:
    w = graphs.noise(1, 8, 3, 3, 3) * np.logspace(-3, 3, 8, dtype=np.float32).reshape(8, 1, 1, 1)
    w[:, 0, 0, 0] = -np.abs(w).max(axis=(1, 2, 3))  # the extreme is negative: the grid's -128 tempts
    model = graphs.model("(float[N,3,6,6] x) => (float[N,8,4,4] y) { [c] y = Conv(x, w) }", {"w": w})
    int8, _ = to_int8(model, {"x": graphs.noise(0, 2, 3, 6, 6)})
    code, scale = codes(int8, np.int8)["w"]
    assert scale.shape == (8,)
    np.testing.assert_allclose(scale, np.abs(w).max(axis=(1, 2, 3)) / 127, rtol=1e-6)
    assert code.min() == -127
    assert (code[:, 0, 0, 0] == -127).all()
    assert (np.abs(code * scale.reshape(8, 1, 1, 1) - w) < scale.reshape(8, 1, 1, 1) * 0.501).all()
    node = next(n for n in int8.graph if graph.constant(n.inputs[0]) is not None and n.outputs[0].name.startswith("w_"))
    zero_point = graph.constant(node.inputs[2])
    assert zero_point is None or not zero_point.any()


def test_gemm_and_matmul_weights_are_per_column_too() -> None:
    for body, shape, axis in (
        ("Gemm(x, w)", (6, 5), 0),
        ("Gemm<transB=1>(x, w)", (5, 6), 1),
        ("MatMul(x, w)", (6, 5), 0),
    ):
        w = graphs.noise(1, *shape)
        model = graphs.model(f"(float[N,6] x) => (float[N,5] y) {{ [m] y = {body} }}", {"w": w})
        _, scale = codes(to_int8(model, {"x": graphs.noise(0, 3, 6)})[0], np.int8)["w"]
        np.testing.assert_allclose(scale, np.abs(w).max(axis=axis) / 127, rtol=1e-6)


def test_given_codes_come_out_as_they_are() -> None:
    model = graphs.model(
        "(float[N,3,6,6] x) => (float[N,8,4,4] y) { [c] y = Conv(x, w) }", {"w": graphs.noise(1, 8, 3, 3, 3)}
    )
    given = np.random.default_rng(0).integers(-127, 128, (8, 3, 3, 3)).astype(np.int8)
    rounded = per_channel(given, np.linspace(0.001, 0.02, 8).astype(np.float32), 0)
    plan, ranges = graphs.planned(model, {"x": graphs.noise(0, 2, 3, 6, 6)})
    found = quantize.weights(quantize.to_int8(model, plan, ranges, {"w": rounded}))["w"]
    np.testing.assert_array_equal(found.codes, given)
    np.testing.assert_array_equal(found.scale, rounded.scale)
    assert found.channel_axis == 0


def test_weights_are_read_back_as_the_graph_has_them() -> None:
    model = graphs.model(
        "(float[N,6] x) => (float[N,5] y) { [a] h = Gemm<transB=1>(x, v)\n [b] y = MatMul(h, w) }",
        {"v": graphs.noise(1, 6, 6), "w": graphs.noise(2, 6, 5)},
    )
    found = quantize.weights(to_int8(model, {"x": graphs.noise(0, 3, 6)})[0])
    assert {name: rounded.codes.shape for name, rounded in found.items()} == {"v": (6, 6), "w": (6, 5)}
    for name, seed in (("v", 1), ("w", 2)):
        real = graphs.noise(seed, *found[name].codes.shape)
        error = np.abs(decode(found[name]) - real)
        assert 0 < error.max() <= np.abs(real).max() / 127 / 2 * 1.001


def shared_bias() -> ir.Model:
    """Ten Conv whose equal biases are one initializer, through Identity: FACTS 4.5."""
    body = "\n".join(f"[i{n}] b{n} = Identity(b)\n [c{n}] x{n + 1} = Conv(x{n}, w{n}, b{n})" for n in range(10))
    weights = {f"w{n}": graphs.noise(n, 4, 4, 1, 1) / 2 for n in range(10)} | {"b": np.zeros(4, np.float32)}
    return graphs.model(f"(float[N,4,5,5] x0) => (float[N,4,5,5] x10) {{ {body} }}", weights)


def test_biases_shared_through_identity_leave_no_conv_float() -> None:
    model = shared_bias()
    constants.rewrite(model)
    unshare.rewrite(model)
    assert len({node.inputs[2].name for node in model.graph}) == len(model.graph) == 10
    int8, plan = to_int8(model, {"x0": graphs.noise(0, 2, 4, 5, 5)})
    assert len(plan.int8) == 10
    assert len(codes(int8, np.int32)) == 10


def test_onnxruntimes_quantizer_alone_leaves_them_float_in_this_version() -> None:
    """When this fails, ORT handles shared biases by itself and rule 2 of prepare/constants is one reason poorer."""
    model, batch = shared_bias(), {"x0": graphs.noise(0, 2, 4, 5, 5)}
    decisions = [Decision(node=f"c{n}", op_type="Conv", scheme=W8A8, reason="", macs=1) for n in range(10)]
    plan = Plan(decisions=tuple(decisions), tensors=tuple(f"x{n}" for n in range(11)))
    ranges = observe(model, plan.tensors, iter([batch])).ranges
    assert len(codes(quantize._rewrite(model, plan, ranges, {}), np.int32)) < 10


def test_int32_bias_is_input_scale_times_weight_scale_per_channel() -> None:
    b = np.array([0.5, -3, 100, 0], np.float32)
    model = graphs.model(
        "(float[N,4] x) => (float[N,4] y) { [a] h = Gemm(x, w, b)\n [r] r = Relu(h)\n [e] y = Gemm(r, v) }",
        {"w": graphs.noise(1, 4, 4), "v": graphs.noise(2, 4, 4), "b": b},
    )
    int8, _ = to_int8(model, {"x": graphs.noise(0, 16, 4)})
    code, scale = codes(int8, np.int32)["b"]
    x_scale = graph.constant(graphs.node(int8, "a").inputs[0].producer().inputs[1])
    np.testing.assert_allclose(scale, x_scale * codes(int8, np.int8)["w"][1], rtol=1e-6)
    np.testing.assert_array_less(np.abs(code * scale.astype(np.float64) - b), scale * 0.501 + 1e-9)


def test_bias_that_int32_cannot_hold_names_its_channel_or_is_held_by_a_wider_scale() -> None:
    """A dead channel: its weights are 1e-9 and its bias is 5, which is 5 / (x_scale · 8e-12) codes."""
    w, b = graphs.noise(1, 4, 4), graphs.noise(2, 4)
    w[:, 2], b[2] = 1e-9, 5
    model = graphs.model(
        "(float[N,4] x) => (float[N,4] y) { [a] h = Gemm(x, w, b)\n [r] r = Relu(h)\n [e] y = Gemm(r, v) }",
        {"w": w, "v": graphs.noise(3, 4, 4), "b": b},
    )
    batch = {"x": graphs.noise(0, 16, 4)}
    int8, _ = to_int8(model, batch)
    code, scale = codes(int8, np.int32)["b"]
    assert abs(code[2] * float(scale[2]) - 5) < 0.01
    assert snr_db(model, int8, batch) > 25


def test_bias_check_names_the_channel() -> None:
    scale = np.array([1e-3, 1e-12], np.float32)
    bias = np.array([1.0, 5.0], np.float32)
    held = np.array([1000, 2**31 - 1], np.int32)
    with pytest.raises(
        QuantizeError, match="bias 'b', channel 1: found 5 at scale 1e-12, expected a value that int32 holds"
    ):
        quantize._check_bias("b", held, scale, bias)
    quantize._check_bias("b", np.array([1000, 0], np.int32), scale, np.array([1, 0], np.float32))


def test_layer_of_zeros_and_tensor_that_is_always_zero_have_usable_scales() -> None:
    model = graphs.model(
        "(float[N,4] x) => (float[N,4] y) { [a] h = Gemm(x, w, b)\n [r] r = Relu(h)\n [e] y = Gemm(r, v) }",
        {"w": np.zeros((4, 4), np.float32), "b": np.zeros(4, np.float32), "v": graphs.noise(1, 4, 4)},
    )
    batch = {"x": graphs.noise(0, 16, 4)}
    int8, _ = to_int8(model, batch)
    assert not graph.runner(int8)(batch)["y"].any()


def test_graph_of_a_plan_without_int8_nodes_comes_out_as_it_is() -> None:
    lone = graphs.model("(float[N,4] x) => (float[N,4] y) { [g] y = Gemm(x, w) }", {"w": graphs.noise(1, 4, 4)})
    int8, _ = to_int8(lone, {"x": graphs.noise(0, 2, 4)}, Gemm="float")
    assert graph.to_bytes(int8) == graph.to_bytes(lone)


def test_range_that_is_missing_is_refused_in_our_words() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { [g] y = Gemm(x, w) }", {"w": graphs.noise(1, 4, 4)})
    plan, ranges = graphs.planned(model, {"x": graphs.noise(0, 2, 4)})
    without = replace(ranges, tensors={name: found for name, found in ranges.tensors.items() if name != "x"})
    with pytest.raises(QuantizeError, match="ONNX Runtime's quantizer refused the graph"):
        quantize.to_int8(model, plan, without)


def test_range_too_narrow_for_a_scale_gets_a_usable_one_and_a_scale_that_is_none_is_refused() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { [g] y = Gemm(x, w) }", {"w": graphs.noise(1, 4, 4)})
    plan, ranges = graphs.planned(model, {"x": graphs.noise(0, 2, 4)})
    tiny = Range(low=0.0, high=1e-42, elements=8, masked=0)
    int8 = quantize.to_int8(model, plan, replace(ranges, tensors={**ranges.tensors, "x": tiny}))
    scale = graphs.node(int8, "g").inputs[0].producer().inputs[1]
    assert graph.constant(scale) >= np.finfo(np.float32).tiny
    for bad in (0.0, 1e-42, float("inf"), float("nan")):
        scale.const_value = ir.tensor(np.float32(bad))
        with pytest.raises(QuantizeError, match="tensor 'x': found scale .*expected a positive normal float32"):
            quantize._check_numbers(int8, model)


def test_graph_that_strays_from_the_plan_is_refused_by_node() -> None:
    model = graphs.model(
        "(float[N,4] x) => (float[N,4] y) { [g] h = Gemm(x, w)\n [e] y = Gemm(h, w) }", {"w": graphs.noise(1, 4, 4)}
    )
    batch = {"x": graphs.noise(0, 2, 4)}
    half, _ = to_int8(model, batch, e="float")
    whole, _ = graphs.planned(model, batch)
    with pytest.raises(QuantizeError, match="Gemm e: planned int8, and is not") as error:
        quantize._check_plan(half, model, whole)
    assert error.value.node == "e"


def test_wider_range_means_coarser_codes() -> None:
    model = graphs.model("(float[N,8] x) => (float[N,8] y) { [g] y = Gemm(x, w) }", {"w": graphs.noise(1, 8, 8)})
    batch = {"x": graphs.noise(0, 32, 8)}
    plan, ranges = graphs.planned(model, batch)
    found = []
    for factor in (1, 4, 16):
        scaled = replace(
            ranges.tensors["x"], low=ranges.tensors["x"].low * factor, high=ranges.tensors["x"].high * factor
        )
        int8 = quantize.to_int8(model, plan, replace(ranges, tensors={**ranges.tensors, "x": scaled}))
        found.append(snr_db(model, int8, batch))
    assert found[0] > found[1] + 6 > found[2] + 12  # each factor of 4 is 2 bits is 12 dB, less what the weights hide


def test_rule_keeps_a_layer_float_and_the_rest_int8() -> None:
    model = stages.prepared("residual").model
    batch = next(models.batches("residual", 1, 1))
    first = next(node.name for node in model.graph if node.op_type == "Conv")
    plan = place.decide(model, X86_VNNI, (rule(str(first), "float"),), graph.shapes(model, batch))
    int8 = quantize.to_int8(model, plan, observe(model, plan.tensors, iter([batch])).ranges)
    assert producer(graphs.node(int8, str(first)).inputs[0]) == "Pad"  # of the picture's channels, in float
    assert len(codes(int8, np.int8)) == 2


def test_layer_that_the_plan_keeps_float_between_two_int8_layers_runs_in_a_float_kernel(tmp_path: Path) -> None:
    """ONNX Runtime's WeightBiasQuantization would round its weight at load, with one scale for all channels."""
    text = """(float[N,16,8,8] x) => (float[N,16,P,Q] y) {
        [first] a = Conv(x, w)
        [kept] b = Conv(a, v)
        [last] y = Conv(b, w)
    }"""
    model = graphs.model(text, {"w": graphs.noise(1, 16, 16, 3, 3), "v": graphs.noise(2, 16, 16, 3, 3)})
    batch = {"x": graphs.noise(0, 2, 16, 8, 8)}
    int8, _ = to_int8(model, batch, kept="float")
    (tmp_path / "int8.onnx").write_bytes(graph.to_bytes(int8))
    ran = trace(tmp_path / "int8.onnx", batch, entries=X86_VNNI.session).kernels
    assert [kernel.integer for kernel in ran if kernel.macs] == [True, False, True]


def test_product_and_its_bias_stay_an_integer_product_where_every_size_is_fixed(tmp_path: Path) -> None:
    """ONNX Runtime's MatMulAddFusion would make a Gemm of the two, which runs in float."""
    text = """(float[1,6,16] x) => (float[1,6,16] y) {
        [product] p = MatMul(x, w)
        [bias] s = Add(p, b)
        [norm] y = LayerNormalization(s, g)
    }"""
    model = graphs.model(text, {"w": graphs.noise(1, 16, 16), "b": graphs.noise(2, 16), "g": graphs.noise(3, 16)})
    batch = {"x": graphs.noise(0, 1, 6, 16)}
    int8, plan = to_int8(model, batch)
    (tmp_path / "int8.onnx").write_bytes(graph.to_bytes(int8))
    assert graphs.precisions(plan)["product"] == "int8"
    ran = trace(tmp_path / "int8.onnx", batch, entries=X86_VNNI.session).kernels
    assert [kernel.integer for kernel in ran if kernel.macs] == [True]


def test_shape_is_read_from_the_codes() -> None:
    """A DequantizeLinear for Shape alone would turn a whole tensor into real numbers that nothing reads."""
    text = """(float[N,16,8,8] x) => (float[N,16,P,Q] y) {
        [first] a = Conv(x, w)
        [size] s = Shape(a)
        [reshape] r = Reshape(a, s)
        [last] y = Conv(r, w)
    }"""
    model = graphs.model(text, {"w": graphs.noise(1, 16, 16, 3, 3)})
    batch = {"x": graphs.noise(0, 2, 16, 8, 8)}
    int8, plan = to_int8(model, batch)
    assert graphs.precisions(plan) == {"first": "int8", "size": "float", "reshape": "int8", "last": "int8"}
    assert producer(graphs.node(int8, "size").inputs[0]) == "QuantizeLinear"
    assert snr_db(model, int8, batch) > 30


def test_weight_that_an_int8_and_a_float_layer_share_is_rounded_for_the_one_alone() -> None:
    model = graphs.model(
        "(float[N,4,6,6] x) => (float[N,4,6,6] y) { [a] h = Conv(x, w)\n [b] y = Conv(h, w) }",
        {"w": graphs.noise(1, 4, 4, 1, 1)},
    )
    int8, _ = to_int8(model, {"x": graphs.noise(0, 2, 4, 6, 6)}, b="float")
    np.testing.assert_array_equal(graph.constant(graphs.node(int8, "b").inputs[1]), graphs.noise(1, 4, 4, 1, 1))
    assert graphs.node(int8, "a").inputs[1].producer().op_type == "DequantizeLinear"
