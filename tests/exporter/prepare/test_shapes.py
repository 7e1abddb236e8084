from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter.prepare import shapes
from tests.exporter import graphs, stages


def test_every_tensor_of_a_traced_network_has_a_type_and_a_rank() -> None:
    for name in ("residual", "transformer"):
        model = stages.prepared(name).model
        for node in model.graph:
            for value in node.outputs:
                assert value.dtype is not None and value.shape is not None, value.name


def test_stale_shape_is_replaced_and_missing_one_is_found() -> None:
    model = graphs.model(
        "(float[N,3,6,6] x) => (float[N,M] y) { [c] c = Conv(x, w)\n [f] y = Flatten(c) }",
        {"w": graphs.noise(1, 4, 3, 3, 3)},
    )
    conv = graphs.node(model, "c").outputs[0]
    conv.shape = ir.Shape([1, 2, 3])  # as a rewrite may leave it
    after, _ = graphs.rewritten(model, shapes.rewrite, {"x": graphs.noise(0, 2, 3, 6, 6)})
    assert [str(dim) for dim in graphs.node(after, "c").outputs[0].shape] == ["N", "4", "4", "4"]
    assert graphs.node(after, "c").outputs[0].dtype == ir.DataType.FLOAT


def test_shape_that_is_computed_is_followed() -> None:
    model = graphs.model(
        """(float[2,3,4] x) => (float[P,Q] y) {
            s = Shape<start=0, end=1>(x)
            t = Concat<axis=0>(s, rest)
            [r] r = Reshape(x, t)
            y = Relu(r)
        }""",
        {"rest": np.array([-1])},
    )
    graphs.node(model, "r").outputs[0].shape = None
    shapes.rewrite(model)
    assert list(graphs.node(model, "r").outputs[0].shape) == [2, 12]
