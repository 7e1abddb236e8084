"""int8 files as others make them: one layer by hand, and a residual CNN through ONNX Runtime's own quantizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from exporter.quiet import quiet
from tests.exporter import graphs

Array = NDArray[Any]
ENDS = {"u8": (np.uint8, 128), "s8": (np.int8, 0), "u16": (np.uint16, 32768)}

CNN = """(float[N,3,16,16] image) => (float[N,8] logits) {
    [stem] a = Conv <pads=[1,1,1,1]> (image, w0, b0)
    [relu0] r = Relu(a)
    [branch0] b = Conv <pads=[1,1,1,1]> (r, w1, b1)
    [relu1] s = Relu(b)
    [branch1] c = Conv <pads=[1,1,1,1]> (s, w2, b2)
    [add] d = Add(c, r)
    [relu2] t = Relu(d)
    [pool] g = GlobalAveragePool(t)
    [flat] h = Flatten(g)
    [head] logits = Gemm(h, w3, b3)
}"""
CNN_MACS = 2 * (16 * 3 + 2 * 16 * 16) * 9 * 16 * 16 + 2 * 16 * 8  # of a batch of two images


def matmul(codes: Array, activation: str = "u8", readers: int = 1) -> onnx.ModelProto:
    """x -> [q] -> [dq] -> [fc0], [fc1], ...: MatMuls in Q/DQ form, whose weight is one initializer with a [dw] each."""
    dtype, middle = ENDS[activation]
    lines = "\n".join(
        f"[dw{i}] v{i} = DequantizeLinear(w, ws, wz)\n [fc{i}] y{i} = MatMul(d, v{i})" for i in range(readers)
    )
    outputs = ", ".join(f"float[N,{codes.shape[1]}] y{i}" for i in range(readers))
    text = f"""(float[N,{codes.shape[0]}] x) => ({outputs}) {{
        [q] c = QuantizeLinear(x, xs, xz)
        [dq] d = DequantizeLinear(c, xs, xz)
        {lines}
    }}"""
    weights = {
        "xs": np.float32(0.02),
        "xz": dtype(middle),
        "w": codes,
        "ws": np.float32(0.01),
        "wz": codes.dtype.type(0),
    }
    return graphs.proto(text, weights, opset=21)


def cnn() -> onnx.ModelProto:
    weights = {
        "w0": graphs.noise(1, 16, 3, 3, 3),
        "b0": graphs.noise(2, 16),
        "w1": graphs.noise(3, 16, 16, 3, 3) / 6,
        "b1": graphs.noise(4, 16),
        "w2": graphs.noise(5, 16, 16, 3, 3) / 6,
        "b2": graphs.noise(6, 16),
        "w3": graphs.noise(7, 16, 8),
        "b3": graphs.noise(8, 8),
    }
    return graphs.proto(CNN, weights, opset=17)


def images(seed: int, count: int) -> Iterator[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {"image": rng.random((2, 3, 16, 16), dtype=np.float32)}


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Batches as ONNX Runtime's quantizer takes them."""

    def __init__(self, batches: Iterator[dict[str, Array]]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, Array] | None:
        return next(self.batches, None)


def quantized(path: Path, activation: QuantType = QuantType.QInt8, weight: QuantType = QuantType.QInt8) -> Path:
    """cnn() by quantize_static, whose own default types are s8 and s8."""
    with quiet():
        quantize_static(cnn(), path, Reader(images(1, 4)), activation_type=activation, weight_type=weight)
    return path
