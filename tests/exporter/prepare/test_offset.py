from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from exporter import graph
from exporter.prepare import offset
from tests.exporter import graphs

WEIGHTS = {
    "w": graphs.noise(1, 5, 4, 3),
    "b": graphs.noise(2, 5),
    "warm": np.full(5, 288, np.float32),
    "g": graphs.noise(3, 4, 5),
}
FLAT = {"x": np.float32(300) + np.float32(0.1) * graphs.noise(0, 2, 4, 9)}
WIDE = {"x": graphs.noise(0, 2, 4, 9)}


def rewritten(text: str, batch: dict[str, graphs.Array], *others: dict[str, graphs.Array]) -> list[str]:
    model = graphs.model(text, WEIGHTS)
    return graphs.op_types(graphs.rewritten(model, partial(offset.rewrite, batch=batch), batch, *others)[0])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = Conv(x, w)", ["Sub", "Conv"]),
        ("y = Conv(x, w, b)", ["Sub", "Conv"]),
        ("y = Conv<pads=[1,1]>(x, w, b)", ["Conv"]),  # a border is 0, not 300
        ("a = Conv(x, w)\n c = Conv(x, w, b)\n y = Add(a, c)", ["Sub", "Conv", "Conv", "Add"]),
    ],
)
def test_constant_of_an_input_is_in_the_bias_of_the_layers_that_read_it(body: str, expected: list[str]) -> None:
    text = f"(float[N,4,9] x) => (float[N,M,P] y) {{ {body} }}"
    assert rewritten(text, FLAT, {"x": FLAT["x"] + np.float32(7)}) == expected
    assert rewritten(text, WIDE) == [each for each in expected if each != "Sub"]


def test_constant_of_an_output_is_added_behind_the_layer() -> None:
    text = "(float[N,4,9] x) => (float[N,M,P] y) { y = Conv(x, w, warm) }"
    tenth = {"x": np.float32(0.1) * WIDE["x"]}
    assert rewritten(text, tenth, WIDE) == ["Conv", "Add"]
    assert rewritten(text.replace("warm", "b"), tenth) == ["Conv"]


def test_codes_of_the_input_without_its_constant_are_finer() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,5] y) { y = Gemm(x, g, b) }", WEIGHTS)
    batch = {"x": np.float32(300) + np.float32(0.1) * graphs.noise(0, 6, 4)}
    after, matched = graphs.rewritten(model, partial(offset.rewrite, batch=batch), batch)
    around = graph.runner(graph.with_outputs(after, ["x_about_0"]))(batch)["x_about_0"]
    assert matched == 1 and abs(around).max() < 0.4
