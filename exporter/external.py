"""An ONNX file's weights that lie beside it, and those that are written sparse -> plain tensors of the model."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from exporter import weights
from exporter.errors import TraceError


def load(model: onnx.ModelProto, path: Path) -> bool:
    """Read external tensors into the model; only plain files inside the model's folder are read.

    Whether large initializers were left where they are, because all of them are more than protobuf can hold.

    Raises:
        TraceError: a file that is missing, too short, or outside the folder.
    """
    root = path.resolve().parent
    found = [
        tensor
        for tensor in onnx.external_data_helper._get_all_tensors(model)
        if onnx.external_data_helper.uses_external_data(tensor)
    ]
    for tensor in found:
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        inside = PurePosixPath(location.replace("\\", "/"))
        target = (root / location).resolve()
        if not location or inside.is_absolute() or ".." in inside.parts or root not in target.parents:
            raise TraceError(
                f"{path}: tensor {tensor.name}",
                found=f"external data {location!r}",
                expected="a file in the model's own folder",
            )
        if not target.is_file():
            raise TraceError(f"{path}: tensor {tensor.name}", found=f"no file {location}", expected="its weights")
    initializers = {id(tensor) for tensor in model.graph.initializer}
    left = {id(t) for t in found if id(t) in initializers and _bytes(t) >= weights.LEAST_BYTES}
    if sum(map(_bytes, found)) <= weights.LIMIT_BYTES:
        left = set()
    try:
        for tensor in found:
            if id(tensor) in left:
                _require_whole(tensor, root)
                continue
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(root))
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    except (ValueError, OSError) as error:
        raise TraceError(
            f"{path}: external data",
            found=str(error).splitlines()[0][:200] if str(error) else "no data",
            expected="the weights as they were saved",
            do="copy them again",
        ) from error
    return bool(left)


def _bytes(tensor: onnx.TensorProto) -> int:
    return int(math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)


def _require_whole(tensor: onnx.TensorProto, root: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    begin, size = int(entries.get("offset", 0)), _bytes(tensor)
    end, found = begin + size, (root / entries["location"]).stat().st_size
    if found < end or int(entries.get("length", size)) != size:
        raise ValueError(f"{entries['location']} has {found} bytes, {tensor.name} is to end at {end}")


def make_dense(model: onnx.ModelProto) -> None:
    """Turn sparse initializers and constants into plain ones: the tools that read a graph do not see them."""
    for sparse in model.graph.sparse_initializer:
        model.graph.initializer.append(_dense(sparse))
    del model.graph.sparse_initializer[:]
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "sparse_value":
                attribute.CopyFrom(onnx.helper.make_attribute("value", _dense(attribute.sparse_tensor)))


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    """values [NNZ] at indices [NNZ] of the flat tensor, or at [NNZ, rank]; zero elsewhere."""
    values, at = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if at.ndim == 1:
        dense.reshape(-1)[at] = values
    else:
        dense[tuple(at.T)] = values
    return numpy_helper.from_array(dense, sparse.values.name)
