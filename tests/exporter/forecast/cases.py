"""Small int8 models that saturate without VNNI, in every form that reaches ONNX Runtime, with inputs that make them.

Weights lean to one sign and activations are large, so that full-range codes clip at once. Nothing between the layers
rounds in float, for other CPUs round that otherwise.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from tests.exporter import graphs

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    model: bytes
    inputs: Mapping[str, Array]


def leaning(seed: int, *shape: int) -> Array:
    """Weights of which about nine in ten are positive."""
    generator = np.random.default_rng(seed)
    return (np.abs(generator.standard_normal(shape)) * np.where(generator.random(shape) < 0.9, 1, -1)).astype(
        np.float32
    )


def real(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).uniform(0, 1, shape).astype(np.float32)


def cnn() -> onnx.ModelProto:
    """Plain, padded, strided, dilated, grouped and pointwise Conv, depthwise + residual Add, odd channels, Gemm."""
    return graphs.proto(
        """(float[N,3,12,12] x) => (float[N,5] y) {
            [plain] a0 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w0, b0)
            a = Relu(a0)
            [grouped] b1 = Conv<kernel_shape=[3,3], group=4, strides=[2,2], pads=[0,1,1,0]>(a, w1, b2)
            b = Relu(b1)
            [depthwise] c0 = Conv<kernel_shape=[3,3], group=16, pads=[1,1,1,1]>(b, w2)
            c = Relu(c0)
            [residual] d = Add(b, c)
            [odd] e0 = Conv<kernel_shape=[1,1]>(d, w3)
            e = Relu(e0)
            [dilated] f0 = Conv<kernel_shape=[2,2], dilations=[2,2]>(e, w4)
            f = Relu(f0)
            [pointwise] g0 = Conv<kernel_shape=[1,1]>(f, w5)
            g = Relu(g0)
            [flat] h = Flatten(g)
            [head] y = Gemm<transB=1>(h, w6, b6)
        }""",
        {
            "w0": leaning(0, 16, 3, 3, 3), "b0": real(1, 16), "w1": leaning(2, 16, 4, 3, 3), "b2": real(3, 16),
            "w2": leaning(4, 16, 1, 3, 3), "w3": leaning(5, 7, 16, 1, 1), "w4": leaning(6, 16, 7, 2, 2),
            "w5": leaning(7, 20, 16, 1, 1), "w6": leaning(8, 5, 320), "b6": real(9, 5),
        },
    )  # fmt: skip


def chain() -> onnx.ModelProto:
    """Conv, Conv, Gemm: where a symmetric int8 activation folds no Relu and is read twice, ONNX Runtime runs the layer in float."""
    return graphs.proto(
        """(float[N,3,12,12] x) => (float[N,5] y) {
            [plain] a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w0, b0)
            [grouped] b = Conv<kernel_shape=[3,3], group=4, strides=[3,3]>(a, w1)
            [flat] c = Flatten(b)
            [head] y = Gemm<transB=1>(c, w2, b2)
        }""",
        {
            "w0": leaning(0, 16, 3, 3, 3), "b0": real(1, 16), "w1": leaning(2, 16, 4, 3, 3), "w2": leaning(3, 5, 256),
            "b2": real(4, 5),
        },
    )  # fmt: skip


def products() -> onnx.ModelProto:
    """MatMul of three axes with odd K, a bias behind it, and Gemm."""
    return graphs.proto(
        """(float[N,6,33] x) => (float[N,10] y) {
            [first] a0 = MatMul(x, w0)
            [bias] a = Add(a0, b0)
            [second] b = MatMul(a, w1)
            [flat] c = Flatten(b)
            [head] y = Gemm(c, w2, b2)
        }""",
        {
            "w0": leaning(0, 33, 24), "b0": real(1, 24), "w1": leaning(2, 24, 17), "w2": leaning(3, 102, 10),
            "b2": real(4, 10),
        },
    )  # fmt: skip


def attention() -> onnx.ModelProto:
    """A MatMul with a weight, and one of two activations."""
    return graphs.proto(
        """(float[N,6,33] x) => (float[N,6,6] y) {
            [query] a = MatMul(x, w0)
            [turned] b = Transpose<perm=[0,2,1]>(a)
            [scores] y = MatMul(a, b)
        }""",
        {"w0": leaning(0, 33, 24)},
    )


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Iterator[Mapping[str, Array]]) -> None:
        self.batches = batches

    def get_next(self) -> Mapping[str, Array] | None:
        return next(self.batches, None)


def static(model: onnx.ModelProto, shape: tuple[int, ...], **options: Any) -> Case:
    """A model through ONNX Runtime's own static quantizer, and a batch of two."""
    batches = iter([{"x": real(seed, 2, *shape)} for seed in range(4)])
    given = {"weight_type": QuantType.QInt8, "activation_type": QuantType.QUInt8, "per_channel": True} | options
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "int8.onnx"
        quantize_static(model, out, _Reader(batches), **given)
        return Case(model=out.read_bytes(), inputs={"x": real(9, 2, *shape)})


