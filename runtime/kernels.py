"""Which kernel ran each node, in which types, how long and over how many multiply-adds: model + inputs -> Kernels.

What counts as integer is the kernel that ONNX Runtime's profiler says it ran, not the Q/DQ nodes in the file.

Two sessions are profiled. The real one tells kernel and time. It cannot tell all shapes: a weight that was prepacked is no
longer among a node's inputs, and an NCHWc kernel (float Conv on x86) sees channels padded to its block. So a second
session, without prepacking and without NCHWc, tells types, shapes and the model's own node names; the two meet by name.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtime.bundle import Bundle, require_opened
from runtime.errors import PacklightError
from runtime.session import NO_ENTRIES, ORT_ERRORS, Held, open_session, without

if TYPE_CHECKING:
    from pathlib import Path

    from runtime.drift import Array

Shape = tuple[int, ...]

# Kernel -> position of its weight among the inputs the profiler lists (it leaves out what an optional input lacks).
CONV = {"Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
MATMUL = {
    **dict.fromkeys(("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "TransposeMatMul"), 1),
    **dict.fromkeys(("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"), 1),
    **dict.fromkeys(("QLinearMatMul", "QGemm"), 3),
}
RECURRENT = {"LSTM": 1, "GRU": 1, "RNN": 1, "DynamicQuantizeLSTM": 1}
ATTENTION = {"Attention": 1, "QAttention": 1, "MultiHeadAttention": 1}
OTHER = {"ConvTranspose": 1, "MatMulNBits": 1}
WEIGHT = {**CONV, **MATMUL, **RECURRENT, **ATTENTION, **OTHER}
INTEGER = frozenset(
    {"ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
    | {"QGemm", "QAttention"}
)  # and every QLinear*
SHORT = {"float": "f32", "double": "f64", "float16": "f16", "bfloat16": "bf16", "bool": "bool"} | {
    f"{sign}int{bits}": f"{'u' if sign else 's'}{bits}" for sign in ("", "u") for bits in (4, 8, 16, 32, 64)
}
CONTAINERS = frozenset({"Loop", "Scan", "If"})  # their time is their bodies', whose nodes are listed too
NCHWC, EVENT = "_nchwc", "_kernel_time"
# The NHWC pass renames each node it moves, with a number that depends on what other passes did before it
MOVED = r"_token_\d+$"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One node as it ran: `types` of activation and weight ("u8s8") or of the first input; ms and multiply-adds of one run."""

    node: str
    kernel: str
    types: str
    ms: float
    macs: int
    integer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Every node of a model as it ran, in order of execution."""

    kernels: tuple[Kernel, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of one run."""
        return sum(kernel.macs for kernel in self.kernels)

    @property
    def integer_macs(self) -> float:
        """Share, 0..1, of the multiply-adds that ran in integer kernels; 0.0 when there are none."""
        return sum(kernel.macs for kernel in self.kernels if kernel.integer) / (self.macs or 1)

    @property
    def ms(self) -> float:
        """Sum of the nodes' median milliseconds: a little less than one run, which has gaps between nodes."""
        return math.fsum(kernel.ms for kernel in self.kernels if kernel.kernel not in CONTAINERS)


def kernels(bundle: Bundle, inputs: Mapping[str, Array] | None = None, runs: int = 10) -> Kernels:
    """The kernels of a bundle's int8 model on `inputs`, by default the probe's first batch; runs: behind each time, see trace()."""
    require_opened(bundle, "kernels")
    feed = bundle.probes()[0].inputs if inputs is None else inputs
    bundle.run(feed)  # names, dtypes and shapes are refused here, in words
    with bundle.held(bundle.model.name) as model:
        return trace(model, feed, threads=bundle.threads or 1, entries=bundle.manifest.session, runs=runs)


def trace(
    model: Path | Held,
    inputs: Mapping[str, Array],
    *,
    threads: int = 1,
    entries: Mapping[str, str] = NO_ENTRIES,
    runs: int = 10,
) -> Kernels:
    """Profile any ONNX file on one batch, on the CPU.

    Multiply-adds of a node, from the shapes it saw (out: elements of its first output; W: weight):

        Conv          out * prod(W[1:])                 grouped, too, for W is [M, C/group, kernel...]
        ConvTranspose in * prod(W[1:])                  W is [C, M/group, kernel...]
        MatMul, Gemm  out * K
        LSTM, GRU,... steps * batch * prod(W) + steps * batch * prod(R)     W, R over directions, gates, hidden
        Attention     2 * elements of Q * keys, and elements of X * columns of W where it projects by itself
        all others    0: they move or combine elements

    Args:
        model: an ONNX file, or one that was read and held.
        inputs: {name: array}.
        threads: of one operator.
        entries: session config entries, as the target wants them.
        runs: how many profiled runs the medians are over, after one run that is not counted.

    Raises:
        BundleError: ONNX Runtime cannot open the model.
        PacklightError: it cannot run it on these inputs.
    """
    real = _profile(model, inputs, threads, entries, runs + 1)
    plain = {**without(entries, "NchwcTransformer"), "session.disable_prepacking": "1"}
    shaped = _profile(model, inputs, threads, plain, 1)
    nodes: _Nodes = defaultdict(list)
    for event in real:
        nodes[event.name, event.number].append(event)
    both = zip(nodes.values(), _shapes(nodes, shaped, runs), strict=True)
    return Kernels(kernels=tuple(_kernel(events, shapes, runs) for events, shapes in both))


class _Event(NamedTuple):
    """One run of one node: its name, ONNX Runtime's number for it, kernel, and what went in and came out."""

    name: str
    number: str
    kernel: str
    us: float
    inputs: tuple[tuple[str, Shape], ...]
    outputs: tuple[tuple[str, Shape], ...]


