from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from exporter import graph, trace
from exporter.errors import TraceError
from exporter.source import Source, from_module
from tests import models
from tests.exporter import graphs, stages

Captured = pytest.CaptureFixture[str]
X = np.ones((2, 16), np.float32)


def tracer(monkeypatch: pytest.MonkeyPatch, **exporters: Callable[[Source, Any], ir.Model]) -> None:
    monkeypatch.setattr(trace, "_EXPORTERS", exporters)


def refused(module: nn.Module, inputs: dict[str, Any], dynamic: Any = None) -> TraceError:
    with pytest.raises(TraceError) as error:
        trace.to_onnx(from_module(module, inputs, ["y"], dynamic))
    return error.value


@pytest.mark.parametrize("name", ["residual", "two_input", "transformer", "lstm"])
def test_graph_equals_torch_on_new_data(name: str) -> None:
    module, traced = models.module(name).eval(), stages.traced(name)
    run = graph.runner(traced.model)
    for batch in models.batches(name, 5, 3):
        expected = module(*map(torch.from_numpy, batch.values()))
        expected = expected if isinstance(expected, tuple) else (expected,)
        for value, found in zip(expected, run(batch).values(), strict=True):
            np.testing.assert_allclose(found, value.detach().numpy(), rtol=1e-3, atol=1e-5)


def test_graph_has_the_names_and_named_dimensions_that_were_asked_for() -> None:
    model = stages.traced("two_input").model
    assert [(t.name, t.dtype, t.shape) for t in graph.inputs(model)] == [
        ("ids", "int64", ("batch", 5)),
        ("features", "float32", ("batch", 8)),
    ]
    assert [(t.name, t.shape) for t in graph.outputs(model)] == [("logits", ("batch", 4)), ("embedding", ("batch", 8))]


def test_proof_runs_at_other_sizes_of_every_dynamic_axis() -> None:
    sizes = [tuple(each.values()) for each in stages.traced("transformer").sizes]
    assert sizes == [(2, 6), (3, 6), (4, 6), (2, 7), (2, 12)]
    assert stages.traced("lstm").sizes == ({},)


def test_output_named_as_torch_names_an_inner_tensor_is_exported_well() -> None:
    """torch calls the result of nn.Embedding "embedding", also where an output has that name."""

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids).mean(1)

    ids = np.arange(10).reshape(2, 5)
    traced = trace.to_onnx(from_module(module := Lookup(), {"ids": ids}, ["embedding"], {"ids": {0: "batch"}}))
    assert traced.exporter == "dynamo"
    names = [value.name for node in traced.model.graph for value in node.outputs]
    assert len(set(names)) == len(names) and "embedding" in names
    expected = module(torch.from_numpy(ids)).detach().numpy()
    np.testing.assert_allclose(graph.runner(traced.model)({"ids": ids})["embedding"], expected, rtol=1e-5, atol=1e-6)


def test_module_is_traced_in_eval_mode_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4))
    module.train()
    module[3].eval()  # a mixed module: flags come back one by one, not by train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    flags = [part.training for part in module.modules()]
    seen: list[bool] = []

    def watching(source: Source, traced: Any) -> ir.Model:
        seen.extend(part.training for part in traced.modules())
        return trace._torchscript(source, traced)

    tracer(monkeypatch, watching=watching)
    traced = trace.to_onnx(from_module(module, {"x": X}, ["y"]))
    assert seen == [False] * 5
    assert [part.training for part in module.modules()] == flags == [True, True, True, True, False]
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert "Dropout" not in graphs.op_types(traced.model)


def test_flags_come_back_after_a_failure_too() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("not today")

    module = Broken()
    assert module.training
    error = refused(module, {"x": X})
    assert module.training
    assert (
        "its forward fails on the example: found ValueError: not today, expected a call with x float32[2, 16]"
        in str(error)
    )


def test_module_that_cannot_be_set_to_eval_is_refused() -> None:
    class Stuck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(16, 4))
            self.inner[0].training = True

        def train(self, mode: bool = True) -> nn.Module:
            return self

    error = refused(Stuck(), {"x": X})
    assert "eval() leaves it in training mode: found training: Stuck" in str(error)

    class Raises(nn.Module):
        def train(self, mode: bool = True) -> nn.Module:
            raise RuntimeError("always training")

    assert "eval() failed: found RuntimeError: always training" in str(refused(Raises(), {"x": X}))


def specialised(source: Source, module: Any) -> ir.Model:
    """An exporter that drops the dynamic axes, without a word."""
    return trace._torchscript(replace(source, dynamic={}), module)


