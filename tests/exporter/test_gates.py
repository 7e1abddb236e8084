from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter import graph, quantize
from exporter.calibrate import Range, Ranges, distinguish
from exporter.gates import Read, on_codes
from exporter.place import Plan
from exporter.target import X86_VNNI
from runtime import drift
from runtime.kernels import trace
from runtime.session import open_session
from tests.exporter import graphs

Batch = dict[str, np.ndarray]
CODES = np.arange(256)


def values(gate: Read) -> np.ndarray:
    return (np.clip(CODES, gate.first, gate.last) - gate.zero_point) * gate.scale


def exact(scale: float, zero_point: int, alpha: float, beta: float) -> np.ndarray:
    return np.clip(alpha * (CODES - zero_point) * scale + beta, 0, 1)


@pytest.mark.parametrize(
    ("scale", "zero_point", "alpha", "beta"),
    [
        (3 / 33, 33, 1 / 6, 0.5),
        (3 / 33, 120, 1 / 6, 0.5),
        (0.02, 130, 0.2, 0.5),
        (0.05, 50, 0.5, 0.25),
        (0.01, 300 - 60, 0.4, 0.1),
    ],
)
def test_codes_of_x_read_otherwise_are_its_hardsigmoid_where_knees_are_codes(
    scale: float, zero_point: int, alpha: float, beta: float
) -> None:
    gate = on_codes(scale, zero_point, alpha, beta)
    assert gate is not None
    np.testing.assert_allclose(values(gate), exact(scale, zero_point, alpha, beta), atol=1e-6)


@pytest.mark.parametrize("scale", [0.013, 0.037, 0.09, 0.4])
def test_knees_between_codes_move_by_less_than_the_rounding_of_x(scale: float) -> None:
    zero_point = round(3 / scale) if scale > 0.02 else 240
    gate = on_codes(scale, zero_point, 1 / 6, 0.5)
    assert gate is not None
    assert np.abs(values(gate) - exact(scale, zero_point, 1 / 6, 0.5)).max() <= scale / 2 / 6 + 1e-9


def test_values_are_exactly_0_below_and_1_above() -> None:
    gate = on_codes(0.1, 100, 1 / 6, 0.5)
    assert gate == Read(first=70, last=130, scale=1 / 60, zero_point=70)
    assert (values(gate)[:71].max(), values(gate)[130:].min()) == (0, 1)


def test_codes_that_saturate_at_the_knees_need_no_clip() -> None:
    assert on_codes(6 / 255, 128, 1 / 6, 0.5) == Read(first=0, last=255, scale=1 / 6 * 6 / 255, zero_point=0)


@pytest.mark.parametrize(("scale", "zero_point"), [(0.02, 100), (7.0, 20)])
def test_what_uint8_codes_cannot_say_is_none(scale: float, zero_point: int) -> None:
    """The lower knee would be below code 0; both knees would be one code."""
    assert on_codes(scale, zero_point, 1 / 6, 0.5) is None


SWISH = """(float[N,8,9,9] x) => (float[N,8,9,9] y) {
    [first] a = Conv<pads=[1,1,1,1]>(x, w)
    [gate] g = HardSigmoid<alpha=0.16666667, beta=0.5>(a)
    [swish] s = Mul(a, g)
    [second] y = Conv<pads=[1,1,1,1]>(s, w)
}"""
SQUEEZED = """(float[N,8,9,9] x) => (float[N,8,9,9] y) {
    [first] a = Conv<pads=[1,1,1,1]>(x, w)
    [pool] p = GlobalAveragePool(a)
    [squeeze] q = Conv(p, v)
    [gate] g = HardSigmoid(q)
    [excite] y = Mul(a, g)
}"""
GATED = {"w": graphs.noise(1, 8, 8, 3, 3), "v": graphs.noise(2, 8, 8, 1, 1)}
MAPS = {"x": graphs.noise(0, 2, 8, 9, 9)}


def kernels(int8: ir.Model, batch: Batch, folder: Path) -> list[str]:
    path = folder / "int8.onnx"
    path.write_bytes(graph.to_bytes(int8))
    return [each.kernel for each in trace(path, batch, entries=X86_VNNI.session, runs=1).kernels]


def snr_db(reference: ir.Model, candidate: ir.Model, batch: Batch) -> float:
    """Of the int8 graph as it is written: between its Q/DQ all is float, so that no kernel of this CPU can saturate."""
    session = open_session(graph.to_bytes(candidate), entries={"session.disable_quant_qdq": "1"})
    names = [output.name for output in session.get_outputs()]
    made = dict(zip(names, session.run(names, batch), strict=True))
    return drift.measure([(graph.runner(reference)(batch), made)]).worst_snr_db


