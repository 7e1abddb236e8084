"""What people give where a Source, a Recipe and batches are asked for -> those, where it is plain what they mean, and what was
done about it; else an error with the line to write.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch.utils._pytree import tree_leaves

from exporter import batches
from exporter.batches import Array
from exporter.budget import Evaluate
from exporter.errors import CalibrationError, RecipeError, TraceError
from exporter.progress import Progress
from exporter.recipe import Recipe, load_recipe
from exporter.source import Source, from_module, from_onnx, from_program
from runtime.errors import PacklightError

LINE = 'exporter.from_module(model, inputs={"x": example}, outputs=["y"])'


@dataclass(frozen=True, slots=True, kw_only=True)
class Meant:
    """A source, its calibration data with the batch that was looked at still in it, and what was taken for granted."""

    source: Source
    calibration: Any
    notes: tuple[str, ...] = ()


def source(given: Any, calibration: Any) -> Meant:
    """A Source as it is; a module with the first calibration batch for its example; the path of an .onnx or .pt2 file.

    A module's inputs are the arguments of its forward, its outputs output_0, output_1, ...; the first axis is dynamic where
    twice the batch gives twice every output.

    Raises:
        TraceError: none of these, or a module whose call cannot be told from its forward and the batch.
        CalibrationError: no batch, or one that holds no numbers.
    """
    if isinstance(given, Source):
        return Meant(source=given, calibration=calibration, notes=_evaluated(given.model))
    if isinstance(given, torch.nn.Module):
        return _module(given, calibration)
    readers: dict[str, Callable[[Any], Source]] = {".onnx": from_onnx, ".pt2": from_program}
    if isinstance(given, str | Path) and Path(given).suffix.lower() in readers:
        return Meant(source=readers[Path(given).suffix.lower()](given), calibration=calibration)
    do = f"write {LINE}"
    if isinstance(given, type) and issubclass(given, torch.nn.Module):
        do = f"make one: {given.__name__}(...)"
    elif isinstance(given, onnx.ModelProto):
        do = "save it with onnx.save and give exporter.from_onnx(path)"
    elif isinstance(given, torch.export.ExportedProgram):
        do = "save it with torch.export.save and give exporter.from_program(path)"
    elif isinstance(given, Mapping):
        do = f"load the weights into their module, then {LINE}"
    elif inspect.isfunction(given):
        do = f"call it: {given.__name__}()"
    raise TraceError("source", found=_kind(given), expected="a Source, or a torch.nn.Module", do=do)


def recipe(given: Any) -> Recipe:
    """A Recipe as it is; one by its name or path.

    Raises:
        RecipeError: neither, or see load_recipe.
    """
    if isinstance(given, str | os.PathLike):
        return load_recipe(Path(given) if isinstance(given, os.PathLike) else given)
    if not isinstance(given, Recipe):
        raise RecipeError(
            "recipe", found=_kind(given), expected='a Recipe, or its name: exporter.load_recipe("portable")'
        )
    return given


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The knobs of `export`, as they were given; each is said there."""

    ort: bool = False
    skip_bad: bool = False
    progress: Progress | None = None
    workers: str | None = None
    evaluate: Evaluate | None = None
    costs: str | Path | None = None
    max_evaluations: int | None = None
    max_minutes: float | None = None


def require_apart(heldout: Any, calibration: Any) -> None:
    """Refuse one iterator for both.

    Raises:
        CalibrationError: the first to be read would leave nothing to the other.
    """
    if heldout is not None and heldout is calibration and isinstance(heldout, Iterator):
        raise CalibrationError(
            "heldout", found="the iterator that calibration reads, too", expected="other batches, or None",
            do="leave heldout out: every fourth calibration batch is then kept apart",
        )  # fmt: skip


def require_options(options: Options) -> None:
    """Refuse options of another type, before any long work.

    Raises:
        PacklightError, RecipeError: name the argument.
    """
    if options.progress is not None and not all(hasattr(options.progress, name) for name in ("stage", "note", "each")):
        raise PacklightError(
            "progress", found=_kind(options.progress), expected="an object with stage(), note() and each(), or None"
        )
    if options.evaluate is not None and not callable(options.evaluate):
        raise RecipeError("evaluate", found=_kind(options.evaluate), expected="a function run -> {metric: value}")
    if options.workers is not None and not isinstance(options.workers, str):
        raise PacklightError("workers", found=repr(options.workers), expected='"local:N", or "tcp://host:port"')
    if options.costs is not None and not (
        isinstance(options.costs, str | os.PathLike) and Path(options.costs).is_file()
    ):
        raise RecipeError("costs", found=repr(options.costs), expected="the path of another export's costs.json")
    whole = hasattr(options.max_evaluations, "__index__") and not isinstance(options.max_evaluations, bool)
    if options.max_evaluations is not None and not (whole and options.max_evaluations >= 0):
        raise PacklightError("max_evaluations", found=repr(options.max_evaluations), expected="0 or more, as an int")
    number = isinstance(options.max_minutes, int | float) and not isinstance(options.max_minutes, bool)
    if options.max_minutes is not None and not (
        number and math.isfinite(options.max_minutes) and options.max_minutes >= 0
    ):
        raise PacklightError("max_minutes", found=repr(options.max_minutes), expected="a number of 0 or more")


