"""exporter.correct.opened: scales per channel through HardSwish and SiLU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter import correct, graph
from exporter.calibrate import distinguish, observe
from exporter.correct import bias, opened
from exporter.target import PORTABLE, X86_VNNI, Target
from runtime.kernels import trace
from tests.exporter import graphs

HARD = """(float[N,8,9,9] x) => (float[N,6,9,9] y) {
    [first] a = Conv<pads=[1,1,1,1]>(x, w)
    [gate] g = HardSigmoid<alpha=0.16666667, beta=0.5>(a)
    [swish] s = Mul(a, g)
    [second] y = Conv(s, v)
}"""
SILU = HARD.replace("HardSigmoid<alpha=0.16666667, beta=0.5>", "Sigmoid")
# Output channels of the first layer from 10 down to 0.01; the second reads the small ones with large weights
REACH = np.logspace(1, -2, 16, dtype=np.float32)
WEIGHTS = {
    "w": graphs.noise(1, 16, 8, 3, 3) / 8 * REACH[:, None, None, None],
    "v": graphs.noise(2, 6, 16, 1, 1) / REACH[:, None, None],
}
BATCHES = [{"x": graphs.noise(seed, 2, 8, 9, 9)} for seed in range(9)]


def improve(model: ir.Model, target: Target = X86_VNNI, **rules: str) -> correct.Opened | None:
    plan, _ = graphs.planned(model, *BATCHES, target=target, **rules)
    seen = observe(model, plan.tensors, iter(BATCHES), bias.channels(model, plan))
    shapes = graph.shapes(model, BATCHES[0])
    return correct.open_gates(model, plan, distinguish(model, seen.ranges), seen.means, target, shapes, BATCHES)


@pytest.mark.parametrize("target", [X86_VNNI, PORTABLE])
@pytest.mark.parametrize("text", [HARD, SILU])
def test_channels_of_small_values_keep_their_codes(text: str, target: Target) -> None:
    model = graphs.model(text, WEIGHTS)
    found = improve(model, target)
    assert found is not None and found.names == ("gate",)
    smooth = found.corrected.corrections[0]
    assert smooth.name == "smooth" and smooth.kept and smooth.after_db > smooth.before_db + 10
    other = {"x": graphs.noise(99, 4, 8, 9, 9)}
    expected, rounded = graph.runner(model)(other)["y"], graph.runner(found.corrected.int8)(other)["y"]
    assert 10 * np.log10((expected**2).sum() / ((rounded - expected) ** 2).sum()) > smooth.after_db - 2


@pytest.mark.parametrize("text", [HARD, SILU])
def test_line_runs_on_codes_and_the_plan_says_so(text: str, tmp_path: Path) -> None:
    found = improve(graphs.model(text, WEIGHTS))
    assert found is not None
    decided = {d.node: (d.op_type, d.precision, d.macs) for d in found.plan.decisions}
    assert decided["gate_line"] == ("Conv", "int8", 2 * 16 * 9 * 9)
    assert decided["gate"][:2] == ("Clip" if text is HARD else "Sigmoid", "int8")
    (tmp_path / "m.onnx").write_bytes(graph.to_bytes(found.corrected.int8))
    ran = {kernel.node: kernel for kernel in trace(tmp_path / "m.onnx", BATCHES[0]).kernels}
    assert ran["gate_line"].integer and ran["gate_line"].kernel == "QLinearConv"
    assert not {"Clip", "HardSigmoid", "Conv"} & {kernel.kernel for kernel in ran.values()}


def test_slope_of_each_channel_takes_its_scale_and_float_outputs_are_the_same() -> None:
    model = graphs.model(HARD, WEIGHTS)
    found = improve(model)
    assert found is not None and found.corrected.moved is not None
    wider, _ = opened._open(model, {"gate"}, graph.shapes(model, BATCHES[0]))
    moved = found.corrected.moved.graph(wider)
    slopes = graph.constant(graphs.node(moved, "gate_line").inputs[1])
    assert slopes is not None and slopes.max() / slopes.min() > 30
    assert (np.diff(slopes.reshape(-1)) <= 0).all()  # the further a channel reaches, the larger its scale
    np.testing.assert_allclose(graph.runner(moved)(BATCHES[0])["y"], graph.runner(model)(BATCHES[0])["y"], atol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        HARD.replace("Mul(a, g)", "Mul(b, g)").replace("[gate]", "[other] b = Conv<pads=[1,1,1,1]>(x, w)\n [gate]"),
        HARD.replace("(float[N,6,9,9] y) {", "(float[N,6,9,9] y, float[N,16,9,9] a) {"),
        HARD.replace("[second]", "[third] t = Tanh(s)\n [second]").replace("Conv(s, v)", "Conv(t, v)"),
        "(float[N,8,9,9] x) => (float[N,16,9,9] y) { [first] y = Conv<pads=[1,1,1,1]>(x, w) }",
    ],
    ids=["another's gate", "an output", "no layer behind", "no gate"],
)
def test_gate_through_which_no_scale_goes_stays_closed(text: str) -> None:
    used = {name: array for name, array in WEIGHTS.items() if f" {name})" in text}
    assert improve(graphs.model(text, used)) is None


def test_float_gates_stay_closed() -> None:
    assert improve(graphs.model(HARD, WEIGHTS), HardSigmoid="float") is None


def test_target_without_a_depthwise_kernel_opens_none() -> None:
    assert improve(graphs.model(HARD, WEIGHTS), replace(X86_VNNI, depthwise=False)) is None


def test_channels_that_are_alike_gain_nothing() -> None:
    alike = {"w": graphs.noise(1, 16, 8, 3, 3) / 8, "v": graphs.noise(2, 6, 16, 1, 1)}
    assert improve(graphs.model(HARD, alike)) is None


def test_line_takes_a_name_that_is_free() -> None:
    named = HARD.replace("[second]", "[gate_line] t = Identity(s)\n [second]").replace("Conv(s, v)", "Conv(t, v)")
    found = improve(graphs.model(named, WEIGHTS))
    assert found is not None
    assert [d.node for d in found.plan.decisions].count("gate_line_1") == 1


def test_slopes_are_of_channels_and_never_of_a_size_of_the_batch() -> None:
    """One output channel behind a Transpose: its second axis is H, of which other batches have more."""
    more = """    [other] m = Conv<pads=[1,1,1,1]>(x, u)
    [turn] n = Transpose<perm=[0,2,3,1]>(m)
    [gate2] k = Sigmoid(n)
    [silu] q = Mul(n, k)
    [back] p = Transpose<perm=[0,3,1,2]>(q)
    [third] z = Conv(p, t)
}"""
    text = HARD.replace("float[N,6,9,9] y)", "float[N,6,9,9] y, float[N,6,9,9] z)").removesuffix("}") + more
    weights = WEIGHTS | {"u": graphs.noise(3, 1, 8, 3, 3) / 8, "t": graphs.noise(4, 6, 1, 1, 1)}
    found = improve(graphs.model(text, weights), Sigmoid="int8", Mul="int8", Transpose="int8", HardSigmoid="int8")
    assert found is not None and found.names == ("gate",)
