"""The file beside a graph that holds its weights, written tensor by tensor: array -> where it lies in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

ALIGNED = 64  # bytes: a cache line, and what the widest vectors of a CPU load
TYPES: Mapping[str, int] = {"float32": onnx.TensorProto.FLOAT, "uint8": onnx.TensorProto.UINT8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Where an array lies: file, first byte, bytes; its dtype and shape."""

    location: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> onnx.TensorProto:
        """An initializer that refers to it, in this shape or another one of as many elements."""
        dims = self.shape if shape is None else shape
        assert int(np.prod(dims)) == int(np.prod(self.shape))
        found = onnx.TensorProto(name=name, data_type=TYPES[self.dtype], dims=dims)
        found.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", self.offset), ("length", self.length)):
            found.external_data.add(key=key, value=str(value))
        return found


class Store:
    """An open file of weights; `with` closes it."""

    def __init__(self, path: Path) -> None:
        self._file, self._location, self._end = open(path, "wb"), path.name, 0  # noqa: SIM115  # __exit__ closes it

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, array: NDArray[Any]) -> Stored:
        """Write an array behind those before it."""
        self._file.write(b"\0" * (-self._end % ALIGNED))
        offset = self._end + -self._end % ALIGNED
        whole = np.ascontiguousarray(array)
        self._file.write(whole.data.cast("B") if whole.size else b"")
        self._end = offset + whole.nbytes
        return Stored(
            location=self._location, offset=offset, length=whole.nbytes, dtype=str(whole.dtype), shape=whole.shape
        )
