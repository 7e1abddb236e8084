"""Source -> FP32 ONNX, then proof that torch == ONNX.

dynamo is tried first, TorchScript second; the first graph that passes the proof is kept. The proof runs both on the
example and, where axes are dynamic, at other sizes too: an exporter that silently fixes a size does not pass.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils._pytree import tree_leaves

from exporter import graph, proof
from exporter.batches import Array, Batch
from exporter.errors import TraceError
from exporter.quiet import quiet
from exporter.source import Source

# Gelu is one node from 20 on and LayerNormalization from 17; TorchScript ends at 20; ORT 1.31 has CPU kernels for all of 20
OPSET = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """An FP32 graph that was proved equal to its source.

    exporter: "dynamo", "torchscript" or "onnx" (given as a file).
    sizes: the sizes the proof ran at, one {label: size} each; empty for a file.
    """

    model: ir.Model
    exporter: str
    sizes: tuple[Mapping[str, int], ...]


def to_onnx(source: Source) -> Traced:
    """Trace a source and prove the graph.

    Raises:
        TraceError: neither exporter gave a graph that equals torch; names the operators or the module at fault.
    """
    if isinstance(source.model, onnx.ModelProto):
        return Traced(model=ir.serde.deserialize_model(source.model), exporter="onnx", sizes=())
    failures: list[str] = []
    faults: list[str] = []
    with _evaluating(source) as module:
        _require_float32(source, module)
        references = _references(source, module)
        for name, export in _EXPORTERS.items():
            try:
                with quiet():
                    model = export(source, module)
            except Exception as error:  # torch raises RuntimeError, TypeError, AssertionError, its own: all mean "no"
                failures.append(f"{name}: {_why(error)}")
                faults += _operators(error) + _modules(error, module)
                if any(isinstance(part, GuardOnDataDependentSymNode) for part in _chain(error)):
                    break  # a branch on a value: TorchScript would keep the example's side of it, without a word
                continue
            wrong = _disproof(model, references)
            if not wrong:
                sizes = [_sizes(source, known.batch) for known in references]
                return Traced(
                    model=model, exporter=name, sizes=tuple(s for i, s in enumerate(sizes) if s not in sizes[:i])
                )
            failures.append(f"{name}: the graph differs from torch, {wrong}")
    faults = list(dict.fromkeys(faults))
    raise TraceError(
        f"{source.name}: no exporter of torch gives an equal ONNX graph"
        + (f"; at fault: {', '.join(faults)}" if faults else ""),
        found="; ".join(failures),
        expected="a graph that can be traced: no Python control flow that depends on tensor values",
        do="use torch.where or torch.cond for the branch, replace the operator, or pass an ONNX file",
        op_types=faults,
    )


def _dynamo(source: Source, module: Any) -> ir.Model:
    labels = {label: torch.export.Dim(_symbol(label)) for axes in source.dynamic.values() for label in axes.values()}
    shapes = {
        name: {axis: labels[label] for axis, label in source.dynamic.get(name, {}).items()} for name in source.inputs
    }
    if isinstance(source.model, torch.export.ExportedProgram):
        program = torch.onnx.export(
            source.model,
            input_names=[*source.inputs],
            output_names=[*source.outputs],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    else:
        args, kwargs = _call(module, _widened(source))
        program = torch.onnx.export(
            module, args, kwargs=kwargs, input_names=[*source.inputs], output_names=[*source.outputs],
            dynamic_shapes=shapes if kwargs else tuple(shapes.values()), opset_version=OPSET, dynamo=True, verbose=False,
        )  # fmt: skip
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    # torch names an inner tensor after its operator even where an output has that name ("embedding"): two of one name
    return NameFixPass()(program.model).model


def _symbol(label: str) -> str:
    """The label as torch.export can say it: a Python name."""
    name = re.sub(r"\W", "_", label)
    return name if name.isidentifier() else f"d_{name}"


def _torchscript(source: Source, module: Any) -> ir.Model:
    if isinstance(source.model, torch.export.ExportedProgram):
        raise TypeError("an exported program has no TorchScript form")
    args, kwargs = _call(module, _widened(source))
    buffer: Any = io.BytesIO()  # torch says it takes a path; its TorchScript exporter takes a file too
    # named arguments become positional ones in forward's order, whatever order they are given in
    names = (
        sorted(source.inputs, key=[*inspect.signature(module.forward).parameters].index) if kwargs else source.inputs
    )
    torch.onnx.export(
        module, args, buffer, kwargs=kwargs, input_names=[*names], output_names=[*source.outputs],
        dynamic_axes={name: dict(axes) for name, axes in source.dynamic.items()}, opset_version=OPSET, dynamo=False,
    )  # fmt: skip
    return ir.serde.deserialize_model(onnx.load_from_string(buffer.getvalue()))


_EXPORTERS: Mapping[str, Callable[[Source, Any], ir.Model]] = {"dynamo": _dynamo, "torchscript": _torchscript}


@contextlib.contextmanager
def _evaluating(source: Source) -> Iterator[Any]:
    """The source's module in eval mode; every training flag is put back afterwards."""
    if isinstance(source.model, torch.export.ExportedProgram):
        yield source.model.module()
        return
    module = source.model
    assert isinstance(module, torch.nn.Module)
    flags = [(part, part.training) for part in module.modules()]
    try:
        try:
            module.eval()
        except Exception as error:  # a module's own train() may raise anything
            raise TraceError(
                f"{source.name}: eval() failed", found=_why(error), do="export an eval-mode module"
            ) from error
        stuck = [name or type(part).__name__ for name, part in module.named_modules() if part.training]
        if stuck:
            raise TraceError(
                f"{source.name}: eval() leaves it in training mode",
                found=f"training: {', '.join(stuck[:3])}",
                expected="a module whose eval() sets training to False",
                do="dropout and batch statistics would be exported: fix its train() method",
            )
        yield module
    finally:
        for part, training in flags:
            part.training = training


