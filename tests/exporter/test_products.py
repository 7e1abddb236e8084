"""exporter.products: products of two activations run on the kernel that layers have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from exporter import graph, place, products, quantize
from exporter.calibrate import distinguish, observe
from exporter.target import TARGETS, X86_VNNI
from runtime.kernels import trace
from tests.exporter import graphs

# one head: q kᵀ, softmax, times v; each from a linear layer, as a transformer has them behind the rewrite `linear`
ATTENTION = """(float[24,32] x) => (float[1,24,32] y) {
    [q0] q0 = Gemm(x, wq, b)
    [q] q = Reshape(q0, pages)
    [k0] k0 = Gemm(x, wk, b)
    [k1] k1 = Reshape(k0, pages)
    [k] k = Transpose<perm=[0,2,1]>(k1)
    [v0] v0 = Gemm(x, wv, b)
    [v] v = Reshape(v0, pages)
    [scores] s = MatMul(q, k)
    [softmax] p = Softmax<axis=-1>(s)
    [mixed] y = MatMul(p, v)
}"""
WEIGHTS = {
    "wq": graphs.noise(1, 32, 32) / 6, "wk": graphs.noise(2, 32, 32) / 6, "wv": graphs.noise(3, 32, 32) / 6,
    "b": graphs.noise(4, 32) / 6, "pages": np.array([1, 24, 32], np.int64),
}  # fmt: skip
BATCHES = [{"x": graphs.noise(seed, 24, 32)} for seed in range(10, 14)]
DENSE = replace(X86_VNNI, quantize_ns=0.0, dequantize_ns=0.0, crossing_ns=0.0)  # so small a graph would stay float


def quantized(text: str = ATTENTION, weights: dict[str, np.ndarray] = WEIGHTS) -> tuple[ir.Model, ir.Model]:
    model = graphs.model(text, weights)
    plan = place.decide(model, DENSE, (), graph.shapes(model, BATCHES[0]))
    ranges = distinguish(model, observe(model, plan.tensors, BATCHES).ranges)
    return model, quantize.to_int8(model, plan, ranges)


def kernels(int8: ir.Model, entries: dict[str, str], folder: Path) -> dict[str, tuple[str, str]]:
    (folder / "m.onnx").write_bytes(graph.to_bytes(int8))
    found = trace(folder / "m.onnx", BATCHES[0], entries=entries, runs=1)
    return {each.node: (each.kernel, each.types) for each in found.kernels if each.integer}


def test_products_run_on_signed_codes_and_the_layers_before_them_in_integers(tmp_path: Path) -> None:
    _, int8 = quantized()
    ready, there = products.ready(int8, X86_VNNI)
    before = kernels(int8, dict(X86_VNNI.session), tmp_path)
    after = kernels(ready, dict(there.session), tmp_path)
    assert {types for kernel, types in before.values() if "MatMul" in kernel} == {"u8u8"}
    assert {types for kernel, types in after.values()} == {"u8s8"}
    assert sorted(kernel for kernel, _ in after.values()) == sorted(["QGemm"] * 3 + ["MatMulIntegerToFloat"] * 2)


def test_signed_codes_stand_for_the_same_numbers() -> None:
    _, int8 = quantized()
    ready, _ = products.ready(int8, X86_VNNI)
    theirs, ours = (graph.runner(each) for each in (int8, ready))
    for batch in BATCHES:
        assert ours(batch)["y"] == pytest.approx(theirs(batch)["y"], abs=1e-5)
    zeros = [graph.constant(node.inputs[2]) for node in ready.graph if node.op_type == "DequantizeLinear"]
    signed = {name for name in ready.graph.initializers if name.endswith("_signed")}
    assert len(signed) == 2
    assert all(zero is None or zero.dtype in (np.uint8, np.int8, np.int32) for zero in zeros)


def test_graph_that_is_given_is_not_changed_and_ready_again_is_the_same() -> None:
    _, int8 = quantized()
    before = graph.to_bytes(int8)
    ready, there = products.ready(int8, X86_VNNI)
    assert graph.to_bytes(int8) == before
    assert products.ready(ready, there) == (ready, there)


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"x86-vnni"}))
def test_other_targets_have_no_signed_factor(name: str) -> None:
    _, int8 = quantized()
    assert products.ready(int8, TARGETS[name]) == (int8, TARGETS[name])


@pytest.mark.parametrize(
    "text",
    [
        "(float[24,32] x) => (float[24,24] y) { [t] t = Transpose<perm=[1,0]>(x) [n] y = MatMul(x, t) }",  # x is both
        """(float[24,32] x) => (float[24,24] y) {
            [a] a = Add(x, x) [t] t = Transpose<perm=[1,0]>(a) [r] r = Gemm(x, wq, b) [n] y = MatMul(r, t)
        }""",  # QLinearAdd writes uint8 alone
        """(float[24,32] x) => (float[24,24] y) {
            [r] r = Gemm(x, wq, b) [s] q, k = Split<axis=1, num_outputs=2>(r) [t] t = Transpose<perm=[1,0]>(k) [n] y = MatMul(q, t)
        }""",
        """(float[24,32] x) => (float[24,24] y) {
            [r] r = Gemm(x, wq, b) [q] q = Gemm<transA=1>(x, x24) [n] y = MatMul(r, q)
        }""".replace("[q] q = Gemm<transA=1>(x, x24)", "[q] q = Gemm(xt, w24)").replace(
            "{", "{ [xt] xt = Transpose<perm=[1,0]>(x)"
        ),  # nothing moves between the layer and the product
    ],
)
def test_codes_that_others_read_or_a_kernel_writes_as_uint8_become_signed_behind_it(text: str, tmp_path: Path) -> None:
    weights = {**WEIGHTS, "w24": graphs.noise(5, 24, 24) / 6}
    _, int8 = quantized(text, weights)
    ready, there = products.ready(int8, X86_VNNI)
    kernel, types = kernels(ready, dict(there.session), tmp_path)["n"]
    assert (kernel, types) in {("MatMulIntegerToFloat", "u8s8"), ("QLinearMatMul", "u8s8")}
    theirs, ours = (graph.runner(each)(BATCHES[0])["y"] for each in (int8, ready))
    assert ours == pytest.approx(theirs, abs=1e-5)
    others = {
        name: types for name, (_, types) in kernels(int8, dict(X86_VNNI.session), tmp_path).items() if name != "n"
    }
    assert {
        name: types for name, (_, types) in kernels(ready, dict(there.session), tmp_path).items() if name != "n"
    } == others


def test_graph_without_products_stays() -> None:
    _, int8 = quantized("(float[24,32] x) => (float[24,32] y) { [r] y = Gemm(x, wq, b) }")
    assert products.ready(int8, X86_VNNI) == (int8, X86_VNNI)


def test_factor_that_a_float_node_makes_is_signed_where_it_is_rounded(tmp_path: Path) -> None:
    text = """(float[24,32] x) => (float[24,24] y) {
        [r] r = Gemm(x, wq, b) [e] e = Tanh(x) [t] t = Transpose<perm=[1,0]>(e) [n] y = MatMul(r, t)
    }"""
    _, int8 = quantized(text)
    ready, there = products.ready(int8, X86_VNNI)
    assert ready is not int8
    assert kernels(ready, dict(there.session), tmp_path)["n"][1] == "u8s8"
