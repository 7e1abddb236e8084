"""exporter.recurrent: LSTM whose products run in integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import QuantType, quantize_dynamic

from exporter import dynamic, graph, place, recurrent
from exporter.errors import RecipeError
from exporter.place import Plan
from exporter.recurrent import Laid
from exporter.target import PORTABLE, X86_VNNI, Target
from runtime.kernels import trace
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
BATCHES = [{"x": graphs.noise(seed, 12, 2, HIDDEN)} for seed in range(4)]


def improve(model: ir.Model, target: Target = X86_VNNI, **asked: object) -> Laid:
    plan = place.decide(model, target, (), graph.shapes(model, BATCHES[0]))
    expected = list(map(graph.runner(model), BATCHES))
    return recurrent.improve(model, plan, target, expected, BATCHES, **asked)  # type: ignore[arg-type]


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
    expected = list(map(graph.runner(model), batches))
    plan = place.decide(model, X86_VNNI, (), graph.shapes(model, batches[0]))
    found = recurrent.improve(model, plan, X86_VNNI, expected, batches)
    assert found.layers == ("both",)
    made = graph.runner(found.int8)(batches[1])
    np.testing.assert_allclose(made["y"], expected[1]["y"], atol=0.05)
    np.testing.assert_allclose(made["h"], expected[1]["h"], atol=0.05)


def test_layer_that_outputs_do_not_bear_stays_float() -> None:
    """Rows with one giant value: their other codes are 0."""
    bad = WEIGHTS | {"w": WEIGHTS["w"].copy()}
    bad["w"][:, :, 7] *= 3000
    given = [batch | {"x": batch["x"] * (np.arange(HIDDEN) != 7).astype(np.float32)} for batch in BATCHES]
    model = graphs.model(TWO, bad)
    plan = place.decide(model, X86_VNNI, (), graph.shapes(model, given[0]))
    found = recurrent.improve(model, plan, X86_VNNI, list(map(graph.runner(model), given)), given)
    assert found.layers == ("second",)
    assert precisions(found.plan)["first"] == "float"


@pytest.mark.parametrize(
    "asked", [{"left": ("first", "second")}, {"accepts": lambda run: False}, {"floor_db": 90.0}],
    ids=["left", "not accepted", "not close enough"],
)  # fmt: skip
def test_what_is_asked_for_keeps_them_float(asked: dict[str, object]) -> None:
    model = graphs.model(TWO, WEIGHTS)
    found = improve(model, **asked)
    assert found.layers == () and found.int8 is model


def test_small_ones_and_other_targets_stay_float() -> None:
    small = TWO.replace("64", "16")
    weights = {
        "w": graphs.noise(1, 1, 64, 16), "r": graphs.noise(2, 1, 64, 16), "b": graphs.noise(3, 1, 128),
        "v": graphs.noise(5, 1, 64, 16), "q": graphs.noise(6, 1, 64, 16), "axes": np.array([1]),
    }  # fmt: skip
    model, given = graphs.model(small, weights), [{"x": graphs.noise(1, 12, 2, 16)}]
    plan = place.decide(model, X86_VNNI, (), graph.shapes(model, given[0]))
    assert recurrent.improve(model, plan, X86_VNNI, [graph.runner(model)(given[0])], given).layers == ()
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
