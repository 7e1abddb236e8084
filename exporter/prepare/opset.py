"""Raise the default opset to OPSET.

1. An older graph is converted operator by operator: per-channel DequantizeLinear exists from 13 on, LayerNormalization
   from 17, Gelu from 20, so 20 is what the other rewrites can count on.
   Functions of the file are inlined first: the converter does not look into them.
2. A graph at OPSET or newer is left alone.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import version_converter
from onnx_ir.passes.common import InlinePass

from exporter.errors import TraceError
from exporter.trace import OPSET


def rewrite(model: ir.Model) -> int:
    found = model.opset_imports.get("", 0)
    if found >= OPSET:
        return 0
    InlinePass()(model)
    try:
        raised = version_converter.convert_version(ir.serde.serialize_model(model), OPSET)
        onnx.checker.check_model(raised)
    except (RuntimeError, onnx.checker.ValidationError, version_converter.ConvertError) as error:
        raise TraceError(
            f"opset {found} cannot be raised to {OPSET}",
            found=str(error).strip().splitlines()[-1][:200],
            do=f"export the model again at opset {OPSET}",
        ) from error
    converted = ir.serde.deserialize_model(raised)
    model.graph = converted.graph
    model.ir_version = converted.ir_version
    return 1
