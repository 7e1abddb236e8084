"""Rows of tables -> batches: Parquet, folders of `datasets.save_to_disk`, and any iterable of {column: value}.

Read record batch by record batch; the recipe's `[columns]` says which column an input gets. A column of pictures or of
text is prepared by `[images]` or `[text]` on its way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PlainValidator

from exporter.batches import Array, Batch, as_array
from exporter.data import files, images, text
from exporter.data.files import File
from exporter.data.group import Left, Size, by_name, grouped, nearest, size
from exporter.data.images import Images
from exporter.data.table import Table, refuse
from exporter.data.text import Text
from exporter.errors import CalibrationError, RecipeError
from runtime.manifest import Tensor

SUFFIXES = (".parquet", ".pq")
SAVED = "state.json"  # of a folder that datasets.save_to_disk wrote
SAVED_SPLITS = "dataset_dict.json"  # of one that holds such folders
BLOCK = 64  # rows read at once, at least
BUFFER = 1 << 20  # bytes of a column read at once; without it pyarrow loads a row group, which may be the whole file


def _pairs(value: Any) -> Any:
    """A table as pairs: what a frozen recipe holds."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple) or not all(isinstance(part, str) and part for pair in pairs for part in pair):
        refuse('{input = "column"}')
    return pairs


class Columns(Table):
    """`[columns]`: which column an input gets, {input = "column"}; else that of its own name. batch: rows a batch."""

    batch: int | None = Field(default=None, ge=1)
    inputs: Annotated[tuple[tuple[str, str], ...], PlainValidator(_pairs)] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepare:
    """What else the recipe says of columns: one of pictures, one of text."""

    images: Images | None = None
    text: Text | None = None
    folder: Path = Path()


def from_files(
    found: Sequence[File], asked: Columns, prepare: Prepare, tensors: Sequence[Tensor], left: Left
) -> Iterator[Batch]:
    """Batches of the rows of Parquet files, or of the Arrow files of a saved data set.

    Raises:
        RecipeError: an input that the graph does not have.
        CalibrationError: a file that is none, a column that is missing or does not fit its input.
    """
    wanted = _wanted(asked, prepare, tensors)
    rows = size(asked.batch, _leading(wanted, tensors), "columns")
    blocks = (block for file in found for block in _blocks(file, wanted, max(BLOCK, rows.rows)))
    if prepare.images is not None or prepare.text is not None:
        single = (row for block in blocks for row in block.to_pylist())
        return _prepared(single, wanted, rows, prepare, tensors, left)
    return (
        {
            name: _fitted(_numbers(group[column], column), tensor, column)
            for name, column, tensor in _each(wanted, tensors)
        }
        for group in _arrow_groups(blocks, rows, left)
    )


def from_rows(
    given: Iterable[Any], asked: Columns, prepare: Prepare, tensors: Sequence[Tensor], left: Left
) -> Iterator[Batch]:
    """Batches of an iterable of rows {column: value}, a Hugging Face data set for one.

    Raises:
        RecipeError, CalibrationError: as `from_files`.
    """
    wanted = _wanted(asked, prepare, tensors)
    rows = size(asked.batch, _leading(wanted, tensors), "columns")
    return _prepared(_checked_rows(given, wanted), wanted, rows, prepare, tensors, left)


def saved(folder: File) -> list[File]:
    """The Arrow files of a folder that datasets.save_to_disk wrote, in order.

    Raises:
        CalibrationError: its state.json is none.
    """
    state = File(path=f"{folder.path.rstrip('/')}/{SAVED}", system=folder.system)
    try:
        names = [str(each["filename"]) for each in json.loads(files.contents(state).read())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            state.name, found=str(error)[:120] or type(error).__name__, expected="what datasets.save_to_disk writes"
        ) from error
    return [File(path=f"{folder.path.rstrip('/')}/{name}", system=folder.system) for name in names]


def _wanted(asked: Columns, prepare: Prepare, tensors: Sequence[Tensor]) -> dict[str, str]:
    """{input: column}, for every input that a column fills."""
    columns = dict(asked.inputs)
    for name in columns:
        by_name(tensors, name, "[columns]:inputs")
    made: set[str] = set()
    if prepare.text is not None:
        takes = text.inputs(prepare.text, tensors)
        made = {tensor.name for kind, tensor in takes.items() if kind != "ids"}
    for table, other in (("images", prepare.images), ("text", prepare.text)):
        if other is not None and other.batch is not None:
            raise RecipeError("batch", found="one beside [columns]", expected="it in [columns]", where=f"[{table}]")
    return {tensor.name: columns.get(tensor.name, tensor.name) for tensor in tensors if tensor.name not in made}


