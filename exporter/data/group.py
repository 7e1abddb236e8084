"""Rows -> groups of one batch each; what is left out on the way is counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from exporter.errors import CalibrationError, RecipeError
from runtime.manifest import Tensor

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Left:
    """What one pass over the data left out, counted as it goes.

    skip_bad: whether a picture that does not decode may be left out; if not, it is an error.
    skipped: the names of those that were. over: rows at the end that did not fill a batch of the graph's fixed size.
    """

    skip_bad: bool = False
    skipped: list[str] = field(default_factory=list)
    over: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Rows a batch. fixed: the graph takes no other number."""

    rows: int
    fixed: bool


def size(asked: int | None, tensor: Tensor, table: str) -> Size:
    """How many rows a batch of this input has: the graph's own number where its first axis is fixed, else what was asked, else 1.

    Raises:
        RecipeError: asked for another number than the graph's.
    """
    first = tensor.shape[0] if tensor.shape else 1
    if isinstance(first, str):
        return Size(rows=asked or 1, fixed=False)
    if asked is not None and asked != first:
        raise RecipeError(
            "batch", found=str(asked), expected=f"{first}, the fixed first size of input {tensor.name!r}",
            do="leave it out, or export the model with a named first axis", where=f"[{table}]",
        )  # fmt: skip
    return Size(rows=max(1, first), fixed=True)


def grouped(rows: Iterable[T], size: Size, left: Left) -> Iterator[list[T]]:
    """Groups of `size.rows`; a smaller one at the end, unless the size is fixed."""
    group: list[T] = []
    for row in rows:
        group.append(row)
        if len(group) == size.rows:
            yield group
            group = []
    if group and size.fixed:
        left.over = len(group)
    elif group:
        yield group


def batches_of(rows: int, size: Size) -> int:
    return rows // size.rows if size.fixed else -(-rows // size.rows)


def by_name(tensors: Sequence[Tensor], name: str, where: str) -> Tensor:
    """The graph's input of that name.

    Raises:
        RecipeError: there is none; says which there are.
    """
    for tensor in tensors:
        if tensor.name == name:
            return tensor
    names = [tensor.name for tensor in tensors]
    raise RecipeError(f"no input {name!r}", expected=f"one of {', '.join(names)}", do=nearest(name, names), where=where)


def require_filled(tensors: Sequence[Tensor], filled: Iterable[str], where: str) -> None:
    """Refuse a table that leaves inputs of the graph without values.

    Raises:
        CalibrationError: names the first such input.
    """
    has = set(filled)
    for tensor in tensors:
        if tensor.name not in has:
            raise CalibrationError(
                f"{where}: input {tensor.name!r}",
                found=f"values for {', '.join(sorted(has))} only",
                expected="values for every input",
                do="give whole batches from file.py:function instead",
                tensor=tensor.name,
            )


def nearest(name: str, names: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else ""
