"""Source -> FP32 ONNX, then proof that torch == ONNX.

dynamo is tried first, TorchScript second; the first graph that passes the proof is kept. The proof runs both on the
example and, where axes are dynamic, at other sizes too: an exporter that silently fixes a size does not pass.

A module in half, bfloat16 or double precision is traced as a float32 copy; where that does not run (its forward names a type) as
it is, and the graph is computed in float32. Its inputs and outputs keep their types.
"""

from __future__ import annotations

import contextlib
import copy
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from exporter import blame, call, fake_quantize, graph, precision, proof
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
    notes: what the graph has otherwise than its source, a clause each. given: a file's own graph, where there are notes.
    """

    model: ir.Model
    exporter: str
    sizes: tuple[Mapping[str, int], ...]
    notes: tuple[str, ...] = ()
    given: ir.Model | None = None


def to_onnx(source: Source) -> Traced:
    """Trace a source and prove the graph.

    Raises:
        TraceError: neither exporter gave a graph that equals torch; names the operators or the module at fault.
    """
    if isinstance(source.model, onnx.ModelProto):
        given = ir.serde.deserialize_model(source.model)
        if source.folder is not None:
            ir.external_data.set_base_dir(given.graph, source.folder)
        model, notes = precision.to_float32(given)
        return Traced(model=model, exporter="onnx", sizes=(), notes=notes, given=given if notes else None)
    failures: list[str] = []
    faults: list[str] = []
    with _evaluating(source) as module, torch.compiler.set_stance("force_eager"):
        for form in _forms(source, module):
            for name, export in _EXPORTERS.items():
                try:
                    with quiet(), fake_quantize.AsQdq():
                        model = export(form.source, form.traced)
                except (
                    Exception
                ) as error:  # torch raises RuntimeError, TypeError, AssertionError, its own: all mean "no"
                    failures.append(f"{name}: {blame.why(error)}")
                    faults += blame.operators(error) + blame.modules(error, form.module)
                    by_value = any(isinstance(part, GuardOnDataDependentSymNode) for part in blame.chain(error))
                    if by_value and not isinstance(form.module, torch.jit.ScriptModule):
                        break  # a branch on a value: TorchScript would keep the example's side of it, without a word
                    continue
                made, notes = precision.to_float32(model)
                wrong = _disproof(made, form.references, proof.ALIKE_SNR_DB if notes else proof.EQUAL_SNR_DB)
                if not wrong:
                    sizes = [_sizes(source, known.batch) for known in form.references]
                    return Traced(
                        model=precision.with_ends(made, form.ends) if form.ends else made,
                        exporter=name,
                        sizes=tuple(s for i, s in enumerate(sizes) if s not in sizes[:i]),
                        notes=(*form.notes, *(note for note in notes if note not in form.notes)),
                    )
                failures.append(f"{name}: the graph differs from torch, {wrong}")
    faults = list(dict.fromkeys(faults))
    raise TraceError(
        f"{source.name}: no exporter of torch gives an equal ONNX graph"
        + (f"; at fault: {', '.join(faults)}" if faults else ""),
        found="; ".join(dict.fromkeys(failures)),
        expected="a graph that can be traced: no Python control flow that depends on tensor values",
        do="use torch.where or torch.cond for the branch, replace the operator, or pass an ONNX file",
        op_types=faults,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """A module as it is traced, what it gives, and the types that its inputs and outputs had before.

    source: with the example of this form. traced: the module, or one that calls it in a way that exporters can say.
    """

    source: Source
    module: torch.nn.Module
    traced: torch.nn.Module
    references: list[_Reference]
    ends: Mapping[str, ir.DataType]
    notes: tuple[str, ...]


def _forms(source: Source, module: torch.nn.Module) -> Iterator[_Form]:
    """The module as a float32 copy, where it is of another precision and that copy runs; and as it is."""
    kinds = _precisions(module)
    if kinds and not isinstance(source.model, torch.export.ExportedProgram):
        with contextlib.suppress(Exception), quiet():  # a forward that names a type; a module that cannot be copied
            yield _float32(source, module, kinds)
    yield _form(source, module, {}, _told(source))


def _float32(source: Source, module: torch.nn.Module, kinds: Sequence[torch.dtype]) -> _Form:
    try:
        given = _results(source, module, source.inputs)
    except TraceError:  # an operator that torch has for float32 alone
        given = {}
    single = copy.deepcopy(module).float()
    real = {
        name: value.astype(np.float32) if value.dtype.kind == "f" else value for name, value in source.inputs.items()
    }
    ends = {name: _TYPES[value.dtype.name] for name, value in source.inputs.items() if value.dtype.name in _TYPES}
    ends |= {name: _TYPES[str(value.dtype)[6:]] for name, value in given.items() if str(value.dtype)[6:] in _TYPES}
    named = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
    notes = (f"{named} computed in float32", *_told(source))
    return _form(replace(source, inputs=real, bfloat16=()), single, ends, notes)


def _form(source: Source, module: torch.nn.Module, ends: Mapping[str, ir.DataType], notes: tuple[str, ...]) -> _Form:
    called = call.of(module, [*source.inputs])
    args, kwargs = called.arguments(_tensors(source, source.inputs))
    references = _references(source, module)
    traced: torch.nn.Module = module
    if called.loose or not call.is_plain(_run(source, module, args, kwargs)):
        traced = call.InOrder(module, called)
    return _Form(source=source, module=module, traced=traced, references=references, ends=ends, notes=notes)


# the types that a graph in float32 has at its ends by a Cast; bfloat16 is none that numpy has
_TYPES = {"float16": ir.DataType.FLOAT16, "float64": ir.DataType.DOUBLE}


def _told(source: Source) -> tuple[str, ...]:
    plain = ", ".join(source.bfloat16)
    return (f"{plain} given as float32, for numpy has no bfloat16",) if plain else ()


def _precisions(module: torch.nn.Module) -> list[torch.dtype]:
    """The types other than float32 that the module's parameters have; its buffers where they are half."""
    found = [value.dtype for value in module.parameters() if value.is_floating_point() and value.dtype != torch.float32]
    found += [value.dtype for value in module.buffers() if value.dtype in (torch.float16, torch.bfloat16)]
    return list(dict.fromkeys(found))


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
        called = call.of(module, [*source.inputs])
        args, kwargs = called.arguments(_tensors(source, _widened(source)))
        given: Any = dict(shapes)
        if not kwargs:
            fixed, rest = called.positional[: called.fixed], called.positional[called.fixed :]
            given = (*(shapes[name] for name in fixed), *([tuple(shapes[name] for name in rest)] if rest else []))
        program = torch.onnx.export(
            module, args, kwargs=kwargs, input_names=[*source.inputs], output_names=[*source.outputs],
            dynamic_shapes=given, opset_version=OPSET, dynamo=True, verbose=False,
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
    args, kwargs = call.of(module, [*source.inputs]).arguments(_tensors(source, _widened(source)))
    buffer: Any = io.BytesIO()  # torch says it takes a path; its TorchScript exporter takes a file too
    # named arguments become positional ones in forward's order, whatever order they are given in
    order = call.parameter_names(module)
    names = sorted(source.inputs, key=order.index) if {*source.inputs} <= {*order} and kwargs else [*source.inputs]
    if isinstance(module, torch.jit.ScriptModule):  # the exporter takes them in order alone
        args, kwargs = (*args, *(kwargs[name] for name in names if name in kwargs)), {}
    torch.onnx.export(
        module, args, buffer, kwargs=kwargs, input_names=names, output_names=[*source.outputs],
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
    assert isinstance(source.model, torch.nn.Module)
    module = call.unwrapped(source.model)
    flags = [(part, part.training) for part in module.modules()]
    try:
        try:
            module.eval()
        except Exception as error:  # a module's own train() may raise anything
            raise TraceError(
                f"{source.name}: eval() failed", found=blame.why(error), do="export an eval-mode module"
            ) from error
        stuck = [name or type(part).__name__ for name, part in module.named_modules() if part.training]
        if stuck:
            raise TraceError(
                f"{source.name}: eval() leaves it in training mode",
                found=f"training: {', '.join(stuck[:3])}",
                expected="a module whose eval() sets training to False",
                do="dropout and batch statistics would be exported: fix its train() method",
            )
        yield fake_quantize.observing_nothing(module) if fake_quantize.is_in(module) else module
    finally:
        for part, training in flags:
            part.training = training


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
    def plain(value: torch.Tensor) -> torch.Tensor:
        return value.float() if value.dtype == torch.bfloat16 else value

    return {
        name: plain(value).detach().cpu().resolve_conj().resolve_neg().numpy()
        for name, value in _results(source, module, batch).items()
    }


def _results(source: Source, module: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """What torch returns for a batch, by the outputs' names."""
    args, kwargs = call.of(module, [*batch]).arguments(_tensors(source, batch))
    found = call.tensors(_run(source, module, args, kwargs))
    if len(found) != len(source.outputs):
        raise TraceError(
            f"{source.name}: outputs",
            found=f"{len(source.outputs)} names ({', '.join(source.outputs)}) for {len(found)} tensors",
            expected="one name per tensor",
        )
    named = dict(zip(source.outputs, found, strict=True))
    for name, value in named.items():
        if value.layout != torch.strided:
            raise TraceError(
                f"{source.name}: output {name}",
                found=f"{value.dtype}, {value.layout}".replace("torch.", ""),
                expected="a dense tensor",
                do="call .to_dense() on it in forward",
            )
    return named


def _run(source: Source, module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return module(*args, **kwargs)
    except Exception as error:  # the caller's forward may raise anything
        at = blame.modules(error, module)
        raise TraceError(
            f"{source.name}: its forward fails on the example",
            found=blame.why(error),
            expected=f"a call with {', '.join(f'{k} {v.dtype}{list(v.shape)}' for k, v in source.inputs.items())}",
            do="check names, dtypes and shapes of `inputs`" + (f"; it fails in {at[0]}" if at else ""),
        ) from error


def _tensors(source: Source, batch: Batch) -> dict[str, torch.Tensor]:
    found = {name: torch.from_numpy(np.array(value)) for name, value in batch.items()}
    return found | {name: found[name].to(torch.bfloat16) for name in source.bfloat16}


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


def _disproof(model: ir.Model, references: Sequence[_Reference], most_db: float) -> str:
    """Why the graph is not torch's, on the first batch where it is not; empty when it is on all of them.

    most_db: what is asked of it at most; where torch rounded to half, a float32 graph is not nearer.
    """
    try:
        runner = graph.runner(model)
        for known in references:
            wrong = proof.difference(known.outputs, runner(known.batch), min(known.least_snr_db, most_db))
            if wrong:
                return f"{wrong} at {', '.join(f'{k} {list(v.shape)}' for k, v in known.batch.items())}"
    except graph.RunError as error:
        return f"ONNX Runtime refuses it: {error}"
    return ""