_HALF = (torch.float16, torch.bfloat16)


def _require_float32(source: Source, module: Any) -> None:
    """Half precision is not what is proved equal, nor what int8 is made from."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.dtype in _HALF:
            raise TraceError(
                f"{source.name}: parameter {name}",
                found=str(value.dtype).removeprefix("torch."),
                expected="float32",
                do="call .float() on the module",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    """What torch gives for one batch, and how near the graph must come to it."""

    batch: Batch
    outputs: Mapping[str, Array]
    least_snr_db: float


def _references(source: Source, module: Any) -> list[_Reference]:
    """Torch's outputs on the example, on other values and, for dynamic axes, at other sizes; what torch refuses is left out.

    Other values show a branch that a tracer kept one side of, other sizes an axis that it fixed.
    """
    example = _torch_outputs(source, module, source.inputs)
    found = [_Reference(batch=source.inputs, outputs=example, least_snr_db=proof.EQUAL_SNR_DB)]
    tried = [(batch, proof.ALIKE_SNR_DB) for batch in _negated(source)]
    tried += [(batch, proof.EQUAL_SNR_DB) for batch in _resizings(source)]
    for batch, least_snr_db in tried:
        with contextlib.suppress(Exception), quiet():  # torch may refuse a size: (h % 32), a maximal length
            outputs = _torch_outputs(source, module, batch)
            found.append(_Reference(batch=batch, outputs=outputs, least_snr_db=least_snr_db))
    return found


def _torch_outputs(source: Source, module: Any, batch: Batch) -> dict[str, Array]:
    args, kwargs = _call(module, batch)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = module(*args, **kwargs)
    except Exception as error:  # the caller's forward may raise anything
        raise TraceError(
            f"{source.name}: its forward fails on the example",
            found=_why(error),
            expected=f"a call with {', '.join(f'{k} {v.dtype}{list(v.shape)}' for k, v in batch.items())}",
            do="check names, dtypes and shapes of `inputs`",
        ) from error
    leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    if len(leaves) != len(source.outputs):
        raise TraceError(
            f"{source.name}: outputs",
            found=f"{len(source.outputs)} names ({', '.join(source.outputs)}) for {len(leaves)} tensors",
            expected="one name per tensor",
        )
    named = dict(zip(source.outputs, leaves, strict=True))
    for name, leaf in named.items():
        if leaf.dtype == torch.bfloat16 or leaf.layout != torch.strided:
            raise TraceError(
                f"{source.name}: output {name}",
                found=f"{leaf.dtype}, {leaf.layout}".replace("torch.", ""),
                expected="a dense tensor of a type that numpy has",
                do="call .float() or .to_dense() on it in forward",
            )
    return {name: leaf.detach().cpu().resolve_conj().resolve_neg().numpy() for name, leaf in named.items()}


def _call(module: Any, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments, or named ones when every input is an argument of forward in another order."""
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in batch.items()}
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    arguments = list(code.co_varnames[1 : code.co_argcount]) if code else []
    if set(tensors) <= set(arguments) and list(tensors) != arguments[: len(tensors)]:
        return (), tensors
    return tuple(tensors.values()), {}


