"""`.npz` (one array an input) and `.npy` (one input) files: one batch each. Never a pickle."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from exporter.data import files
from exporter.data.files import File
from exporter.errors import CalibrationError

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
    with files.opened(file) if file.system is None else files.contents(file) as stream:
        try:
            if file.suffix != ".npz":
                return np.lib.format.read_array(stream, allow_pickle=False)
            with zipfile.ZipFile(stream):  # numpy would take an .npy file for one
                stream.seek(0)
                with np.load(stream, allow_pickle=False) as arrays:
                    return {key: arrays[key] for key in arrays.files}
        except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            said = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
            raise CalibrationError(
                file.name, found=said, expected="an .npz or .npy file without pickled objects"
            ) from error
