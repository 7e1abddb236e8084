from __future__ import annotations

import numpy as np
import pytest

from exporter import graph
from exporter.prepare import conv_transpose
from tests.exporter import graphs

X = {"x": graphs.noise(0, 2, 3, 5, 6)}


@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_stride_equal_to_kernel_becomes_conv_and_depth_to_space(block: int, bias: str) -> None:
    model = graphs.model(
        f"(float[N,3,H,W] x) => (float[N,4,P,Q] y) {{ [up] y = ConvTranspose<strides=[{block},{block}]>(x, w{bias}) }}",
        {"w": graphs.noise(1, 3, 4, block, block), "b": graphs.noise(2, 4)},
    )
    after, matched = graphs.rewritten(model, conv_transpose.rewrite, X, {"x": graphs.noise(3, 1, 3, 2, 2)})
    assert (matched, graphs.op_types(after)) == (1, ["Conv", "DepthToSpace"])
    assert graph.constant(graphs.node(after, "up").inputs[1]).shape == (4 * block * block, 3, 1, 1)
    assert after.graph.outputs[0].name == "y"


def test_macs_stay_what_they_were() -> None:
    model = graphs.model(
        "(float[N,3,H,W] x) => (float[N,4,P,Q] y) { [up] y = ConvTranspose<strides=[2,2]>(x, w) }",
        {"w": graphs.noise(1, 3, 4, 2, 2)},
    )
    after, _ = graphs.rewritten(model, conv_transpose.rewrite, X)
    macs = [sum(graph.macs(node, graph.shapes(each, X)) for node in each.graph) for each in (model, after)]
    assert macs == [2 * 3 * 5 * 6 * 4 * 4] * 2


@pytest.mark.parametrize(
    ("attributes", "kernel"),
    [
        ("strides=[2,3]", (2, 3)),
        ("strides=[1,1], pads=[2,0,0,0]", (2, 2)),
        ("strides=[2,2], output_padding=[1,1]", (2, 2)),
        ("strides=[2,2], dilations=[2,2]", (2, 2)),
        ('strides=[2,2], auto_pad="SAME_UPPER"', (2, 2)),
        ("strides=[2,2], group=3", (2, 2)),
        ("strides=[2,2], output_shape=[10,12]", (2, 2)),
    ],
)
def test_any_other_geometry_is_left_alone(attributes: str, kernel: tuple[int, int]) -> None:
    model = graphs.model(
        f"(float[N,3,5,6] x) => (float[N,M,P,Q] y) {{ y = ConvTranspose<{attributes}>(x, w) }}",
        {"w": graphs.noise(1, 3, 4, *kernel)},
    )
    assert graphs.rewritten(model, conv_transpose.rewrite, X)[1] == 0


def test_weight_or_bias_that_is_computed_is_left_alone() -> None:
    for inputs, given in (("float[3,4,2,2] w", ("x, w")), ("float[4] b", "x, k, b")):
        model = graphs.model(
            f"(float[N,3,5,6] x, {inputs}) => (float[N,4,P,Q] y) {{ y = ConvTranspose<strides=[2,2]>({given}) }}",
            {"k": graphs.noise(1, 3, 4, 2, 2)},
        )
        batch = X | {"w": graphs.noise(2, 3, 4, 2, 2)} if "w" in given.split(", ") else X | {"b": graphs.noise(2, 4)}
        assert graphs.rewritten(model, conv_transpose.rewrite, batch)[1] == 0


def test_one_dimension_is_left_alone() -> None:
    model = graphs.model(
        "(float[N,3,L] x) => (float[N,4,M] y) { y = ConvTranspose<strides=[2]>(x, w) }", {"w": graphs.noise(1, 3, 4, 2)}
    )
    assert graphs.rewritten(model, conv_transpose.rewrite, {"x": np.ones((1, 3, 5), np.float32)})[1] == 0


@pytest.mark.parametrize(
    ("attributes", "kernel", "becomes"),
    [
        ("strides=[2,2], pads=[1,1,1,1]", (4, 4), ["Conv", "DepthToSpace", "Slice"]),  # DCGAN, UNet
        ("strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]", (3, 3), ["Conv", "DepthToSpace", "Slice"]),
        ("strides=[2,2]", (3, 3), ["Conv", "DepthToSpace", "Slice"]),
        ("strides=[4,4], pads=[2,2,2,2]", (8, 8), ["Conv", "DepthToSpace", "Slice"]),
        ("strides=[2,2], pads=[1,0,0,1]", (2, 2), ["Conv", "DepthToSpace", "Slice"]),
        ("strides=[3,3], pads=[0,1,2,0]", (4, 2), ["Conv", "DepthToSpace", "Slice"]),
        ("strides=[3,3]", (2, 2), ["Conv", "DepthToSpace", "Slice"]),
        ("strides=[1,1]", (2, 3), ["Conv"]),
        ("strides=[1,1], pads=[1,1,1,1]", (3, 3), ["Conv"]),
    ],
)
def test_any_kernel_and_padding_is_a_conv_of_phases(
    attributes: str, kernel: tuple[int, int], becomes: list[str]
) -> None:
    model = graphs.model(
        f"(float[N,3,H,W] x) => (float[N,4,P,Q] y) {{ [up] y = ConvTranspose<{attributes}>(x, w, b) }}",
        {"w": graphs.noise(1, 3, 4, *kernel), "b": graphs.noise(2, 4)},
    )
    after, matched = graphs.rewritten(model, conv_transpose.rewrite, X, {"x": graphs.noise(3, 1, 3, 3, 2)})
    assert (matched, graphs.op_types(after)) == (1, becomes)
