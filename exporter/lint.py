"""int8 model + Target -> Findings: what would make the file wrong, slow or impossible to open on a CPU it is meant for.

Each rule is one line of RULES and one function. An error makes wrong numbers, no session, or a file slower than FP32; a
warning costs time, or is an error on a CPU that was not asked about (no target given: every CPU).
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from exporter import graph, ops, ort_format, recurrent
from exporter.batches import Array, Batch
from exporter.correct.rounding import breaks_pair_rule
from exporter.errors import QuantizeError
from exporter.target import TARGETS, Target
from runtime import manifest as manifests
from runtime.bundle import Bundle
from runtime.kernels import trace
from runtime.sarif import Result, log
from runtime.verified import NOT_PORTABLE

Severity = Literal["error", "warning"]
ONE_CPU, MINUS_128, SHARED, TYPES = "one-cpu-operator", "weight-minus-128", "shared-int8-weight", "types"
PAIRS, FLOAT_ORT, ISLAND = "pair-rule", "float-ort", "float-island"
RULES: Mapping[str, str] = {
    ONE_CPU: "An operator in the channel block of one CPU computes other numbers on another, without an error.",
    MINUS_128: "The int8 weight -128 wraps in int16 in kernels for ARM Cortex-A53 and A72, and in depthwise ones of newer cores.",
    SHARED: "With session.x64quantprecision=1 no session opens when two DequantizeLinear read one int8 initializer.",
    TYPES: "The types of activation and weight choose the kernel: some pairs have none, some are slower than float.",
    PAIRS: "Two neighbouring weights of one sign that sum to more than 128 saturate on x86 without VNNI.",
    ISLAND: "A node without an integer kernel between int8 layers makes real numbers of codes, and codes again, for itself alone.",
    FLOAT_ORT: "An .ort file keeps what it was optimized to, so a layer that was float then is float on every device.",
}
PRECISE = "session.x64quantprecision"
# layer, as ONNX names it or as ONNX Runtime's integer kernels do; the activation is input 0
INTEGER_LAYERS = tuple(name for name, row in ops.OPERATORS.items() if row.plain)
LAYERS = tuple(name for name in ops.LAYERS if ops.of(name).kernel)
INT8, UINT8 = ir.DataType.INT8, ir.DataType.UINT8
WIDE = (ir.DataType.INT16, ir.DataType.UINT16)
SHORT = {INT8: "s8", UINT8: "u8", ir.DataType.INT16: "s16", ir.DataType.UINT16: "u16"}
WIDTH = 80
NAMED = 3  # nodes that the text names of one fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fault: the rule it breaks, the node that shows it, and what was found, was expected and is to be done."""

    rule: str
    severity: Severity
    node: str
    found: str
    expected: str
    do: str

    @property
    def message(self) -> str:
        at = f"{self.node}: " if self.node else ""
        return f"{at}found {self.found}, expected {self.expected}; {self.do}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """An int8 layer: types of activation and weight, and the weight's codes where they are constant."""

    node: ir.Node
    op_type: str
    activation: ir.DataType | None
    weight: ir.DataType | None
    codes: Array | None


def check(
    model: Path | ir.Model, target: Target | None = None, session: Mapping[str, str] | None = None
) -> tuple[Finding, ...]:
    """Hold a file against every rule that needs no run.

    Args:
        model: an ONNX file or graph, with DequantizeLinear around its layers or integer operators; or an .ort file, which
            is held against one-cpu-operator alone (its types and weights are those of the ONNX file it was made of).
        target: the CPUs it is meant for; None is every CPU, and what would be an error on some is a warning.
        session: the entries it will run with; None is the target's own.

    Returns:
        Findings in the order of RULES, then of the graph.

    Raises:
        QuantizeError: the file is no model.
    """
    if isinstance(model, Path) and model.suffix == ".ort":
        return tuple(_ort_domains(model))
    opened = _read(model) if isinstance(model, Path) else model
    entries = session if session is not None else target.session if target is not None else {}
    try:
        layers = list(_layers(opened))
    except IndexError as error:
        raise QuantizeError(
            str(model) if isinstance(model, Path) else "the model", found="a node with too few inputs",
            expected="a valid ONNX model", do="see what onnx.checker says of it",
        ) from error  # fmt: skip
    return (
        *_one_cpu(opened),
        *_minus_128(layers, target),
        *_shared(opened, target, entries),
        *_types(layers, target),
        *_pairs(layers, target),
        *_islands(opened, target),
    )


