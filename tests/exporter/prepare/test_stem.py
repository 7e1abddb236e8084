from __future__ import annotations

import numpy as np
import pytest

from exporter import graph
from exporter.prepare import stem
from tests.exporter import graphs


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "pads", "blocks", "then"),
    [
        (3, (7, 7), 2, (3, 3, 3, 3), (12, 4, 4), (2, 2, 1, 1)),
        (3, (6, 6), 2, (2, 2, 2, 2), (12, 3, 3), (1, 1, 1, 1)),
        (3, (5, 5), 2, (1, 1, 2, 2), (12, 3, 3), (1, 1, 1, 1)),
        (3, (5, 5), 2, (0, 0, 0, 0), (12, 3, 3), (0, 0, 0, 0)),
        (3, (7, 5), 2, (3, 0, 2, 4), (12, 4, 3), (2, 0, 1, 2)),
        (3, (4, 4), 4, (0, 0, 0, 0), (48, 1, 1), (0, 0, 0, 0)),
        (3, (7, 7), 4, (3, 3, 3, 3), (48, 2, 2), (1, 1, 0, 0)),
        (1, (3, 3), 2, (1, 1, 1, 1), (4, 2, 2), (1, 1, 0, 0)),
    ],
)
def test_strided_conv_of_a_picture_reads_blocks_with_stride_one(
    channels: int,
    kernel: tuple[int, int],
    stride: int,
    pads: tuple[int, ...],
    blocks: tuple[int, ...],
    then: tuple[int, ...],
) -> None:
    model = graphs.model(
        f"(float[N,{channels},16,24] x) => (float[N,5,P,Q] y)"
        f"{{ [c] y = Conv<strides=[{stride},{stride}], pads=[{','.join(map(str, pads))}]>(x, w, b) }}",
        {"w": graphs.noise(1, 5, channels, *kernel), "b": graphs.noise(2, 5)},
    )
    after, matched = graphs.rewritten(model, stem.rewrite, {"x": graphs.noise(0, 2, channels, 16, 24)})
    conv = graphs.node(after, "c")
    weight = graph.constant(conv.inputs[1])
    assert (matched, graphs.op_types(after), weight.shape) == (1, ["SpaceToDepth", "Conv"], (5, *blocks))
    assert (conv.attributes.get_ints("strides"), tuple(conv.attributes.get_ints("pads"))) == ((1, 1), then)
    assert np.count_nonzero(weight) == 5 * channels * kernel[0] * kernel[1]


@pytest.mark.parametrize(
    ("size", "attributes", "weight"),
    [
        ("16,16", "strides=[2,2], pads=[1,1,1,1]", (5, 3, 3, 3)),  # faster with its channels filled
        ("16,16", "strides=[4,4], pads=[2,2,2,2]", (5, 3, 11, 11)),
        ("16,16", "strides=[2,2]", (5, 8, 5, 5)),
        ("16,16", "strides=[1,1]", (5, 3, 6, 6)),
        ("16,16", "strides=[8,8]", (5, 3, 8, 8)),
        ("16,16", "strides=[2,4]", (5, 3, 6, 6)),
        ("16,15", "strides=[2,2]", (5, 3, 6, 6)),
        ("H,16", "strides=[2,2]", (5, 3, 6, 6)),
        ("16,16", "strides=[2,2], dilations=[2,2]", (5, 3, 6, 6)),
        ("16,16", "strides=[2,2], group=2", (6, 1, 6, 6)),
        ('16,16', 'strides=[2,2], auto_pad="SAME_UPPER"', (5, 3, 6, 6)),
    ],
)  # fmt: skip
def test_conv_that_gains_nothing_or_has_no_whole_blocks_is_left_alone(
    size: str, attributes: str, weight: tuple[int, ...]
) -> None:
    channels = weight[1] * (2 if "group" in attributes else 1)
    model = graphs.model(
        f"(float[N,{channels},{size}] x) => (float[N,M,P,Q] y) {{ [c] y = Conv<{attributes}>(x, w) }}",
        {"w": graphs.noise(1, *weight)},
    )
    assert graphs.rewritten(model, stem.rewrite)[1] == 0


def test_conv_of_an_inner_tensor_is_left_alone() -> None:
    model = graphs.model(
        "(float[N,3,16,16] x) => (float[N,5,P,Q] y) { r = Relu(x) [c] y = Conv<strides=[2,2]>(r, w) }",
        {"w": graphs.noise(1, 5, 3, 6, 6)},
    )
    assert graphs.rewritten(model, stem.rewrite)[1] == 0
