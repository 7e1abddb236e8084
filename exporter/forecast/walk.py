"""Run an int8 model as x86 without VNNI would: int8 graph -> Cut, (Cut, inputs) -> outputs and what clipped.

ONNX Runtime is asked once which graph it would run (its own fusions, the target's session entries). That graph is cut at
the layers that can clip; they are computed in numpy. Everything between two of them is run by ONNX Runtime as it stands,
with no further optimization, so that cutting changes no kernel. Layers that cannot clip are exact on every CPU.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from exporter import graph, ops
from exporter.batches import Array, Batch
from exporter.forecast import layer as layers
from exporter.forecast.layer import Clips, Layer
from runtime.errors import PacklightError
from runtime.manifest import Tensor
from runtime.session import NO_ENTRIES, ORT_ERRORS, open_session

# ONNX Runtime's words for the type of an element -> ONNX's number
ELEMENTS = {name.lower(): number for name, number in TensorProto.DataType.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Nodes that ONNX Runtime runs: what goes in, what comes out."""

    session: ort.InferenceSession
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A graph cut at its layers that can clip; `steps` in the order in which they run.

    inputs: what a batch must hold; constants: initializers that a layer reads or that are outputs.
    rounds_here: nodes in float whose last bits depend on the CPU: sums in an order of its own, functions by polynomials.
    """

    inputs: tuple[Tensor, ...]
    steps: tuple[Segment | Layer, ...]
    constants: Mapping[str, Array]
    outputs: tuple[str, ...]
    rounds_here: tuple[str, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(step for step in self.steps if isinstance(step, Layer))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """outputs: {name: array}; clips: of each layer of the Cut, in its order."""

    outputs: Mapping[str, Array]
    clips: tuple[Clips, ...]


def cut(model: ir.Model | Path, entries: Mapping[str, str] = NO_ENTRIES) -> Cut:
    """Cut an int8 model at the layers that can clip.

    Args:
        model: QDQ or operators of int8, as a file or a graph.
        entries: session config entries, as the bundle's manifest has them.

    Raises:
        BundleError: ONNX Runtime cannot open the model.
        PacklightError: a layer can clip in a way that is not followed; it is named.
    """
    fused = _with_types(_without_dynamic(_as_it_runs(model, entries)), entries)
    constants = {each.name: numpy_helper.to_array(each) for each in fused.graph.initializer}
    found = _layers(fused, constants)
    nodes, behind = _levels(fused.graph, found)
    outputs = tuple(each.name for each in fused.graph.output)
    wanted = {name for each in found.values() for name in each.node.input} | set(outputs)
    wanted |= {name for at in nodes for node in nodes[at] for name in _reads(node) if behind.get(name, 0) < at}
    steps: list[Segment | Layer] = []
    for at in sorted(nodes):
        between = [node for node in nodes[at] if node.output[0] not in found]
        if between:
            steps.append(_segment(fused, between, wanted, entries))
        steps += [found[node.output[0]] for node in nodes[at] if node.output[0] in found]
    kept = {name: array for name, array in constants.items() if name in wanted}
    return Cut(
        inputs=graph.inputs(ir.serde.deserialize_model(fused)),
        steps=tuple(steps),
        constants=kept,
        outputs=outputs,
        rounds_here=_rounds_here(fused),
    )


def run(cut: Cut, inputs: Batch, saturates: bool) -> Ran:
    """The outputs on a CPU that saturates, or on one that does not.

    Raises:
        RunError: ONNX Runtime cannot run a part of the graph on these inputs.
    """
    values: dict[str, Array] = {**cut.constants, **inputs}
    clips: list[Clips] = []
    for step in cut.steps:
        if isinstance(step, Segment):
            try:
                made = step.session.run(step.outputs, {name: values[name] for name in step.inputs})
            except ORT_ERRORS as error:
                raise graph.RunError(str(error).splitlines()[0][:300]) from error
            values |= dict(zip(step.outputs, made, strict=True))
        else:
            read = [values[name] if name else None for name in step.node.input]
            values[step.node.output[0]], found = layers.run(step, read, saturates)
            clips.append(found)
    return Ran(outputs={name: values[name] for name in cut.outputs}, clips=tuple(clips))


def _as_it_runs(model: ir.Model | Path, entries: Mapping[str, str]) -> onnx.ModelProto:
    """The graph after ONNX Runtime's optimizations."""
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        written = Path(folder) / "fused.onnx"
        given = model if isinstance(model, Path) else graph.to_bytes(model)
        open_session(given, threads=1, entries=entries, optimized=written)
        return onnx.load(written)


def _open(model: onnx.ModelProto, entries: Mapping[str, str]) -> ort.InferenceSession:
    # one thread: those of so many sessions would spin while numpy computes, which is ten times slower
    return open_session(model.SerializeToString(), threads=1, entries=entries, optimize=False)


