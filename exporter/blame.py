"""Why torch's exporters refused a module: the outermost cause that says something, the operators and the module at fault."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# what torch.onnx wraps around the cause: essays about how to report it
ESSAYS = frozenset({"TorchExportError", "ConversionError", "GraphConstructionError", "OnnxExporterError"})
LONGEST = 180
# dynamo: "No ONNX function found for <OpOverload(op='aten.x', ..."; TorchScript: "the operator 'aten::x' to ONNX opset"
_OPERATOR = re.compile(r"OpOverload\(op='([\w.]+)'|operator '(\w+::\w+)'")


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on inwards."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__


def why(error: BaseException) -> str:
    """The first line of the outermost error that is no essay of the exporter; those further in are often accidents of its own."""
    told = [each for each in chain(error) if type(each).__name__ not in ESSAYS and _first_line(each)]
    found = told[0] if told else error
    line = _first_line(found)
    return f"{type(found).__name__}: {line[:LONGEST]}" if line else type(found).__name__


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in re.sub(r"\x1b\[\d*m", "", str(error)).splitlines())
    return next(filter(None, lines), "")


def operators(error: BaseException) -> list[str]:
    """Operator names in the messages of both exporters, as torch writes them: aten.special_bessel_j0."""
    found = [match for part in chain(error) for match in _OPERATOR.findall(str(part))]
    return [(dynamo or script).replace("::", ".") for dynamo, script in found]


def modules(error: BaseException, module: torch.nn.Module) -> list[str]:
    """The innermost forward() that was running, one outside torch if there is any: its module's path, file and line."""
    names = {id(part): name or type(part).__name__ for name, part in module.named_modules()}
    home = str(Path(torch.__file__).parent)
    ours: list[str] = []
    for part in chain(error):
        for frame, line in reversed(list(traceback.walk_tb(part.__traceback__))):
            owner: Any = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
            if id(owner) not in names:
                continue
            said = f"module {names[id(owner)]} ({Path(frame.f_code.co_filename).name}:{line})"
            if not frame.f_code.co_filename.startswith(home):
                return [said]
            if names[id(owner)] != type(owner).__name__:  # the module as a whole is no news
                ours.append(said)
    return ours[:1]
