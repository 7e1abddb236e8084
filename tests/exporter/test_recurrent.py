"""exporter.recurrent: LSTM whose products run in integers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

import exporter
from exporter import dynamic, graph, lint, place, recurrent
from exporter.batches import Batch
from exporter.budget import Accepts, Run
from exporter.errors import RecipeError
from exporter.place import Plan
from exporter.recipe import parse
from exporter.recurrent import Laid
from exporter.target import PORTABLE, X86_VNNI, Target
from runtime import manifest
from runtime.kernels import trace
from runtime.manifest import Budget
from runtime.session import open_session
from tests.exporter import graphs

HIDDEN = 64
TWO = """(float[S,N,64] x) => (float[S,1,N,64] y, float[1,N,64] c) {
    [first] s, h1, c1 = LSTM <hidden_size=64> (x, w, r, b)
    [flat] f = Squeeze(s, axes)
    [second] y, h, c = LSTM <hidden_size=64> (f, v, q, b)
}"""
WEIGHTS = {
    **{name: graphs.noise(seed, 1, 4 * HIDDEN, HIDDEN) / 8 for seed, name in enumerate("wrvq")},
    "b": graphs.noise(9, 1, 8 * HIDDEN) / 8,
    "axes": np.array([1]),
}
NO_LIMIT = Budget()
BATCHES = [{"x": graphs.noise(seed, 12, 2, HIDDEN)} for seed in range(4)]


def improve(
    model: ir.Model,
    target: Target = X86_VNNI,
    left: tuple[str, ...] = (),
    aim_db: float = 35.0,
    budget: Budget = NO_LIMIT,
    accepts: Accepts | None = None,
    batches: Sequence[Batch] = BATCHES,
) -> Laid:
    plan = place.decide(model, target, (), graph.shapes(model, batches[0]))
    names, expected = recurrent.candidates(model, plan, target, left), list(map(graph.runner(model), batches))
    return recurrent.improve(model, plan, names, expected, batches, aim_db, budget, accepts)


def precisions(plan: Plan) -> dict[str, str]:
    return {d.node: d.precision for d in plan.decisions}


def test_products_run_in_integers_and_outputs_stay_close(tmp_path: Path) -> None:
    model = graphs.model(TWO, WEIGHTS)
    found = improve(model)
    assert found.layers == ("first", "second")
    assert precisions(found.plan) == {"first": "dynamic", "flat": "float", "second": "dynamic"}
    (tmp_path / "m.onnx").write_bytes(graph.to_bytes(found.int8))
    onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"))
    ran = {kernel.node: kernel for kernel in trace(tmp_path / "m.onnx", BATCHES[0]).kernels if kernel.macs}
    assert {name: (each.kernel, each.integer) for name, each in ran.items()} == {
        "first": ("DynamicQuantizeLSTM", True), "second": ("DynamicQuantizeLSTM", True),
    }  # fmt: skip
    other = {"x": graphs.noise(9, 20, 3, HIDDEN)}
    expected, made = graph.runner(model)(other), graph.runner(found.int8)(other)
    for name in ("y", "c"):
        assert 10 * np.log10((expected[name] ** 2).sum() / ((expected[name] - made[name]) ** 2).sum()) > 30


def test_same_bits_as_quantize_dynamic(tmp_path: Path) -> None:
    model = graphs.model(TWO, WEIGHTS)
    (tmp_path / "m.onnx").write_bytes(graph.to_bytes(model))
    quantize_dynamic(
        tmp_path / "m.onnx", tmp_path / "q.onnx", op_types_to_quantize=["LSTM"], per_channel=True, weight_type=QuantType.QInt8
    )  # fmt: skip
    theirs = open_session((tmp_path / "q.onnx").read_bytes()).run(None, BATCHES[0])
    for one, other in zip(graph.runner(improve(model).int8)(BATCHES[0]).values(), theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_both_directions_and_a_given_state() -> None:
    text = """(float[S,N,64] x, float[2,N,64] h0, float[2,N,64] c0) => (float[S,2,N,64] y, float[2,N,64] h) {
        [both] y, h = LSTM <hidden_size=64, direction="bidirectional"> (x, w, r, , , h0, c0)
    }"""
    weights = {"w": graphs.noise(1, 2, 4 * HIDDEN, HIDDEN) / 8, "r": graphs.noise(2, 2, 4 * HIDDEN, HIDDEN) / 8}
    model = graphs.model(text, weights)
    batches = [
        {"x": graphs.noise(n, 9, 2, 64), "h0": graphs.noise(n, 2, 2, 64), "c0": graphs.noise(n, 2, 2, 64)}
        for n in range(3)
    ]
    found = improve(model, batches=batches)
    assert found.layers == ("both",)
    made, expected = graph.runner(found.int8)(batches[1]), graph.runner(model)(batches[1])
    np.testing.assert_allclose(made["y"], expected["y"], atol=0.05)
    np.testing.assert_allclose(made["h"], expected["h"], atol=0.05)


def test_layer_that_outputs_do_not_bear_stays_float() -> None:
    """Rows with one giant value: their other codes are 0."""
    bad = WEIGHTS | {"w": WEIGHTS["w"].copy()}
    bad["w"][:, :, 7] *= 3000
    given = [batch | {"x": batch["x"] * (np.arange(HIDDEN) != 7).astype(np.float32)} for batch in BATCHES]
    found = improve(graphs.model(TWO, bad), batches=given)
    assert found.layers == ("second",)
    first = next(d for d in found.plan.decisions if d.node == "first")
    assert first.precision == "float" and re.search(
        r"its products in integers cost too much, SNR -?\d+\.\d dB", first.reason
    )


@pytest.mark.parametrize(
    "asked",
    [
        {"left": ("first", "second")},
        {"accepts": lambda run: False},
        {"aim_db": 90.0},
        {"budget": Budget(max_abs=1e-4)},
        {"budget": Budget(min_cosine=0.9999999)},
    ],
    ids=["left", "not accepted", "not close enough", "max_abs", "cosine"],
)
def test_what_is_asked_for_keeps_them_float(asked: dict[str, Any]) -> None:
    found = improve(graphs.model(TWO, WEIGHTS), **asked)
    assert found.layers == () and not recurrent.is_in(found.int8)


def test_metric_that_refuses_both_may_accept_one() -> None:
    model = graphs.model(TWO, WEIGHTS)
    exact = graph.runner(model)(BATCHES[0])["c"]

    def near(run: Run) -> bool:
        return bool(np.abs(run(BATCHES[0])["c"] - exact).max() < worst)

    errors = [
        np.abs(graph.runner(improve(model, left=left).int8)(BATCHES[0])["c"] - exact).max()
        for left in (("second",), ())
    ]
    worst = (errors[0] + errors[1]) / 2
    assert errors[0] < worst < errors[1]
    assert improve(model, accepts=near).layers == ("first",)


def test_small_ones_and_other_targets_stay_float() -> None:
    small = TWO.replace("64", "16")
    weights = {
        "w": graphs.noise(1, 1, 64, 16), "r": graphs.noise(2, 1, 64, 16), "b": graphs.noise(3, 1, 128),
        "v": graphs.noise(5, 1, 64, 16), "q": graphs.noise(6, 1, 64, 16), "axes": np.array([1]),
    }  # fmt: skip
    assert improve(graphs.model(small, weights), batches=[{"x": graphs.noise(1, 12, 2, 16)}]).layers == ()
    assert improve(graphs.model(TWO, WEIGHTS), PORTABLE).layers == ()


def test_rule_makes_one_dynamic_and_says_why_it_cannot() -> None:
    model = graphs.model(TWO, WEIGHTS)
    plan, _ = graphs.planned(model, *BATCHES, first="dynamic")
    assert precisions(plan)["first"] == "dynamic"
    laid = model.clone()
    dynamic.lay(laid, model, plan.dynamic, {})
    assert graphs.op_types(laid) == ["DynamicQuantizeLSTM", "Squeeze", "LSTM"]
    with pytest.raises(RecipeError, match="for Gemm, MatMul only on portable"):
        graphs.planned(model, *BATCHES, target=PORTABLE, first="dynamic")


HEADED = """(float[S,N,64] x) => (float[S,N,8] z) {
    [lstm] s, h, c = LSTM <hidden_size=64> (x, w, r, b)
    [flat] f = Squeeze(s, axes)
    [head] z = MatMul(f, m)
}"""
MORE = {name: WEIGHTS[name] for name in ("w", "r", "b", "axes")} | {"m": graphs.noise(7, 64, 8)}


@pytest.mark.parametrize(
    "rule", ["", '[[rules]]\nmatch = "lstm"\nprecision = "dynamic"\nwhy = "asked"\n'], ids=["found", "ruled"]
)
def test_bundle_says_that_it_holds_on_no_other_cpu(rule: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(graph.to_bytes(graphs.model(HEADED, MORE)))
    recipe = parse(exporter.load_recipe("x86-vnni").toml + rule, "lstm")
    given = [{"x": graphs.noise(seed, 12, 2, HIDDEN)} for seed in range(12)]
    made = exporter.export(
        exporter.from_onnx(tmp_path / "m.onnx"), recipe, given[:8], given[8:], tmp_path / "out", max_evaluations=0
    )  # fmt: skip
    assert made.met and made.integer_macs == 1.0
    assert ("dynamic: 1 LSTM" in str(made)) and made.dynamic_nodes == 1
    found = manifest.loads((tmp_path / "out" / "manifest.json").read_text(), "test")
    assert found.pair_rule is False and found.exact_on == ()
    rules = {each.rule for each in lint.check(tmp_path / "out" / "model.int8.onnx", PORTABLE)}
    assert rules == {lint.PAIRS}
