from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from exporter import graph, place
from exporter.errors import RecipeError
from exporter.recipe import Rule
from exporter.target import LAYERS, X86_VNNI, Target
from tests.exporter import golden, graphs, stages

CONVS = """(float[N,8,16,16] x) => (float[N,8,16,16] y) {
    [first] a = Conv<pads=[1,1,1,1]>(x, w)
    [relu] r = Relu(a)
    [second] b = Conv<pads=[1,1,1,1]>(r, w)
    [add] s = Add(r, b)
    [third] y = Conv<pads=[1,1,1,1]>(s, w)
}"""
W = {"w": graphs.noise(1, 8, 8, 3, 3)}
X = {"x": graphs.noise(0, 2, 8, 16, 16)}
NORMED = """(float[N,6,16] x) => (float[N,6,16] y) {
    [first] a = MatMul(x, w)
    [add] s = Add(a, x)
    [norm] n = LayerNormalization(s, g, b)
    [second] y = MatMul(n, w)
}"""
NORM = {"w": graphs.noise(1, 16, 16), "g": graphs.noise(2, 16), "b": graphs.noise(3, 16)}


def decide(model: ir.Model, batch: dict[str, np.ndarray], *rules: Rule, target: Target = X86_VNNI) -> place.Plan:
    return place.decide(model, target, rules, graph.shapes(model, batch))


def rule(match: str, precision: str, why: str = "asked for") -> Rule:
    return Rule(match=match, precision=precision, why=why)  # type: ignore[arg-type]


def reasons(plan: place.Plan) -> dict[str, str]:
    return {decision.node: decision.reason for decision in plan.decisions}


@pytest.mark.parametrize("name", ["residual", "transformer", "lstm", "upsampler"])
def test_plan_is_the_recorded_one(name: str) -> None:
    assert golden.same(f"{name}.plan.txt", stages.plan(name).to_text())


@pytest.mark.parametrize("name", ["residual", "transformer", "lstm", "upsampler"])
def test_every_node_is_decided_with_a_reason_in_graph_order(name: str) -> None:
    plan = stages.plan(name)
    assert [d.node for d in plan.decisions] == [node.name for node in stages.prepared(name).model.graph]
    assert all(d.reason and "|" not in d.reason and d.precision in ("int8", "float") for d in plan.decisions)


def test_add_between_two_conv_is_int8() -> None:
    plan = decide(graphs.model(CONVS, W), X)
    assert set(graphs.precisions(plan).values()) == {"int8"}
    assert reasons(plan)["add"] == "its neighbours are int8"
    assert reasons(plan)["relu"] == "folds into the layer before it"


def test_add_before_a_layernormalization_is_float() -> None:
    plan = decide(graphs.model(NORMED, NORM), {"x": graphs.noise(0, 2, 6, 16)})
    assert graphs.precisions(plan) == {"first": "int8", "add": "float", "norm": "float", "second": "int8"}
    assert reasons(plan)["add"] == "int8 costs more here than it saves, Q/DQ included"
    assert reasons(plan)["norm"] == "no integer kernel for LayerNormalization"


def test_plan_names_the_tensors_that_int8_nodes_touch_and_no_other() -> None:
    assert decide(graphs.model(CONVS, W), X).tensors == ("x", "a", "r", "b", "s", "y")
    plan = decide(graphs.model(NORMED, NORM), {"x": graphs.noise(0, 2, 6, 16)})
    assert set(plan.tensors) == {"x", "a", "n", "y"}


def test_macs_of_the_observed_batch_are_written_down() -> None:
    plan = decide(graphs.model(CONVS, W), X)
    conv = 2 * 8 * 16 * 16 * 8 * 9
    assert {d.node: d.macs for d in plan.decisions} == {
        "first": conv,
        "relu": 0,
        "second": conv,
        "add": 0,
        "third": conv,
    }


