from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from exporter import graph, prepare, proof
from exporter.errors import QuantizeError
from exporter.prepare import apply
from tests import models
from tests.exporter import graphs, stages


@pytest.mark.parametrize("name", ["residual", "transformer", "upsampler", "shared_weight"])
def test_prepared_graph_equals_the_traced_one_on_new_data(name: str) -> None:
    made = stages.prepared(name)
    for batch in models.batches(name, 9, 2):
        expected = graph.runner(stages.traced(name).model)(batch)
        for model in (made.reference, made.model):
            assert proof.difference(expected, graph.runner(model)(batch)) == ""


def test_rewrites_are_counted_and_reference_is_only_cleaned() -> None:
    made = stages.prepared("upsampler")
    assert made.rewrites["conv_transpose"] == 1
    assert "ConvTranspose" in graphs.op_types(made.reference)
    assert "ConvTranspose" not in graphs.op_types(made.model)


def test_traced_model_is_not_changed() -> None:
    traced = stages.traced("upsampler").model
    before = graph.to_bytes(traced)
    prepare.to_quantizable(traced, next(models.batches("upsampler", 0, 1)))
    assert graph.to_bytes(traced) == before


def test_rewriting_what_is_rewritten_changes_nothing() -> None:
    made = stages.prepared("residual")
    again = prepare.to_quantizable(made.model, next(models.batches("residual", 0, 1)))
    assert graphs.op_types(again.model) == graphs.op_types(made.model)
    assert not {"pad", "batchnorm", "layernorm", "gelu", "hardswish", "gemm", "pool", "unshare"} & again.rewrites.keys()


def test_torch_names_paths_and_stack_traces_are_in_neither_graph() -> None:
    for model in (stages.prepared("residual").reference, stages.prepared("residual").model):
        content = graph.to_bytes(model)
        assert not any(word in content for word in (b".py", b"stack_trace", b"pytorch", b"site-packages"))


def test_rewrite_that_changes_outputs_is_caught_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: ir.Model) -> int:
        for value in model.graph.initializers.values():
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01))
        return 1

    monkeypatch.setattr(apply, "REWRITES", {"wrong": wrong})
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", {"w": graphs.noise(1, 4, 4)})
    with pytest.raises(QuantizeError, match=r"rewrite wrong changed the model: found 'y' differs: SNR 40\.0 dB"):
        prepare.to_quantizable(model, {"x": graphs.noise(0, 2, 4)})


def test_rewrite_that_breaks_the_graph_is_caught_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: ir.Model) -> int:
        model.graph[0].op_type = "NoSuchOperator"
        return 1

    monkeypatch.setattr(apply, "REWRITES", {"broken": broken})
    model = graphs.model("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    with pytest.raises(QuantizeError, match="the graph after rewrite broken does not run"):
        prepare.to_quantizable(model, {"x": graphs.noise(0, 2, 4)})