def dynamic(model: onnx.ModelProto, shape: tuple[int, ...], **options: Any) -> Case:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "int8.onnx"
        quantize_dynamic(model, out, weight_type=QuantType.QInt8, **options)
        return Case(model=out.read_bytes(), inputs={"x": real(9, 2, *shape)})


CNN, PRODUCTS = (3, 12, 12), (6, 33)
FLOAT_OUTPUTS = {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}


QUANTIZED: Mapping[str, Callable[[], Case]] = {
    "cnn qdq": lambda: static(cnn(), CNN),
    "cnn qdq per tensor": lambda: static(cnn(), CNN, per_channel=False),
    "chain s8s8": lambda: static(chain(), CNN, activation_type=QuantType.QInt8),
    "cnn operators": lambda: static(cnn(), CNN, quant_format=QuantFormat.QOperator),
    "attention qdq": lambda: static(attention(), PRODUCTS),
    "products qdq": lambda: static(products(), PRODUCTS),
    "products float between": lambda: static(products(), PRODUCTS, extra_options=FLOAT_OUTPUTS),
    "products operators": lambda: static(products(), PRODUCTS, quant_format=QuantFormat.QOperator),
    "products dynamic": lambda: dynamic(products(), PRODUCTS),
    "products dynamic per channel": lambda: dynamic(products(), PRODUCTS, per_channel=True),
}


OUTPUT = {
    **dict.fromkeys(("MatMulInteger", "ConvInteger"), TensorProto.INT32),
    **dict.fromkeys(("MatMulIntegerToFloat", "DynamicQuantizeLSTM"), TensorProto.FLOAT),
}


def codes(seed: int, dtype: type, *shape: int) -> Array:
    """Codes of the type's whole range, of which most are large."""
    generator, limits = np.random.default_rng(seed), np.iinfo(dtype)
    large = generator.integers(limits.max // 2, limits.max, shape, endpoint=True)
    return np.where(generator.random(shape) < 0.8, large, generator.integers(limits.min, limits.max, shape)).astype(
        dtype
    )


def node(
    op_type: str, inputs: Mapping[str, Array | None], given: tuple[str, ...], domain: str = "", **attributes: Any
) -> Case:
    """One node; `given` are inputs of the graph, the others its initializers, None an input left out."""
    names = [name if array is not None else "" for name, array in inputs.items()]
    made = helper.make_node(op_type, names, ["y"], op_type, domain=domain, **attributes)
    there = {name: array for name, array in inputs.items() if array is not None}
    graph = helper.make_graph(
        [made],
        "g",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(there[n].dtype), there[n].shape)
            for n in given
        ],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(array, name) for name, array in there.items() if name not in given],
    )
    graph.output[0].type.tensor_type.elem_type = OUTPUT.get(op_type, TensorProto.UINT8)
    if op_type == "QGemm" and inputs["y_scale"] is None:
        graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return Case(model=model.SerializeToString(), inputs={name: there[name] for name in given})


def conv(
    x: tuple[int, ...], w: tuple[int, ...], given: tuple[str, ...] = ("x",), w_zero: int = 0, **attributes: Any
) -> Case:
    """A QLinearConv with a bias, a scale for each channel, and zero points that are not 0."""
    channels, k = w[0], int(np.prod(w[1:]))
    inputs = {
        "x": codes(0, np.uint8, *x), "x_scale": np.float32(0.02), "x_zero": np.uint8(7),
        "w": codes(1, np.int8, *w), "w_scale": real(2, channels) / 50 + np.float32(0.01),
        "w_zero": np.full(channels, w_zero, np.int8),
        "y_scale": np.float32(0.15 * k / 8), "y_zero": np.uint8(3), "bias": np.arange(channels, dtype=np.int32) * 1000,
    }  # fmt: skip
    return node("QLinearConv", {n: np.asarray(a) for n, a in inputs.items()}, given, **attributes)


def matmul(a: tuple[int, ...], b: tuple[int, ...], given: tuple[str, ...] = ("a",)) -> Case:
    columns = b[-1] if len(b) > 1 else 1
    inputs = {
        "a": codes(0, np.uint8, *a), "a_scale": np.float32(0.02), "a_zero": np.uint8(5),
        "b": codes(1, np.int8, *b), "b_scale": real(2, columns) / 50 + np.float32(0.01) if len(b) == 2 else np.float32(0.02),
        "b_zero": np.arange(columns, dtype=np.int8) if len(b) == 2 else np.int8(3),
        "y_scale": np.float32(0.02 * a[-1]), "y_zero": np.uint8(3),
    }  # fmt: skip
    return node("QLinearMatMul", {n: np.asarray(v) for n, v in inputs.items()}, given)


def gemm(requantized: bool, **attributes: Any) -> Case:
    inputs: dict[str, Array | None] = {
        "a": codes(0, np.uint8, 65, 9) if attributes.get("transA") else codes(0, np.uint8, 9, 65),
        "a_scale": np.asarray(np.float32(0.02)), "a_zero": np.asarray(np.uint8(9)),
        "b": codes(1, np.int8, 20, 65) if attributes.get("transB") else codes(1, np.int8, 65, 20),
        "b_scale": real(2, 20) / 50 + np.float32(0.01), "b_zero": np.zeros(20, np.int8), "c": np.arange(20, dtype=np.int32) * 777,
        "y_scale": np.asarray(np.float32(1.3)) if requantized else None, "y_zero": np.asarray(np.uint8(3)) if requantized else None,
    }  # fmt: skip
    return node("QGemm", inputs, ("a",), "com.microsoft", **attributes)


