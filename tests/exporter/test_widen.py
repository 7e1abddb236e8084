from __future__ import annotations

import numpy as np
import pytest

from exporter import graph, quantize
from exporter.errors import QuantizeError
from tests.exporter import graphs

SMALL = 10.0 ** -np.arange(30, 46, dtype=np.float64)


@pytest.mark.parametrize("x_reach", [1.0, 1e-20, 1e-30])
def test_channels_of_next_to_nothing_leave_sane_scales_and_what_lives_as_it_was(x_reach: float) -> None:
    w, b = graphs.noise(1, 16, 16, 1, 1), graphs.noise(2, 16) * np.float32(x_reach)
    w[::2] *= SMALL[::2, None, None, None].astype(np.float32)
    b[::4] *= SMALL[::4].astype(np.float32)
    model = graphs.model("(float[N,16,4,4] x) => (float[N,16,4,4] y) { [c] y = Conv(x, w, b) }", {"w": w, "b": b})
    batch = {"x": graphs.noise(3, 8, 16, 4, 4) * np.float32(x_reach)}
    plan, ranges = graphs.planned(model, batch)
    int8 = quantize.to_int8(model, plan, ranges)
    for node in int8.graph:
        if node.op_type == "DequantizeLinear":
            scale = graph.constant(node.inputs[1])
            assert (scale >= np.finfo(np.float32).tiny).all() and np.isfinite(scale).all()
    expected, got = (graph.runner(each)(batch)["y"] / np.float32(x_reach) for each in (model, int8))
    assert 10 * np.log10((expected**2).sum() / ((expected - got) ** 2).sum()) > 35


def test_channel_of_zeros_keeps_its_bias() -> None:
    """At a scale of 1 it would be rounded to multiples of the input's scale, here 0.8."""
    w, b = graphs.noise(1, 4, 4), np.array([0.3, -0.2, 0.25, 0.1], np.float32)
    w[:, 2] = 0
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { [g] y = Gemm(x, w, b) }", {"w": w, "b": b})
    batch = {"x": 100 * graphs.noise(0, 16, 4)}
    plan, ranges = graphs.planned(model, batch)
    got = graph.runner(quantize.to_int8(model, plan, ranges))(batch)["y"]
    np.testing.assert_allclose(got[:, 2], 0.25, rtol=1e-5)


def test_layer_whose_whole_output_is_too_small_for_a_scale_is_refused_by_name() -> None:
    w = graphs.noise(1, 8, 8, 1, 1) * np.float32(1e-4)
    model = graphs.model(
        "(float[N,8,4,4] x) => (float[N,8,4,4] y) { [c] y = Conv(x, w, b) }", {"w": w, "b": np.zeros(8, np.float32)}
    )
    batch = {"x": graphs.noise(3, 8, 8, 4, 4) * np.float32(1e-31)}
    plan, ranges = graphs.planned(model, batch)
    with pytest.raises(QuantizeError, match="Conv c: found products so small") as error:
        quantize.to_int8(model, plan, ranges)
    assert error.value.node == "c"
