"""How a module is called: what its forward takes by position and by name, and the tensors in what it returns."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_leaves

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
ANY_POSITION = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Which inputs are positional arguments, in which order, and which go by name.

    fixed: how many of the positional ones have a parameter of their own; the others go into *args.
    loose: whether one goes into **kwargs.
    """

    positional: tuple[str, ...]
    named: tuple[str, ...]
    fixed: int
    loose: bool

    def arguments(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(values[name] for name in self.positional), {name: values[name] for name in self.named}


def of(module: torch.nn.Module, names: Sequence[str]) -> Call:
    """How a module is called with inputs of these names.

    By name, when every name is one of forward's arguments and the order is another. Else in order, as many as forward takes by
    position; keyword-only ones by name, and so what is left, where forward has **kwargs.
    """
    parameters = _parameters(module)
    places = [each.name for each in parameters if each.kind in POSITIONAL]
    keywords = {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    kinds = {each.kind for each in parameters}
    if set(names) <= {*places, *keywords} and [*names] != places[: len(names)]:
        return Call(positional=(), named=tuple(names), fixed=0, loose=False)
    ordered = [name for name in names if name not in keywords]
    room = len(ordered)
    if inspect.Parameter.VAR_POSITIONAL not in kinds and inspect.Parameter.VAR_KEYWORD in kinds:
        room = len(places)
    positional = tuple(ordered[:room])
    return Call(
        positional=positional,
        named=tuple(name for name in names if name not in positional),
        fixed=min(len(positional), len(places)),
        loose=room < len(ordered),
    )


def parameter_names(module: torch.nn.Module) -> list[str]:
    """The names of forward's arguments, in order."""
    return [each.name for each in _parameters(module)]


def _parameters(module: torch.nn.Module) -> list[inspect.Parameter]:
    """forward's parameters, behind decorators that say what they wrap; anything by position where it does not say."""
    forward: Any = module.forward
    schema = getattr(forward, "schema", None)  # TorchScript's
    if schema is not None:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return [inspect.Parameter(argument.name, kind) for argument in schema.arguments[1:]]
    try:
        return [*inspect.signature(forward).parameters.values()]
    except (TypeError, ValueError):
        return [ANY_POSITION]


def tensors(result: Any) -> list[torch.Tensor]:
    """Every tensor in what forward returned, in order: in tuples, lists, dicts, dataclasses, in one another."""
    found: list[torch.Tensor] = []
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors([getattr(leaf, field.name) for field in fields(leaf)])
        elif isinstance(leaf, Mapping):
            found += tensors([*leaf.values()])
        elif isinstance(leaf, SimpleNamespace):
            found += tensors([*vars(leaf).values()])
    return found


def is_plain(result: Any) -> bool:
    """Whether torch's exporters find the same tensors in it."""
    return all(leaf is None or isinstance(leaf, torch.Tensor) for leaf in tree_leaves(result))


class InOrder(torch.nn.Module):
    """A module that is called with its tensors in order, and returns its tensors in order: what every exporter can say."""

    def __init__(self, module: torch.nn.Module, call: Call) -> None:
        super().__init__()
        self.module, self.call = module, call
        self.eval()

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        names = (*self.call.positional, *self.call.named)
        args, kwargs = self.call.arguments(dict(zip(names, values, strict=True)))
        return tuple(tensors(self.module(*args, **kwargs)))


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module without DataParallel, DistributedDataParallel and torch.compile around it or around parts of it."""

    def inside(part: torch.nn.Module) -> torch.nn.Module:
        if isinstance(part, DataParallel | DistributedDataParallel):
            return inside(part.module)
        compiled = None if isinstance(part, torch.jit.ScriptModule) else part._modules.get("_orig_mod")
        return part if compiled is None else inside(compiled)

    return replaced(module, inside)


def replaced(module: torch.nn.Module, swap: Callable[[torch.nn.Module], torch.nn.Module]) -> torch.nn.Module:
    """The module with swap(part) in the place of each part; it is not changed, and shares its parameters with the result."""
    made: dict[int, torch.nn.Module] = {}

    def of_part(part: torch.nn.Module) -> torch.nn.Module:
        if id(part) not in made:
            inner = swap(part)
            if isinstance(inner, torch.jit.ScriptModule):  # no Python of ours is in there
                made[id(part)] = inner
                return inner
            parts = {name: child if child is None else of_part(child) for name, child in inner._modules.items()}
            if any(parts[name] is not child for name, child in inner._modules.items()):
                inner = copy.copy(inner)
                inner.__dict__["_modules"] = parts
            made[id(part)] = inner
        return made[id(part)]

    return of_part(module)
