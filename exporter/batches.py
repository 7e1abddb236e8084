"""What people have -> batches {input: array}, checked against the inputs of a graph.

A batch is what one call of the model takes. Sources: any iterable of dicts, tuples or single arrays and tensors; a torch
DataLoader is one, and exporter.data makes one of files. Everything streams: an iterable is read once.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from exporter import axes
from exporter.errors import CalibrationError
from runtime.manifest import Tensor

Array = npt.NDArray[Any]
Batch = Mapping[str, Array]
RANDOM = "random"  # the name by which noise is asked for instead of data
RANDOM_BATCHES = 8
NONE = object()  # no batch, where None would be one
# what to do about pixels where the model takes real numbers; only the model's training knows the scale
SCALED = (
    "pixels 0..255 are scaled as in training: divide by 255, as in (x / 255).astype('float32'), or give the pictures' folder, and "
    "[images] with scale, mean and std in the recipe"
)


def as_array(value: Any, name: str) -> Array:
    """An array, a torch tensor (any device, grad or not) or a plain number as a numpy array; bfloat16 as float32.

    Raises:
        CalibrationError: objects, strings, ragged lists, tensors that numpy has no form of (sparse).
    """
    try:
        if hasattr(value, "detach"):
            tensor = value.detach().cpu()
            value = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"input {name!r}",
            found=f"{type(value).__name__}: {str(error).splitlines()[0][:120]}",
            expected="a plain array or tensor of numbers",
            tensor=name,
        ) from error
    if array.dtype.kind not in "fiub":
        raise CalibrationError(f"input {name!r}", found=f"dtype {array.dtype}", expected="numbers", tensor=name)
    return array


def read(
    given: Any,
    tensors: Sequence[Tensor],
    role: str,
    left_out: dict[str, int] | None = None,
    optional: Sequence[Tensor] = (),
) -> Iterator[Batch]:
    """Yield checked batches from whatever was given.

    Args:
        given: an iterable of batches, or "random": noise, for plumbing (see `random`). What lies at a path becomes an
            iterable in exporter.data.
        tensors: the graph's inputs: name, dtype, shape.
        role: "calibration" or "heldout", for messages.
        left_out: counts {what is in a batch and for no input: in how many batches}.
        optional: inputs with a default, which a batch may have too.

    Raises:
        CalibrationError: nothing given, wrong names, dtype or shape, NaN or infinity; names the batch and the input.
    """
    require(given, role)
    if isinstance(given, str) and given == RANDOM:
        yield from random(tensors, RANDOM_BATCHES, np.random.default_rng(len(role)))
        return
    if isinstance(given, str | Path):
        raise CalibrationError(
            role, found=f"the path {given}", expected="an iterable of batches", do="open it with exporter.data.stream"
        )
    try:
        stream = iter(given)
    except TypeError as error:
        raise CalibrationError(
            role, found=f"{type(given).__name__}: {error}"[:200], expected="an iterable of batches"
        ) from error
    for number, raw in enumerate(stream):
        yield _checked(raw, tensors, role, number, {} if left_out is None else left_out, optional)


def require(given: Any, role: str) -> None:
    """Refuse what cannot be batches, before any long work.

    Raises:
        CalibrationError: nothing given, or one batch where an iterable of batches is meant.
    """
    if given is None:
        raise CalibrationError(
            f"{role}: no data",
            expected="batches like the ones the model will see",
            do="pass an iterable of {input: array}, or --calibration/--heldout with .npz files",
        )
    if isinstance(given, Mapping):
        raise CalibrationError(role, found="one dict", expected="an iterable of dicts", do="wrap it: [batch]")
    if hasattr(given, "to_numpy") and hasattr(given, "columns"):
        raise CalibrationError(
            role,
            found=type(given).__name__,
            expected="an iterable of batches",
            do="give its values: [frame.to_numpy('float32')]",
        )
    iterable = hasattr(given, "__iter__") or hasattr(given, "__getitem__")
    if not isinstance(given, str | Path) and (not iterable or isinstance(given, type)):
        do = f"call it: {given.__name__}()" if hasattr(given, "__name__") else ""
        raise CalibrationError(role, found=type(given).__name__, expected="an iterable of batches, or a path", do=do)


def peek(stream: Iterator[Batch], role: str, given: Any = None) -> tuple[Batch, Iterator[Batch]]:
    """The first batch, and a stream that still has it; given: what the stream reads.

    Raises:
        CalibrationError: the stream is empty.
    """
    first = next(stream, None)
    if first is None:
        raise empty(role, given)
    return first, itertools.chain([first], stream)


def empty(role: str, given: Any = None) -> CalibrationError:
    """The refusal of an iterable that gives nothing."""
    do = "check the data source"
    if isinstance(given, Iterator):
        do = "a generator can be read once: make a new one for each export"
    return CalibrationError(f"{role}: no batches", found="an empty iterable", expected="at least one batch", do=do)


def digest(batch: Batch) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: equal exactly when two batches are."""
    sha = hashlib.sha256()
    for name in sorted(batch):
        array = np.ascontiguousarray(batch[name])
        sha.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def samples(batch: Batch, tensors: Sequence[Tensor]) -> int:
    """How many samples a batch holds: the size of the first dimension that is free; 1 where it is fixed in every input."""
    free = (batch[t.name].shape[0] for t in tensors if t.shape and not isinstance(t.shape[0], int))
    return next(free, 1)


