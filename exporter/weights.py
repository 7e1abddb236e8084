"""The weights of a graph that protobuf cannot hold: beside its bytes, in files.

protobuf ends at 2 GB. Where the initializers of a graph are more than LIMIT_BYTES, those of LEAST_BYTES and more lie in files of
one temporary folder of this process, to which the graph's bytes refer as ONNX's external data; ONNX Runtime maps them, and they
take no memory of their own. A bundle has them in one file beside each model (`write`). Smaller graphs are bytes alone, as ever.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

from exporter.errors import QuantizeError
from runtime import manifest, session

LIMIT_BYTES = 1_500_000_000
LEAST_BYTES = 1 << 20
ALIGNMENT = 1 << 16  # what every system can map a file at
BLOCK = 1 << 24
NAME = re.compile(rb"packlight-[0-9a-f]{32}")
_PLACED: dict[int, tuple[ir.TensorProtocol, ir.ExternalTensor]] = {}


def heavy(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """{initializer: its tensor}, those that must lie beside the graph's bytes; empty where all of it is bytes."""
    found = {
        name: value.const_value for name, value in model.graph.initializers.items() if value.const_value is not None
    }
    if sum(tensor.nbytes for tensor in found.values()) <= LIMIT_BYTES:
        return {}
    return {name: tensor for name, tensor in found.items() if tensor.nbytes >= LEAST_BYTES}


def outside(model: ir.Model) -> ir.Model:
    """The model, or a clone whose heavy weights are external data in this process's folder, and whose others are in it."""
    beside = heavy(model)
    if not beside:
        return inside(model)
    clone = model.clone()
    for name, tensor in beside.items():
        clone.graph.initializers[name].const_value = _placed(name, tensor)
    return clone


def inside(model: ir.Model) -> ir.Model:
    """The model, or a clone, with all its weights in memory."""
    mapped = [n for n, value in model.graph.initializers.items() if isinstance(value.const_value, ir.ExternalTensor)]
    if not mapped:
        return model
    clone = model.clone()
    for name in mapped:
        value = clone.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy().copy(), name=name)
    return clone


def without(model: ir.Model, names: Collection[str]) -> ir.Model:
    """A clone in which these initializers are inputs of the graph: for tools that would copy them."""
    clone = model.clone()
    for name in names:
        value = clone.graph.initializers.pop(name)
        value.const_value = None
        clone.graph.inputs.append(value)
    return clone


def restore(model: ir.Model, tensors: Mapping[str, ir.TensorProtocol]) -> None:
    """The inverse of `without`, in place."""
    for value in [value for value in model.graph.inputs if value.name in tensors]:
        model.graph.inputs.remove(value)
        value.const_value = tensors[value.name or ""]
        model.graph.register_initializer(value)


def size(content: bytes) -> int:
    """Bytes of a model and of the weights beside it."""
    return len(content) + sum(_length(tensor) for tensor in _beside(content))


def place(content: bytes, path: Path) -> None:
    """Write a graph's bytes where another process, or ONNX Runtime by a path, reads them: the files are linked beside it."""
    path.write_bytes(content)
    for name in set(NAME.findall(content)):
        _link(_folder() / name.decode(), path.parent / name.decode())


def write(content: bytes, path: Path) -> None:
    """Write a model as it ships: heavy weights in one file beside it, each at a multiple of ALIGNMENT; runs of zeros stay holes.

    The same model gives the same bytes.
    """
    beside = list(_beside(content))
    if not beside:
        path.write_bytes(content)
        return
    model = onnx.ModelProto.FromString(content)
    data = path.with_name(path.name + manifest.DATA)
    with data.open("wb") as out:
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            entries = {entry.key: entry.value for entry in tensor.external_data}
            length, start = _length(tensor), -(-out.tell() // ALIGNMENT) * ALIGNMENT
            out.seek(start)
            _copy(_folder() / entries["location"], int(entries.get("offset", 0)), length, out)
            del tensor.external_data[:]
            for key, value in (("location", data.name), ("offset", str(start)), ("length", str(length))):
                tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString(deterministic=True))


def require_bytes(model: ir.Model, what: str) -> None:
    """Refuse what needs the whole model in one run of bytes.

    Raises:
        QuantizeError: the model is too large for that.
    """
    if beside := heavy(model):
        total = sum(tensor.nbytes for tensor in beside.values())
        raise QuantizeError(
            what,
            found=f"{total / 1e9:.1f} GB of weights",
            expected=f"at most {LIMIT_BYTES / 1e9:.1f} GB",
            do="leave it out",
        )


def _beside(content: bytes) -> Iterator[onnx.TensorProto]:
    if NAME.search(content):
        model = onnx.ModelProto.FromString(content)
        yield from (t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)


def _length(tensor: onnx.TensorProto) -> int:
    return next(int(entry.value) for entry in tensor.external_data if entry.key == "length")


def _placed(name: str, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
    """The tensor as external data in this process's folder; once for each tensor, whatever clones share it."""
    known = _PLACED.get(id(tensor))
    if known is not None:
        return known[1]
    if isinstance(tensor, ir.ExternalTensor):
        given = Path(tensor.path)
        seen = given.stat()
        file = _name(f"{given.resolve()}|{tensor.offset}|{seen.st_mtime_ns}|{seen.st_size}".encode())
        if not (_folder() / file).exists():
            with (_folder() / file).open("wb") as out:
                _copy(given, tensor.offset or 0, tensor.nbytes, out)
    else:
        array = np.ascontiguousarray(tensor.numpy())
        file = _name(repr((array.dtype.str, array.shape)).encode(), array.reshape(-1).view(np.uint8).data)
        if not (_folder() / file).exists():
            array.tofile(_folder() / file)
    made = ir.ExternalTensor(
        file, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name, base_dir=_folder()
    )
    _PLACED[id(tensor)] = _PLACED[id(made)] = (tensor, made)
    return made


def _name(*parts: bytes | memoryview) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return f"packlight-{sha.hexdigest()[:32]}"


def _copy(given: Path, offset: int, length: int, out: BinaryIO) -> None:
    """Append so many bytes of a file; blocks of zeros become holes."""
    with given.open("rb") as file:
        file.seek(offset)
        for at in range(0, length, BLOCK):
            block = file.read(min(BLOCK, length - at))
            if np.frombuffer(block, np.uint8).any():
                out.write(block)
            else:
                out.seek(len(block), os.SEEK_CUR)
    out.truncate(out.tell())


def _link(given: Path, there: Path) -> None:
    if there.exists():
        return
    try:
        os.link(given, there)
    except OSError:  # another file system, or one without links
        shutil.copyfile(given, there)


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="packlight-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    session.read_weights_from(folder)
    return folder