_Nodes = dict[tuple[str, str], list[_Event]]  # (name, number) -> its events, over all runs


def _profile(
    model: Path | Held, inputs: Mapping[str, Array], threads: int, entries: Mapping[str, str], runs: int
) -> list[_Event]:
    import json  # here and not above, as below
    import tempfile  # here: `import runtime` need not pay for it

    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        session = open_session(model, threads=threads, entries=entries, profile=f"{folder}/profile")
        try:
            for _ in range(runs):
                session.run(None, dict(inputs))
        except ORT_ERRORS as error:
            name = model.name if isinstance(model, Held) else model
            raise PacklightError(f"{name}: ONNX Runtime failed while running", found=str(error)[:300]) from error
        finally:
            written = session.end_profiling()
        with open(written, encoding="utf-8") as file:
            return list(_events(json.load(file)))


def _events(profile: list[dict[str, Any]]) -> Iterator[_Event]:
    for each in profile:
        if each.get("cat") == "Node" and each["name"].endswith(EVENT):
            args = each["args"]
            yield _Event(
                name=re.sub(MOVED, "", each["name"].removesuffix(EVENT)),
                number=args.get("node_index", ""),
                kernel=args["op_name"],
                us=float(each["dur"]),
                inputs=_tensors(args.get("input_type_shape", [])),
                outputs=_tensors(args.get("output_type_shape", [])),
            )


def _tensors(listed: list[dict[str, list[int]]]) -> tuple[tuple[str, Shape], ...]:
    return tuple((dtype, tuple(shape)) for each in listed for dtype, shape in each.items())


def _one_run(events: list[_Event], runs: int) -> list[_Event]:
    """The events of the last run: one, or more inside a loop."""
    return events[-(len(events) // (runs + 1)) :]


def _shapes(nodes: _Nodes, shaped: list[_Event], runs: int) -> Iterator[list[_Event]]:
    """For each node of the real session its events of one run with all shapes told, as far as the other session has them."""
    named: dict[str, list[_Event]] = defaultdict(list)
    for event in shaped:
        named[event.name].append(event)
    known = {name for name, _ in nodes}
    renamed = [event for event in shaped if event.kernel in CONV and event.name not in known]
    for (name, _), events in nodes.items():
        last = _one_run(events, runs)
        if name.endswith(NCHWC) and last[0].kernel in CONV:
            same = [next((event for event in renamed if _pads_to(event, last[0])), last[0])] * len(last)
            renamed = [event for event in renamed if event is not same[0]]
        else:
            same = [event for event in named[name] if event.kernel == last[0].kernel]
        yield same if len(same) == len(last) else last


def _pads_to(plain: _Event, padded: _Event) -> bool:
    """Whether `padded` is `plain` with its channels padded to a block: NCHWc names a node by its output, not by its name."""
    if len(padded.inputs) < 2:
        return False
    (_, w), (_, w_padded) = plain.inputs[1], padded.inputs[1]
    (_, y), (_, y_padded) = plain.outputs[0], padded.outputs[0]
    same = (w[2:], y[:1], y[2:]) == (w_padded[2:], y_padded[:1], y_padded[2:])
    return same and w[0] <= w_padded[0] and w[1] <= w_padded[1]


def _kernel(events: list[_Event], shapes: list[_Event], runs: int) -> Kernel:
    name, each = events[0].kernel, len(shapes)
    times = [math.fsum(event.us for event in events[n * each : (n + 1) * each]) for n in range(1, runs + 1)]
    return Kernel(
        node=shapes[0].name,
        kernel=name,
        types=_types(shapes[0]),
        ms=float(np.median(times)) / 1e3,
        macs=sum(map(_macs, shapes)),
        integer=name in INTEGER or name.startswith("QLinear"),
    )


def _types(event: _Event) -> str:
    """Types of activation and weight, once when both are the same float; of the first input where there is no weight."""
    at = WEIGHT.get(event.kernel, 0)
    types = [SHORT.get(dtype, dtype) for dtype, _ in event.inputs]
    if not 0 < at < len(types) or types[0] == types[at] == "f32":
        return types[0] if types else ""
    return types[0] + types[at]


def _macs(event: _Event) -> int:
    """Multiply-adds of one event, by the table in trace(); 0 when the shapes it needs were not seen."""
    kernel, at = event.kernel, WEIGHT.get(event.kernel)
    if at is None or at >= len(event.inputs) or not event.outputs:
        return 0
    x, w, y = event.inputs[0][1], event.inputs[at][1], event.outputs[0][1]
    if event.name.endswith(f"_bn{NCHWC}"):  # a BatchNormalization, which NCHWc runs as a 1x1 depthwise Conv
        return 0
    if kernel in CONV:
        return math.prod(y) * math.prod(w[1:])
    if kernel == "ConvTranspose":
        return math.prod(x) * math.prod(w[1:])
    if kernel == "MatMulNBits":
        return math.prod(y) * x[-1]
    if kernel in RECURRENT:
        return x[0] * x[1] * sum(math.prod(shape) for _, shape in event.inputs[at : at + 2])
    if kernel in ATTENTION and len(w) > 2:  # Q [batch, queries, hidden] or [batch, heads, queries, size], and K alike
        return 2 * math.prod(x) * w[-2]
    if kernel in ATTENTION:  # X [batch, tokens, features] and W [features, 3 * hidden]
        return math.prod(x) * w[-1] + 2 * math.prod(y) * x[1]
    columns = y[-1] if len(w) > 1 and y else 1
    return math.prod(y) * (math.prod(w[-2:]) // (columns or 1))