def require_sound(model: ir.Model, target: Target, given: Collection[str] = ()) -> None:
    """Refuse a model that is about to be written with a fault in it.

    given: names of nodes that the file has in integers; they are told about elsewhere.

    Raises:
        QuantizeError: the first error that check() finds; warnings pass.
    """
    for finding in check(model, target):
        if finding.severity == "error" and finding.node not in given:
            raise QuantizeError(
                f"{finding.rule} {finding.node}", found=finding.found, expected=finding.expected, do="report the model to us",
                node=finding.node,
            )  # fmt: skip


def check_bundle(bundle: Bundle, target: Target | None) -> dict[str, tuple[Finding, ...]]:
    """{file name: findings} of a verified bundle's models; its .ort file is run on the probe's first batch."""
    folder, entries = bundle.path, bundle.manifest.session
    if not (folder / manifests.INT8).is_file():  # the types and weights of an .ort file are those of its .onnx
        return {manifests.ORT: check(folder / manifests.ORT)}
    found = {manifests.INT8: check(folder / manifests.INT8, target, entries)}
    ort = folder / manifests.ORT
    if ort.is_file():
        batch = bundle.probes()[0].inputs
        found[ort.name] = (
            *check(ort),
            *check_ort(ort, folder / manifests.INT8, batch, entries, bundle.manifest.target),
        )
    return found


def check_ort(
    ort: Path, model: Path, batch: Batch, session: Mapping[str, str] | None = None, target: str = ""
) -> tuple[Finding, ...]:
    """float-ort: run both files, and compare the share of multiply-adds in integer kernels.

    Args:
        ort: the .ort file.
        model: the .onnx file that it was made of.
        batch: inputs to run them on.
        session: the entries both run with.
        target: the name of the CPUs they are meant for; on ARM, ONNX Runtime lets signed activations run in integers by itself.
    """
    given = dict(session or {})
    fixed = ort_format.entries(model.read_bytes(), given, target)
    try:
        ort_format.refuse_float(trace(model, batch, entries=fixed, runs=1), trace(ort, batch, entries=given, runs=1))
    except QuantizeError as error:
        found = Finding(
            rule=FLOAT_ORT, severity="error", node=error.node, found=error.found, expected=error.expected, do=error.do
        )
        return (found,)
    return ()


