"""Whatever was given -> a stream of batches: which kind of data it is, and which tables of the recipe it needs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter import batches
from exporter.batches import Batch
from exporter.data import arrays, files, images, tables, text
from exporter.data.files import File
from exporter.data.group import Left, batches_of, by_name, size
from exporter.data.images import Images
from exporter.data.tables import Columns, Prepare
from exporter.data.text import Text
from exporter.errors import CalibrationError, RecipeError
from runtime.errors import install
from runtime.manifest import Tensor
from runtime.preprocess import Preprocessing

SUFFIXES = {"arrays": arrays.SUFFIXES, "images": images.SUFFIXES, "text": text.SUFFIXES, "columns": tables.SUFFIXES}
KINDS = {
    "arrays": ".npz or .npy files",
    "images": f"pictures ({', '.join(images.SUFFIXES)})",
    "text": ".txt files",
    "columns": "Parquet files, or what datasets.save_to_disk wrote",
}

LIBRARIES = {"images": {"PIL": "images"}, "text": {"tokenizers": "text"}, "columns": {"pyarrow": "tables"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a recipe says of data; folder: the recipe's, where its relative paths begin."""

    images: Images | None = None
    text: Text | None = None
    columns: Columns | None = None
    folder: Path = Path()

    @property
    def tables(self) -> list[str]:
        return [name for name in ("columns", "images", "text") if getattr(self, name) is not None]