def random(tensors: Sequence[Tensor], count: int, generator: np.random.Generator) -> Iterator[Batch]:
    """`count` batches of normal noise (floats) and zeros or ones (integers): for plumbing, not for accuracy.

    A named dimension has size 1. Only used where the user asked for random data by name.
    """
    for _ in range(count):
        batch = {}
        for tensor in tensors:
            shape = tuple(size if isinstance(size, int) else 1 for size in tensor.shape)
            dtype = np.dtype(tensor.dtype)
            values = generator.standard_normal(shape) if dtype.kind == "f" else generator.integers(0, 2, shape)
            batch[tensor.name] = values.astype(dtype)
        yield batch


def _checked(
    raw: Any, tensors: Sequence[Tensor], role: str, number: int, left_out: dict[str, int], optional: Sequence[Tensor]
) -> Batch:
    where = f"{role} batch {number}"
    names = [tensor.name for tensor in tensors]
    if isinstance(raw, str | Path):
        raise CalibrationError(
            where, found=f"the text {str(raw)[:80]!r}", expected=f"arrays: {', '.join(names)}",
            do=f"files are given by their folder: {role}='folder'", batch=number,
        )  # fmt: skip
    if isinstance(raw, Mapping):
        given = dict(raw)
    else:
        values = list(raw) if isinstance(raw, tuple | list) else [raw]
        # a DataLoader over a labelled data set yields (input, label): what exceeds the model's inputs is not for it
        given = dict(zip(names, values, strict=False)) if len(values) >= len(names) else {}
        if not given:
            raise CalibrationError(where, found=f"{len(values)} arrays", expected=f"{len(names)}: {', '.join(names)}")
        if len(values) > len(names):
            _count(left_out, "what is behind the inputs, such as labels")
    missing = [name for name in names if name not in given]
    tensors = [*tensors, *(tensor for tensor in optional if tensor.name in given)]
    names = [tensor.name for tensor in tensors]
    unknown = [str(name) for name in given if name not in names]
    if missing:
        raise CalibrationError(
            where,
            found=f"inputs {', '.join(map(str, given))}",
            expected=f"inputs {', '.join(names)}",
            do=f"rename {unknown[0]!r}" if unknown else f"add {missing[0]!r}",
            tensor=missing[0],
            batch=number,
        )
    for name in unknown:
        _count(left_out, f"{name!r}, which is no input")
    batch = {tensor.name: _checked_array(given[tensor.name], tensor, where, number) for tensor in tensors}
    axes.check(batch, tensors, where, number)
    return batch


def _count(left_out: dict[str, int], what: str) -> None:
    left_out[what] = left_out.get(what, 0) + 1


def _checked_array(value: Any, tensor: Tensor, where: str, number: int) -> Array:
    what = f"{where}: input {tensor.name!r}"
    try:
        array = as_array(value, tensor.name)
    except CalibrationError as error:
        raise CalibrationError(
            what, found=error.found, expected=error.expected, tensor=tensor.name, batch=number
        ) from error
    if array.dtype != np.dtype(tensor.dtype):
        raise CalibrationError(
            what,
            found=f"dtype {array.dtype}",
            expected=tensor.dtype,
            tensor=tensor.name,
            batch=number,
            do=SCALED
            if array.dtype == np.uint8 and tensor.dtype.startswith("float")
            else f"convert it with .astype({tensor.dtype!r})",
        )
    if not _fits(array.shape, tensor.shape):
        raise CalibrationError(
            what,
            found=f"shape {list(array.shape)}",
            expected=f"shape {list(tensor.shape)}",
            do=_reshaped(array.shape, tensor.shape),
            tensor=tensor.name,
            batch=number,
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        kind = "NaN" if np.isnan(array).any() else "infinity"
        raise CalibrationError(
            what,
            found=kind,
            expected="finite numbers",
            do="look at this sample's preprocessing",
            tensor=tensor.name,
            batch=number,
        )
    return array


def _fits(shape: Sequence[int], wanted: Sequence[int | str]) -> bool:
    return len(shape) == len(wanted) and all(
        isinstance(want, str) or size == want for size, want in zip(shape, wanted, strict=True)
    )


def _reshaped(shape: Sequence[int], wanted: Sequence[int | str]) -> str:
    """The line that makes an array of this shape fit: a batch axis, or channels moved from last to first; empty if none does."""
    if _fits((1, *shape), wanted):
        return "add the axis of the batch: x[None], or a DataLoader with batch_size=1"
    if len(shape) == 4 and _fits((shape[0], shape[3], shape[1], shape[2]), wanted):
        return "move the channels: x.transpose(0, 3, 1, 2)"
    if len(shape) == 3 and _fits((1, shape[2], shape[0], shape[1]), wanted):
        return "move the channels and add the axis of the batch: x.transpose(2, 0, 1)[None]"
    return ""