def _leading(wanted: Mapping[str, str], tensors: Sequence[Tensor]) -> Tensor:
    """An input of a fixed first size, if there is one: it decides how many rows a batch has."""
    of = [tensor for tensor in tensors if tensor.name in wanted]
    return next((tensor for tensor in of if tensor.shape and isinstance(tensor.shape[0], int)), of[0])


def _each(wanted: Mapping[str, str], tensors: Sequence[Tensor]) -> list[tuple[str, str, Tensor]]:
    return [(name, column, by_name(tensors, name, "[columns]")) for name, column in wanted.items()]


def _blocks(file: File, wanted: Mapping[str, str], rows: int) -> Iterator[Any]:
    """The record batches of one file, with the wanted columns only."""
    import pyarrow
    from pyarrow import ipc, parquet

    columns = sorted(set(wanted.values()))
    with files.opened(file) as stream:
        try:
            if file.suffix in SUFFIXES:
                table = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER)
                _require_columns(wanted, table.schema_arrow.names, file.name)
                yield from table.iter_batches(batch_size=rows, columns=columns)
            else:
                arrow = ipc.open_stream(pyarrow.memory_map(file.path) if file.system is None else stream)
                _require_columns(wanted, arrow.schema.names, file.name)
                yield from (block.select(columns) for block in arrow)
        except CalibrationError:
            raise
        except Exception as error:  # pyarrow's, and what a damaged file makes of it
            raise CalibrationError(
                file.name, found=(str(error).splitlines() or [""])[0][:160], expected="a Parquet or Arrow file"
            ) from error


def _require_columns(wanted: Mapping[str, str], names: Sequence[str], where: str) -> None:
    for name, column in wanted.items():
        if column not in names:
            raise CalibrationError(
                f"{where}: no column {column!r} for input {name!r}",
                expected=f"one of {', '.join(map(str, names))}"[:400],
                do=nearest(column, map(str, names))
                or f"name its column in the recipe: [columns] inputs = {{{name} = ...}}",
                tensor=name,
            )


def _arrow_groups(blocks: Iterable[Any], rows: Size, left: Left) -> Iterator[dict[str, Any]]:
    """{column: pyarrow array of `rows` rows}, cut and joined without a copy of each value."""
    import pyarrow

    slices: list[Any] = []
    for block in blocks:
        start = 0
        while start < block.num_rows:
            taken = block.slice(start, rows.rows - sum(each.num_rows for each in slices))
            slices.append(taken)
            start += taken.num_rows
            if sum(each.num_rows for each in slices) == rows.rows:
                yield _columns(pyarrow.Table.from_batches(slices))
                slices = []
    if slices and rows.fixed:
        left.over = sum(each.num_rows for each in slices)
    elif slices:
        yield _columns(pyarrow.Table.from_batches(slices))


def _columns(table: Any) -> dict[str, Any]:
    return {name: table.column(name).combine_chunks() for name in table.column_names}


def _numbers(values: Any, column: str) -> Array:
    """A pyarrow array as a numpy array: [rows] of numbers, [rows, n] of lists, [rows, n, m] of lists of lists."""
    import pyarrow

    kind = values.type
    if isinstance(values, pyarrow.ChunkedArray):  # what combine_chunks of no chunk gives in some versions
        values = pyarrow.concat_arrays(values.chunks) if values.num_chunks else pyarrow.array([], kind)
    if isinstance(kind, pyarrow.FixedShapeTensorType):
        shape, values = kind.shape, values.storage
        return _numbers(values, column).reshape(len(values), *shape)
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _numbers(values.storage, column)
    if values.null_count:
        raise CalibrationError(f"column {column!r}", found="null", expected="a value in every row")
    types = pyarrow.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        lengths = set(values.value_lengths().to_pylist())
        if len(lengths) > 1:
            raise _ragged(column, lengths)
        inner = _numbers(values.flatten(), column)
        return inner.reshape(len(values), *lengths, *inner.shape[1:])
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        hint = "prepare it with [text]" if types.is_string(kind) or types.is_large_string(kind) else ""
        hint = "prepare it with [images]" if types.is_binary(kind) or types.is_struct(kind) else hint
        raise CalibrationError(f"column {column!r}", found=str(kind)[:80], expected="numbers or lists of them", do=hint)
    return np.asarray(values.to_numpy(zero_copy_only=False))


