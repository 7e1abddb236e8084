"""What one operator costs in float and in int8: the numbers that exporter/target.py's tables quote.

    python benchmarks/costs.py            # about a minute; needs packlight[export]
    python benchmarks/costs.py x86-avx2   # beside the table of another target

Each op_type runs on one thread on a tensor of some 200,000 elements, in float and between Q/DQ pairs; the kernel's time is
what ONNX Runtime's profiler says. It stands between two Neg, which fuse with nothing, or, where the layout decides
(pooling, Resize), between two 1x1 Conv, so that float runs inside NCHWc and int8 inside NHWC as in a CNN.

How to read it: nanoseconds per element of the op's largest tensor, float and int8, each beside exporter/target.py's. Placement
compares these costs with each other, so only their ratios matter: the last column is measured / table, float and int8, after
the machine's own speed (their median) is taken out. `!` marks what is then more than 30 % off, above FREE_NS. "ran in
float" says that ONNX Runtime had no integer kernel after all. QuantizeLinear and DequantizeLinear are costed per element and, from
the clock, per node of 16 elements: what a crossing costs whatever its size.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from exporter import target
from exporter.target import Cost
from runtime import cpu
from runtime.kernels import Kernel, trace
from runtime.session import open_session

MAP = (1, 64, 56, 56)  # a feature map in the middle of a CNN
HEADS = (1, 12, 128, 128)  # attention weights
STATES = (1, 128, 6, 64)  # hidden states, split into heads
OFF = 0.30
FREE_NS = 0.03  # below it an op is as good as free and no difference counts
ROUNDS, RUNS = 3, 30
CHAIN, SMALL, CALLS = 100, 16, 300
CNN, ALONE, FOLDS = "between Conv", "between Neg", "behind Conv"
NOWHERE = np.array([], np.float32)
TWICE = np.array([1, 1, 2, 2], np.float32)
OWN = re.compile(r"cost(_token_\d+|_nchwc)?$")  # the op under test, with what ONNX Runtime adds to its name


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operator: inputs (all of `shape`), constants behind them, attributes, and where it stands."""

    shape: tuple[int, ...] = MAP
    inputs: int = 1
    constants: tuple[Any, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    largest: int = 1  # elements of its largest tensor / elements of `shape`
    place: str = ALONE


def ints(*values: int) -> np.ndarray:
    """An int64 constant."""
    return np.array(values, np.int64)


CASES: Mapping[str, Case] = {
    "Add": Case(inputs=2),
    "Mul": Case(inputs=2),
    "Concat": Case(inputs=2, attributes={"axis": 1}, largest=2),
    "Sigmoid": Case(),
    "LeakyRelu": Case(attributes={"alpha": 0.1}),
    "Softmax": Case(shape=HEADS, attributes={"axis": -1}),
    "GlobalAveragePool": Case(place=CNN),
    "AveragePool": Case(place=CNN, attributes={"kernel_shape": [3, 3], "pads": [1] * 4}),
    "Relu": Case(place=FOLDS),
    "Clip": Case(place=FOLDS, constants=(np.float32(0), np.float32(2))),
    "MaxPool": Case(place=CNN, attributes={"kernel_shape": [2, 2], "strides": [2, 2]}),
    "Reshape": Case(constants=(ints(64, -1),)),
    "Flatten": Case(),
    "Squeeze": Case(constants=(ints(0),)),
    "Unsqueeze": Case(constants=(ints(0),)),
    "Transpose": Case(shape=STATES, attributes={"perm": [0, 2, 1, 3]}),
    "Slice": Case(constants=(ints(0), ints(32), ints(1))),
    "Split": Case(attributes={"axis": 1, "num_outputs": 2}, outputs=2),
    "Gather": Case(constants=(np.arange(32),), attributes={"axis": 1}),
    "DepthToSpace": Case(attributes={"blocksize": 2, "mode": "DCR"}),
    "Resize": Case(
        place=CNN,
        constants=(NOWHERE, TWICE),
        attributes={"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        largest=4,
    ),
}


class Graph:
    """Nodes and initializers of one model, in float or with Q/DQ pairs."""

    def __init__(self, quantized: bool) -> None:
        self.quantized = quantized
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.constant("scale", np.float32(0.02))
        self.constant("zero_point", np.uint8(128))
        self.constant("positive_scale", np.float32(2 / 255))  # 0..2: what Relu and Clip(0, 2) let through
        self.constant("positive_zero_point", np.uint8(0))
        self.constant("weight_scale", np.float32(0.01))
        self.constant("weight_zero_point", np.int8(0))

    def constant(self, name: str, value: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> str:
        """Add a node, named after its first output, which is returned."""
        self.nodes.append(helper.make_node(op_type, list(inputs), list(outputs), name=outputs[0], **attributes))
        return outputs[0]

    def rounded(self, tensor: str, kind: str = "") -> str:
        """The tensor behind a Q/DQ pair; the tensor itself in float."""
        if not self.quantized:
            return tensor
        settings = [f"{kind}scale", f"{kind}zero_point"]
        self.node("QuantizeLinear", [tensor, *settings], [f"{tensor}_q"])
        return self.node("DequantizeLinear", [f"{tensor}_q", *settings], [f"{tensor}_dq"])

    def conv(self, tensor: str, out: str, channels: int) -> str:
        """A 1x1 Conv from `channels` to as many."""
        codes = np.random.default_rng(0).integers(-100, 101, (channels, channels, 1, 1)).astype(np.int8)
        if self.quantized:
            settings = [self.constant(f"{out}_w", codes), "weight_scale", "weight_zero_point"]
            weight = self.node("DequantizeLinear", settings, [f"{out}_wr"])
        else:
            weight = self.constant(f"{out}_wr", codes.astype(np.float32) * np.float32(0.01))
        return self.node("Conv", [tensor, weight], [out])

    def around(self, tensor: str, out: str, case: Case) -> str:
        """A neighbour of the op under test."""
        alone = case.place == ALONE or (case.place == FOLDS and not self.quantized)
        return self.node("Neg", [tensor], [out]) if alone else self.conv(tensor, out, case.shape[1])

    def save(self, path: Path, inputs: Mapping[str, tuple[int, ...]], outputs: Sequence[str]) -> None:
        """Write the model; the shapes of its outputs are left open."""
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "cost", made, ends, self.initializers)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def build(op_type: str, case: Case, quantized: bool, path: Path) -> None:
    """Write a model whose node "cost" is the operator, between the neighbours that its case asks for."""
    graph = Graph(quantized)
    names = [f"x{number}" for number in range(case.inputs)]
    starts = names if case.place == ALONE else [graph.rounded(name) for name in names]
    before = [graph.around(start, f"before_{name}", case) for start, name in zip(starts, names, strict=True)]
    inputs = before if case.place == FOLDS else [graph.rounded(tensor) for tensor in before]
    inputs += [graph.constant(f"constant{number}", value) for number, value in enumerate(case.constants)]
    outputs = ["cost", *(f"cost{number}" for number in range(1, case.outputs))]
    graph.node(op_type, inputs, outputs, **case.attributes)
    written = [graph.rounded(out, "positive_" if case.place == FOLDS else "") for out in outputs]
    after = [graph.around(tensor, f"after_{out}", case) for tensor, out in zip(written, outputs, strict=True)]
    ends = after if case.place == ALONE else [graph.rounded(tensor) for tensor in after]
    graph.save(path, dict.fromkeys(names, case.shape), ends)


def run(op_type: str, case: Case, folder: Path) -> tuple[float, float | None, Mapping[str, float]]:
    """Nanoseconds an element: in float, in int8 (None: ran in float), and of the Q and DQ nodes seen beside it.

    Float and int8 take turns; of ROUNDS medians the smallest counts, which other work on the machine touched least.
    """
    random = np.random.default_rng(0)
    feed = {f"x{number}": random.standard_normal(case.shape).astype(np.float32) for number in range(case.inputs)}
    models = {quantized: folder / f"{op_type}_{quantized}.onnx" for quantized in (False, True)}
    for quantized, path in models.items():
        build(op_type, case, quantized, path)
    rounds = [{key: trace(path, feed, runs=RUNS).kernels for key, path in models.items()} for _ in range(ROUNDS)]
    size = math.prod(case.shape)
    scale = 1e6 / (size * case.largest)
    floats, codes = ([_own(each[quantized]) for each in rounds] for quantized in (False, True))
    float_ns = min(kernel.ms for kernel in floats if kernel is not None) * scale
    crossings = {
        kernel.kernel: min(k.ms for each in rounds for k in each[True] if k.node == kernel.node) * 1e6 / size
        for kernel in rounds[0][True]
        if kernel.kernel in ("QuantizeLinear", "DequantizeLinear")
        and case.place == ALONE
        and case.largest == case.outputs == 1
    }
    if all(kernel is None for kernel in codes):
        return float_ns, 0.0, crossings  # it became the saturation of the QuantizeLinear behind its layer
    kernels = [kernel for kernel in codes if kernel is not None]
    in_codes = kernels[0].kernel.startswith("QLinear") or kernels[0].types.startswith("u8")
    return float_ns, min(kernel.ms for kernel in kernels) * scale if in_codes else None, crossings


def _own(kernels: Sequence[Kernel]) -> Kernel | None:
    return next((kernel for kernel in kernels if OWN.match(kernel.node)), None)


def crossing_ns(folder: Path) -> float:
    """Nanoseconds of one QuantizeLinear or DequantizeLinear of SMALL elements: (chain with them - chain without) / nodes."""
    sessions = []
    for quantized in (True, False):
        graph, tensor = Graph(quantized), "x"
        for number in range(CHAIN):
            tensor = graph.rounded(graph.node("Neg", [tensor], [f"n{number}"]))
        graph.save(folder / "chain.onnx", {"x": (SMALL,)}, [graph.node("Neg", [tensor], ["y"])])
        sessions.append(open_session(folder / "chain.onnx", threads=1))
    feed = {"x": np.ones(SMALL, np.float32)}
    times: list[list[float]] = [[], []]
    for _ in range(CALLS):
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, feed)
            taken.append(time.perf_counter() - start)
    slow, fast = (statistics.median(taken) for taken in times)
    return (slow - fast) * 1e9 / (2 * CHAIN)


def main(name: str = "x86-vnni") -> None:
    """Print the table beside that of the target called `name`."""
    assumed = target.by_name(name)
    listed: dict[str, Cost] = {**assumed.elementwise, **assumed.movers}
    rows: list[tuple[str, float, float, float | None, float]] = []  # op, measured and table in float, then in int8
    seen: dict[str, list[float]] = {"QuantizeLinear": [], "DequantizeLinear": []}
    with tempfile.TemporaryDirectory(prefix="packlight-costs-") as folder:
        for op_type, table in listed.items():
            float_ns, int8_ns, crossings = run(op_type, CASES[op_type], Path(folder))
            rows.append((op_type, float_ns, table.float_ns, int8_ns, table.int8_ns))
            for kernel, value in crossings.items():
                seen[kernel].append(value)
        per_node = crossing_ns(Path(folder))
    quantize, dequantize = (statistics.median(values) for values in seen.values())
    pairs = [pair for row in rows for pair in ((row[1], row[2]), (row[3], row[4]))]
    speed = statistics.median(found / given for found, given in pairs if found and given >= FREE_NS)
    print(
        f"{cpu.name()}, onnxruntime {onnxruntime.__version__}, 1 thread; this machine takes {speed:.2f} of the table's times"
    )
    print(f"{'ns an element':<20}{'float':>8}{'table':>8}{'int8':>8}{'table':>8}   measured / table / {speed:.2f}")
    for op_type, float_ns, float_table, int8_ns, int8_table in rows:
        shown = f"{float_ns:8.3f}{float_table:8.2f}" + (
            "    ran in float" if int8_ns is None else f"{int8_ns:8.3f}{int8_table:8.2f}"
        )
        print(f"{op_type:<20}{shown}   {_off(float_ns, float_table, speed)} {_off(int8_ns, int8_table, speed)}")
    for name, found, given in (
        ("QuantizeLinear", quantize, assumed.quantize_ns),
        ("DequantizeLinear", dequantize, assumed.dequantize_ns),
    ):
        print(f"{name:<20}{'':16}{found:8.3f}{given:8.2f}   {'':6}{_off(found, given, speed)}")
    off = _off(per_node, assumed.crossing_ns, speed)
    print(f"{'the same, per node':<20}{'':16}{per_node:8.0f}{assumed.crossing_ns:8.0f}   {'':6}{off}")


def _off(found: float | None, given: float, speed: float) -> str:
    if found is None:
        return "     !"
    if max(found / speed, given) < FREE_NS:
        return " free "
    ratio = found / given / speed if given else math.inf
    return f"{ratio:5.2f}{' ' if 1 - OFF <= ratio <= 1 / (1 - OFF) else '!'}"


if __name__ == "__main__":
    main(*sys.argv[1:2])
