"""Where a model comes from: an nn.Module, a .pt2 program, an .onnx file, or a Python file that offers one.

A Source is a frozen description; nothing is traced, run or changed here. A pickle is never loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import io
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import onnx
import torch

from exporter import batches, external, sniff
from exporter import program as program_files
from exporter.batches import Array
from exporter.errors import TraceError
from exporter.quiet import quiet
from runtime.errors import PacklightError, install

OLDEST_OPSET = 11  # what onnx.version_converter was tried on; older files differ in Pad, Clip, Resize, BatchNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model and how it is called.

    model: what is traced; the caller's object is never changed.
    inputs: one example per input, in the order of the module's arguments. Empty for ONNX, where the file says it.
    outputs: names for the results, in order. Empty for ONNX.
    dynamic: {input: {axis: label}}; equal labels are equal sizes. Output names are accepted and need not be given.
    folder: where the large weights of an ONNX file lie, which are not read into `model`.
    bfloat16: the inputs whose example was of that type; numpy has none, so theirs are float32 here and in the bundle.
    """

    name: str
    model: torch.nn.Module | torch.export.ExportedProgram | onnx.ModelProto
    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]
    bfloat16: tuple[str, ...] = ()
    folder: Path | None = None


def from_module(
    module: torch.nn.Module,
    inputs: Mapping[str, Any],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    name: str | None = None,
) -> Source:
    """A trained module, called with `inputs` in their order (or by name, when every name is one of its arguments).

    Args:
        module: traced in eval mode; its own training flags are restored afterwards.
        inputs: one example (array or tensor) per input, as the model would see it in use.
        outputs: a name for each result, in order.
        dynamic: {input: {axis: label}} for the axes whose size may change, e.g. {"image": {0: "batch"}}.

    Raises:
        TraceError: no inputs or outputs, or a `dynamic` entry that fits none of them.
        CalibrationError: an example that is no array of numbers.
    """
    if not isinstance(module, torch.nn.Module):
        raise TraceError("from_module", found=type(module).__name__, expected="a torch.nn.Module")
    if not isinstance(inputs, Mapping):
        raise TraceError("from_module: inputs", found=type(inputs).__name__, expected="a dict {name: example}")
    examples = {key: batches.as_array(value, key) for key, value in inputs.items()}
    _check_names(examples, outputs, dynamic or {})
    return Source(
        name=str(name or type(module).__name__),
        model=module,
        inputs=examples,
        outputs=tuple(outputs),
        dynamic=_input_axes(examples, dynamic or {}),
        bfloat16=_bfloat16(inputs),
    )


def _bfloat16(inputs: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name, value in inputs.items() if getattr(value, "dtype", None) == torch.bfloat16)


def from_program(
    path: str | Path,
    outputs: Sequence[str] = (),
    *,
    trust: bool = False,
) -> Source:
    """A torch.export program (.pt2). Its example inputs and dynamic shapes are in the file.

    Args:
        path: of the file.
        outputs: names for the results, in order.
        trust: let torch read it whatever it holds, and so run what somebody wrote into it, as a file.py is run.

    Raises:
        TraceError: the file is no torch.export program, holds what could run code when it is read (see program.require_plain),
            or no example inputs.
    """
    path = _path(path, "from_program")
    try:
        content = path.read_bytes()
        if not trust:
            program_files.require_plain(content, path)
        program = torch.export.load(io.BytesIO(content))
    except TraceError:
        raise
    except Exception as error:  # torch's reader meets a damaged archive with whatever its parts raise
        raise TraceError(
            str(path),
            found=sniff.looks_like(path) or _first_line(error),
            expected="a program saved by torch.export.save",
        ) from error
    if program.example_inputs is None:
        raise TraceError(str(path), found="no example inputs", do="export it again with torch.export.export")
    args, kwargs = program.example_inputs
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    values = [*args, *kwargs.values()]
    if len(names) != len(values) or not all(isinstance(value, torch.Tensor) for value in values):
        raise TraceError(str(path), found="inputs that are not plain tensors", expected="tensors only")
    count = len(program.graph_signature.user_outputs)
    return Source(
        name=path.stem,
        model=program,
        inputs={name: batches.as_array(value, name) for name, value in zip(names, values, strict=True)},
        outputs=tuple(outputs) or tuple(f"output_{i}" for i in range(count)),
        dynamic=_program_axes(program, names, values),
        bfloat16=_bfloat16(dict(zip(names, values, strict=True))),
    )


