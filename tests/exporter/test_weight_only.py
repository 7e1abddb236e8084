from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import runtime
from exporter import graph, place, quantize
from exporter.calibrate import Ranges
from exporter.errors import RecipeError
from exporter.numerics.formats import W8A32
from exporter.numerics.quantized import decode, encode
from exporter.place import Plan
from exporter.recipe import Rule, parse
from exporter.target import X86_VNNI
from runtime.explain import explain
from tests.exporter import graphs
from tests.exporter.test_pipeline import VNNI, transformer

TEXT = (
    "(float[4,64] x) => (float[4,32] y) { [one] a = MatMul(x, w) [act] r = Relu(a) [two] y = Gemm<transB=1>(r, v, c) }"
)
WEIGHTS = {"w": graphs.noise(0, 64, 96), "v": graphs.noise(1, 32, 96), "c": graphs.noise(2, 32)}
X = {"x": graphs.noise(3, 4, 64)}
NO_RANGES = Ranges(tensors={}, batches=1, method="minmax")


def planned(text: str, weights: dict[str, np.ndarray], *names: str) -> Plan:
    model = graphs.model(text, weights)
    rules = [Rule(match=name, precision="w8a32", why="test") for name in names]
    return place.decide(model, X86_VNNI, rules, graph.shapes(model, X))


def test_weights_are_codes_in_blocks_of_32_inputs_and_activations_stay_float() -> None:
    model, plan = graphs.model(TEXT, WEIGHTS), planned(TEXT, WEIGHTS, "one", "two")
    made = quantize.to_int8(model, plan, NO_RANGES)
    readers = {node.name: node for node in made.graph if node.op_type == "DequantizeLinear"}
    settings = {(n.attributes.get_int("axis"), n.attributes.get_int("block_size")) for n in readers.values()}
    assert settings == {(0, 32)} and made.opset_imports[""] == 21
    assert [list(graph.constant(n.inputs[1]).shape) for n in readers.values()] == [[2, 96], [3, 32]]  # type: ignore[union-attr]
    assert "QuantizeLinear" not in {node.op_type for node in made.graph} and plan.tensors == ()
    real = {"w": decode(encode(WEIGHTS["w"], W8A32.weights)), "v": decode(encode(WEIGHTS["v"].T, W8A32.weights)).T}
    same = graphs.model(TEXT, {**WEIGHTS, **real})
    drift = np.abs(graph.runner(made)(X)["y"] - graph.runner(same)(X)["y"]).max()
    assert drift < 0.02 * np.abs(graph.runner(model)(X)["y"]).max()  # MatMulNBits rounds activations as it runs


def test_blocks_lose_less_than_a_scale_per_channel_where_inputs_differ_in_size() -> None:
    weight = WEIGHTS["w"] * np.repeat(np.float32([1, 0.01]), 32)[:, None]
    error = [np.square(decode(encode(weight, each)) - weight)[32:].sum() for each in (
        W8A32.weights, W8A32.weights.per_channel(1),
    )]  # fmt: skip
    assert error[0] < error[1] / 100


def test_plan_says_the_scheme_and_counts_it_as_float() -> None:
    plan = planned(TEXT, WEIGHTS, "one", "two")
    assert "one | MatMul | w8a32 | rule 'one': test" in plan.to_text()
    assert plan.integer_share == 0 and [each.node for each in plan.float_layers] == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "weights", "why"),
    [
        (
            "(float[4,64] x) => (float[4,8] y) { [one] y = Gemm<alpha=2.0>(x, w) }",
            {"w": graphs.noise(0, 64, 8)},
            "alpha",
        ),
        ("(float[4,64] x) => (float[4,64] y) { [one] y = Relu(x) }", {}, "MatMul and Gemm only"),
        (
            "(float[4,64] x) => (float[4,4] y) { t = Transpose(x) [one] y = MatMul(x, t) }",
            {},
            "constant float32 matrix",
        ),
    ],
)
def test_layer_that_has_no_blocks_is_refused_with_the_reason(
    text: str, weights: dict[str, np.ndarray], why: str
) -> None:
    with pytest.raises(RecipeError, match=f"(?s){why}.*can be stored in blocks"):
        planned(text, weights, "one")


def test_inputs_that_fill_no_block_are_refused() -> None:
    text, weight = (
        "(float[4,64] x) => (float[4,8] y) { s = Concat<axis=1>(x, c) [one] y = MatMul(s, w) }",
        graphs.noise(0, 65, 8),
    )
    with pytest.raises(RecipeError, match="its 65 inputs are no multiple of 32"):
        planned(text, {"w": weight, "c": graphs.noise(1, 4, 1)}, "one")


def test_bundle_of_a_rule_is_searched_reported_loaded_and_checked(tmp_path: Path) -> None:
    rules = '\n[[rules]]\nmatch = "*_gemm"\nprecision = "w8a32"\nwhy = "its inputs bear no rounding"\n'
    report = transformer(parse(VNNI.toml + rules, "blocks"), tmp_path / "b", max_evaluations=3)
    plan = (tmp_path / "b" / "plan.txt").read_text().splitlines()[1:]
    assert sum("| w8a32 | rule '*_gemm': its inputs bear no rounding" in line for line in plan) == 4
    assert sum(each.reason.startswith("rule '*_gemm'") for each in report.float_layers) == 4
    assert report.drift.worst_snr_db > 30
    bundle = runtime.load(tmp_path / "b", threads=1)
    assert runtime.check(bundle).met
    explained = {
        each.planned.precision: each.kernel for each in explain(bundle).nodes if each.planned and each.kernel.macs
    }
    assert explained["w8a32"].kernel in ("MatMulNBits", "MatMul") and not explained["w8a32"].integer
