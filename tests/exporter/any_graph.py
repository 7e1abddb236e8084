"""Random small graphs of every operator that the exporter knows, which ONNX Runtime runs: it is asked after every node.

A graph is what a hypothesis strategy draws: operators, attributes, which tensor feeds what. Numbers come from one drawn seed. A
node that ONNX Runtime refuses, or that leaves finite numbers, is dropped and the graph goes on without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from hypothesis import assume, reject
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]
Draw = Callable[[st.SearchStrategy[Any]], Any]
OPSETS = (13, 15, 17, 18, 20, 21)
CALIBRATION, HELDOUT = 6, 8
MOST_ELEMENTS, LARGEST = 20_000, 1e5
FLOAT = np.dtype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model's bytes, and batches of it; of one distribution, the two kinds apart."""

    model: bytes
    calibration: list[dict[str, Array]]
    heldout: list[dict[str, Array]]

    def __repr__(self) -> str:
        """The nodes, a line each, for a failing test's message."""
        nodes = onnx.load_from_string(self.model).graph.node
        return "\n".join(f"{', '.join(n.output)} = {n.op_type} ({', '.join(n.input)})" for n in nodes)


@dataclass(slots=True)
class Draft:
    """A graph that grows. values: what each tensor is on the batches that ONNX Runtime is asked with."""

    draw: Draw
    rng: np.random.Generator
    opset: int
    feeds: list[dict[str, Array]]
    values: dict[str, Array] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    count: int = 0

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def yes(self) -> bool:
        return bool(self.draw(st.booleans()))

    def number(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def name(self, what: str = "t") -> str:
        self.count += 1
        return f"{what}{self.count}"

    def constant(self, value: Any) -> str:
        """An initializer, or what a Constant node makes."""
        array, name = np.asarray(value), self.name("c")
        if self.draw(st.integers(0, 7)) == 7:
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        else:
            self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int) -> str:
        """Seeded weights, of about 1 / sqrt(inputs); at times another scale, a dead channel, or one that is much larger."""
        fan = max(1, int(np.prod(shape[1:])))
        values = self.rng.normal(size=shape) / np.sqrt(fan)
        kind = self.number(0, 9)
        if kind == 7:
            values *= 10.0 ** self.rng.uniform(-3, 1)
        if kind == 8 and shape:
            values[self.rng.integers(shape[0])] = 0
        if kind == 9 and shape:
            values[self.rng.integers(shape[0])] *= 30
        return self.constant(values.astype(np.float32))

    def of(self, *ranks: int, dtype: Any = FLOAT) -> str | None:
        """A tensor of one of these ranks (any, where none is named); the newest ones are likely."""
        found = [name for name, v in self.values.items() if v.dtype == dtype and (not ranks or v.ndim in ranks)]
        if not found:
            return None
        return found[-1] if self.number(0, 3) else self.pick(found)

    def add(
        self, op_type: str, inputs: Sequence[str], outputs: int = 1, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node if ONNX Runtime runs the graph with it; its outputs, or nothing."""
        names = [self.name() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, self.name("n"), domain=domain, **attributes))
        try:
            made = self.run(names)
        except Exception:  # onnxruntime's exceptions share no base but Exception
            self.nodes.pop()
            return []
        good = all(
            isinstance(v, np.ndarray) and 0 < v.size <= MOST_ELEMENTS and (v.dtype.kind != "f" or
            (np.isfinite(v).all() and float(abs(v).max()) < LARGEST)) for v in made.values()
        )  # fmt: skip
        if not good:
            self.nodes.pop()
            return []
        self.values |= made
        return names

    def run(self, names: Sequence[str]) -> dict[str, Array]:
        graph = self.graph(names)
        session = ort.InferenceSession(
            serialized(graph, self.opset), quiet_options(), providers=["CPUExecutionProvider"]
        )
        made = session.run(list(names), self.feeds[0])
        return dict(zip(names, made, strict=True))

    def graph(self, outputs: Sequence[str], dims: dict[str, list[Any]] | None = None) -> onnx.GraphProto:
        """The graph with these outputs; dims: what is declared of the inputs' shapes."""
        inputs = [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), (dims or {}).get(name, list(value.shape))
            )
            for name, value in self.feeds[0].items()
        ]
        made = [onnx.ValueInfoProto(name=name) for name in outputs]
        for value in made:
            if value.name in self.values:
                kind = helper.np_dtype_to_tensor_dtype(self.values[value.name].dtype)
                value.CopyFrom(helper.make_tensor_value_info(value.name, kind, None))
        return helper.make_graph(self.nodes, "any", inputs, made, self.initializers)


