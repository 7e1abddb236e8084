"""wasm multiplies in integers quickly and writes codes slowly: its layers are placed by cost."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from exporter import graph, place
from exporter.errors import RecipeError
from exporter.recipe import Rule
from exporter.target import ARM64, PORTABLE, TARGETS, WASM, X86_AVX2, X86_VNNI, Target, facts
from tests.exporter import graphs

SLOW_DEPTHWISE = "depthwise: its integer kernel here multiplies one value at a time, and is slower"
TOO_DEAR = "int8 costs more here than it saves, Q/DQ included"
# expand, filter each channel, project: the block that mobile CNNs are made of
BLOCK = """(float[N,{c},14,14] x) => (float[N,{c},14,14] y) {{
    [expand] a = Conv(x, we)
    [clip] b = Clip(a, low, high)
    [depthwise] d = Conv<group={e}, pads=[1,1,1,1]>(b, wd)
    [clip2] f = Clip(d, low, high)
    [project] p = Conv(f, wp)
    [add] y = Add(p, x)
}}"""


def decide(model: ir.Model, batch: dict[str, np.ndarray], *rules: Rule, target: Target = WASM) -> place.Plan:
    return place.decide(model, target, rules, graph.shapes(model, batch))


def block(channels: int, *rules: Rule, target: Target = WASM) -> place.Plan:
    """The plan of one block that expands six times."""
    inner = 6 * channels
    weights = {
        "we": graphs.noise(1, inner, channels, 1, 1),
        "wd": graphs.noise(2, inner, 1, 3, 3),
        "wp": graphs.noise(3, channels, inner, 1, 1),
        "low": np.float32(0),
        "high": np.float32(6),
    }
    model = graphs.model(BLOCK.format(c=channels, e=inner), weights)
    return decide(model, {"x": graphs.noise(0, 1, channels, 14, 14)}, *rules, target=target)


def pointwise(channels: int, target: Target = WASM) -> dict[str, str]:
    """Precisions of two 1x1 Conv, `channels` -> 64 -> `channels`, at 28x28."""
    text = f"""(float[N,{channels},28,28] x) => (float[N,{channels},28,28] y) {{
        [first] a = Conv(x, w)
        [second] y = Conv(a, v)
    }}"""
    weights = {"w": graphs.noise(1, 64, channels, 1, 1), "v": graphs.noise(2, channels, 64, 1, 1)}
    return graphs.precisions(
        decide(graphs.model(text, weights), {"x": graphs.noise(0, 1, channels, 28, 28)}, target=target)
    )


def gemm(rows: int, transposed: int) -> str:
    weight = graphs.noise(1, 256, 256)
    model = graphs.model(
        f"(float[N,256] x) => (float[N,256] y) {{ [gemm] y = Gemm<transB={transposed}>(x, w) }}", {"w": weight}
    )
    return graphs.precisions(decide(model, {"x": graphs.noise(0, rows, 256)}))["gemm"]


def test_depthwise_conv_is_float_and_says_why() -> None:
    (depthwise,) = [d for d in block(112).decisions if d.node == "depthwise"]
    assert (depthwise.precision, depthwise.reason) == ("float", SLOW_DEPTHWISE)
    assert depthwise.macs == 672 * 14 * 14 * 9


def test_on_every_other_target_all_layers_of_the_same_block_are_int8() -> None:
    for target in (PORTABLE, X86_VNNI, X86_AVX2, ARM64):
        assert not block(16, target=target).float_layers
        assert graphs.precisions(block(16, target=target))["clip2"] == "int8"


def test_projection_from_many_channels_is_int8_beside_a_float_depthwise_conv() -> None:
    """EfficientNet-Lite0 in node: 480 -> 80 at 14x14 takes 0.89 ms in float and 0.43 in int8."""
    assert graphs.precisions(block(80))["project"] == "int8"


def test_expansion_from_few_channels_is_float_and_from_many_int8() -> None:
    """EfficientNet-Lite0 in node, with Relu6: 40 -> 240 takes 0.97 ms in float, 1.54 in int8; 192 -> 1152 1.57 and 0.92."""
    few, many = block(40), block(192)
    assert graphs.precisions(few)["expand"] == "float" and graphs.precisions(many)["expand"] == "int8"
    assert {d.node: d.reason for d in few.decisions}["expand"] == TOO_DEAR


def test_clip_goes_where_its_layer_goes() -> None:
    for channels in (16, 40, 80, 112, 192):
        found = graphs.precisions(block(channels))
        assert (found["clip"], found["clip2"]) == (found["expand"], found["depthwise"])


def test_conv_pays_by_the_multiply_adds_behind_each_output() -> None:
    assert set(pointwise(16).values()) == {"float"}
    assert set(pointwise(256).values()) == {"int8"}
    assert set(pointwise(16, X86_VNNI).values()) == {"int8"}


def test_gemm_pays_with_many_rows_and_not_with_one_for_which_its_weight_is_packed() -> None:
    assert [gemm(rows, transposed=1) for rows in (1, 64)] == ["float", "int8"]
    assert [gemm(rows, transposed=0) for rows in (1, 64)] == ["float", "int8"]
    assert (gemm(8, transposed=0), gemm(8, transposed=1)) == ("int8", "float")


def test_rule_may_ask_for_a_depthwise_conv_in_int8() -> None:
    plan = block(40, Rule(match="depthwise", precision="int8", why="smaller"))
    (depthwise,) = [d for d in plan.decisions if d.node == "depthwise"]
    assert (depthwise.precision, depthwise.reason) == ("int8", "rule 'depthwise': smaller")
    with pytest.raises(RecipeError, match="contradict"):
        block(
            40,
            Rule(match="clip2", precision="int8", why="codes"),
            Rule(match="depthwise", precision="float", why="values"),
        )


def test_rule_may_ask_for_a_layer_in_int8_that_costs_more() -> None:
    plan = block(40, Rule(match="expand", precision="int8", why="smaller"))
    assert graphs.precisions(plan)["expand"] == "int8"


def test_wasm_alone_places_its_layers_by_cost_and_was_measured() -> None:
    assert [name for name, each in TARGETS.items() if each.layer is not None] == ["wasm"]
    assert [name for name, each in TARGETS.items() if not each.depthwise] == ["wasm"]
    assert WASM.costs_from == "onnxruntime-web in node"
    (layers,) = [fact for fact in facts(WASM) if fact.what == "layers"]
    assert "by cost as well" in layers.why
    (layers,) = [fact for fact in facts(PORTABLE) if fact.what == "layers"]
    assert "by cost" not in layers.why


def test_wasm_has_a_cost_for_every_operator_that_the_others_have() -> None:
    assert [*WASM.elementwise] == [*X86_VNNI.elementwise]
    assert [*WASM.movers] == [*X86_VNNI.movers]


def test_in_wasm_an_int8_output_costs_more_behind_a_relu() -> None:
    assert WASM.layer is not None
    assert WASM.elementwise["Relu"].int8_ns > WASM.layer.output_ns > 0
    assert WASM.layer.int8_ns < WASM.layer.float_ns
    assert WASM.layer.transposed_ns > WASM.layer.weight_ns