def _without_dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    """DynamicQuantizeMatMul   becomes   DynamicQuantizeLinear -> MatMulIntegerToFloat, which is how its kernel works."""
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "DynamicQuantizeMatMul":
            nodes.append(node)
            continue
        a, b, b_scale, b_zero, bias = list(node.input) + [""] * (5 - len(node.input))
        codes, scale, zero = (f"{node.output[0]}/{part}" for part in ("codes", "scale", "zero"))
        nodes.append(helper.make_node("DynamicQuantizeLinear", [a], [codes, scale, zero], f"{node.name}/quantize"))
        fused = [codes, b, scale, b_scale, zero, b_zero, bias]
        nodes.append(helper.make_node("MatMulIntegerToFloat", fused, node.output[:], node.name, domain="com.microsoft"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _with_types(model: onnx.ModelProto, entries: Mapping[str, str]) -> onnx.ModelProto:
    """The model with the type of every tensor that is computed: ONNX Runtime does not write them, but tells of outputs."""
    told = onnx.ModelProto()
    told.CopyFrom(model)
    names = {each.name for each in told.graph.output}
    made = [name for node in model.graph.node for name in node.output if name and name not in names]
    told.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made)
    types = {each.name: each.type for each in _open(told, entries).get_outputs()}
    del model.graph.value_info[:]
    model.graph.value_info.extend(helper.make_value_info(name, _type(types[name])) for name in made)
    return model


def _type(told: str) -> onnx.TypeProto:
    """ONNX's form of a type in ONNX Runtime's words: tensor(float), seq(tensor(int64))."""
    kind, _, inner = told.removesuffix(")").partition("(")
    if kind == "seq":
        return helper.make_sequence_type_proto(_type(inner))
    if kind == "optional":
        return helper.make_optional_type_proto(_type(inner))
    return helper.make_tensor_type_proto(ELEMENTS[inner], None)


def _dtypes(of: onnx.GraphProto) -> dict[str, np.dtype]:
    given = {each.name: each.type.tensor_type.elem_type for each in (*of.input, *of.value_info, *of.output)}
    given |= {each.name: each.data_type for each in of.initializer}
    return {name: helper.tensor_dtype_to_np_dtype(code) for name, code in given.items() if code}


def _layers(model: onnx.ModelProto, constants: Mapping[str, Array]) -> dict[str, Layer]:
    """{output: Layer} of the nodes that can clip, all of them in the outermost graph."""
    dtypes = _dtypes(model.graph)
    found: dict[str, Layer] = {}
    for node in model.graph.node:
        if (layer := layers.can_clip(node, constants, dtypes)) is not None:
            found[node.output[0]] = layer
        for inner, its_constants, its_dtypes in _inside(node, constants, dtypes):
            if layers.can_clip(inner, its_constants, its_dtypes) is not None:
                raise PacklightError(
                    f"{layers.name_of(inner)} ({inner.op_type})",
                    found=f"a layer that can clip inside {layers.name_of(node)} ({node.op_type})",
                    expected="it in the outermost graph",
                    do="keep this node float, or round its weight under the pair rule (target portable)",
                )
    return found


def _rounds_here(model: onnx.ModelProto) -> tuple[str, ...]:
    floats = {name for name, dtype in _dtypes(model.graph).items() if dtype.kind == "f"}
    return tuple(
        layers.name_of(node)
        for node in model.graph.node
        if not floats.isdisjoint(node.output) and ops.of(node.op_type).bits == "here"
    )


_Scope = tuple[onnx.NodeProto, Mapping[str, Array], Mapping[str, np.dtype]]


def _inside(node: onnx.NodeProto, constants: Mapping[str, Array], dtypes: Mapping[str, np.dtype]) -> Iterator[_Scope]:
    """The nodes of a node's branches and bodies, with the constants and dtypes they see."""
    for body in _bodies(node):
        seen = {**constants, **{each.name: numpy_helper.to_array(each) for each in body.initializer}}
        known = {**dtypes, **_dtypes(body)}
        for inner in body.node:
            yield inner, seen, known
            yield from _inside(inner, seen, known)


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [each.g for each in node.attribute if each.type == onnx.AttributeProto.GRAPH]


def _reads(node: onnx.NodeProto) -> set[str]:
    """The tensors a node reads, those its branches and bodies take from outside included."""
    read = set(node.input)
    for body in _bodies(node):
        made = {each.name for each in (*body.input, *body.initializer)} | {o for n in body.node for o in n.output}
        read |= {name for inner in body.node for name in _reads(inner)} - made
        read |= {each.name for each in body.output} - made
    return read - {""}


def _levels(
    of: onnx.GraphProto, found: Mapping[str, Layer]
) -> tuple[Mapping[int, list[onnx.NodeProto]], Mapping[str, int]]:
    """Nodes by how many layers that can clip are before them, along the longest way, and for each tensor how many are behind it."""
    nodes: dict[int, list[onnx.NodeProto]] = defaultdict(list)
    behind: dict[str, int] = {}
    for node in of.node:
        at = max((behind.get(name, 0) for name in _reads(node)), default=0)
        nodes[at].append(node)
        behind |= dict.fromkeys(node.output, at + (node.output[0] in found))
    return nodes, behind


def _segment(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], wanted: set[str], entries: Mapping[str, str]
) -> Segment:
    made = {name for node in nodes for name in node.output if name}
    read = set().union(*(_reads(node) for node in nodes))
    initializers = [each for each in model.graph.initializer if each.name in read]
    inputs = sorted(read - made - {each.name for each in initializers})
    types = {each.name: each for each in (*model.graph.input, *model.graph.value_info, *model.graph.output)}
    outputs = sorted(made & wanted)
    part = helper.make_graph(
        nodes,
        "part",
        [types[name] for name in inputs],
        [types.get(name, onnx.ValueInfoProto(name=name)) for name in outputs],
        initializers,
    )
    whole = helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = _open(whole, entries)
    return Segment(session=session, inputs=tuple(inputs), outputs=tuple(outputs))