def _widened(source: Source) -> Batch:
    """The example with every dynamic axis at size 2 or more: torch.export takes a size of 1 for a constant."""
    return {
        name: _resized(value, {axis: max(2, value.shape[axis]) for axis in source.dynamic.get(name, {})})
        for name, value in source.inputs.items()
    }


def _negated(source: Source) -> Iterator[Batch]:
    """The example with its real inputs negated, where it has any."""
    if any(value.dtype.kind == "f" for value in source.inputs.values()):
        yield {name: -value if value.dtype.kind == "f" else value for name, value in source.inputs.items()}


def _resizings(source: Source) -> Iterator[Batch]:
    """The example with each label's axes one larger and twice as large; values repeat, so they stay real."""
    for label, size in _sizes(source, source.inputs).items():
        for other in dict.fromkeys((size + 1, size * 2)):
            yield {
                name: _resized(
                    value, {axis: other for axis, each in source.dynamic.get(name, {}).items() if each == label}
                )
                for name, value in source.inputs.items()
            }


def _resized(value: Array, sizes: Mapping[int, int]) -> Array:
    for axis, size in sizes.items():
        value = np.take(value, range(size), axis=axis, mode="wrap")
    return value


def _sizes(source: Source, batch: Batch) -> dict[str, int]:
    return {label: batch[name].shape[axis] for name, axes in source.dynamic.items() for axis, label in axes.items()}


def _disproof(model: ir.Model, references: Sequence[_Reference]) -> str:
    """Why the graph is not torch's, on the first batch where it is not; empty when it is on all of them."""
    try:
        runner = graph.runner(model)
        for known in references:
            wrong = proof.difference(known.outputs, runner(known.batch), known.least_snr_db)
            if wrong:
                return f"{wrong} at {', '.join(f'{k} {list(v.shape)}' for k, v in known.batch.items())}"
    except graph.RunError as error:
        return f"ONNX Runtime refuses it: {error}"
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def _why(error: BaseException) -> str:
    """The innermost error's first line: the outer ones are the exporter's essays about it."""
    inner = list(_chain(error))[-1]
    lines = [line.strip() for line in re.sub(r"\x1b\[\d*m", "", str(inner)).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0][:180]}" if lines else type(inner).__name__


# dynamo: "No ONNX function found for <OpOverload(op='aten.x', ..."; TorchScript: "the operator 'aten::x' to ONNX opset"
_OPERATOR = re.compile(r"OpOverload\(op='([\w.]+)'|operator '(\w+::\w+)'")


def _operators(error: BaseException) -> list[str]:
    """Operator names in the messages of both exporters, as torch writes them: aten.special_bessel_j0."""
    found = [match for part in _chain(error) for match in _OPERATOR.findall(str(part))]
    return [(dynamo or script).replace("::", ".") for dynamo, script in found]


def _modules(error: BaseException, module: Any) -> list[str]:
    """The innermost forward() outside torch that was running: its module's path, file and line."""
    names = {id(part): name or type(part).__name__ for name, part in module.named_modules()}
    home = str(Path(torch.__file__).parent)
    for part in _chain(error):
        for frame, line in reversed(list(traceback.walk_tb(part.__traceback__))):
            owner = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
            if id(owner) in names and not frame.f_code.co_filename.startswith(home):
                return [f"module {names[id(owner)]} ({Path(frame.f_code.co_filename).name}:{line})"]
    return []
