"""Give every node a name of its own, and take out what must not travel in a file.

1. Doc strings and metadata (stack traces, source paths, module scopes of the tracer) are removed.
2. A node without a name, or with a name already taken, is called after its first output. Those in branches and bodies count:
   a plan, a rule and ONNX Runtime's profile all know a node by its name alone.
   A name that ONNX Runtime's quantizer gives to nodes of its own gets an ending.
   Line breaks and "|" in a name become "_": a node is one field of one line in plan.txt, whose fields "|" separates.
3. A tensor `x_scale` beside a tensor `x` is renamed: it is what ONNX Runtime's quantizer calls the scale of x. So are
   the other names it makes up. Of two where one is an input or output of the graph, the other is renamed.
"""

from __future__ import annotations

import re

import onnx_ir as ir
from onnx_ir.passes import common as passes

from exporter.prepare import edit

QUANTIZERS = re.compile(r"(_(?:Quantize|Dequantize)Linear)$")  # its own nodes end so
ONE_FIELD = re.compile(r"[|\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")  # what str.splitlines splits at


def rewrite(model: ir.Model) -> int:
    modified = passes.ClearMetadataAndDocStringPass()(model).modified
    modified |= passes.NameFixPass()(model).modified
    model.producer_name, model.producer_version = "packlight", ""
    taken: set[str] = set()
    for node in [node for each in model.graphs() for node in each]:
        plain = QUANTIZERS.sub(r"\1_own", ONE_FIELD.sub("_", node.name or "").strip())
        modified |= plain != (node.name or "")
        node.name = plain
        if not node.name or node.name in taken:
            base = ONE_FIELD.sub("_", node.outputs[0].name or "").strip() or node.op_type
            node.name = next(
                name for name in (base, *(f"{base}_{i}" for i in range(len(taken) + 1))) if name not in taken
            )
            modified = True
        taken.add(node.name)
    return int(modified) + _free_the_quantizers_names(model)


def _free_the_quantizers_names(model: ir.Model) -> int:
    """Rule 3. Two inputs or outputs that clash are kept apart by `ends`."""
    ends = {*model.graph.inputs, *model.graph.outputs}
    found = {value.name: value for value in edit.tensors(model)}
    clashing = [
        found[stem] if value in ends else value
        for value in found.values()
        for stem in edit.stems(value.name)
        if stem in found
    ]
    renamed = [value for value in dict.fromkeys(clashing) if value not in ends]
    for value in renamed:
        value.name = edit.free_name(model, f"{value.name}_own")
    return len(renamed)