def test_first_rule_that_matches_wins_by_name_or_by_op_type() -> None:
    model = graphs.model(CONVS, W)
    plan = decide(model, X, rule("second", "float", "tried and worse"), rule("Conv", "int8", "layers"))
    found = graphs.precisions(plan)
    assert (found["first"], found["second"], found["third"]) == ("int8", "float", "int8")
    assert reasons(plan)["second"] == "rule 'second': tried and worse"
    assert reasons(plan)["first"] == "rule 'Conv': layers"
    plan = decide(model, X, rule("Conv", "int8"), rule("second", "float"))
    assert graphs.precisions(plan)["second"] == "int8"


def test_wildcards_match_any_text() -> None:
    plan = decide(graphs.model(CONVS, W), X, rule("*ir*", "float"))
    assert [d.node for d in plan.decisions if d.reason.startswith("rule")] == ["first", "third"]


def test_rule_takes_its_surroundings_along() -> None:
    """With every layer float there is nothing that int8 neighbours could be next to."""
    plan = decide(graphs.model(CONVS, W), X, rule("Conv", "float"))
    assert set(graphs.precisions(plan).values()) == {"float"}
    assert len(plan.float_layers) == 3


def test_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(
        RecipeError, match="rule 'Conv2d' matches no node: found 5 nodes such as 'first', 'relu'"
    ) as error:
        decide(graphs.model(CONVS, W), X, rule("first", "float"), rule("Conv2d", "float"))
    assert error.value.where == "rules[1]"


def test_rule_that_asks_for_int8_on_lstm_is_refused() -> None:
    model = stages.prepared("lstm").model
    with pytest.raises(RecipeError, match="rule 'LSTM' asks for int8: found LSTM .*no static int8 kernel for LSTM"):
        place.decide(model, X86_VNNI, (rule("LSTM", "int8"),), {})


REFUSED = [
    ("[n] y = Tanh(x)", "no integer kernel for Tanh"),
    ("[n] y = Relu(x)", "no integer kernel for Relu, and no layer before it to fold into"),
    ("[n] y = MatMul(k, x)", "its first factor is the constant one: the integer kernel packs the second"),
    ("[n] y = Gemm<alpha=0.5>(x, k)", "the integer kernel takes alpha = beta = 1 and A as it is"),
    ("[n] y = Gemm<transA=1>(x, k)", "the integer kernel takes alpha = beta = 1 and A as it is"),
    ("[n] y = Gemm(x, z)", "its weight is computed at run time"),
    ("[n] y = Gemm(x, k, z)", "its bias is computed at run time"),
    ("[c] i = Cast<to=7>(x)\n [n] j = Add(i, i)\n [d] y = Cast<to=1>(j)", "computes on int64 tensors"),
    ("[n] i = Add(k, k)\n [d] y = Add(x, i)", "all its inputs are constant"),
    (
        "[a] i = Gemm(x, k)\n [n] j = Relu(i)\n [d] y = Add(i, j)",
        "no integer kernel for Relu, and what it reads is read elsewhere too",
    ),
    ("[n] y = HardSigmoid<alpha=-1.0>(x)", "it falls, or saturates on one side of 0 only"),
    ("[n] y = HardSigmoid<beta=1.5>(x)", "it falls, or saturates on one side of 0 only"),
    (
        "[t] i = Transpose<perm=[1,0]>(x)\n [n] y = HardSigmoid(i)",
        "a Transpose made its input, whose codes have another tensor's range",
    ),
    ("[a] i = Gemm(x, k)\n [n] y = Clip(i, one)", "its bounds leave 0 out: codes saturate only around 0"),
    ("[a] i = Gemm(x, k)\n [n] y = Clip(i, minus, minus)", "its bounds leave 0 out: codes saturate only around 0"),
]


@pytest.mark.parametrize(("body", "reason"), REFUSED)
def test_node_that_has_no_integer_form_says_why(body: str, reason: str) -> None:
    model = graphs.model(
        f"(float[4,4] x, float[4,4] z) => (float[4,4] y) {{ {body} }}",
        {"k": graphs.noise(1, 4, 4), "one": np.float32(1), "minus": np.float32(-1)},
    )
    plan = decide(model, {"x": graphs.noise(2, 4, 4), "z": graphs.noise(3, 4, 4)})
    assert (graphs.precisions(plan)["n"], reasons(plan)["n"]) == ("float", reason)


