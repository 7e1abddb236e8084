"""Names of open axes in a file: which of them mean that two sizes are equal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from exporter.errors import CalibrationError
from runtime.manifest import Tensor

# what tools write for a size that they do not know: None, ?, -1, unk__12. Equal ones are not equal sizes
_NO_NAME = re.compile(r"(?i)none|unk(nown)?(_*\d+)?|dyn(amic)?(_*\d+)?|.*[^\w.+/* -].*|-?\d*")


def nameless(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same, each free axis with a name of its own."""
    return [
        replace(each, shape=tuple(d if isinstance(d, int) else f"{each.name}_{i}" for i, d in enumerate(each.shape)))
        for each in tensors
    ]


def agreeing(tensors: Sequence[Tensor], batches: Sequence[Mapping[str, NDArray[Any]]]) -> tuple[Tensor, ...]:
    """The same, where a name stays if it is one, stands once in a tensor, and for one size in each batch.

    Files give one name to all open axes; those of one tensor are seldom meant to be equal.
    """
    named = [(label, each, axis) for each in tensors for axis, label in enumerate(each.shape) if isinstance(label, str)]
    lost = {label for label, _, _ in named if _NO_NAME.fullmatch(label)}
    lost |= {label for label, each, _ in named if each.shape.count(label) > 1}
    for batch in batches:
        sizes: dict[str, int] = {}
        lost |= {
            label
            for label, each, axis in named
            if sizes.setdefault(label, batch[each.name].shape[axis]) != batch[each.name].shape[axis]
        }
    return tuple(
        replace(own, shape=tuple(o if d in lost else d for o, d in zip(own.shape, each.shape, strict=True)))
        for own, each in zip(nameless(tensors), tensors, strict=True)
    )


def check(batch: Mapping[str, NDArray[Any]], tensors: Sequence[Tensor], where: str, number: int) -> None:
    """Hold equal names of dimensions to equal sizes, over all inputs."""
    sizes: dict[str, tuple[int, str]] = {}
    for tensor in tensors:
        for label, size in zip(tensor.shape, batch[tensor.name].shape, strict=True):
            if isinstance(label, int):
                continue
            known, first = sizes.setdefault(label, (size, tensor.name))
            if size != known:
                raise CalibrationError(
                    f"{where}: input {tensor.name!r}",
                    found=f"{label} = {size}",
                    expected=f"{label} = {known}, as in {first!r}",
                    tensor=tensor.name,
                    batch=number,
                )
