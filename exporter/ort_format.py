"""int8 model -> model.int8.ort and its list of operators; both models + batches -> a proof that they are one model.

The .ort file is ONNX Runtime's own format, which a reduced build for a phone reads: the graph after every optimization,
so that nothing is left to decide on the device ("Fixed" style). What one CPU alone can run must not be in it:

1. NCHWc, the channel block of an x86 CPU: on another CPU it computes other numbers, or does not load.
2. Float layers in a model with signed activations: ARM runs them in integers, other CPUs only when they are told to. So a
   target that may be ARM gets `session.qdqisint8allowed`, as convert_onnx_models_to_ort's --target_platform arm sets it.

ONNX Runtime writes one table of the file in the order of a hash map, which is another in every run. Same inputs, same bytes:
so that table is written again, sorted, and the rest of the file stays as it was.
"""

from __future__ import annotations

import importlib
import logging
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from exporter.batches import Batch
from exporter.errors import QuantizeError
from exporter.quiet import quiet
from runtime.errors import BundleError
from runtime.kernels import Kernels, trace
from runtime.manifest import OPERATORS, ORT
from runtime.session import ORT_ERRORS, open_session, without

SIGNED_RUN_IN_INTEGERS = "session.qdqisint8allowed"
# A multiple of every alignment that ONNX Runtime asks for in the file; tensors keep theirs when the model moves
ALIGNMENT = 64
HEAD = struct.Struct("<I4s6Hi3I")  # offset of the root, identifier, the root's table of fields, the root
RUN_ERRORS: tuple[type[Exception], ...] = (BundleError, *ORT_ERRORS)
SIGNED = (onnx.TensorProto.INT8, onnx.TensorProto.INT16)