def from_onnx(path: str | Path) -> Source:
    """An ONNX file, opset 11 or newer; external data must lie in the file's own folder.

    Raises:
        TraceError: no ONNX file, an older opset, an input that is no tensor of known rank, external data that is missing,
            too short, or outside the folder.
    """
    path = _path(path, "from_onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise TraceError(str(path), found=_first_line(error), expected="a readable ONNX file") from error
    except Exception as error:  # binary, JSON or text: each parser has an error of its own, at home where it likes
        found = sniff.looks_like(path) or "no ONNX graph"
        raise TraceError(str(path), found=found, expected="a file saved by onnx.save") from error
    if not model.graph.node:
        raise TraceError(str(path), found=sniff.looks_like(path) or "no nodes", expected="a file saved by onnx.save")
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST_OPSET:
        raise TraceError(
            str(path),
            found=f"opset {opset}",
            expected=f"opset {OLDEST_OPSET} or newer",
            do="export the model again, or convert it with onnx.version_converter and check the result",
        )
    try:
        _require_ranks(model, path)
        _require_numbers(model, path)
        _forget_ends(model)
        beside = external.load(model, path)
        external.make_dense(model)
    except PacklightError:
        raise
    except Exception as error:  # sizes, types and indices that lie
        said = f"{type(error).__name__}: {_first_line(error)}"
        raise TraceError(str(path), found=said, expected="a file saved by onnx.save") from error
    folder = path.resolve().parent if beside else None
    return Source(name=path.stem, model=model, inputs={}, outputs=(), dynamic={}, folder=folder)


def from_pretrained(folder: str | Path, task: str = "auto") -> Source:
    """A Hugging Face model saved in a folder, exported to ONNX by optimum (extra `[hf]`), which validates it against torch.

    Args:
        folder: what save_pretrained wrote: config.json and safetensors weights. No hub is asked.
        task: optimum's name of what the model is for, e.g. "feature-extraction"; "auto" takes it from the config.

    Raises:
        TraceError: optimum is not installed, the folder is no such model, or it becomes more than one graph.
    """
    folder = _path(folder, "from_pretrained")
    if not (folder / "config.json").is_file():
        raise TraceError(str(folder), found="no config.json", expected="a folder written by save_pretrained")
    try:
        from optimum.exporters.onnx import main_export  # optimum and transformers take seconds to import
    except ImportError as error:
        raise TraceError(str(folder), found=_first_line(error), do=install("hf")) from error
    with tempfile.TemporaryDirectory(prefix="packlight-") as out:
        try:
            with quiet():
                named = _task(folder) if task == "auto" else task
                main_export(str(folder), out, task=named, no_post_process=True, local_files_only=True)
        except Exception as error:  # optimum, transformers and torch raise what they like
            raise TraceError(
                f"{folder}: optimum cannot export it", found=_first_line(error), do="name the task, or use a file.py"
            ) from error
        graphs = sorted(Path(out).glob("*.onnx"))
        if len(graphs) != 1:
            found = ", ".join(graph.name for graph in graphs) or "no graph"
            raise TraceError(str(folder), found=found, expected="one graph", do="export its parts with a file.py")
        return replace(from_onnx(graphs[0]), name=folder.name)


def _task(folder: Path) -> str:
    """optimum's name of what the folder's first architecture is for; optimum itself would ask the hub."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    architecture = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).architectures[0]
    return str(TasksManager.infer_task_from_model(getattr(transformers, architecture)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a Python file offers: `source()`, `calibration()`, `heldout()` and, optionally, `evaluate(run)`.

    Of the first three each may also be the value itself: a Source or a module, batches or a path.
    recipe: the `recipe.toml` beside the file, where there is one.
    """

    source: Any
    calibration: Any
    heldout: Any
    evaluate: Callable[..., Any] | None
    recipe: Path | None


def from_file(spec: str) -> Sample:
    """`file.py`, `file.py:function` or a folder with a `sample.py`: a Python file that offers source().

    Raises:
        TraceError: the file is missing, or does not offer what is needed.
    """
    text, _, function = spec.partition(":") if not Path(spec).exists() else (spec, "", "")
    path = Path(text)
    folder = path.is_dir()
    path = path / "sample.py" if folder else path
    if not path.is_file():
        raise TraceError(
            spec,
            found="a folder with neither sample.py nor config.json" if folder else "no such file",
            expected="file.py, file.py:function, a folder with sample.py, model.onnx or model.pt2",
        )
    module = load_python(path)
    offered = getattr(module, function or "source", None)
    if not callable(offered) and not isinstance(offered, Source):
        names = sorted(name for name, value in vars(module).items() if inspect.isfunction(value))
        raise TraceError(
            str(path),
            found=f"functions {', '.join(names) or 'none'}",
            expected=f"a function {function or 'source'}() that returns exporter.from_module(...)",
        )
    if not callable(evaluate := getattr(module, "evaluate", None)) and evaluate is not None:
        raise TraceError(
            f"{path}: evaluate", found=type(evaluate).__name__, expected="a function run -> {metric: value}"
        )
    recipe = path.parent / "recipe.toml"
    return Sample(
        source=offered,
        calibration=getattr(module, "calibration", None),
        heldout=getattr(module, "heldout", None),
        evaluate=evaluate,
        recipe=recipe if recipe.is_file() else None,
    )


def load_python(path: Path) -> ModuleType:
    """Run a Python file as a module of its own; its folder is importable while it loads."""
    name = f"packlight_sample_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        found = sniff.looks_like(path) or "no Python file"
        raise TraceError(str(path), found=found, expected="file.py, a folder with sample.py, model.onnx or model.pt2")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch look a class's module up here
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise TraceError(
            str(path), found=_first_line(error), do="install what the file imports (see its README)"
        ) from error
    except PacklightError:
        raise
    except SystemExit as error:  # a script that parses arguments, or ends itself
        raise TraceError(
            f"{path}: running it ended the process", found=f"SystemExit({error.code!r})",
            do="put what must not run on import under if __name__ == '__main__':",
        ) from error  # fmt: skip
    except Exception as error:  # the caller's file may raise anything
        raise TraceError(f"{path}: running it failed", found=f"{type(error).__name__}: {_first_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _check_names(inputs: Mapping[str, Array], outputs: Sequence[str], dynamic: Mapping[str, Mapping[int, str]]) -> None:
    if not inputs or not outputs:
        raise TraceError("from_module", found="no inputs" if not inputs else "no outputs", expected="names for both")
    if isinstance(outputs, str):
        raise TraceError("from_module: outputs", found=f"the string {outputs!r}", expected=f"a list: [{outputs!r}]")
    if not isinstance(outputs, Sequence):
        raise TraceError("from_module: outputs", found=type(outputs).__name__, expected='a list of names: ["logits"]')
    if bad := [name for name in (*inputs, *outputs) if not isinstance(name, str) or not name]:
        raise TraceError("from_module: names", found=repr(bad[0])[:80], expected="texts that are not empty")
    if not isinstance(dynamic, Mapping):
        expected = '{input: {axis: label}}, as in {"image": {0: "batch"}}'
        raise TraceError("dynamic", found=repr(dynamic)[:80], expected=expected)
    clash = set(inputs) & set(outputs)
    if clash or len(set(outputs)) != len(outputs):
        raise TraceError("from_module", found=f"names used twice in {[*inputs, *outputs]}", expected="different names")
    for name, axes in dynamic.items():
        if name not in inputs and name not in outputs:
            raise TraceError("dynamic", found=repr(name), expected=f"one of {', '.join([*inputs, *outputs])}")
        if not isinstance(axes, Mapping) or not all(type(a) is int and isinstance(axes[a], str) for a in axes):
            raise TraceError(f"dynamic: {name}", found=repr(axes)[:80], expected='{axis: label}, as in {0: "batch"}')
        for axis in axes:
            if name in inputs and not 0 <= axis < inputs[name].ndim:
                raise TraceError(f"dynamic: {name}", found=f"axis {axis}", expected=f"0..{inputs[name].ndim - 1}")


def _input_axes(inputs: Mapping[str, Array], dynamic: Mapping[str, Mapping[int, str]]) -> dict[str, dict[int, str]]:
    return {name: dict(dynamic[name]) for name in inputs if dynamic.get(name)}


def _program_axes(
    program: torch.export.ExportedProgram, names: Sequence[str], values: Sequence[torch.Tensor]
) -> dict[str, dict[int, str]]:
    """Axes that the program keeps symbolic, by the symbol's own name."""
    axes: dict[str, dict[int, str]] = {}
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for name, value in zip(names, values, strict=True):
        shape = cast(Any, nodes[name].meta["val"]).shape
        found = {axis: str(shape[axis]) for axis in range(value.ndim) if not isinstance(shape[axis], int)}
        if found:
            axes[name] = found
    return axes


def _forget_ends(model: onnx.ModelProto) -> None:
    """Let an output that is an input or an initializer have that one's type; one with a map in it has none."""
    graph = model.graph
    ends = {
        tensor.name: onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims) for tensor in graph.initializer
    }
    ends |= {value.name: value.type for value in graph.input}
    for value in graph.output:
        if value.name in ends:
            value.type.CopyFrom(ends[value.name])
        elif _holds_a_map(value.type):
            value.ClearField("type")
    outputs = {value.name for value in graph.output}
    kept = [v for v in graph.value_info if v.name not in ends and v.name not in outputs and not _holds_a_map(v.type)]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _holds_a_map(kind: onnx.TypeProto) -> bool:
    inner = str(kind.WhichOneof("value"))
    if inner in ("sequence_type", "optional_type"):
        return _holds_a_map(getattr(kind, inner).elem_type)
    return inner == "map_type"


def _require_ranks(model: onnx.ModelProto, path: Path) -> None:
    """Refuse an input that is no tensor, or one of unknown rank: no batch could be held against it."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        kind = value.type.WhichOneof("value")
        if value.name not in weights and (kind != "tensor_type" or not value.type.tensor_type.HasField("shape")):
            raise TraceError(
                f"{path}: input {value.name}",
                found="no shape" if kind == "tensor_type" else str(kind),
                expected="a tensor with a number of axes (their sizes may be open)",
                do="export the model again with the shapes of its inputs",
            )


def _require_numbers(model: onnx.ModelProto, path: Path) -> None:
    """Refuse ends that are no numbers, as pipelines of scikit-learn have them: a probe holds arrays, and drift compares numbers."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for side, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            kind = value.type.WhichOneof("value")
            text = kind == "tensor_type" and value.type.tensor_type.elem_type == onnx.TensorProto.STRING
            if value.name not in weights and (text or kind not in (None, "tensor_type")):
                raise TraceError(
                    f"{path}: {side} {value.name}",
                    found="strings" if text else "a sequence or map",
                    expected="arrays of numbers",
                    do="of a classifier export probabilities as an array (skl2onnx: options={'zipmap': False}) and classes as "
                    "integers; else leave it out with onnx.utils.extract_model",
                )


def _path(given: object, what: str) -> Path:
    if isinstance(given, onnx.ModelProto):
        raise TraceError(what, found="a ModelProto", expected="a path", do="save it with onnx.save")
    if not isinstance(given, str | Path) or "\0" in str(given):
        raise TraceError(
            what, found=type(given).__name__ if not isinstance(given, str) else repr(given), expected="a path"
        )
    path = Path(given)
    if (
        os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
    ):  # a pipe, which would be waited for
        raise TraceError(str(path), found="something that is not a file", expected="a file")
    return path


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