def test_hardswish_between_two_conv_is_int8() -> None:
    model = graphs.model(
        """(float[N,8,16,16] x) => (float[N,8,16,16] y) {
            [first] a = Conv<pads=[1,1,1,1]>(x, w)
            [gate] g = HardSigmoid<alpha=0.16666667, beta=0.5>(a)
            [swish] s = Mul(a, g)
            [second] y = Conv<pads=[1,1,1,1]>(s, w)
        }""",
        W,
    )
    plan = decide(model, X)
    assert set(graphs.precisions(plan).values()) == {"int8"}
    assert reasons(plan)["gate"] == "its codes are those of its input, read otherwise"


def test_weight_of_rank_3_says_why() -> None:
    model = graphs.model(
        "(float[2,3,4] x) => (float[2,3,5] y) { [n] y = MatMul(x, w) }", {"w": graphs.noise(1, 2, 4, 5)}
    )
    assert reasons(decide(model, {"x": graphs.noise(2, 2, 3, 4)}))["n"].startswith("its weight has rank 3")


def test_product_of_two_activations_is_float_where_it_does_not_pay() -> None:
    model = graphs.model("(float[2,3,4] x, float[2,4,3] z) => (float[2,3,3] y) { [n] y = MatMul(x, z) }")
    batch = {"x": graphs.noise(2, 2, 3, 4), "z": graphs.noise(3, 2, 4, 3)}
    plan = decide(model, batch, target=replace(X86_VNNI, activations_matmul=False))
    assert reasons(plan)["n"].startswith("a product of two activations: ")
    plan = decide(model, batch, target=replace(X86_VNNI, activations_matmul=True))
    assert (graphs.precisions(plan), reasons(plan)) == ({"n": "int8"}, {"n": "integer kernel"})


def test_clip_around_zero_folds_and_relu6_too() -> None:
    model = graphs.model(
        "(float[N,4] x) => (float[N,4] y) { [a] i = Gemm(x, k)\n [n] j = Clip(i, zero, six)\n [b] y = Gemm(j, k) }",
        {"k": graphs.noise(1, 4, 4), "zero": np.float32(0), "six": np.float32(6)},
    )
    assert set(graphs.precisions(decide(model, {"x": graphs.noise(2, 3, 4)})).values()) == {"int8"}


def test_every_layer_that_can_is_int8_whatever_it_costs() -> None:
    model = graphs.model("(float[1,4] x) => (float[1,4] y) { [g] y = Gemm(x, k) }", {"k": graphs.noise(1, 4, 4)})
    slow = replace(X86_VNNI, crossing_ns=1e9)
    assert graphs.precisions(decide(model, {"x": graphs.noise(2, 1, 4)}, target=slow)) == {"g": "int8"}
    assert LAYERS == X86_VNNI.layers == ("Conv", "Gemm", "MatMul")


def test_price_of_a_crossing_moves_elementwise_nodes_between_int8_and_float() -> None:
    """The same Add: int8 where a crossing is dear, float where crossing is free and its own kernel is not."""
    model = graphs.model(CONVS, W)
    dear = replace(X86_VNNI, crossing_ns=1e6)
    free = replace(X86_VNNI, crossing_ns=0.0, quantize_ns=0.0, dequantize_ns=0.0)
    slow_add = {**X86_VNNI.elementwise, "Add": replace(X86_VNNI.elementwise["Add"], int8_ns=9.0)}
    assert graphs.precisions(decide(model, X, target=dear))["add"] == "int8"
    assert graphs.precisions(decide(model, X, target=replace(free, elementwise=slow_add)))["add"] == "float"


