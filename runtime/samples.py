"""The user's own data -> samples, one at a time: a file is read as it is used, so that memory holds one sample of it.

A sample is what the model takes at once: one row, where the first axis of its inputs is open or 1; else as many rows as it has.
`.npz` and `.npy` files, folders of them, and pictures by the manifest's preprocessing.
"""

from __future__ import annotations

import csv
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from runtime import preprocess
from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.drift import Array
    from runtime.manifest import Manifest, Tensor
ARRAYS, PICTURES = (".npz", ".npy"), (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
UNREADABLE = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, SyntaxError, RuntimeError, MemoryError),
    *(zlib.error, zipfile.BadZipFile),
)
LARGEST_SAMPLE = 1 << 30  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One call of the model: `name` is the file, and the row where a file has several."""

    name: str
    inputs: Mapping[str, Array]


def read(data: str | os.PathLike[str], about: Manifest) -> Iterator[Sample]:
    """The samples of a file or folder, in the order of their names and rows.

    Raises:
        InputError: no such place, none of the kinds above, arrays that are not the model's inputs, a file that does not read.
    """
    place, count = Path(data), 0
    for file in _files(place):
        name = file.name if file == place else str(file.relative_to(place))
        samples = _rows(file, name, about) if file.suffix.lower() in ARRAYS else _picture(file, name, about)
        for sample in samples:
            count += 1
            yield sample
    if not count:
        raise InputError(str(place), found="no sample in it", expected="one row at least")


def _files(place: Path) -> Sequence[Path]:
    kinds = (*ARRAYS, *PICTURES)
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.suffix.lower() in kinds and file.is_file())
    else:
        found = [place] if place.is_file() and place.suffix.lower() in kinds else []
    if not found:
        seen = "nothing" if not place.exists() else "none of these" if place.is_dir() else f"a file {place.suffix}"
        raise InputError(
            str(place), found=seen, expected=f"{', '.join(kinds)}, or a folder of them",
            do="text and tables: make arrays of them, as for packlight run",
        )  # fmt: skip
    return found


def _picture(file: Path, name: str, about: Manifest) -> Iterator[Sample]:
    wanted = about.preprocessing
    array = preprocess.image(file, wanted)  # type: ignore[arg-type]  # it refuses None, in words
    assert wanted is not None
    if len(about.inputs) != 1:
        raise InputError(name, found="a picture", expected=f".npz of {', '.join(each.name for each in about.inputs)}")
    yield Sample(name=name, inputs={wanted.input: array})


def _rows(file: Path, name: str, about: Manifest) -> Iterator[Sample]:
    try:
        with ExitStack() as opened:
            arrays = dict(_members(file, about, opened))
            at_once = _at_once(about.inputs, arrays, name)
            rows = {len(each) for each in arrays.values()} if at_once else {1}
            if len(rows) != 1:
                raise InputError(name, found=f"{sorted(rows)} rows", expected="as many of each input")
            (many,) = rows
            if at_once and many % at_once:
                raise InputError(name, found=f"{many} rows", expected=f"a multiple of {at_once}, the model's batch")
            for start in range(0, many, at_once or 1):
                taken = {key: each.take(at_once) for key, each in arrays.items()}
                yield Sample(name=f"{name}:{start}" if many > (at_once or 1) else name, inputs=taken)
    except UNREADABLE as error:
        raise InputError(name, found=str(error)[:200] or type(error).__name__, expected="plain arrays") from error


def _members(file: Path, about: Manifest, opened: ExitStack) -> Iterator[tuple[str, _Stream]]:
    """One open stream an input."""
    names = [tensor.name for tensor in about.inputs]
    if file.suffix.lower() == ".npy":
        if len(names) != 1:
            raise InputError(file.name, found="one array", expected=f".npz of {', '.join(names)}")
        yield names[0], _Stream(opened.enter_context(file.open("rb")), file.name)
        return
    archive = opened.enter_context(zipfile.ZipFile(file))
    members = {each.removesuffix(".npy"): each for each in archive.namelist()}
    if set(members) != set(names):
        found = ", ".join(sorted(members)) or "no array"
        raise InputError(file.name, found=found, expected=f"arrays {', '.join(names)}")
    for name in names:
        yield name, _Stream(opened.enter_context(archive.open(members[name])), f"{file.name}:{name}")


class _Stream:
    """An array in a file, read row by row in C order; never a pickle."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.file, self.name = file, name
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, by_column, self.dtype = read(file)
        if self.dtype.hasobject or self.dtype.kind not in "biuf":
            raise InputError(name, found=f"dtype {self.dtype}"[:80], expected="numbers")
        if any(type(size) is not int or size < 0 for size in self.shape):
            raise InputError(name, found=f"shape {self.shape}"[:80], expected="sizes")
        if by_column and len(self.shape) > 1:
            raise InputError(name, found="Fortran order", expected="C order", do="np.ascontiguousarray, then save")

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 1

    def take(self, rows: int) -> Array:
        """The next rows; all of the array where rows is 0."""
        shape = (rows, *self.shape[1:]) if rows else self.shape
        size = int(np.prod(shape, dtype=object)) * self.dtype.itemsize
        if size > LARGEST_SAMPLE:
            raise InputError(self.name, found=f"{size:,} bytes a sample", expected=f"at most {LARGEST_SAMPLE:,}")
        content = self.file.read(size)
        if len(content) != size:
            raise InputError(self.name, found="the end of the file", expected=f"{size:,} bytes more")
        return np.frombuffer(content, self.dtype).reshape(shape).astype(self.dtype.newbyteorder("="), copy=False)


def _at_once(tensors: Sequence[Tensor], arrays: Mapping[str, _Stream], name: str) -> int:
    """How many rows are one sample; 0 where the arrays are one sample as they are."""
    for tensor in tensors:
        if len(arrays[tensor.name].shape) != len(tensor.shape):
            found = f"shape {list(arrays[tensor.name].shape)}"
            raise InputError(f"{name}, input {tensor.name}", found=found, expected=f"{list(tensor.shape)}")
    firsts = {tensor.shape[0] if tensor.shape else "" for tensor in tensors}
    if len(firsts) != 1 or "" in firsts:
        return 0
    (first,) = firsts
    return first if isinstance(first, int) else 1


def labels(file: str | os.PathLike[str]) -> list[Any] | dict[str, Any]:
    """What the samples are: `.npy` of a row a sample, `.txt` of a line a sample, `.csv` of name,label lines.

    Numbers are numbers. Raises InputError: another kind of file, or one that does not read.
    """
    path = Path(file)
    try:
        if path.suffix.lower() == ".npy":
            return list(np.load(path, allow_pickle=False))
        with open(path, encoding="utf-8", newline="") as text:
            if path.suffix.lower() == ".csv":
                return {name: _number(label) for name, label in csv.reader(text)}
            if path.suffix.lower() == ".txt":
                return [_number(line.strip()) for line in text if line.strip()]
    except (*UNREADABLE, csv.Error) as error:
        raise InputError(
            str(path), found=str(error)[:200], expected="labels: .npy, .txt or .csv of name,label"
        ) from error
    raise InputError(str(path), found=f"a file {path.suffix}", expected="labels: .npy, .txt or .csv of name,label")


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text