NOTHING = Asked()


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What lies at a path: one kind of data, in files that are not opened yet."""

    kind: str
    files: tuple[File, ...]


class Stream:
    """The batches at a path, not checked yet. Iterating again begins again; `left` tells of the last pass."""

    def __init__(self, make: Callable[[Left], Iterator[Batch]], left: Left, hint: int | None, none: str) -> None:
        self.left = left
        self._make, self._hint, self._none = make, hint, none

    def __iter__(self) -> Iterator[Batch]:
        self.left.skipped.clear()
        self.left.over = 0
        empty = True
        for batch in self._make(self.left):
            empty = False
            yield batch
        if empty and (self.left.skipped or self.left.over):
            raise CalibrationError(
                self._none, found=f"{len(self.left.skipped)} that do not decode and {self.left.over} that fill no batch",
                expected="enough for one batch",
            )  # fmt: skip

    def __length_hint__(self) -> int:
        """How many batches there will be, if none is skipped; 0 where only reading tells."""
        return self._hint or 0


def skipped(*given: Any) -> tuple[str, ...]:
    """Names of the pictures that were left out in the last pass over each stream, without their folders."""
    streams = (each for each in given if isinstance(each, Stream))
    return tuple(name.replace("\\", "/").rsplit("/", 1)[-1] for each in streams for name in each.left.skipped)


def require(given: Any, role: str, asked: Asked = NOTHING) -> None:
    """Refuse what cannot be batches, and tables of the recipe that this data has no use for, before any long work.

    Raises:
        CalibrationError, RecipeError: see `stream`.
    """
    batches.require(given, role)
    if _is_path(given):
        _found(given, role, asked)
    else:
        _require_used(given, role, asked)


def stream(given: Any, tensors: Sequence[Tensor], role: str, asked: Asked = NOTHING, *, skip_bad: bool = False) -> Any:
    """What was given as an iterable for `exporter.batches.read`: paths become a Stream, all else stays what it is.

    Args:
        given: an iterable of batches (of rows, with `[columns]`), "random", or a path or URL: `.npz`, `.npy`, `.txt`,
            Parquet, a picture, or a folder of one of these kinds.
        tensors: the graph's inputs.
        role: "calibration" or "heldout", for messages.
        asked: the recipe's tables.
        skip_bad: leave out and count pictures that do not decode (`Stream.left.skipped`), where else they are refused.

    Raises:
        CalibrationError: nothing there, of no kind that is read, or, while it is read, not what its name says.
        RecipeError: a table that is missing, of no use for this data, or at odds with the graph.
    """
    batches.require(given, role)
    left = Left(skip_bad=skip_bad)
    if not _is_path(given):
        _require_used(given, role, asked)
        if asked.columns is None or given == batches.RANDOM:
            return given
        columns, prepare = asked.columns, _prepare(asked)
        return Stream(lambda left: tables.from_rows(given, columns, prepare, tensors, left), left, None, role)
    found = _found(given, role, asked)
    make, hint = _reader(found, asked, tensors)
    return Stream(make, left, hint, f"{role}: {files.shown(str(given))}")


def read(
    given: Any, tensors: Sequence[Tensor], role: str, asked: Asked = NOTHING, *, skip_bad: bool = False
) -> Iterator[Batch]:
    """Checked batches from whatever was given: `stream` through `exporter.batches.read`."""
    return batches.read(stream(given, tensors, role, asked, skip_bad=skip_bad), tensors, role)


def preprocessing(asked: Asked, tensors: Sequence[Tensor]) -> Preprocessing | None:
    """What a device must do to a picture, for the manifest; None where the recipe has no `[images]`."""
    return None if asked.images is None else images.preprocessing(asked.images, tensors)


def _is_path(given: Any) -> bool:
    return isinstance(given, Path) or (isinstance(given, str) and given != batches.RANDOM)


def _prepare(asked: Asked) -> Prepare:
    return Prepare(images=asked.images, text=asked.text, folder=asked.folder)


def _reader(
    found: Found, asked: Asked, tensors: Sequence[Tensor]
) -> tuple[Callable[[Left], Iterator[Any]], int | None]:
    """How the files are read, and how many batches they give if that can be told."""
    if found.kind == "images":
        table = asked.images or Images()
        wanted = images.preprocessing(table, tensors)
        rows = size(table.batch, by_name(tensors, wanted.input, "[images]"), "images")
        return lambda left: images.batches(found.files, table, tensors, left), batches_of(len(found.files), rows)
    if found.kind == "text":
        lines = asked.text
        assert lines is not None
        return lambda left: text.batches(found.files, lines, asked.folder, tensors, left), None
    if found.kind == "columns":
        columns, prepare = asked.columns or Columns(), _prepare(asked)
        return lambda left: tables.from_files(found.files, columns, prepare, tensors, left), None
    return lambda left: arrays.batches(found.files), len(found.files)


def _found(given: str | Path, role: str, asked: Asked) -> Found:
    """What lies there. A suffix says what a file is, the tables of the recipe what a folder is for."""
    file = files.at(given)
    kind = next((kind for kind, suffixes in SUFFIXES.items() if file.suffix in suffixes), None)
    if kind is not None and (file.system is not None or os.path.isfile(file.path)):
        found = Found(kind=kind, files=(file,))
    elif files.is_folder(file):
        found = _in_folder(file, asked)
    else:
        there = file.system is not None or os.path.exists(file.path)
        raise CalibrationError(
            file.name, found=f"a file {file.suffix or 'without a suffix'}" if there else "nothing there",
            expected=f"{', '.join(KINDS.values())}, or a folder of one of these kinds",
        )  # fmt: skip
    _require_fitting(found.kind, asked, f"{role}: {file.name}")
    _require_libraries([found.kind, *asked.tables], f"{role}: {file.name}")
    return found


def _in_folder(folder: File, asked: Asked) -> Found:
    inside = files.inside(folder)
    names = {files.relative(folder, file.path): file for file in inside}
    if (tables.SAVED_SPLITS,) in names:
        splits = sorted({parts[0] for parts in names if len(parts) > 1})
        raise CalibrationError(
            folder.name,
            found=f"the splits {', '.join(splits)}",
            expected="one of them",
            do=f"give {splits[0]} of it" if splits else "",
        )
    by_kind = {kind: [file for file in inside if file.suffix in suffixes] for kind, suffixes in SUFFIXES.items()}
    by_kind["arrays"] = arrays.in_folder(folder, inside)
    if (tables.SAVED,) in names:
        by_kind["columns"] = tables.saved(folder)
    meant = asked.tables[:1]  # with [columns], pictures and text are in its columns
    for kind in [*meant, "arrays", "columns", "images", "text"]:
        if by_kind[kind]:
            return Found(kind=kind, files=tuple(by_kind[kind]))
    raise CalibrationError(
        folder.name, found=f"no {KINDS[meant[0]] if meant else KINDS['arrays']}",
        expected=f"one of {', '.join(KINDS.values())}",
    )  # fmt: skip


def _require_fitting(kind: str, asked: Asked, where: str) -> None:
    """Refuse a table that this kind of data has no use for, and data without the table it needs."""
    if kind != "columns":  # whose columns may hold pictures and text
        for name in asked.tables:
            if name != kind:
                raise _unused(name, KINDS[kind], where)
    if kind in ("images", "text") and kind not in asked.tables:
        raise RecipeError(
            f"{where}: found {KINDS[kind]}, and no [{kind}] in the recipe",
            do=f"add [{kind}]: it says how they become the model's inputs",
        )


def _require_used(given: Any, role: str, asked: Asked) -> None:
    """Refuse tables for batches that are made already; random data stands in for any."""
    if isinstance(given, str):
        return
    if asked.columns is not None:
        _require_libraries([name for name in asked.tables if name != "columns"], role)
        return
    for name in asked.tables:
        raise _unused(name, "batches that are made already", role)


def _require_libraries(kinds: Iterable[str], where: str) -> None:
    for kind in kinds:
        for library, extra in LIBRARIES.get(kind, {}).items():
            try:
                importlib.import_module(library)
            except ImportError as error:
                raise CalibrationError(where, found=f"no {library}", do=install(extra)) from error


def _unused(table: str, found: str, where: str) -> RecipeError:
    return RecipeError(
        f"[{table}] in the recipe is of no use for {where}", found=found, expected=KINDS[table],
        do=f"take [{table}] out, or give the data that it is for",
    )  # fmt: skip