def to_float(a: tuple[int, ...], b: tuple[int, ...]) -> Case:
    inputs = {
        "a": codes(0, np.uint8, *a), "b": codes(1, np.int8, *b), "a_scale": np.float32(0.0213), "b_scale": real(2, b[-1]),
        "a_zero": np.uint8(9), "b_zero": np.zeros(b[-1], np.int8), "bias": real(3, b[-1]) * 100,
    }  # fmt: skip
    return node("MatMulIntegerToFloat", {n: np.asarray(v) for n, v in inputs.items()}, ("a",), "com.microsoft")


def integer(
    a: tuple[int, ...], b: tuple[int, ...], a_zero: int, given: tuple[str, ...] = ("a",), a_dtype: type = np.uint8
) -> Case:
    inputs = {"a": codes(0, a_dtype, *a), "b": codes(1, np.int8, *b), "a_zero": np.asarray(a_dtype(a_zero))}
    return node("MatMulInteger", inputs, given)


@functools.cache
def nodes() -> Mapping[str, Case]:
    """One node each: the shapes and types at which ONNX Runtime changes kernels."""
    return {
        "conv 3x3, 3 channels": conv((2, 3, 9, 8), (16, 3, 3, 3), pads=[1, 1, 1, 1]),
        "conv 3x3, 4 channels": conv((1, 4, 9, 8), (16, 4, 3, 3), strides=[2, 1], pads=[1, 0, 0, 1]),
        "conv 3x3, 5 channels to 7": conv((1, 5, 9, 8), (7, 5, 3, 3)),
        "conv 5x5, 8 channels to 20": conv((1, 8, 9, 8), (20, 8, 5, 5), dilations=[2, 1]),
        "conv same upper": conv((1, 6, 7, 8), (9, 6, 3, 2), auto_pad="SAME_UPPER", strides=[2, 2]),
        "conv same lower": conv((1, 6, 7, 8), (9, 6, 3, 2), auto_pad="SAME_LOWER", strides=[1, 2]),
        "conv 2 groups": conv((2, 6, 7, 7), (8, 3, 3, 3), group=2),
        "conv 1 channel a group, 2 out": conv((1, 8, 7, 7), (16, 1, 3, 3), group=8),
        "conv depthwise, 16 channels": conv((1, 16, 7, 7), (16, 1, 3, 3), group=16),
        "conv depthwise, 5 channels": conv((1, 5, 7, 7), (5, 1, 3, 3), group=5),
        "conv of one channel": conv((1, 1, 7, 7), (1, 1, 3, 3)),
        "conv weight with a zero point": conv((1, 4, 7, 7), (16, 4, 3, 3), w_zero=11),
        "conv weight given": conv((1, 4, 7, 7), (16, 4, 3, 3), given=("x", "w")),
        "conv depthwise weight given": conv((1, 16, 7, 7), (16, 1, 3, 3), given=("x", "w"), group=16),
        "conv 1 axis": conv((2, 6, 40), (18, 6, 5), pads=[2, 2]),
        "conv 3 axes": conv((1, 4, 6, 6, 6), (16, 4, 2, 3, 3)),
        "conv 3 axes, groups": conv((1, 6, 6, 6, 6), (4, 3, 2, 3, 3), group=2, pads=[1, 1, 1, 0, 0, 0]),
        "matmul": matmul((7, 64), (64, 20)),
        "matmul one row": matmul((1, 63), (63, 20)),
        "matmul long": matmul((5, 1301), (1301, 33)),
        "matmul of a batch": matmul((2, 3, 7, 65), (65, 20)),
        "matmul of two batches": matmul((2, 3, 7, 31), (3, 31, 20), given=("a", "b")),
        "matmul of constant batches": matmul((2, 3, 7, 31), (3, 31, 20)),
        "gemm": gemm(True),
        "gemm both turned": gemm(True, transA=1, transB=1, alpha=0.37),
        "gemm to float": gemm(False, transB=1, alpha=0.37),
        "to float": to_float((2, 5, 63), (63, 21)),
        "to float, two batches": to_float((3, 5, 16), (16, 21)),
        "integer": integer((7, 65), (65, 20), 9),
        "integer one row": integer((1, 65), (65, 20), 0),
        "integer one row given": integer((1, 65), (65, 20), 0, given=("a", "b")),
        "integer s8s8": integer((7, 65), (65, 20), 9, a_dtype=np.int8),
        "integer of a vector": integer((65,), (65, 20), 9),
        "integer by a vector": integer((4, 65), (65,), 9),
    }


@functools.cache
def by_name(name: str) -> Case:
    return QUANTIZED[name]() if name in QUANTIZED else nodes()[name]
