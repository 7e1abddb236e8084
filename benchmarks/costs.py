"""What one operator costs in float and in int8: the numbers that exporter/target.py's tables quote.

    python benchmarks/costs.py            # about a minute; needs packlight[export]
    python benchmarks/costs.py x86-avx2   # beside the table of another target
    python benchmarks/costs.py wasm       # in node, by onnxruntime-web; after samples/web/setup.sh, which fetches it

Each op_type runs on one thread on a tensor of some 200,000 elements, in float and between Q/DQ pairs; the kernel's time is
what ONNX Runtime's profiler says. It stands between two Neg, which fuse with nothing, or, where the layout decides
(pooling, Resize), between two 1x1 Conv, so that float runs inside NCHWc and int8 inside NHWC as in a CNN.

How to read it: nanoseconds per element of the op's largest tensor, float and int8, each beside exporter/target.py's. Placement
compares these costs with each other, so only their ratios matter: the last column is measured / table, float and int8, after
the machine's own speed (their median) is taken out. `!` marks what is then more than 30 % off, above FREE_NS. "ran in
float" says that ONNX Runtime had no integer kernel after all. QuantizeLinear and DequantizeLinear are costed per element and, from
the clock, per node of 16 elements: what a crossing costs whatever its size.

Layers follow: multiply-adds a nanosecond of Conv, Gemm and MatMul in float, u8·s8 and u8·u8, each the median of ROUNDS runs in turn
with their range. K is the multiply-adds behind one output. "Relu6" is a layer whose codes saturate at 0 as after Relu6.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from exporter import gates, target
from exporter.target import Cost
from runtime import cpu
from runtime.kernels import Kernel, trace
from runtime.session import open_session

MAP = (1, 64, 56, 56)  # a feature map in the middle of a CNN
HEADS = (1, 12, 128, 128)  # attention weights
STATES = (1, 128, 6, 64)  # hidden states, split into heads
OFF = 0.30
FREE_NS = 0.03  # below it an op is as good as free and no difference counts
ROUNDS, LAYER_ROUNDS, RUNS = 3, 5, 30
CHAIN, SMALL, CALLS = 100, 16, 300
CNN, ALONE, FOLDS = "between Conv", "between Neg", "behind Conv"
NOWHERE = np.array([], np.float32)
TWICE = np.array([1, 1, 2, 2], np.float32)
ROOT = Path(__file__).resolve().parents[1]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A Conv, Gemm or MatMul: the shapes of its input and weight; whether a Clip(0, ..) follows, as Relu6 does."""

    op_type: str = "Conv"
    shape: tuple[int, ...]
    weight: tuple[int, ...]
    group: int = 1
    relu6: bool = False

    @property
    def depth(self) -> int:
        """Multiply-adds behind one output."""
        return math.prod(self.weight[1:]) if self.op_type == "Conv" else self.weight[0]