def producer(value: ir.Value | None) -> str:
    made = value.producer() if value is not None else None
    return made.op_type if made is not None else ""


def gated(text: str, **rules: str) -> tuple[ir.Model, Plan, Ranges]:
    model = graphs.model(text, GATED)
    plan, ranges = graphs.planned(model, MAPS, **rules)
    return model, plan, distinguish(model, ranges)


def test_hardswish_runs_as_a_clip_of_codes_and_an_integer_product(tmp_path: Path) -> None:
    int8 = quantize.to_int8(*gated(SWISH))
    clip = graphs.node(int8, "gate")
    assert (clip.op_type, clip.outputs[0].dtype, producer(clip.inputs[0])) == (
        "Clip",
        ir.DataType.UINT8,
        "QuantizeLinear",
    )
    ran = [kernel for kernel in kernels(int8, MAPS, tmp_path) if kernel not in ("Transpose", *quantize.OWN)]
    assert ran == ["QLinearConv", "Clip", "QLinearMul", "QLinearConv"]


def test_hardsigmoid_whose_input_nothing_else_reads_costs_no_kernel(tmp_path: Path) -> None:
    int8 = quantize.to_int8(*gated(SQUEEZED))
    assert not {"Clip", "HardSigmoid"} & set(graphs.op_types(int8))
    ran = [kernel for kernel in kernels(int8, MAPS, tmp_path) if kernel not in ("Transpose", *quantize.OWN)]
    assert ran == ["QLinearConv", "QLinearGlobalAveragePool", "QLinearConv", "QLinearMul"]


@pytest.mark.parametrize("text", [SWISH, SQUEEZED])
def test_codes_read_as_hardsigmoid_are_as_close_to_fp32_as_codes_of_its_own(text: str) -> None:
    model, plan, ranges = gated(text)
    new = {"x": MAPS["x"] * np.float32(0.9)}
    read, apart = (quantize.to_int8(model, plan, ranges, gates_on_codes=each) for each in (True, False))
    assert graphs.node(apart, "gate").op_type == "HardSigmoid"
    assert snr_db(model, read, new) > snr_db(model, apart, new) - 1 > 27


def test_lower_knee_of_hardswish_is_code_0() -> None:
    """x reaches down to -3, or is widened to it; its upper end stays."""
    model = graphs.model(SWISH, GATED)
    for low in (-1.0, -3.0):
        plan, ranges = graphs.planned(model, MAPS)
        ranges = replace(ranges, tensors=ranges.tensors | {"a": Range(low=low, high=20, elements=1, masked=0)})
        int8 = quantize.to_int8(model, plan, ranges)
        reader = next(n for n in int8.graph if n.op_type == "DequantizeLinear" and n.inputs[1].name == "a_scale")
        assert graph.constant(reader.inputs[1]) == pytest.approx(23 / 255)
        assert graph.constant(reader.inputs[2]) == 33
        assert [int(graph.constant(value)) for value in graphs.node(int8, "gate").inputs[1:]] == [0, 66]


def test_gate_that_codes_cannot_say_keeps_its_own() -> None:
    """A range so wide that 0 and 1 are one code of x."""
    model = graphs.model(SWISH, GATED)
    plan, ranges = graphs.planned(model, MAPS)
    wide = replace(ranges, tensors=ranges.tensors | {"a": Range(low=-3000, high=3000, elements=1, masked=0)})
    assert graphs.node(quantize.to_int8(model, plan, wide), "gate").op_type == "HardSigmoid"


def test_hardsigmoid_that_is_planned_float_is_left_alone() -> None:
    int8 = quantize.to_int8(*gated(SWISH, gate="float", swish="float"))
    assert graphs.node(int8, "gate").op_type == "HardSigmoid"


def test_hardsigmoid_that_is_an_output_and_read_in_float_has_its_real_values() -> None:
    model = graphs.model(
        """(float[N,8,9,9] x) => (float[N,8,9,9] y, float[N,8,9,9] g, float[N,8,9,9] t) {
            [first] a = Conv<pads=[1,1,1,1]>(x, w)
            [gate] g = HardSigmoid(a)
            [swish] s = Mul(a, g)
            [tanh] t = Tanh(g)
            [second] y = Conv<pads=[1,1,1,1]>(s, w)
        }""",
        GATED,
    )
    plan, ranges = graphs.planned(model, MAPS, gate="int8", swish="int8")
    int8 = quantize.to_int8(model, plan, ranges)
    assert graphs.node(int8, "gate").op_type == "Clip"
    assert [value.name for value in int8.graph.outputs] == ["y", "g", "t"]
    assert snr_db(model, int8, MAPS) > 25
