from __future__ import annotations

import numpy as np

from exporter import graph
from exporter.prepare import unshare
from tests.exporter import graphs

W, B = graphs.noise(1, 4, 4), graphs.noise(2, 4)


def inputs(model: object, *names: str, index: int) -> list[str]:
    return [graphs.node(model, name).inputs[index].name for name in names]  # type: ignore[arg-type]


def test_shared_bias_gets_a_copy_per_node() -> None:
    model = graphs.model(
        """(float[N,4] x) => (float[N,4] y) {
            [a] p = Gemm(x, w, b)
            [b] q = Gemm(p, w, b)
            [c] y = Gemm(q, w, b)
        }""",
        {"w": W, "b": B},
    )
    after, copies = graphs.rewritten(model, unshare.rewrite, {"x": graphs.noise(0, 2, 4)})
    assert copies == 2
    assert len(set(inputs(after, "a", "b", "c", index=2))) == 3
    assert inputs(after, "a", "b", "c", index=1) == ["w"] * 3  # one role, one weight: an unrolled cell stays one
    for name in "abc":
        np.testing.assert_array_equal(graph.constant(graphs.node(after, name).inputs[2]), B)


def test_weight_in_two_roles_gets_a_copy_per_role() -> None:
    """Tied embedding: a table that is looked up and multiplied with, transposed and not."""
    model = graphs.model(
        """(int64[N] ids, float[N,4] x) => (float[N,4] y) {
            [look] e = Gather(w, ids)
            [plain] p = Gemm(x, w)
            [turned] q = Gemm<transB=1>(e, w)
            [sum] y = Add(p, q)
        }""",
        {"w": W},
    )
    after, copies = graphs.rewritten(model, unshare.rewrite, {"x": graphs.noise(0, 2, 4), "ids": np.array([1, 3])})
    names = [*inputs(after, "look", index=0), *inputs(after, "plain", "turned", index=1)]
    assert copies == 2 and len(set(names)) == 3


def test_constant_that_no_layer_reads_stays_shared() -> None:
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { a = Mul(x, b)\n c = Sub(a, b)\n y = Add(c, b) }", {"b": B})
    after, copies = graphs.rewritten(model, unshare.rewrite, {"x": graphs.noise(0, 2, 4)})
    assert copies == 0 and len(after.graph.initializers) == 1


def test_bias_that_is_also_a_plain_constant_is_taken_apart() -> None:
    model = graphs.model(
        "(float[N,4] x) => (float[N,4] y) { [g] a = Gemm(x, w, b)\n [m] y = Mul(a, b) }", {"w": W, "b": B}
    )
    after, copies = graphs.rewritten(model, unshare.rewrite, {"x": graphs.noise(0, 2, 4)})
    assert copies == 1
    assert inputs(after, "g", index=2) != inputs(after, "m", index=1)