@dataclass(frozen=True, slots=True, kw_only=True)
class OrtModel:
    """The phone's file, and ONNX Runtime's list of what a reduced build must hold to run it."""

    ort: bytes
    operators: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Both models on the same batches: outputs equal bit for bit, and the share 0..1 of MACs in integer kernels of either."""

    batches: int
    onnx_integer_macs: float
    ort_integer_macs: float
    kernels: Kernels


def convert(model: bytes, session: Mapping[str, str], target: str) -> OrtModel:
    """Write the int8 model as ONNX Runtime would run it.

    Args:
        model: an ONNX file's bytes, weights inside.
        session: the entries that the target wants; they are baked in.
        target: its name; see rule 2 above.

    Returns:
        The same bytes for the same arguments and version of ONNX Runtime. No path is in them.

    Raises:
        QuantizeError: ONNX Runtime cannot open the model, or writes a file that is not laid out as this module knows it.
    """
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        written = Path(folder) / ORT
        try:
            open_session(
                model,
                entries={**entries(model, session, target), "session.save_model_format": "ORT"},
                optimized=written,
            )
        except BundleError as error:
            raise QuantizeError(f"{ORT}: ONNX Runtime cannot write it", found=error.found) from error
        written.write_bytes(_sorted(written.read_bytes()))
        return OrtModel(ort=written.read_bytes(), operators=_operators(written))


def entries(model: bytes, session: Mapping[str, str], target: str) -> dict[str, str]:
    """The session's entries under which the model is optimized: the target's, and rules 1 and 2 above."""
    fixed = without(session, "NchwcTransformer")
    if not target.startswith(("x86-", "wasm")) and _has_signed_activations(onnx.load_from_string(model).graph):
        fixed.setdefault(SIGNED_RUN_IN_INTEGERS, "1")
    return fixed


def prove(
    made: OrtModel, model: bytes, batches: Sequence[Batch], session: Mapping[str, str], target: str, *, runs: int = 3
) -> Proof:
    """Run both models on every batch, on this CPU, with one thread.

    The .onnx file runs without NCHWc, which the .ort file must not have: where a layer is float, NCHWc sums in another order.

    Args:
        made: from convert().
        model: the ONNX file's bytes that it was made of.
        batches: at least one; the first is profiled.
        session: the entries that the target wants.
        target: its name.
        runs: profiled runs behind the times of `kernels`.

    Raises:
        QuantizeError: ONNX Runtime cannot open or run the .ort file, an output differs in any bit, or a smaller share of
            the MACs runs in integer kernels.
    """
    fixed = entries(model, session, target)
    try:
        onnx_session = open_session(model, threads=1, entries=fixed)
        ort_session = open_session(made.ort, threads=1, entries=session)
        for number, batch in enumerate(batches):
            _refuse_difference(onnx_session.run(None, dict(batch)), ort_session.run(None, dict(batch)), number)
    except RUN_ERRORS as error:
        raise QuantizeError(f"{ORT}: it does not run as the .onnx file does", found=str(error)[:300]) from error
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        paths = Path(folder) / "model.int8.onnx", Path(folder) / ORT
        paths[0].write_bytes(model)
        paths[1].write_bytes(made.ort)
        as_onnx = trace(paths[0], batches[0], entries=fixed, runs=1)
        as_ort = trace(paths[1], batches[0], entries=session, runs=runs)
    refuse_float(as_onnx, as_ort)
    return Proof(
        batches=len(batches),
        onnx_integer_macs=as_onnx.integer_macs,
        ort_integer_macs=as_ort.integer_macs,
        kernels=as_ort,
    )


def refuse_float(as_onnx: Kernels, as_ort: Kernels) -> None:
    """Refuse an .ort file that runs fewer of its multiply-adds in integers than the .onnx file does.

    Raises:
        QuantizeError: names the first layer that is float in the .ort file.
    """
    if as_ort.macs == as_onnx.macs and as_ort.integer_macs >= as_onnx.integer_macs:
        return
    first = next((kernel for kernel in as_ort.kernels if kernel.macs and not kernel.integer), None)
    at = f", {first.kernel} {first.node} is {first.types}" if first is not None else ""
    raise QuantizeError(
        f"{ORT}: its integer share",
        found=f"{as_ort.integer_macs:.1%} of {as_ort.macs} MACs{at}",
        expected=f"{as_onnx.integer_macs:.1%} of {as_onnx.macs}, as the .onnx file",
        do="optimize with the session entries of the manifest, and with session.qdqisint8allowed=1 where activations are int8",
        node=first.node if first is not None else "",
    )


def operators(config: str) -> frozenset[tuple[str, int, str]]:
    """(domain, opset, op_type) of every operator that a required_operators_and_types.config lists.

    A line is `domain;opset[,opset];Op{"inputs": {"0": ["float"]}},Op,...`.
    """
    found: set[tuple[str, int, str]] = set()
    for line in config.splitlines():
        if line and not line.startswith("#"):
            domain, opsets, listed = line.split(";", 2)
            found |= {(domain, int(opset), name) for opset in opsets.split(",") for name in _names(listed)}
    return frozenset(found)


def domains(ort: bytes) -> frozenset[str]:
    """The domains of the nodes of an .ort file. Its text cannot tell: every file lists every domain that ONNX Runtime knows."""
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        path = Path(folder) / ORT
        path.write_bytes(ort)
        return frozenset(domain for domain, _, _ in operators(_operators(path)))


def _names(listed: str) -> Iterator[str]:
    """The names in `Op{"inputs": {...}},Op`: what stands outside of all braces."""
    depth, name = 0, ""
    for letter in listed + ",":
        depth += (letter == "{") - (letter == "}")
        if letter == "," and not depth:
            yield name
            name = ""
        elif not depth and letter != "}":
            name += letter


def _has_signed_activations(graph: onnx.GraphProto) -> bool:
    types = {each.name: each.data_type for each in graph.initializer}
    types |= {node.output[0]: node.attribute[0].t.data_type for node in graph.node if node.op_type == "Constant"}
    return any(
        types.get(node.input[2]) in SIGNED
        for node in graph.node
        if node.op_type == "QuantizeLinear" and len(node.input) > 2
    )


def _refuse_difference(as_onnx: Sequence[Any], as_ort: Sequence[Any], number: int) -> None:
    for index, (expected, found) in enumerate(zip(as_onnx, as_ort, strict=True)):
        if np.asarray(expected).tobytes() != np.asarray(found).tobytes():
            raise QuantizeError(
                f"{ORT}: output {index} of batch {number}",
                found="other bits",
                expected="those of the .onnx file on this CPU",
                do="report the model to us",
            )


@contextmanager
def _tool() -> Iterator[Any]:
    """ONNX Runtime's package for .ort files, which sets up logging when it is imported and talks while it works."""
    handlers = logging.root.handlers[:]
    with quiet():
        from onnxruntime.tools import ort_format_model

        yield ort_format_model
    logging.root.handlers[:] = handlers