def test_placement_is_the_cheapest_of_all_placements() -> None:
    """Held against every one of the 2^3 placements of three Adds between two Conv, priced by hand."""
    model = graphs.model(
        """(float[N,8,16,16] x) => (float[N,8,16,16] y) {
            [c1] a = Conv<pads=[1,1,1,1]>(x, w)
            [s1] b = Add(a, a)
            [s2] c = Add(b, b)
            [t] d = Tanh(c)
            [s3] e = Add(c, d)
            [c2] y = Conv<pads=[1,1,1,1]>(e, w)
        }""",
        W,
    )
    elements, target = 2 * 8 * 16 * 16, X86_VNNI
    q, dq = (cost * elements + target.crossing_ns for cost in (target.quantize_ns, target.dequantize_ns))
    add = target.elementwise["Add"]
    readers = {"a": ["s1"], "b": ["s2"], "c": ["t", "s3"], "d": ["s3"], "e": ["c2"], "y": ["end"], "x": ["c1"]}
    makers = {"a": "c1", "b": "s1", "c": "s2", "d": "t", "e": "s3", "y": "c2", "x": "start"}

    def price(int8: set[str]) -> float:
        sides = {"c1", "c2"} | int8
        kernels = sum(
            (add.int8_ns + target.quantize_ns if s in int8 else add.float_ns) * elements for s in ("s1", "s2", "s3")
        )
        crossings = 0.0
        for value, who in readers.items():
            made = makers[value] in sides
            crossings += dq * (made and any(r not in sides for r in who)) + q * (
                not made and any(r in sides for r in who)
            )
        return kernels + crossings

    subsets = [set(c) for n in range(4) for c in itertools.combinations(("s1", "s2", "s3"), n)]
    best = min(map(price, subsets))
    found = {name for name, precision in graphs.precisions(decide(model, X)).items() if precision == "int8"} - {
        "c1",
        "c2",
    }
    assert price(found) == pytest.approx(best)


def test_plan_text_has_four_columns() -> None:
    text = decide(graphs.model(CONVS, W), X).to_text()
    lines = text.splitlines()
    assert lines[0] == "# node | op_type | precision | reason"
    assert lines[4] == "add | Add | int8 | its neighbours are int8"
    assert all(len(line.split(" | ")) == 4 for line in lines)
    assert text.endswith("\n")


@pytest.mark.parametrize(
    ("weight", "groups", "precision"),
    [
        ((64, 8, 3, 3), 8, "float"),
        ((64, 16, 3, 3), 4, "int8"),
        ((64, 1, 3, 3), 64, "int8"),
        ((64, 64, 1, 1), 1, "int8"),
    ],
)
def test_grouped_conv_of_few_channels_stays_float_where_a_depthwise_one_does_not(
    weight: tuple[int, ...], groups: int, precision: str
) -> None:
    model = graphs.model(
        f"(float[N,64,8,8] x) => (float[N,64,P,Q] y) {{ [c] y = Conv<group={groups}>(x, w) }}",
        {"w": graphs.noise(1, *weight)},
    )
    batch = {"x": graphs.noise(0, 1, 64, 8, 8)}
    assert graphs.precisions(decide(model, batch)) == {"c": precision}
    assert graphs.precisions(decide(model, batch, rule("c", "int8"))) == {"c": "int8"}


@pytest.mark.parametrize(("channels", "precision"), [(3, "float"), (16, "int8")])
def test_conv_over_three_axes_stays_float_when_its_input_has_few_channels(channels: int, precision: str) -> None:
    text = f"(float[N,{channels},6,6,6] x) => (float[N,32,P,Q,R] y) {{ [c] y = Conv(x, w) }}"
    model = graphs.model(text, {"w": graphs.noise(1, 32, channels, 3, 3, 3)})
    plan = decide(model, {"x": graphs.noise(0, 1, channels, 6, 6, 6)})
    assert graphs.precisions(plan) == {"c": precision}
    assert precision == "int8" or "position by position" in reasons(plan)["c"]


