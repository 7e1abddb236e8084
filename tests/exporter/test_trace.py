from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
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


class Mixed(nn.Module):
    """A body of one type around a LayerNorm that names float32, as models trained in half precision have it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.before, self.after = nn.Linear(16, 8).to(dtype), nn.Linear(8, 4).to(dtype)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(self.before(x).float()).to(self.dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_module_of_another_precision_computes_in_float32_and_keeps_its_types(dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    module = Mixed(dtype) if kind == "mixed" else nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    before = {name: (value.dtype, value.clone()) for name, value in module.state_dict().items()}
    x = torch.from_numpy(graphs.noise(0, 3, 16)).to(dtype)
    traced = trace.to_onnx(from_module(module, {"x": x}, ["y"], {"x": {0: "batch"}}))
    public = "float32" if dtype == torch.bfloat16 else str(dtype)[6:]
    assert [t.dtype for t in (*graph.inputs(traced.model), *graph.outputs(traced.model))] == [public] * 2
    layers = [node for node in traced.model.graph if node.op_type in ("Gemm", "MatMul")]
    assert len(layers) == 2 and all(
        value.dtype == ir.DataType.FLOAT for node in layers for value in node.inputs if value
    )
    assert f"{str(dtype)[6:]} computed in float32" in traced.notes
    assert ("x given as float32, for numpy has no bfloat16" in traced.notes) == (dtype == torch.bfloat16)
    found = graph.runner(traced.model)({"x": x.to(getattr(torch, public)).numpy()})["y"]
    np.testing.assert_allclose(found.astype(np.float64), module(x).double().detach().numpy(), atol=0.05)
    assert all(
        value.dtype == kept[0] and torch.equal(value, kept[1])
        for (name, value), kept in zip(module.state_dict().items(), before.values(), strict=True)
    )


def test_output_of_bfloat16_is_float32() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.T).to(torch.bfloat16)

    model = trace.to_onnx(from_module(Half(), {"x": X}, ["y"])).model
    assert [tensor.dtype for tensor in graph.outputs(model)] == ["float32"]


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x) * mask


class Loose(Weighted):
    def forward(self, x: Tensor, **others: Tensor) -> Tensor:  # type: ignore[override]
        return self.inner(x) * others["mask"]


class Anything(Weighted):
    def forward(self, *given: Tensor) -> Tensor:  # type: ignore[override]
        return self.inner(given[0]) * given[1]


class Keyword(Weighted):
    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.inner(x) * mask


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        extra = args[1:]
        return function(args[0], *extra, **kwargs)

    return inner


class Decorated(Weighted):
    forward = decorated(Weighted.forward)


class Hooked(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.inner.register_forward_hook(lambda module, given, found: found + 1)
        self.inner = nn.utils.parametrizations.weight_norm(self.inner)


class Compiled(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.compile(self.inner)  # type: ignore[assignment]


class Parallel(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.DataParallel(self.inner)  # type: ignore[assignment]


FORMS: dict[str, Callable[[], nn.Module]] = {
    "args": Anything,
    "kwargs": Loose,
    "keyword only": Keyword,
    "decorated": Decorated,
    "hooks and weight norm": Hooked,
    "a compiled part": Compiled,
    "compiled": lambda: torch.compile(Weighted()),  # type: ignore[return-value]
    "parallel, a part too": lambda: nn.DataParallel(Parallel()),
    "scripted": lambda: torch.jit.script(Weighted()),
    "traced": lambda: torch.jit.trace(Weighted().eval(), (torch.ones(2, 16), torch.ones(2, 4))),
}


@pytest.mark.parametrize(
    ("form", "names"),
    [*((form, ("x", "mask")) for form in FORMS), ("keyword only", ("mask", "x")), ("traced", ("mask", "x"))],
)
def test_module_of_every_form_is_called_as_its_forward_says(form: str, names: tuple[str, str]) -> None:
    values = {"x": graphs.noise(0, 2, 16), "mask": graphs.noise(1, 2, 4)}
    module = FORMS[form]().eval()
    parts, flags = [*module.modules()], [part.training for part in module.modules()]
    inputs = {name: values[name] for name in names}
    traced = trace.to_onnx(from_module(module, inputs, ["y"], {name: {0: "batch"} for name in inputs}))
    assert traced.sizes == ({"batch": 2}, {"batch": 3}, {"batch": 4})
    assert [*module.modules()] == parts and [part.training for part in parts] == flags
    more = {name: np.concatenate([value, -value, value]) for name, value in values.items()}
    given = [torch.from_numpy(more[name]) for name in ("x", "mask")]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = module(given[0], mask=given[1]) if form in ("kwargs", "keyword only") else module(*given)
    np.testing.assert_allclose(graph.runner(traced.model)(more)["y"], expected.numpy(), rtol=1e-4, atol=1e-5)


@dataclass
class Boxes:
    scores: Tensor
    others: Any
    count: int = 3


def test_results_are_found_in_dataclasses_and_mappings_in_their_order() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Boxes:
            y = self.inner(x)
            return Boxes(scores=y, others={"none": None, "more": [y.sum(1), MappingProxyType({"last": y * 2})]})

    module = Detector().eval()
    traced = trace.to_onnx(from_module(module, {"x": X}, ["scores", "sums", "twice"], {"x": {0: "batch"}}))
    found = graph.runner(traced.model)({"x": X})
    scores = module(torch.from_numpy(X)).scores.detach().numpy()
    np.testing.assert_allclose(found["scores"], scores, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["sums"], scores.sum(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["twice"], scores * 2, rtol=1e-5, atol=1e-6)


def test_branch_on_values_in_a_script_is_exported_with_both_sides() -> None:
    module = torch.jit.script(Branch())
    model = trace.to_onnx(from_module(module, {"x": X}, ["y"])).model
    assert "If" in graphs.op_types(model)
    for x in (X, -X):
        expected = module(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(graph.runner(model)({"x": x})["y"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:Please use quant_min")
@pytest.mark.parametrize("engine", ["x86", "qnnpack"])
def test_fake_quantization_becomes_qdq_nodes_and_the_module_keeps_its_scales(engine: str) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    torch.manual_seed(0)
    module: Any = Small()
    module.qconfig = torch.ao.quantization.get_default_qat_qconfig(engine)
    module = torch.ao.quantization.prepare_qat(module.train())
    x = torch.from_numpy(graphs.noise(0, 1, 3, 8, 8))
    module(x)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    traced = trace.to_onnx(from_module(module, {"x": x}, ["y"]))
    assert graphs.op_types(traced.model).count("QuantizeLinear") >= 4
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
    with torch.no_grad():
        expected = module.eval().apply(torch.ao.quantization.disable_observer)(x).numpy()
    np.testing.assert_allclose(graph.runner(traced.model)({"x": x.numpy()})["y"], expected, atol=1e-6)


def test_cause_that_is_told_is_the_outermost_one() -> None:
    class Lost(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return x * [][0]
            except IndexError as error:
                raise ValueError("the table is empty") from error

    said = str(refused(Lost(), {"x": X}))
    assert "found ValueError: the table is empty" in said and "it fails in module Lost (test_trace.py:" in said