def _operators(path: Path) -> str:
    """What create_config_from_models writes, with the file's name in place of its path."""
    config = path.with_name(OPERATORS)
    with _tool() as tool:
        tool.create_config_from_models([path], config, True)
    return config.read_text(encoding="utf-8").replace(str(path), ORT)


def _sorted(ort: bytes) -> bytes:
    """The file with its KernelTypeStrResolver sorted.

    In: root, the resolver's tables, then the model and all it points at, the version's text among it (it was made first,
    and a flatbuffer grows towards its front). Offsets are relative and point backwards to tables of fields or forwards to
    the rest, so the model's part can move as a whole.  Out: root, the sorted resolver, the model's part.

    Source: schema onnxruntime/core/flatbuffers/schema/ort.fbs; layout https://flatbuffers.dev/internals.
    """
    with _tool() as tool:
        root = _fbs(tool).GetRootAs(ort, 0)
        model, resolver = root.Model()._tab, root.KernelTypeStrResolver()
        rows = _rows(resolver)
    begin = min(model.Pos, model.Pos - struct.unpack_from("<i", ort, model.Pos)[0])
    fields = root._tab.Pos - struct.unpack_from("<i", ort, root._tab.Pos)[0]
    version = root._tab.Pos + struct.unpack_from("<H", ort, fields + 4)[0]
    version += struct.unpack_from("<I", ort, version)[0]
    if not resolver._tab.Pos < begin < version < len(ort):
        raise QuantizeError(f"{ORT}: its layout", found="a resolver behind the model", expected="root, resolver, model")
    table = _table(rows)
    table_root = HEAD.size + struct.unpack_from("<I", table, 0)[0]
    end = HEAD.size + len(table)
    shift = end + (begin - end) % ALIGNMENT - begin
    # fields of the root: version at 4, model at 8, none, resolver at 12; each an offset from where it stands itself
    head = HEAD.pack(
        20, b"ORTM", 12, 16, 4, 8, 0, 12, 12, version + shift - 24, model.Pos + shift - 28, table_root - 32
    )  # fmt: skip
    return head + table + bytes(begin + shift - end) + ort[begin:]


_Row = tuple[bytes, list[tuple[bytes, list[tuple[int, int]]]]]  # operator: {type: [(is it an output, its index)]}


def _fbs(tool: Any) -> Any:
    """ONNX Runtime's reader of its own schema; importing `tool` made it importable."""
    return importlib.import_module(f"{tool.__name__}.ort_flatbuffers_py.fbs.InferenceSession").InferenceSession


def _rows(resolver: Any) -> list[_Row]:
    found: list[_Row] = []
    for each in map(resolver.OpKernelTypeStrArgs, range(resolver.OpKernelTypeStrArgsLength())):
        types = [
            (of.KernelTypeStr(), [(arg.ArgType(), arg.Index()) for arg in map(of.Args, range(of.ArgsLength()))])
            for of in map(each.KernelTypeStrArgs, range(each.KernelTypeStrArgsLength()))
        ]
        found.append((each.OpId(), sorted(types)))
    return sorted(found)


def _table(rows: list[_Row]) -> bytes:
    """The resolver as a flatbuffer of its own."""
    import flatbuffers  # type: ignore[import-untyped]

    builder = flatbuffers.Builder(1024)

    def vector(offsets: list[int]) -> int:
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return int(builder.EndVector())

    def entry(name: bytes, items: list[int]) -> int:
        text, listed = builder.CreateString(name), vector(items)
        builder.StartObject(2)
        builder.PrependUOffsetTRelativeSlot(0, text, 0)
        builder.PrependUOffsetTRelativeSlot(1, listed, 0)
        return int(builder.EndObject())

    def argument(kind: int, index: int) -> int:
        builder.StartObject(2)
        builder.PrependInt8Slot(0, kind, 0)
        builder.PrependUint32Slot(1, index, 0)
        return int(builder.EndObject())

    listed = vector(
        [entry(op, [entry(name, [argument(*each) for each in where]) for name, where in types]) for op, types in rows]
    )
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, listed, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())
