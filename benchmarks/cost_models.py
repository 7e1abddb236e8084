"""The models that costs.py times: an operator between neighbours, a layer, a chain of crossings; each in float and with Q/DQ pairs.

An operator stands between two Neg, which fuse with nothing, or, where the layout decides (pooling, Resize), between two 1x1 Conv,
so that float runs inside NCHWc and int8 inside NHWC as in a CNN. Relu and Clip stand behind a Conv, into which they fold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from exporter import gates

Feed = Mapping[str, np.ndarray]

MAP = (1, 64, 56, 56)  # a feature map in the middle of a CNN
HEADS = (1, 12, 128, 128)  # attention weights
STATES = (1, 128, 6, 64)  # hidden states, split into heads
CHAIN, SMALL = 100, 16
CNN, ALONE, FOLDS = "between Conv", "between Neg", "behind Conv"
NOWHERE = np.array([], np.float32)
TWICE = np.array([1, 1, 2, 2], np.float32)


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


def prepare(op_type: str, case: Case, folder: Path) -> tuple[list[Path], Feed]:
    """The models of one operator, float first, and what to feed them."""
    random = np.random.default_rng(0)
    feed = {f"x{number}": random.standard_normal(case.shape).astype(np.float32) for number in range(case.inputs)}
    models = [folder / f"{op_type}_{quantized}.onnx" for quantized in (False, True)]
    for quantized, path in zip((False, True), models, strict=True):
        build(op_type, case, quantized, path)
    return models, feed


def prepare_layer(layer: Layer, folder: Path) -> tuple[list[Path], Feed]:
    """The models of one layer, in the order of TYPES, and what to feed them."""
    models = [folder / f"layer_{name}.onnx" for name in TYPES]
    for weights, path in zip(TYPES.values(), models, strict=True):
        build_layer(layer, weights, path)
    return models, {"x0": np.random.default_rng(0).standard_normal(layer.shape).astype(np.float32)}


def prepare_chain(folder: Path) -> tuple[list[Path], Feed]:
    """CHAIN Neg of SMALL elements with a Q/DQ pair behind each, the same without, and what to feed them."""
    models = []
    for quantized in (True, False):
        graph, tensor = Graph(quantized), "x"
        for number in range(CHAIN):
            tensor = graph.rounded(graph.node("Neg", [tensor], [f"n{number}"]))
        models.append(folder / f"chain_{quantized}.onnx")
        graph.save(models[-1], {"x": (SMALL,)}, [graph.node("Neg", [tensor], ["y"])])
    return models, {"x": np.ones(SMALL, np.float32)}