def test_relu_behind_an_int8_gemm_folds_even_where_its_reader_is_float() -> None:
    model = graphs.model(
        "(float[N,4] x) => (float[N,4] y) { [a] h = Gemm(x, w)\n [r] z = Relu(h)\n [b] y = Gemm(z, v) }",
        {"w": graphs.noise(1, 4, 4), "v": graphs.noise(2, 4, 4)},
    )
    plan, _ = graphs.planned(model, {"x": graphs.noise(0, 3, 4)}, b="float")
    assert plan.int8 == ("a", "r")


def test_rules_that_contradict_each_other_are_refused() -> None:
    model = graphs.model(
        "(float[N,4] x) => (float[N,4] y) { [a] h = Gemm(x, w)\n [r] y = Relu(h) }", {"w": graphs.noise(1, 4, 4)}
    )
    with pytest.raises(RecipeError, match="rules contradict each other"):
        graphs.planned(model, {"x": graphs.noise(0, 3, 4)}, a="float", r="int8")


def test_brackets_in_a_rule_are_brackets() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { [n] y = Gemm(x, w) }", {"w": graphs.noise(1, 4, 4)})
    graphs.node(model, "n").name = "blocks[0]/gemm"
    plan, _ = graphs.planned(model, {"x": graphs.noise(0, 3, 4)}, **{"blocks[0]/*": "float"})
    assert plan.int8 == ()


def test_conv_that_a_branch_reads_stays_float_and_the_graph_still_quantizes() -> None:
    model = graphs.model(
        """(float[N,3,6,6] x, bool c) => (float[N,4,6,6] y) {
            [a] h = Conv(x, w)
            [b] g = Conv(h, v)
            y = If (c) <then_branch = t () => (float[N,4,6,6] p) { p = Add(h, g) },
                        else_branch = e () => (float[N,4,6,6] q) { q = Neg(g) }>
        }""",
        {"w": graphs.noise(1, 4, 3, 1, 1), "v": graphs.noise(2, 4, 4, 1, 1)},
    )
    plan, _ = graphs.planned(model, {"x": graphs.noise(0, 2, 3, 6, 6), "c": np.array(True)})
    assert plan.int8 == ()
    assert {d.reason for d in plan.decisions if d.op_type == "Conv"} == {
        "a branch or loop body reads its output, in float"
    }


@pytest.mark.parametrize(
    ("attributes", "bias", "reason"),
    [
        ("<beta=0.5>", (4,), "the integer kernel takes alpha = beta = 1 and A as it is"),
        ("", (1,), "its bias is not one number per column"),
        ("", (3, 1), "its bias is not one number per column"),
    ],
)
def test_gemm_whose_bias_no_integer_kernel_adds_stays_float(
    attributes: str, bias: tuple[int, ...], reason: str
) -> None:
    model = graphs.model(
        f"(float[3,4] x) => (float[3,4] y) {{ [n] y = Gemm{attributes}(x, w, c) }}",
        {"w": graphs.noise(1, 4, 4), "c": graphs.noise(2, *bias)},
    )
    plan, _ = graphs.planned(model, {"x": graphs.noise(0, 3, 4)})
    assert [(d.precision, d.reason) for d in plan.decisions] == [("float", reason)]


def test_plan_text_is_one_line_of_four_columns_a_node_whatever_their_names() -> None:
    decision = replace(decide(graphs.model(CONVS, W), X).decisions[0], node="a | b", reason="first\n  second | third")
    lines = place.Plan(decisions=(decision,), tensors=()).to_text().splitlines()
    assert lines[1:] == ["a / b | Conv | int8 | first second / third"]


def test_note_of_a_later_stage_stands_behind_the_reason_of_its_node_alone() -> None:
    plan = decide(graphs.model(CONVS, W), X)
    noted = plan.noted({"second": "pair rule: no pair breaks it", "gone": "never read"})
    before, after = reasons(plan), reasons(noted)
    assert after.pop("second") == f"{before.pop('second')}; pair rule: no pair breaks it"
    assert after == before
    assert (noted.int8, noted.tensors) == (plan.int8, plan.tensors)
    assert plan.noted({}) == plan
