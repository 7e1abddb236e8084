"""`.npz` (one array an input) and `.npy` (one input) files: one batch each. Never a pickle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from exporter.data import files
from exporter.data.files import File
from exporter.errors import CalibrationError
from runtime import npz

SUFFIXES = (".npz", ".npy")


def in_folder(folder: File, inside: Iterable[File]) -> list[File]:
    """Those of a folder's files that are batches; none of its subfolders."""
    return [file for file in inside if file.suffix in SUFFIXES and len(files.relative(folder, file.path)) == 1]


def batches(found: Iterable[File]) -> Iterator[Any]:
    """One batch a file: {name: array} of an .npz, the array of an .npy.

    Raises:
        CalibrationError: no such file, no such format, or pickled objects in it.
    """
    for file in found:
        yield _read(file)


def _read(file: File) -> Any:
    with files.contents(file) as stream:
        content = stream.read()
    try:
        return npz.arrays(content) if file.suffix == ".npz" else npz.array(content)
    except (ValueError, MemoryError) as error:
        said = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
        expected = "an .npz or .npy file without pickled objects"
        raise CalibrationError(file.name, found=said, expected=expected) from error
