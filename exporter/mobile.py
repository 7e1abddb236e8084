"""int8 or FP32 graph -> which of its nodes a phone's accelerator would take: NNAPI on Android, Core ML on iOS.

The tables of operators and the partitioning are ONNX Runtime's own (onnxruntime.tools.mobile_helpers). They go by op_type,
rank and whether sizes are known; what else a converter asks for is in `caveats`, and only the phone knows its hardware.
Two counts of the library are corrected here:

1. A DequantizeLinear over a constant weight is no work for an accelerator, and is counted neither as a node nor as taken.
2. A model with a named dimension (`batch`) has no fixed sizes, and NNAPI takes none of it. The verdict is told both for
   the file as it is and for the same file with its sizes fixed, since one command fixes them.

An .ort file in Fixed style holds operators of com.microsoft, most of which no accelerator takes: give these the .onnx file.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx

from exporter.quiet import quiet

Word = Literal["yes", "maybe", "no"]
WIDTH = 80
# provider: its table of operators in the library; NNAPI has a function of its own
PROVIDERS = {
    "NNAPI": None,
    "Core ML NeuralNetwork": "coreml_supported_neuralnetwork_ops.md",
    "Core ML MLProgram": "coreml_supported_mlprogram_ops.md",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """An op_type of which `nodes` stay on the CPU, and why."""

    op_type: str
    nodes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Usability:
    """What one provider would take of a graph.

    nodes: those that compute; see 1. above.
    taken, partitions: with all sizes fixed. Each partition is a trip to the accelerator and back.
    taken_as_is: with the sizes that the file has.
    verdict, verdict_as_is: the library's: yes is one partition with over 75 % of the nodes; maybe is one with over 50 %, or
        two with over 75 %; all else is no.
    left: op_types not taken even with fixed sizes, most nodes first.
    caveats: conditions that nobody has checked, "op_type: condition".
    """

    provider: str
    nodes: int
    taken: int
    partitions: int
    taken_as_is: int
    verdict: Word
    verdict_as_is: Word
    left: tuple[Left, ...]
    caveats: tuple[str, ...]


def judge(model: bytes) -> tuple[Usability, ...]:
    """What NNAPI and the two forms of Core ML would take of an ONNX model, by its file's bytes."""
    inferred = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
    with quiet():
        from onnxruntime.tools.mobile_helpers import usability_checker as library

        return tuple(_judge(library, inferred, provider, table) for provider, table in PROVIDERS.items())


def render(judged: Sequence[Usability]) -> str:
    """A provider on one line and what it leaves on at most two more, in WIDTH columns."""
    lines: list[str] = []
    for each in judged:
        trips = f"{each.partitions} part{'s' * (each.partitions != 1)}"
        as_is = "" if each.verdict == each.verdict_as_is else f"; unfixed sizes: {each.verdict_as_is}"
        lines += textwrap.wrap(
            f"{each.provider}: {each.verdict}, {each.taken} of {each.nodes} nodes in {trips}{as_is}", WIDTH
        )
        if each.left:
            listed = ", ".join(f"{left.op_type} {left.nodes}" for left in each.left)
            lines += textwrap.wrap(
                f"leaves {listed}", WIDTH, initial_indent="  ", subsequent_indent="  ", max_lines=2, placeholder=" ..."
            )
    return "\n".join(lines)


def _judge(library: Any, model: onnx.ModelProto, provider: str, table: str | None) -> Usability:
    graph = model.graph
    constants = {each.name for each in graph.initializer}
    idle = [node for node in graph.node if all(name in constants for name in node.input)]
    check: Callable[[bool], Any] = (
        (lambda fixed: library.check_nnapi_partitions(model, fixed))
        if table is None
        else (lambda fixed: library.check_coreml_partitions(model, fixed, table))
    )
    free = check(False)
    # the library refuses to judge sizes when no shape inside the graph is known
    as_is = check(True) if graph.value_info or len(graph.node) < 2 else None
    nodes = free.num_nodes - len(idle)
    taken, partitions = _working(free, idle)
    taken_as_is, partitions_as_is = _working(as_is, idle) if as_is is not None else (0, 0)
    return Usability(
        provider=provider,
        nodes=nodes,
        taken=taken,
        partitions=partitions,
        taken_as_is=taken_as_is,
        verdict=_verdict(library, nodes, taken, partitions),
        verdict_as_is=_verdict(library, nodes, taken_as_is, partitions_as_is),
        left=_left(free, graph, idle),
        caveats=tuple(caveat.removeprefix("ai.onnx:") for caveat in free.supported_ops_checker.get_caveats()),
    )


def _working(found: Any, idle: list[onnx.NodeProto]) -> tuple[int, int]:
    """Nodes taken and partitions, without nodes that have constant inputs alone."""
    names = {node.output[0] for node in idle}
    groups = [[node for node in group if node.output[0] not in names] for group in found.supported_groups]
    return sum(map(len, groups)), sum(map(bool, groups))


def _verdict(library: Any, nodes: int, taken: int, partitions: int) -> Word:
    if not nodes:
        return "no"
    given = library.PartitioningInfo(nodes, taken, partitions, None, [], set(), 0, 0, 0, set())
    words: dict[str, Word] = {"YES": "yes", "MAYBE": "maybe", "NO": "no"}
    return words[given.suitability().name]


def _left(found: Any, graph: onnx.GraphProto, idle: list[onnx.NodeProto]) -> tuple[Left, ...]:
    skipped = {node.output[0] for node in idle}
    counts = Counter(
        f"{node.domain or 'ai.onnx'}:{node.op_type}" for node in graph.node if node.output[0] not in skipped
    )
    reasons = dict.fromkeys(found.ops_with_unsupported_rank, "more dimensions than it takes")
    reasons |= dict.fromkeys(found.unsupported_ops, "no converter")
    left = [
        Left(op_type=name.removeprefix("ai.onnx:"), nodes=counts[name], reason=reason)
        for name, reason in reasons.items()
        if counts[name]
    ]
    return tuple(sorted(left, key=lambda each: (-each.nodes, each.op_type)))