def render(findings: Mapping[str, Sequence[Finding]]) -> str:
    """Per file its findings, errors first, nodes of one fault together, in WIDTH columns where names allow; then the count."""
    lines: list[str] = []
    for name, found in findings.items():
        faults: dict[Finding, list[str]] = {}
        for each in sorted(found, key=lambda finding: finding.severity):
            faults.setdefault(replace(each, node=""), []).append(each.node)
        for fault, nodes in faults.items():
            lines.append(f"{name}: {fault.severity} {fault.rule}")
            message = replace(fault, node=_listed(nodes)).message
            lines += textwrap.wrap(message, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    errors, warnings = count(findings, "error"), count(findings, "warning")
    lines.append(f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    return "\n".join(lines)


def _listed(nodes: Sequence[str]) -> str:
    more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
    return ", ".join(nodes[:NAMED]) + more


def count(findings: Mapping[str, Sequence[Finding]], severity: Severity) -> int:
    return sum(each.severity == severity for found in findings.values() for each in found)


def sarif(findings: Mapping[str, Sequence[Finding]]) -> dict[str, object]:
    """SARIF 2.1.0 of every rule and finding."""
    results = (
        Result(rule=each.rule, level=each.severity, message=each.message, path=name, node=each.node)
        for name, found in findings.items()
        for each in found
    )
    return log(results, RULES)


def _read(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's, onnx_ir's and the file system's errors share no base
        raise QuantizeError(
            str(path), found=str(error).splitlines()[0][:200] if str(error) else "no model", expected="an ONNX file"
        ) from error


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node, those of branches, loops and functions too."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)
    for function in model.functions.values():
        yield from ir.traversal.RecursiveGraphIterator(function)


def _layers(model: ir.Model) -> Iterator[_Layer]:
    for node in _nodes(model):
        if node.op_type in INTEGER_LAYERS:
            facts = ops.of(node.op_type)
            codes = _constant(node.inputs[facts.weights[0]])
            activation = UINT8 if node.op_type == "DynamicQuantizeMatMul" else _dtype(node.inputs[0])
            if activation is None and node.op_type.startswith("Q"):
                activation = _dtype(node.inputs[2])  # the zero point's type is the tensor's
            yield _Layer(node=node, op_type=facts.plain, activation=activation, weight=_of(codes), codes=codes)
        elif node.op_type == recurrent.OPERATOR:
            for codes in map(_constant, node.inputs[1:3]):  # [directions, in, 4 hidden]
                for each in codes if codes is not None else ():
                    yield _Layer(node=node, op_type="MatMul", activation=UINT8, weight=_of(each), codes=each)
        elif node.op_type in LAYERS:
            activation, (weight, codes) = _dequantized(node.inputs[0])[0], _dequantized(node.inputs[1])
            if activation is not None and weight is not None:
                yield _Layer(node=node, op_type=node.op_type, activation=activation, weight=weight, codes=codes)


def _dequantized(value: ir.Value | None) -> tuple[ir.DataType | None, Array | None]:
    """The type of the codes behind a DequantizeLinear, and the codes where they are constant; (None, None) for a real tensor."""
    reader = value.producer() if value is not None else None
    if reader is None or reader.op_type != "DequantizeLinear":
        return None, None
    codes = _constant(reader.inputs[0])
    if codes is not None:
        return _of(codes), codes
    zero_point = reader.inputs[2] if len(reader.inputs) > 2 else None
    return (_dtype(zero_point) if zero_point is not None else UINT8), None


def _constant(value: ir.Value | None) -> Array | None:
    """The array of an initializer or of a Constant node."""
    if value is None:
        return None
    maker = value.producer()
    if maker is not None and maker.op_type == "Constant" and "value" in maker.attributes:
        return maker.attributes["value"].as_tensor().numpy()
    return graph.constant(value)


def _of(codes: Array | None) -> ir.DataType | None:
    return ir.DataType.from_numpy(codes.dtype) if codes is not None else None


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    if value is None:
        return None
    return value.dtype if value.dtype is not None else _of(_constant(value))


def _one_cpu(model: ir.Model) -> Iterator[Finding]:
    return (_saved_for_one_cpu(n.name or n.op_type) for n in _nodes(model) if n.domain == NOT_PORTABLE.decode())


def _ort_domains(ort: Path) -> Iterator[Finding]:
    content = ort.read_bytes()
    try:
        domains = ort_format.domains(content)
    except Exception as error:  # ONNX Runtime's reader takes the bytes as they are: whatever they lead to
        raise QuantizeError(str(ort), found="no ORT format, or half of it", expected="an .ort file") from error
    if NOT_PORTABLE.decode() in domains:
        yield _saved_for_one_cpu("")


def _saved_for_one_cpu(node: str) -> Finding:
    return Finding(
        rule=ONE_CPU,
        severity="error",
        node=node,
        found=f"domain {NOT_PORTABLE.decode()}",
        expected="a model for every CPU",
        do="save it with NchwcTransformer among optimization.disable_specified_optimizers",
    )


def _minus_128(layers: Sequence[_Layer], target: Target | None) -> Iterator[Finding]:
    if _only_x86(target):
        return
    for layer in layers:
        codes = layer.codes
        if codes is not None and codes.dtype == np.int8 and codes.size and codes.min() == -128:
            yield Finding(
                rule=MINUS_128,
                severity="error",
                node=layer.node.name or "",
                found=f"{np.count_nonzero(codes == -128)} weight codes -128",
                expected="-127..127",
                do="quantize the weight symmetrically, with scale max|w| / 127",
            )


def _shared(model: ir.Model, target: Target | None, entries: Mapping[str, str]) -> Iterator[Finding]:
    precise = entries.get(PRECISE) == "1"
    if target is not None and not precise:
        return
    for name, value in model.graph.initializers.items():
        readers = [use.node for use in value.uses() if use.node.op_type == "DequantizeLinear" and use.idx == 0]
        if value.dtype == INT8 and len(readers) > 1:
            yield Finding(
                rule=SHARED,
                severity="error" if precise else "warning",
                node=readers[1].name or "",
                found=f"{len(readers)} DequantizeLinear that read {name}",
                expected="one",
                do=f"give each its own copy, or do not set {PRECISE}",
            )


def _types(layers: Sequence[_Layer], target: Target | None) -> Iterator[Finding]:
    """One finding a type pair, at its first layer. Speeds: onnxruntime 1.31.1, AVX512-VNNI, one thread, 3x3 Conv and MatMul:
    u8s8 2.4-3.8 times float's, u8u8 1.2-1.6, s8s8 0.2-0.3; s8u8 0.25, and no kernel for Conv."""
    pairs: dict[tuple[ir.DataType | None, ir.DataType | None], list[ir.Node]] = {}
    for layer in layers:
        pairs.setdefault((layer.activation, layer.weight), []).append(layer.node)
    some: Severity = "error" if target is not None else "warning"
    for (activation, weight), nodes in pairs.items():
        pair, found = f"{SHORT.get(activation, '')}{SHORT.get(weight, '')}", ""  # type: ignore[arg-type]
        severity: Severity = some
        if activation in WIDE or weight in WIDE:
            severity, found = "error", "which has no integer kernel on the CPU provider and runs in float"
        elif activation == INT8 and not _only_arm(target):
            found = "which only ARM runs fast: others partly in float, or by session.qdqisint8allowed slower than float"
        elif activation == weight == UINT8 and _only_x86(target) and target is not None and not target.pairs_in_int16:
            severity, found = "warning", "which takes about twice the time of u8s8 with VNNI"
        if found:
            yield Finding(
                rule=TYPES,
                severity=severity,
                node=nodes[0].name or "",
                found=f"{pair} in {len(nodes)} layer{'s' * (len(nodes) != 1)}, {found}",
                expected="u8s8",
                do="quantize activations to uint8 and weights to int8",
            )


def _pairs(layers: Sequence[_Layer], target: Target | None) -> Iterator[Finding]:
    if target is not None and not target.pairs_in_int16:
        return
    for layer in layers:
        codes = layer.codes
        if codes is None or codes.dtype != np.int8 or codes.ndim < 2:
            continue
        groups = layer.node.attributes.get_int("group", 1)
        if layer.op_type == "Conv" and graph.is_depthwise(codes.shape, groups):
            continue
        if codes.ndim == 2 or layer.op_type == "Conv":
            plain = ir.Node("", layer.op_type, [], layer.node.attributes.values())
            if breaks_pair_rule(plain, codes):
                yield Finding(
                    rule=PAIRS,
                    severity="error" if target is not None else "warning",
                    node=layer.node.name or "",
                    found="neighbouring weights of one sign that sum to more than 128",
                    expected="at most 128 in magnitude",
                    do="export for portable, or quantize with reduce_range",
                )


def _islands(model: ir.Model, target: Target | None) -> Iterator[Finding]:
    """Nodes of which each computed input comes from codes, and each output goes to codes that an int8 layer reads."""
    given = TARGETS.values() if target is None else [target]
    in_integers = {op for each in given for op in (*each.layers, *each.elementwise, *each.movers)}
    for node in _nodes(model):
        if (
            graph.op(node) in in_integers
            or graph.op(node) in (*graph.CROSSINGS, *ops.SATURATES, *INTEGER_LAYERS)
            or not node.outputs
        ):
            continue
        computed = [value for value in node.inputs if value is not None and _constant(value) is None]
        readers = [each for value in node.outputs for each in graph.consumers(value) if computed]
        codes = [_dequantized(value)[0] for value in computed]
        if all(codes) and all(each.op_type == "QuantizeLinear" for each in readers) and any(map(_feeds_layer, readers)):
            yield Finding(
                rule=ISLAND,
                severity="warning",
                node=node.name or node.op_type,
                found=f"{node.op_type} in float between DequantizeLinear and QuantizeLinear",
                expected="int8 layers that read each other's codes",
                do="fold it into a layer, or leave its neighbours float",
            )


def _feeds_layer(quantize: ir.Node) -> bool:
    behind = graph.consumers(quantize.outputs[0])
    return any(each.op_type in LAYERS for reader in behind for each in graph.consumers(reader.outputs[0]))


def _only_x86(target: Target | None) -> bool:
    return target is not None and target.machine == "x86_64"


def _only_arm(target: Target | None) -> bool:
    return target is not None and target.machine == "aarch64"
