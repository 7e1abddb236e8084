from __future__ import annotations

import numpy as np
import pytest

from exporter.prepare import pad
from tests.exporter import graphs

X = {"x": graphs.noise(0, 2, 3, 6, 6)}


def folded(pads: list[int], attributes: str = "", value: float | None = None, conv: str = "Conv") -> list[str]:
    weights = {"pads": np.array(pads), "w": graphs.noise(1, 4, 3, 3, 3)}
    weights |= {"value": np.float32(value)} if value is not None else {}
    given = "x, pads, value" if value is not None else "x, pads"
    text = f"(float[N,3,6,6] x) => (float[N,4,H,W] y) {{ p = Pad{attributes}({given})\n y = {conv}(p, w) }}"
    return graphs.op_types(graphs.rewritten(graphs.model(text, weights), pad.rewrite, X)[0])


@pytest.mark.parametrize("pads", [[0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0, 1, 2]])
def test_zero_padding_is_folded_into_conv(pads: list[int]) -> None:
    assert folded(pads) == ["Conv"]
    assert folded(pads, value=0.0) == ["Conv"]
    assert folded(pads, conv="Conv<pads=[1,0,1,0], strides=[2,2]>") == ["Conv"]


def test_padding_with_another_value_mode_or_axis_stays() -> None:
    around = [0, 0, 1, 1, 0, 0, 1, 1]
    assert folded(around, value=1.0) == ["Pad", "Conv"]
    assert folded(around, '<mode="reflect">') == ["Pad", "Conv"]
    assert folded(around, '<mode="edge">') == ["Pad", "Conv"]
    assert folded([1, 0, 1, 1, 0, 0, 1, 1]) == ["Pad", "Conv"]


def test_negative_padding_stays() -> None:
    assert folded([0, 0, -1, 0, 0, 0, 0, 0]) == ["Pad", "Conv"]


def test_padding_that_something_else_reads_keeps_its_value() -> None:
    model = graphs.model(
        "(float[N,3,6,6] x) => (float[N,4,6,6] y, float[N,3,8,8] p) { p = Pad(x, pads)\n y = Conv(p, w) }",
        {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "w": graphs.noise(1, 4, 3, 3, 3)},
    )
    after, _ = graphs.rewritten(model, pad.rewrite, X)
    assert "Pad" in graphs.op_types(after)
