"""Raise the default opset to OPSET.

1. An older graph is converted operator by operator: per-channel DequantizeLinear exists from 13 on, LayerNormalization
   from 17, Gelu from 20, so 20 is what the other rewrites can count on.
   Functions of the file are inlined first: the converter does not look into them.
2. A graph at OPSET or newer is left alone.
3. A node that this opset does not know and ONNX Runtime does (its optimizer writes LayerNormalization into files of opset
   14) goes through untouched.
4. Domains that no node is from are not imported any more: a bundle with an import of what is made for one CPU is refused.
5. Before IR version 4 every initializer had to be an input too.

No checker is asked: it refuses branches and outputs without shapes, which run. The graph is run before and after.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir
from onnx import version_converter
from onnx_ir.passes.common import InlinePass, RemoveUnusedOpsetsPass

from exporter import weights
from exporter.errors import TraceError
from exporter.trace import OPSET

FREE_IR_VERSION = 8  # the first that all of ONNX Runtime's tools read and that asks for no such input
THROUGH = "packlight.through"


def rewrite(model: ir.Model) -> int:
    matched = int(RemoveUnusedOpsetsPass()(model).modified)
    if model.ir_version < 4:
        model.ir_version = FREE_IR_VERSION
        matched += 1
    found = model.opset_imports.get("", 0)
    if found >= OPSET:
        return matched
    InlinePass()(model)
    unknown = [node for node in _nodes(model) if not node.domain and not _is_known(node.op_type, found)]
    for node in unknown:
        node.domain = THROUGH
    model.opset_imports[THROUGH] = 1
    heavy = weights.heavy(model)
    light = weights.without(model, heavy) if heavy else model
    try:
        raised = version_converter.convert_version(ir.serde.serialize_model(light), OPSET)
    except (RuntimeError, version_converter.ConvertError) as error:
        raise TraceError(
            f"opset {found} cannot be raised to {OPSET}",
            found=str(error).strip().splitlines()[-1][:200],
            do=f"export the model again at opset {OPSET}",
        ) from error
    converted = ir.serde.deserialize_model(raised)
    weights.restore(converted, heavy)
    for node in _nodes(converted):
        node.domain = "" if node.domain == THROUGH else node.domain
    del converted.opset_imports[THROUGH]
    for before, after in zip(model.graphs(), converted.graphs(), strict=True):
        for given, value in zip(before.inputs, after.inputs, strict=True):  # the converter forgets that one is a scalar
            value.type, value.shape = given.type, given.shape
    model.graph = converted.graph
    model.ir_version = max(converted.ir_version, model.ir_version)
    return 1


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    return (node for each in model.graphs() for node in each)


def _is_known(op_type: str, opset: int) -> bool:
    try:
        return not onnx.defs.get_schema(op_type, opset).deprecated
    except onnx.defs.SchemaError:
        return False