def _module(module: torch.nn.Module, calibration: Any) -> Meant:
    batches.require(calibration, "calibration")
    if isinstance(calibration, str | Path):
        raise TraceError(
            "source", found=f"a module, and calibration data at {str(calibration)!r}",
            expected="an example for its inputs", do=f"write {LINE}",
        )  # fmt: skip
    stream = iter(calibration)
    first = next(stream, batches.NONE)
    if first is batches.NONE:
        raise batches.empty("calibration", calibration)
    rest = itertools.chain([first], stream) if stream is calibration else calibration
    inputs = _inputs(module, first)
    count, dynamic = _outputs(module, inputs)
    outputs = [f"output_{number}" for number in range(count)]
    made = from_module(module, inputs, outputs, dynamic)
    note = (
        f"a module without names: inputs {', '.join(inputs)} from its forward and the first calibration batch, "
        f"outputs {', '.join(outputs)}, {'any batch size' if dynamic else 'sizes as in that batch'}"
    )
    return Meant(source=made, calibration=rest, notes=(note, *_evaluated(module)))


def _inputs(module: torch.nn.Module, first: Any) -> dict[str, Array]:
    """{argument of forward: value} as the batch has them: by name from a dict, else in order; what exceeds them is not for it."""
    named = [each for each in inspect.signature(module.forward).parameters.values() if each.kind not in _STARRED]
    needed = [each.name for each in named if each.default is each.empty]
    if isinstance(first, Mapping):
        given = {each.name: first[each.name] for each in named if each.name in first}
    else:
        values = list(first) if isinstance(first, tuple | list) else [first]
        names = needed or [each.name for each in named][: len(values)]
        given = dict(zip(names, values, strict=False))
    missing = [name for name in needed if name not in given]
    if missing or not given:
        raise TraceError(
            f"{type(module).__name__}: its forward takes {', '.join(each.name for each in named) or '*args'}",
            found=f"a calibration batch of {', '.join(map(str, first)) if isinstance(first, Mapping) else _kind(first)}",
            expected="its arguments" if not missing else f"a value for {missing[0]}", do=f"write {LINE}",
        )  # fmt: skip
    return {name: batches.as_array(value, name) for name, value in given.items()}


_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _outputs(module: torch.nn.Module, inputs: Mapping[str, Array]) -> tuple[int, dict[str, dict[int, str]]]:
    """How many tensors the module returns; {input: {0: "batch"}} where twice the batch is twice every output."""
    flags = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        shapes = _shapes(module, inputs)
        sizes = {value.shape[0] if value.ndim else None for value in inputs.values()}
        twice: list[tuple[int, ...]] = []
        if len(sizes) == 1 and None not in sizes:
            try:
                twice = _shapes(module, {name: value.repeat(2, axis=0) for name, value in inputs.items()})
            except Exception:  # a module may take one size only, and say so as it likes
                twice = []
        doubled = [(2 * shape[0], *shape[1:]) if shape else () for shape in shapes]
        return len(shapes), {name: {0: "batch"} for name in inputs} if shapes and twice == doubled else {}
    except PacklightError:
        raise
    except Exception as error:  # the caller's forward may raise anything
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        kinds = {value.dtype.name for value in inputs.values()}
        do = batches.SCALED if "uint8" in kinds else f"write {LINE}"
        do = "convert float64 with .astype('float32')" if "float64" in kinds else do
        raise TraceError(
            f"{type(module).__name__}: its forward fails on the first calibration batch",
            found=f"{said}, with {', '.join(f'{name} {v.dtype}{list(v.shape)}' for name, v in inputs.items())}",
            do=do,
        ) from error
    finally:
        for part, training in flags:
            part.training = training


def _shapes(module: torch.nn.Module, inputs: Mapping[str, Array]) -> list[tuple[int, ...]]:
    with torch.no_grad():
        result = module(**{name: torch.from_numpy(value.copy()) for name, value in inputs.items()})
    return [tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _evaluated(model: Any) -> tuple[str, ...]:
    """What is done about a module in training mode, if it is in one."""
    if isinstance(model, torch.nn.Module) and any(part.training for part in model.modules()):
        return ("the module was in training mode: exported as after eval(), and left as it was",)
    return ()


def _kind(given: Any) -> str:
    if isinstance(given, str | Path):
        return repr(str(given))
    if isinstance(given, tuple | list):
        return f"{len(given)} values"
    return (
        f"the class {given.__name__}" if isinstance(given, type) else "None" if given is None else type(given).__name__
    )
