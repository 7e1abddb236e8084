from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import exporter
from exporter import flat, graph
from tests.exporter import graphs

CONVS = """(float[N,4,8,8] x) => (float[N,C,P,Q] y) {
    [k] a = Conv%s(x, w)
    [r] r = Relu(a)
    [c] %s
}"""
WEIGHTS: dict[str, Any] = {
    "w": graphs.noise(1, 8, 4, 3, 3) * np.float32(0.2),
    "v": graphs.noise(2, 3, 8, 1, 1) * np.float32(0.3),
    "b": graphs.noise(3, 3),
    "warm": np.full(3, 288, np.float32),
    "tenth": np.float32(0.1),
    "kelvin": np.float32(288),
    "large": np.float32(200),
}
SCALED = "c = Conv(r, v, b)\n [t] t = Mul(c, tenth)\n "


def exported(out: Path, body: str, middle: float, spread: float, pads: str = "") -> tuple[Any, str]:
    onnx.save(graphs.proto(CONVS % (pads, body), WEIGHTS), out / "m.onnx")
    given = [{"x": np.float32(middle) + np.float32(spread) * graphs.noise(10 + n, 2, 4, 8, 8)} for n in range(12)]
    source, recipe = exporter.from_onnx(out / "m.onnx"), exporter.load_recipe("portable")
    report = exporter.export(source, recipe, given[:9], given[9:], out / "out", max_evaluations=0)
    return report, (out / "out" / "plan.txt").read_text()


@pytest.mark.parametrize(
    ("body", "op_types"),
    [
        (SCALED + "[s] y = Add(t, kelvin)", ["Add"]),
        (SCALED + "[s] s = Add(t, kelvin)\n [m] m = Mul(c, large)\n [j] y = Concat<axis=1>(s, m)", ["Add", "Concat"]),
        ("c = Conv(r, v, warm)\n [s] y = Relu(c)", ["Conv", "Relu"]),
    ],
)
def test_makers_of_an_output_that_varies_by_little_about_a_constant_are_float(body: str, op_types: list[str]) -> None:
    model = graphs.model(CONVS % ("", body), WEIGHTS)
    batch = {"x": graphs.noise(0, 8, 4, 8, 8)}
    names = [value.name or "" for node in model.graph for value in node.outputs]
    run = graph.runner(graph.with_outputs(model, names))(batch)
    ends = {name: (float(run[name].min()), float(run[name].max())) for name in names}
    found = flat.nodes(model, ends, [node.name or "" for node in model.graph], [batch])
    assert sorted(graphs.node(model, name).op_type for name in found) == op_types
    assert all("fewer than 16 steps of" in why for why in found.values())


def test_layer_of_such_an_output_keeps_what_varies(tmp_path: Path) -> None:
    report, plan = exported(tmp_path, "c = Conv(r, v, warm)\n [s] y = Relu(c)", 0.0, 0.1)
    assert plan.count("fewer than 16 steps of its codes") == 2 and "k | Conv | int8" in plan
    assert report.drift.worst_snr_db > 25


@pytest.mark.parametrize("pads", ["", "<pads=[1,1,1,1]>"])
def test_what_is_behind_an_input_that_varies_by_little_about_a_constant_is_float(tmp_path: Path, pads: str) -> None:
    report, plan = exported(tmp_path, "y = Conv(r, v, b)", 300.0, 0.1, pads)
    assert "fewer than 16 steps of its codes" in plan and report.met and report.drift.worst_snr_db > 25


def test_tensors_of_an_ordinary_kind_and_constants_stay_as_they_are() -> None:
    model = graphs.model(CONVS % ("", "y = Conv(r, v, b)"), WEIGHTS)
    batch = {"x": graphs.noise(0, 8, 4, 8, 8)}
    plan, ranges = graphs.planned(model, batch)
    ends = {name: (each.low, each.high) for name, each in ranges.tensors.items()}
    assert flat.nodes(model, ends, plan.int8, [batch]) == {}
    ends["y"] = (5.0, 5.0)
    assert flat.nodes(model, ends, plan.int8, [batch]) == {}
    ends["y"] = (5.0, 5.3)
    assert [*flat.nodes(model, ends, plan.int8, [batch])] == ["c"]


def test_fewer_than_16_steps_of_the_codes_are_few() -> None:
    assert flat.is_flat((300 - 0.1, 300 + 0.1), (299.9, 300.1)) and flat.is_flat((0, 1), (0, 640))
    assert not flat.is_flat((0, 1), (0, 1)) and not flat.is_flat((3, 3), (3, 3)) and not flat.is_flat((0, 1), (0, 15.9))


def test_concat_of_one_tensor_with_itself_again_and_again_is_looked_at_once() -> None:
    steps = "\n".join(f"[c{n}] t{n} = Concat<axis=0>(t{n - 1}, t{n - 1})" for n in range(1, 60))
    model = graphs.model(f"(float[N,2] x) => (float[M,2] t59) {{ [a] t0 = Relu(x)\n {steps} }}")
    ends = {"t0": (287.9, 288.1), **{f"t{n}": (287.9, 288.1) for n in range(1, 60)}}
    assert "a" in flat.nodes(model, ends, ["a"], [{"x": graphs.noise(0, 8, 2)}])