def _ragged(column: str, lengths: Iterable[Any]) -> CalibrationError:
    return CalibrationError(
        f"column {column!r}", found=f"rows of {', '.join(map(str, sorted(lengths, key=str)[:3]))} values in one batch",
        expected="one size", do="take batch = 1 in [columns], or make the rows equally long",
    )  # fmt: skip


def _fitted(array: Array, tensor: Tensor, column: str) -> Array:
    """The rows in the input's dtype, and in its shape where that is fixed and holds as many numbers (tables have no shapes).

    Raises:
        CalibrationError: fractions for an input of integers, integers that it cannot hold.
    """
    dtype = np.dtype(tensor.dtype)
    if array.dtype != dtype:
        kept = array.dtype.kind in "iub" and dtype.kind in "iub"
        with np.errstate(over="ignore"):  # an infinity is refused with its batch, later
            changed = array.astype(dtype) if kept or dtype.kind == "f" else array
        if changed is array or (kept and not np.array_equal(changed, array)):
            raise CalibrationError(
                f"column {column!r}", found=f"{array.dtype} values", expected=f"what {dtype} can hold, for input {tensor.name!r}",
                tensor=tensor.name,
            )  # fmt: skip
        array = changed
    sizes = [each for each in tensor.shape[1:] if isinstance(each, int)]
    known = len(sizes) == len(tensor.shape) - 1
    if known and array.ndim and list(array.shape[1:]) != sizes and math.prod(array.shape[1:]) == math.prod(sizes):
        return array.reshape(len(array), *sizes)
    return array


def _checked_rows(given: Iterable[Any], wanted: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    for number, row in enumerate(given):
        if not isinstance(row, Mapping):
            raise CalibrationError(
                f"row {number}", found=type(row).__name__, expected="{column: value}, as [columns] is in the recipe"
            )
        _require_columns(wanted, list(row), f"row {number}")
        yield row


def _prepared(
    given: Iterable[Mapping[str, Any]],
    wanted: Mapping[str, str],
    rows: Size,
    prepare: Prepare,
    tensors: Sequence[Tensor],
    left: Left,
) -> Iterator[Batch]:
    """Batches of single rows; pictures are decoded before rows are counted off, so that a skipped one leaves no gap."""
    takes = text.inputs(prepare.text, tensors) if prepare.text else {}
    encode = text.encoder(prepare.text, prepare.folder, tensors, rows.rows) if prepare.text else None
    how = images.preprocessing(prepare.images, tensors) if prepare.images else None

    def made(number: int, row: Mapping[str, Any]) -> dict[str, Any] | None:
        values = {name: row[column] for name, column in wanted.items()}
        if how is not None:
            values[how.input] = images.converted(f"row {number}", values[how.input], how, left)
            if values[how.input] is None:
                return None
        return values

    single = (values for number, row in enumerate(given) if (values := made(number, row)) is not None)
    for group in grouped(single, rows, left):
        batch: dict[str, Any] = {}
        for name, column, tensor in _each(wanted, tensors):
            each = [values[name] for values in group]
            if encode is not None and name == takes["ids"].name:
                batch |= encode(_texts(each, column))
            elif how is not None and name == how.input:
                batch[name] = images.joined(each, f"column {column!r}")
            else:
                batch[name] = _fitted(_stacked(each, column), tensor, column)
        yield batch


def _texts(values: Sequence[Any], column: str) -> Sequence[str]:
    for value in values:
        if not isinstance(value, str):
            raise CalibrationError(f"column {column!r}", found=type(value).__name__, expected="text")
    return values


def _stacked(values: Sequence[Any], column: str) -> Array:
    arrays = [as_array(value, column) for value in values]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise _ragged(column, ("x".join(map(str, shape)) or "1" for shape in shapes))
    return np.stack(arrays)