LAYERS: Mapping[str, Layer] = {
    **{
        f"1x1 {c}->{m} at {s}{' relu6' if relu6 else ''}": Layer(shape=(1, c, s, s), weight=(m, c, 1, 1), relu6=relu6)
        for c, m, s in ((16, 96, 56), (32, 96, 56), (64, 128, 28), (128, 128, 28), (256, 256, 14), (512, 256, 14))
        for relu6 in (False, True)
    },
    "3x3 3->32 at 112 relu6": Layer(shape=(1, 3, 112, 112), weight=(32, 3, 3, 3), relu6=True),
    "3x3 64->64 at 28": Layer(shape=(1, 64, 28, 28), weight=(64, 64, 3, 3)),
    **{
        f"depthwise {k}x{k} {c} at {s}{' relu6' if relu6 else ''}": Layer(
            shape=(1, c, s, s), weight=(c, 1, k, k), group=c, relu6=relu6
        )
        for k, c, s, relu6 in (
            (3, 96, 56, False),
            (3, 96, 56, True),
            (3, 480, 14, True),
            (5, 480, 14, True),
            (7, 480, 14, False),
        )
    },
    **{
        f"3x3 {128 // n} groups of {n} at 28": Layer(shape=(1, 128, 28, 28), weight=(128, n, 3, 3), group=128 // n)
        for n in (2, 4, 8, 16, 32)
    },
    "Gemm 1x1280x1000": Layer(op_type="Gemm", shape=(1, 1280), weight=(1280, 1000)),
    "Gemm 16x256x256": Layer(op_type="Gemm", shape=(16, 256), weight=(256, 256)),
    "MatMul 64x32x384": Layer(op_type="MatMul", shape=(64, 32), weight=(32, 384)),
    "MatMul 64x384x384": Layer(op_type="MatMul", shape=(64, 384), weight=(384, 384)),
    "MatMul 64x384x1536": Layer(op_type="MatMul", shape=(64, 384), weight=(384, 1536)),
}
TYPES: Mapping[str, type[np.generic] | None] = {"float": None, "u8s8": np.int8, "u8u8": np.uint8}


def ints(*values: int) -> np.ndarray:
    """An int64 constant."""
    return np.array(values, np.int64)


CASES: Mapping[str, Case] = {
    "Add": Case(inputs=2),
    "Mul": Case(inputs=2),
    "Concat": Case(inputs=2, attributes={"axis": 1}, largest=2),
    "Sigmoid": Case(),
    "LeakyRelu": Case(attributes={"alpha": 0.1}),
    "HardSigmoid": Case(attributes={"alpha": 0.25}),
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


Feed = Mapping[str, np.ndarray]


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
    if op_type == gates.GATE and quantized:
        read_on_codes(path)


def read_on_codes(path: Path) -> None:
    """Let HardSigmoid be a Clip of its input's codes, as an export does."""
    model = ir.load(path)
    gates.read(model, {"cost"})
    ir.save(model, path)


def build_layer(layer: Layer, weights: type[np.generic] | None, path: Path) -> None:
    """Write a model of one layer that reads and writes codes whose range its values fill; weights None: in float."""
    graph = Graph(weights is not None)
    codes = np.random.default_rng(0).integers(-100, 101, layer.weight)
    deviation = 0.577 * math.sqrt(layer.depth)  # of the output: weights are even in -1..1, the input's is 1
    low, high = (0.0 if layer.relu6 else -3 * deviation), 3 * deviation
    if weights is None:
        weight = graph.constant("w", (codes * 0.01).astype(np.float32))
    else:
        shift = 128 if weights is np.uint8 else 0
        settings = [graph.constant("w_q", (codes + shift).astype(weights)), "weight_scale"]
        weight = graph.node("DequantizeLinear", [*settings, graph.constant("w_zero", weights(shift))], ["w"])
    for kind, start, end in (("in_", -3.0, 3.0), ("out_", low, high)):
        graph.constant(f"{kind}scale", np.float32((end - start) / 255))
        graph.constant(f"{kind}zero_point", np.uint8(round(-start * 255 / (end - start))))
    attributes: dict[str, Any] = {}
    if layer.op_type == "Conv":
        attributes = {"group": layer.group, "pads": [size // 2 for size in layer.weight[2:]] * 2}
    made = graph.node(layer.op_type, [graph.rounded("x0", "in_"), weight], ["cost"], **attributes)
    if layer.relu6:
        made = graph.node("Clip", [made, *(graph.constant(f"c{v}", np.float32(v)) for v in (low, high))], ["clipped"])
    graph.save(path, {"x0": layer.shape}, [graph.rounded(made, "out_")])


def print_layers(folder: Path, clock: Clock) -> None:
    """Multiply-adds a nanosecond of every layer in each type: median, and range over LAYER_ROUNDS turns."""
    jobs = []
    for at, layer in enumerate(LAYERS.values()):
        models = [folder / f"layer{at}_{name}.onnx" for name in TYPES]
        for weights, path in zip(TYPES.values(), models, strict=True):
            build_layer(layer, weights, path)
        jobs.append((models, {"x0": np.random.default_rng(0).standard_normal(layer.shape).astype(np.float32)}))
    print(f"\n{'MACs a ns':<28}{'K':>5}" + "".join(f"{name:>22}" for name in TYPES) + "   float ms / u8s8 ms")
    for (name, layer), rounds in zip(LAYERS.items(), clock.kernels(jobs, LAYER_ROUNDS), strict=True):
        line, times = f"{name:<28}{layer.depth:>5}", []
        for at in range(len(TYPES)):
            seen = [[kernel for kernel in each[at] if kernel.macs] for each in rounds]
            rates = [kernels[0].macs / kernels[0].ms / 1e6 for kernels in seen]
            times.append(statistics.median(kernels[0].ms for kernels in seen))
            line += f"{statistics.median(rates):9.2f} ({min(rates):5.2f}-{max(rates):5.2f})"
        print(f"{line}   {times[0]:.3f} / {times[1]:.3f} = {times[0] / times[1]:.2f}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Where models run: kernels(jobs, runs) and milliseconds(models, feed), of models that take turns, [round][model]."""

    where: str
    kernels: Callable[[Sequence[tuple[Sequence[Path], Feed]], int], list[list[list[Sequence[Kernel]]]]]
    milliseconds: Callable[[Sequence[Path], Feed], list[list[float]]]


def _native_kernels(jobs: Sequence[tuple[Sequence[Path], Feed]], rounds: int) -> list[list[list[Sequence[Kernel]]]]:
    return [
        [[trace(model, feed, runs=RUNS).kernels for model in models] for _ in range(rounds)] for models, feed in jobs
    ]


def _native_milliseconds(models: Sequence[Path], feed: Feed) -> list[list[float]]:
    sessions = [open_session(model, threads=1) for model in models]
    rounds = []
    for _ in range(CALLS):
        times = []
        for session in sessions:
            start = time.perf_counter()
            session.run(None, feed)
            times.append((time.perf_counter() - start) * 1e3)
        rounds.append(times)
    return rounds


def native() -> Clock:
    """This CPU."""
    where = f"{cpu.name()}, onnxruntime {onnxruntime.__version__}, 1 thread"
    return Clock(where=where, kernels=_native_kernels, milliseconds=_native_milliseconds)


def in_node() -> Clock:
    """onnxruntime-web in node, from the cache that samples/web/setup.sh fills."""
    version = json.loads((ROOT / "samples" / "web" / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "packlight-devices"
    cache = Path(os.environ.get("PACKLIGHT_DEVICES_CACHE", cache)) / f"onnxruntime-web-{version}"
    runtime = cache / "node_modules" / "onnxruntime-web" / "dist" / "ort.wasm.bundle.min.mjs"
    if not runtime.is_file():
        raise SystemExit(f"found no {runtime}; run samples/web/setup.sh once, which fetches it")

    def call(jobs: Sequence[tuple[Sequence[Path], Feed]], rounds: int, profile: bool) -> list[Any]:
        with tempfile.TemporaryDirectory(prefix="packlight-costs-") as folder:
            asked = [
                {
                    "models": [str(model) for model in models],
                    "feed": {name: _written(array, Path(folder) / f"{at}_{name}") for name, array in feed.items()},
                    "rounds": rounds,
                    "runs": RUNS if profile else 1,
                    "profile": profile,
                    "extra": {},
                }
                for at, (models, feed) in enumerate(jobs)
            ]
            command = ["node", "--no-liftoff", str(ROOT / "benchmarks" / "costs.mjs"), str(runtime), "/"]
            ran = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(ran.stderr)
        answer: list[Any] = json.loads(ran.stdout)
        return answer

    def kernels(jobs: Sequence[tuple[Sequence[Path], Feed]], rounds: int) -> list[list[list[Sequence[Kernel]]]]:
        return [
            [[[Kernel(**kernel) for kernel in model] for model in each] for each in job]
            for job in call(jobs, rounds, True)
        ]

    return Clock(
        where=f"onnxruntime-web {version} in node on {cpu.name()}, 1 thread",
        kernels=kernels,
        milliseconds=lambda models, feed: call([(models, feed)], CALLS, False)[0],
    )


def _written(array: np.ndarray, path: Path) -> dict[str, Any]:
    path.write_bytes(array.tobytes())
    return {"file": str(path), "dims": array.shape, "type": str(array.dtype)}


def prepare(op_type: str, case: Case, folder: Path) -> tuple[list[Path], Feed]:
    """The models of one operator, float first, and what to feed them."""
    random = np.random.default_rng(0)
    feed = {f"x{number}": random.standard_normal(case.shape).astype(np.float32) for number in range(case.inputs)}
    models = [folder / f"{op_type}_{quantized}.onnx" for quantized in (False, True)]
    for quantized, path in zip((False, True), models, strict=True):
        build(op_type, case, quantized, path)
    return models, feed


def read(case: Case, rounds: Sequence[Sequence[Sequence[Kernel]]]) -> tuple[float, float | None, Mapping[str, float]]:
    """Nanoseconds an element: in float, in int8 (None: ran in float), and of the Q and DQ nodes seen beside it.

    Float and int8 took turns; of ROUNDS medians the smallest counts, which other work on the machine touched least.
    """
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


def crossing_ns(folder: Path, clock: Clock) -> float:
    """Nanoseconds of one QuantizeLinear or DequantizeLinear of SMALL elements: (chain with them - chain without) / nodes."""
    models = []
    for quantized in (True, False):
        graph, tensor = Graph(quantized), "x"
        for number in range(CHAIN):
            tensor = graph.rounded(graph.node("Neg", [tensor], [f"n{number}"]))
        models.append(folder / f"chain_{quantized}.onnx")
        graph.save(models[-1], {"x": (SMALL,)}, [graph.node("Neg", [tensor], ["y"])])
    times = zip(*clock.milliseconds(models, {"x": np.ones(SMALL, np.float32)}), strict=True)
    slow, fast = (statistics.median(taken) for taken in times)
    return float(slow - fast) * 1e6 / (2 * CHAIN)


def main(name: str = "x86-vnni") -> None:
    """Print the table beside that of the target called `name`."""
    assumed = target.by_name(name)
    clock = in_node() if name == "wasm" else native()
    listed: dict[str, Cost] = {**assumed.elementwise, **assumed.movers}
    rows: list[tuple[str, float, float, float | None, float]] = []  # op, measured and table in float, then in int8
    seen: dict[str, list[float]] = {"QuantizeLinear": [], "DequantizeLinear": []}
    with tempfile.TemporaryDirectory(prefix="packlight-costs-") as folder:
        jobs = [prepare(op_type, CASES[op_type], Path(folder)) for op_type in listed]
        for (op_type, table), rounds in zip(listed.items(), clock.kernels(jobs, ROUNDS), strict=True):
            float_ns, int8_ns, crossings = read(CASES[op_type], rounds)
            rows.append((op_type, float_ns, table.float_ns, int8_ns, table.int8_ns))
            for kernel, value in crossings.items():
                seen[kernel].append(value)
        per_node = crossing_ns(Path(folder), clock)
    quantize, dequantize = (statistics.median(values) for values in seen.values())
    pairs = [pair for row in rows for pair in ((row[1], row[2]), (row[3], row[4]))]
    speed = statistics.median(found / given for found, given in pairs if found and given >= FREE_NS)
    print(f"{clock.where}; this machine takes {speed:.2f} of the table's times")
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
    with tempfile.TemporaryDirectory(prefix="packlight-costs-") as folder:
        print_layers(Path(folder), clock)


def _off(found: float | None, given: float, speed: float) -> str:
    if found is None:
        return "     !"
    if max(found / speed, given) < FREE_NS:
        return " free "
    ratio = found / given / speed if given else math.inf
    return f"{ratio:5.2f}{' ' if 1 - OFF <= ratio <= 1 / (1 - OFF) else '!'}"


if __name__ == "__main__":
    main(*sys.argv[1:2])