def rounded(source: Source, module: Any) -> ir.Model:
    """An exporter that loses a thousandth of a weight."""
    model = trace._torchscript(source, module)
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.001))
    return model


def test_exporter_that_silently_fixes_a_size_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer(monkeypatch, specialised=specialised, honest=trace._torchscript)
    traced = trace.to_onnx(models.source("dynamic_batch"))
    assert traced.exporter == "honest"
    assert traced.sizes == ({"batch": 2}, {"batch": 3}, {"batch": 4})
    tracer(monkeypatch, specialised=specialised)
    with pytest.raises(TraceError, match="specialised: the graph differs from torch, ONNX Runtime refuses it"):
        trace.to_onnx(models.source("dynamic_batch"))


def test_graph_that_is_a_thousandth_off_is_passed_over_with_its_snr(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer(monkeypatch, rounded=rounded)
    with pytest.raises(
        TraceError, match=r"rounded: the graph differs from torch, 'logits' differs: SNR 60\.0 dB.*x \[2, 16\]"
    ):
        trace.to_onnx(models.source("linear"))


class Branch(nn.Module):
    """Goes one way or the other, by the values it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) if x.sum() > 0 else self.right(x)


def test_branch_on_values_names_the_module_its_file_and_line() -> None:
    error = refused(nn.Sequential(nn.Linear(16, 16), Branch()), {"x": X})
    assert error.op_types and error.op_types[0].startswith("module 1 (test_trace.py:")
    assert "at fault: module 1 (test_trace.py:" in str(error)
    assert "no Python control flow that depends on tensor values" in str(error)
    assert "dynamo: " in str(error) and "torchscript: " not in str(error)  # it would bake the example's side in


def test_operator_without_onnx_form_is_named() -> None:
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    error = refused(Bessel(), {"x": X})
    assert any("bessel_j0" in op_type for op_type in error.op_types)
    assert len(str(error).splitlines()) == 1


def test_tracers_noise_stays_out_of_the_terminal(capfd: Captured) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    trace.to_onnx(from_module(Noisy(), {"x": X}, ["y"], {"x": {0: "batch"}}))
    refused(Branch(), {"x": X})
    assert capfd.readouterr() == ("", "")


def test_wrong_count_of_output_names_is_refused() -> None:
    source = replace(models.source("two_input"), outputs=("logits",))
    with pytest.raises(TraceError, match=r"outputs: found 1 names \(logits\) for 2 tensors"):
        trace.to_onnx(source)


def test_inputs_are_positional_or_by_name_when_every_name_is_an_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    class Minus(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    tracer(monkeypatch, torchscript=trace._torchscript)
    one, two = np.full((2, 3), 1, np.float32), np.full((2, 3), 2, np.float32)
    for inputs, expected in (({"p": one, "q": two}, -1), ({"a": one, "b": two}, -1), ({"b": one, "a": two}, 1)):
        model = trace.to_onnx(from_module(Minus(), inputs, ["y"])).model
        assert {tensor.name for tensor in graph.inputs(model)} == {*inputs}
        np.testing.assert_array_equal(graph.runner(model)(inputs)["y"], np.full((2, 3), expected, np.float32))


def test_size_that_torch_itself_refuses_is_not_part_of_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    class Even(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] % 2:
                raise ValueError("odd")
            return torch.relu(x)

    tracer(monkeypatch, torchscript=trace._torchscript)
    traced = trace.to_onnx(from_module(Even(), {"x": X}, ["y"], {"x": {0: "batch"}}))
    assert traced.sizes == ({"batch": 2}, {"batch": 4})


def test_onnx_file_is_its_own_graph() -> None:
    proto = graphs.proto("(float[N,4] x) => (float[N,4] y) { [r] y = Relu(x) }")
    traced = trace.to_onnx(Source(name="m", model=proto, inputs={}, outputs=(), dynamic={}))
    assert (traced.exporter, traced.sizes, graphs.op_types(traced.model)) == ("onnx", (), ["Relu"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_module_is_told_to_call_float(dtype: torch.dtype) -> None:
    error = refused(nn.Linear(16, 4).to(dtype), {"x": X})
    assert f"found {str(dtype)[6:]}, expected float32; call .float() on the module" in str(error)


def test_output_that_numpy_has_no_form_of_is_refused_by_name() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to(torch.bfloat16)

    assert "Half: output y: found bfloat16, strided" in str(refused(Half(), {"x": X}))