def quiet_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return options


def serialized(graph: onnx.GraphProto, opset: int) -> bytes:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(model.SerializeToString())


# --- operators: each adds nodes to the draft, or none where no tensor fits ---------------------------------------------------

Step = Callable[[Draft], object]


def conv(d: Draft) -> None:
    if (x := d.of(3, 4, 5)) is None:
        return
    channels, rank = d.values[x].shape[1], d.values[x].ndim - 2
    groups = d.pick([1, 1, 1, channels] + [g for g in (2, 3, 4) if channels % g == 0])
    out = groups * d.number(1, max(1, 12 // groups))
    kernel = [d.pick([1, 1, 2, 3, 3, 5]) for _ in range(rank)]
    attributes: dict[str, Any] = {
        "group": groups,
        "strides": [d.pick([1, 1, 2])] * rank,
        "dilations": [d.pick([1, 1, 1, 2])] * rank,
    }
    padding = d.number(0, 3)
    if padding == 0:
        attributes["auto_pad"] = d.pick(["SAME_UPPER", "SAME_LOWER", "VALID"])
        attributes["dilations"] = [1] * rank
    elif padding > 1:
        attributes["pads"] = [d.number(0, 2) for _ in range(2 * rank)]
    inputs = [x, d.weight(out, channels // groups, *kernel)]
    d.add("Conv", inputs + ([d.weight(out)] if d.yes() else []), kernel_shape=kernel, **attributes)


def conv_transpose(d: Draft) -> None:
    if (x := d.of(3, 4)) is None:
        return
    channels, rank = d.values[x].shape[1], d.values[x].ndim - 2
    groups = d.pick([1, 1] + [g for g in (2, 4) if channels % g == 0])
    out, stride = d.number(1, 4), d.pick([1, 2, 2, 3])
    attributes: dict[str, Any] = {"group": groups, "strides": [stride] * rank, "pads": [d.number(0, 1)] * 2 * rank}
    if stride > 1 and d.yes():
        attributes["output_padding"] = [1] * rank
    inputs = [x, d.weight(channels, out, *[d.pick([2, 3, 4])] * rank)]
    d.add("ConvTranspose", inputs + ([d.weight(out * groups)] if d.yes() else []), **attributes)


def gemm(d: Draft) -> None:
    if (x := d.of(2)) is None:
        return
    over, turned, out = d.pick([0, 0, 0, 1]), d.pick([0, 1]), d.number(1, 12)
    k = d.values[x].shape[0 if over else 1]
    rows = d.values[x].shape[1 if over else 0]
    weight = d.weight(*((out, k) if turned else (k, out)))
    bias = d.pick([None, (out,), (1, out), (1, 1), (), (rows, out), (rows, 1), (1,)])
    attributes = {"alpha": d.pick([1.0, 1.0, 0.5]), "beta": d.pick([1.0, 1.0, 2.0])}
    d.add("Gemm", [x, weight, *([] if bias is None else [d.weight(*bias)])], transA=over, transB=turned, **attributes)


def matmul(d: Draft) -> None:
    if (x := d.of()) is None or d.values[x].ndim == 0:
        return
    shape, out = d.values[x].shape, d.number(1, 12)
    kind = d.number(0, 5)
    if kind <= 2:
        made = d.add("MatMul", [x, d.weight(shape[-1], out)])
        if made and d.yes():
            d.add("Add", d.pick([[made[0], d.weight(out)], [d.weight(out), made[0]], [made[0], d.weight(1, out)]]))
    elif kind == 3:
        d.add("MatMul", [x, d.weight(*d.pick([(shape[-1],), (*shape[:-2], shape[-1], out)]))])
    elif kind == 4 and len(shape) >= 2:
        d.add("MatMul", [d.weight(*d.pick([(out, shape[-2]), (*shape[:-2], out, shape[-2])])), x])
    elif len(shape) >= 2:
        perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        turned = d.add("Transpose", [x], perm=perm)
        scores = turned and d.add("MatMul", [x, turned[0]])
        if scores and d.yes():
            odds = d.add("Softmax", scores, axis=-1)
            if odds:
                d.add("MatMul", [odds[0], x])


def pool(d: Draft) -> None:
    if (x := d.of(3, 4)) is None:
        return
    rank, kind = (
        d.values[x].ndim - 2,
        d.pick(["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool"]),
    )
    if kind.startswith("Global"):
        d.add(kind, [x])
        return
    size = d.pick([2, 3])
    attributes: dict[str, Any] = {"kernel_shape": [size] * rank, "strides": [d.pick([1, 2])] * rank}
    if d.yes():
        attributes["pads"] = [d.number(0, size - 1) for _ in range(2 * rank)]
    if kind != "LpPool" and d.yes():
        attributes["ceil_mode"] = 1
    if kind == "AveragePool" and d.yes():
        attributes["count_include_pad"] = 1
    d.add(kind, [x], **attributes)


UNARY = {
    "Relu": 6, "Relu6": 13, "LeakyRelu": 6, "Sigmoid": 13, "Tanh": 13, "HardSigmoid": 6, "HardSwish": 14, "Softplus": 1,
    "Softsign": 1,
    "Elu": 6, "Selu": 6, "Celu": 12, "ThresholdedRelu": 10, "Mish": 18, "Gelu": 20, "Erf": 13, "Neg": 13, "Abs": 13, "Floor": 13,
    "Ceil": 13, "Round": 11, "Sign": 13, "Sin": 7, "Cos": 7, "Sqrt": 13, "Exp": 13, "Log": 13, "Reciprocal": 13, "Identity": 13,
    "Dropout": 13, "Atan": 7,
}  # fmt: skip


def unary(d: Draft) -> None:
    if (x := d.of()) is None:
        return
    op_type = d.pick([name for name, since in UNARY.items() if since <= d.opset])
    if op_type == "Relu6":
        bounds = d.pick([(0.0, 6.0), (-1.0, 1.0), (0.0, None), (None, 1.0), (0.5, 2.0), (-3.0, -0.5)])
        d.add("Clip", [x, *("" if bound is None else d.constant(np.float32(bound)) for bound in bounds)])
        return
    attributes: dict[str, Any] = {}
    if op_type == "HardSigmoid" and d.yes():
        attributes = {"alpha": d.pick([1 / 6, 0.5, -0.2]), "beta": d.pick([0.5, 0.0])}
    if op_type == "LeakyRelu":
        attributes = {"alpha": d.pick([0.01, 0.3, 1.5, -0.5])}
    if op_type == "Gelu":
        attributes = {"approximate": d.pick(["none", "tanh"])}
    made = d.add(op_type, [x], **attributes)
    if made and op_type in ("Sigmoid", "Tanh", "HardSigmoid", "Erf") and d.yes():
        d.add("Mul", [x, made[0]])  # a gate: SiLU and its like


def softmax(d: Draft) -> None:
    if (x := d.of(1, 2, 3, 4)) is not None:
        d.add(d.pick(["Softmax", "LogSoftmax", "Hardmax"]), [x], axis=d.number(-d.values[x].ndim, d.values[x].ndim - 1))


def _beside(d: Draft, x: str) -> str:
    """Something to compute with x: a constant of a shape that broadcasts, or another tensor."""
    shape = d.values[x].shape
    others = [name for name, v in d.values.items() if v.dtype == FLOAT and v.ndim and name != x]
    if others and d.yes():
        alike = [name for name in others if d.values[name].shape == shape]
        return str(d.pick(alike or others))
    channel = tuple(n if axis == 1 else 1 for axis, n in enumerate(shape))
    chosen = d.pick([(), (1,), shape[-1:], channel, shape, tuple(n if d.yes() else 1 for n in shape)])
    return d.weight(*chosen)


def binary(d: Draft) -> None:
    if (x := d.of()) is None:
        return
    pair = [x, _beside(d, x)]
    op_type = d.pick(["Add", "Add", "Mul", "Mul", "Sub", "Div", "Max", "Min", "Pow", "PRelu", "Sum", "Mean"])
    if op_type == "Pow":
        pair[1] = d.constant(np.float32(d.pick([2, 2, 3, 0.5])))
    if op_type != "PRelu" and d.yes():
        pair = pair[::-1]
    d.add(op_type, pair)


def compare(d: Draft) -> None:
    if (x := d.of()) is None:
        return
    mask = d.add(d.pick(["Greater", "Less", "Equal", "GreaterOrEqual"]), [x, d.constant(np.float32(0.1))])
    if mask:
        mask = d.add("Not", mask) if d.yes() else mask
        kind = d.number(0, 2)
        if kind == 0:
            d.add("Where", [mask[0], x, d.pick([d.constant(np.float32(0)), d.constant(np.float32(-3.4e38)), x])])
        elif kind == 1:
            d.add("Where", [mask[0], x, _beside(d, x)])
        else:
            d.add("Cast", mask, to=onnx.TensorProto.FLOAT)


def cast(d: Draft) -> None:
    if (x := d.of()) is None:
        return
    to = d.pick(["FLOAT16", "DOUBLE", "INT64", "INT32", "BOOL", "FLOAT", "UINT8", "INT8"])
    made = d.add("Cast", [x], to=getattr(onnx.TensorProto, to))
    if made and d.yes():
        if to == "DOUBLE" and d.yes():
            made = d.add("Mul", [made[0], d.constant(np.float64(0.5))]) or made
        d.add("Cast", made, to=onnx.TensorProto.FLOAT)


def joined(d: Draft) -> None:
    if (x := d.of(1, 2, 3, 4, 5)) is None:
        return
    shape, axis = d.values[x].shape, d.number(0, d.values[x].ndim - 1)
    fits = [
        name for name, v in d.values.items()
        if v.dtype == FLOAT and v.ndim == len(shape) and all(a == axis or n == shape[a] for a, n in enumerate(v.shape))
    ]  # fmt: skip
    others = [str(d.pick(fits)) for _ in range(d.number(1, 2))]
    if d.number(0, 3) == 3:
        others.append(d.weight(*(2 if a == axis else n for a, n in enumerate(shape))))
    d.add("Concat", [x, *others], axis=axis if d.yes() else axis - len(shape))


def split(d: Draft) -> None:
    if (x := d.of(1, 2, 3, 4)) is None:
        return
    axis = d.number(0, d.values[x].ndim - 1)
    size = d.values[x].shape[axis]
    if size < 2:
        return
    first = d.number(1, size - 1)
    d.add("Split", [x, d.constant(np.array([first, size - first], np.int64))], outputs=2, axis=axis)


def cut(d: Draft) -> None:
    if (x := d.of(1, 2, 3, 4)) is None:
        return
    axis = d.number(0, d.values[x].ndim - 1)
    size, step = d.values[x].shape[axis], d.pick([1, 1, 2, -1])
    start = d.number(0, size - 1)
    ends = d.pick([size, 2**31 - 1, -1]) if step > 0 else -(2**31)
    parts = [np.array([value], np.int64) for value in (start if step > 0 else size - 1, ends, axis, step)]
    d.add("Slice", [x, *map(d.constant, parts)])


def pad(d: Draft) -> None:
    if (x := d.of(2, 3, 4, 5)) is None:
        return
    rank = d.values[x].ndim
    spatial = [0 if axis < rank - 2 else d.number(0, 2) for axis in range(rank)]
    after = [d.number(0, 1) * size for size in spatial] if d.yes() else spatial
    mode, value = d.pick(["constant", "constant", "reflect", "edge"]), d.pick([None, 0.0, 1.0, -0.5])
    inputs = [x, d.constant(np.array([*spatial, *after], np.int64))]
    if mode == "constant" and value is not None:
        inputs.append(d.constant(np.float32(value)))
    made = d.add("Pad", inputs, mode=mode)
    if made and d.yes():
        conv(d)


def resize(d: Draft) -> None:
    if (x := d.of(3, 4)) is None:
        return
    mode = d.pick(["nearest", "linear", "cubic"])
    way = d.pick(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
    shape = d.values[x].shape
    if d.yes():
        scales = [1.0, 1.0] + [d.pick([2.0, 0.5, 1.5])] * (len(shape) - 2)
        inputs = [x, "", d.constant(np.array(scales, np.float32))]
    else:
        sizes = [*shape[:2], *(d.number(1, 9) for _ in shape[2:])]
        inputs = [x, "", "", d.constant(np.array(sizes, np.int64))]
    d.add("Resize", inputs, mode=mode, coordinate_transformation_mode=way)


def moved(d: Draft) -> None:
    if (x := d.of()) is None:
        return
    shape = d.values[x].shape
    kind = d.pick(["Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "Shaped"])
    if kind == "Transpose" and shape:
        d.add(kind, [x], perm=d.draw(st.permutations(range(len(shape)))))
    elif kind == "Reshape" and shape:
        target = d.pick([[-1], [0, -1], [shape[0], -1], [1, -1], [-1, shape[-1]], [*shape, 1], [shape[0], -1, 2]])
        d.add(kind, [x, d.constant(np.array(target, np.int64))])
    elif kind == "Flatten":
        d.add(kind, [x], axis=d.number(0, len(shape)))
    elif kind == "Squeeze" and 1 in shape:
        d.add(kind, [x, d.constant(np.array([shape.index(1)], np.int64))])
    elif kind == "Unsqueeze" and len(shape) < 5:
        d.add(kind, [x, d.constant(np.array([d.number(0, len(shape))], np.int64))])
    elif kind == "Expand" and shape:
        d.add(kind, [x, d.constant(np.array([2, *shape] if len(shape) < 4 else shape, np.int64))])
    elif kind == "Tile" and shape:
        d.add(kind, [x, d.constant(np.array([d.number(1, 2) for _ in shape], np.int64))])
    elif kind == "Shaped" and shape:  # a shape that is computed, as exporters write it
        size = d.add("Shape", [x])
        first = size and d.add("Gather", [size[0], d.constant(np.array([0], np.int64))], axis=0)
        rest = first and d.add("Concat", [first[0], d.constant(np.array([-1], np.int64))], axis=0)
        if rest:
            d.add("Reshape", [x, rest[0]])


def taken(d: Draft) -> None:
    if (x := d.of(1, 2, 3, 4)) is None:
        return
    shape, axis = d.values[x].shape, d.number(0, d.values[x].ndim - 1)
    kind, size = (
        d.pick(["Gather", "Gather", "GatherElements", "TopK", "ArgMax", "CumSum", "ScatterND", "Trilu"]),
        shape[axis],
    )
    if kind == "Gather":
        indices = d.pick([np.int64(size - 1), np.array([0, size - 1, -1]), np.zeros((2, 2), np.int64)])
        d.add(kind, [x, d.constant(indices)], axis=axis)
    elif kind == "GatherElements":
        d.add(kind, [x, d.constant(d.rng.integers(0, size, shape))], axis=axis)
    elif kind == "TopK":
        d.add(kind, [x, d.constant(np.array([d.number(1, size)], np.int64))], outputs=2, axis=axis)
    elif kind == "ArgMax":
        d.add(kind, [x], axis=axis, keepdims=d.pick([0, 1]))
    elif kind == "CumSum":
        d.add(kind, [x, d.constant(np.int64(axis))])
    elif kind == "ScatterND":
        d.add(kind, [x, d.constant(np.zeros((1, 1), np.int64)), d.weight(1, *shape[1:])])
    elif len(shape) >= 2:
        d.add("Trilu", [x], upper=d.pick([0, 1]))


def blocks(d: Draft) -> None:
    if (x := d.of(4)) is not None:
        d.add(d.pick(["DepthToSpace", "SpaceToDepth"]), [x], blocksize=2)


def reduced(d: Draft) -> None:
    if (x := d.of(1, 2, 3, 4, 5)) is None:
        return
    rank = d.values[x].ndim
    op_type = d.pick(["ReduceMean", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare",
                      "ReduceLogSumExp", "ReduceProd"])  # fmt: skip
    axes = d.pick([[-1], [rank - 1], list(range(2, rank)) or [0], [0], list(range(rank)), [1 % rank]])
    attributes: dict[str, Any] = {"keepdims": d.pick([0, 1])}
    inputs = [x]
    if d.opset >= 18 or op_type == "ReduceSum":
        inputs.append(d.constant(np.array(axes, np.int64)))
    else:
        attributes["axes"] = axes
    d.add(op_type, inputs, **attributes)


def normalized(d: Draft) -> None:
    if (x := d.of(2, 3, 4)) is None:
        return
    shape = d.values[x].shape
    kind = d.pick(["BatchNormalization", "InstanceNormalization", "LayerNormalization", "LpNormalization", "LRN",
                   "GroupNormalization",
                   "MeanVarianceNormalization"])  # fmt: skip
    if kind == "BatchNormalization":
        spread = d.constant((d.rng.uniform(0.1, 2, shape[1]) * d.pick([1, 1, 1e-12, 100])).astype(np.float32))
        d.add(kind, [x, d.weight(shape[1]), d.weight(shape[1]), d.weight(shape[1]), spread])
    elif kind == "InstanceNormalization":
        d.add(kind, [x, d.weight(shape[1]), d.weight(shape[1])])
    elif kind == "LayerNormalization" and d.opset >= 17:
        d.add(kind, [x, d.weight(shape[-1]), *([d.weight(shape[-1])] if d.yes() else [])], axis=-1)
    elif kind == "LpNormalization":
        d.add(kind, [x], axis=-1)
    elif kind == "LRN":
        d.add(kind, [x], size=3)
    elif kind == "GroupNormalization" and d.opset >= 21:
        d.add(kind, [x, d.weight(shape[1]), d.weight(shape[1])], num_groups=d.pick([1, shape[1]]))
    elif kind == "MeanVarianceNormalization":
        d.add(kind, [x], axes=list(range(1, len(shape))))


def recurrent(d: Draft) -> None:
    if (x := d.of(3)) is None:
        return
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}
    op_type, hidden, size = d.pick(list(gates)), d.number(1, 6), d.values[x].shape[2]
    ways = d.pick([1, 1, 2])
    wide = gates[op_type] * hidden
    inputs = [x, d.weight(ways, wide, size), d.weight(ways, wide, hidden)]
    inputs += [d.weight(ways, 2 * wide)] if d.yes() else []
    direction = "bidirectional" if ways == 2 else d.pick(["forward", "reverse"])
    more = {"linear_before_reset": d.pick([0, 1])} if op_type == "GRU" else {}
    made = d.add(op_type, inputs, outputs=1, hidden_size=hidden, direction=direction, **more)
    if made:
        d.add("Squeeze", [made[0], d.constant(np.array([1], np.int64))]) if ways == 1 else None


def branched(d: Draft) -> None:
    """If the mean is positive one thing, else another; both read the tensor from outside."""
    if (x := d.of()) is None or d.values[x].ndim == 0:
        return
    axes = d.constant(np.arange(d.values[x].ndim))
    mean = d.add("ReduceSum", [x, axes], keepdims=0)
    asked = mean and d.add("Greater", [mean[0], d.constant(np.float32(0))])
    if not asked:
        return
    bodies = []
    for number in range(2):
        out, made = d.name("b"), list[onnx.NodeProto]()
        if d.yes():
            weight = numpy_helper.from_array(
                (d.rng.normal(size=(d.values[x].shape[-1], 3)) / 2).astype(np.float32), d.name("w")
            )
            made.append(helper.make_node("MatMul", [x, weight.name], [out], d.name("n")))
            bodies.append(helper.make_graph(made, f"body{number}", [], [onnx.ValueInfoProto(name=out)], [weight]))
        else:
            made.append(helper.make_node(d.pick(["Relu", "Neg", "Identity", "Tanh"]), [x], [out], d.name("n")))
            bodies.append(helper.make_graph(made, f"body{number}", [], [onnx.ValueInfoProto(name=out)]))
    d.add("If", asked, then_branch=bodies[0], else_branch=bodies[1])


def looked_up(d: Draft) -> None:
    """Numbers choose rows of a table."""
    numbers = [name for name, v in d.values.items() if v.dtype == np.int64 and v.ndim]
    if not numbers:
        return
    chosen = d.pick(numbers)
    rows = 2 + int(max(0, d.values[chosen].max()))
    d.add("Gather", [d.weight(max(rows, 20), d.number(1, 8)), chosen], axis=0)


STEPS: Sequence[Step] = (
    conv, conv, conv, conv_transpose, gemm, gemm, matmul, matmul, matmul, pool, unary, unary, unary, softmax,
    binary, binary, binary, compare, cast, joined, split, cut, pad, resize, moved, moved, taken, blocks,
    reduced, normalized, normalized, recurrent, branched, looked_up,
)  # fmt: skip
LAYERS: Sequence[Step] = (conv, gemm, matmul, conv, matmul)


def _data(rng: np.random.Generator, kind: int, shape: tuple[int, ...], scale: float) -> Array:
    """float32 of one of six distributions: around 0, positive, far from 0, few large, mostly 0, pixels."""
    values = rng.normal(size=shape)
    if kind == 1:
        values = abs(values)
    if kind == 2:
        values = values + 5
    if kind == 3:
        values = values * (1 + 10 * (rng.random(shape) > 0.97))
    if kind == 4:
        values = values * (rng.random(shape) > 0.7)
    if kind == 5:
        values = rng.random(shape)
    return np.asarray(values * scale, np.float32)


SHAPES = {1: (1, 8), 2: (1, 12), 3: (1, 6, 8), 4: (1, 4, 8, 8), 5: (1, 2, 4, 5, 5)}


@st.composite
def cases(draw: Draw) -> Case:
    """A graph of one to twelve steps, a layer among the first, and batches that fit it."""
    seed, opset = draw(st.integers(0, 2**16)), draw(st.sampled_from(OPSETS))
    rng = np.random.default_rng(seed)
    inputs: dict[str, tuple[int, float, tuple[int, ...]]] = {}
    for number in range(draw(st.sampled_from([1, 1, 1, 2]))):
        rank = draw(st.sampled_from([2, 3, 4, 4, 5]))
        shape = tuple(max(1, n + draw(st.integers(-1, 1))) if axis else n for axis, n in enumerate(SHAPES[rank]))
        shape = (draw(st.sampled_from([1, 1, 2])), *shape[1:])
        inputs[f"x{number}"] = (draw(st.integers(0, 5)), draw(st.sampled_from([1.0, 1.0, 0.02, 50.0])), shape)
    ids = draw(st.integers(0, 5)) == 5

    def batch() -> dict[str, Array]:
        made = {name: _data(rng, kind, shape, scale) for name, (kind, scale, shape) in inputs.items()}
        return made | ({"ids": rng.integers(0, 20, (1, 6))} if ids else {})

    feeds = [batch() for _ in range(CALIBRATION + HELDOUT)]
    draft = Draft(draw=draw, rng=rng, opset=opset, feeds=feeds)
    draft.values |= feeds[0]
    before = draw(st.integers(0, 2))
    for _ in range(before):
        draw(st.sampled_from(STEPS))(draft)
    draw(st.sampled_from(LAYERS))(draft)
    for _ in range(draw(st.integers(0, 10))):
        draw(st.sampled_from(STEPS))(draft)
    assume(draft.nodes)
    return _finished(draft)


def _finished(draft: Draft) -> Case:
    made = [name for name in draft.values if name not in draft.feeds[0]]
    read = {name for node in draft.nodes for name in node.input}
    ends = [name for name in made if name not in read] or made[-1:] or list(draft.feeds[0])[:1]
    if made and draft.yes():
        ends = list(dict.fromkeys([*ends, draft.pick(made)]))
    dims: dict[str, list[Any]] = {}
    if draft.number(0, 3) == 3:
        dims = {name: ["batch", *value.shape[1:]] for name, value in draft.feeds[0].items() if name != "ids"}
    content = serialized(draft.graph(ends, dims), draft.opset)
    session = ort.InferenceSession(content, quiet_options(), providers=["CPUExecutionProvider"])
    for batch in draft.feeds:
        try:
            session.run(None, batch)
        except Exception:  # another branch, whose result does not fit what reads it
            reject()
    return Case(model=content, calibration=draft.feeds[:CALIBRATION], heldout=draft.feeds[CALIBRATION:])
