from __future__ import annotations

import numpy as np
import pytest

from exporter import graph
from exporter.prepare import channels
from tests.exporter import graphs


@pytest.mark.parametrize(("found", "filled"), [(1, 4), (3, 4), (6, 8)])
def test_picture_of_odd_channels_is_filled_to_a_multiple_of_four(found: int, filled: int) -> None:
    model = graphs.model(
        f"(float[N,{found},9,9] x) => (float[N,5,P,Q] y) {{ [c] y = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w, b) }}",
        {"w": graphs.noise(1, 5, found, 3, 3), "b": graphs.noise(2, 5)},
    )
    after, matched = graphs.rewritten(model, channels.rewrite, {"x": graphs.noise(0, 2, found, 9, 9)})
    weight = graph.constant(graphs.node(after, "c").inputs[1])
    assert (matched, graphs.op_types(after), weight.shape) == (1, ["Pad", "Conv"], (5, filled, 3, 3))
    assert not np.any(weight[:, found:])


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("[c] y = Conv(x, w)", (5, 4, 3, 3)),
        ("[c] y = Conv<group=2>(x, w)", (6, 2, 3, 3)),
        ("r = Relu(x)\n [c] y = Conv(r, w)", (5, 3, 3, 3)),
        ("[c] y = Conv<strides=[8,8]>(x, w)", (5, 3, 8, 8)),
    ],
)
def test_words_groups_inner_tensors_and_large_kernels_are_left_alone(text: str, weight: tuple[int, ...]) -> None:
    given = weight[1] * (2 if "group" in text else 1)
    model = graphs.model(
        f"(float[N,{given},9,9] x) => (float[N,M,P,Q] y) {{ {text} }}", {"w": graphs.noise(1, *weight)}
    )
    assert graphs.rewritten(model, channels.rewrite, {"x": graphs.noise(0, 2, given, 9, 9)})[1] == 0
