"""What a CPU does in int8, as data: types, which op_types have an integer kernel, what each costs, and which session keys to set.

Costs are nanoseconds on one thread of an x86-64 server core with AVX512-VNNI, measured with onnxruntime 1.31.1 by
`python benchmarks/costs.py`. Placement compares them with each other, so only their ratios matter.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from exporter.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Nanoseconds of one kernel in float and in int8, per element of its largest tensor."""

    float_ns: float
    int8_ns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A CPU family.

    pairs_in_int16: some of its CPUs add two u8·s8 products in int16, which saturates (vpmaddubsw, before VNNI); weights
        then keep the pair rule (exporter/correct/rounding.py).
    layers: op_types that hold the MACs; they run in integers wherever a kernel exists.
    elementwise, movers: other op_types with an integer kernel, which placement chooses for or against by cost. A mover
        leaves codes as they are: its output has its input's scale and zero point.
    quantize_ns, dequantize_ns: per element; crossing_ns: of either, whatever its size.
    copied_channels: input channels a group from which a Conv that copies its input position by position pays in int8.
    activations_matmul: whether a MatMul of two activations pays in int8: its B cannot be packed ahead of time.
    """

    name: str
    summary: str
    pairs_in_int16: bool
    layers: tuple[str, ...]
    elementwise: Mapping[str, Cost]
    movers: Mapping[str, Cost]
    copied_channels: int
    activations_matmul: bool
    quantize_ns: float
    dequantize_ns: float
    crossing_ns: float
    session: Mapping[str, str]


# Float is measured inside the NCHWc layout that ORT's fp32 CNNs run in, int8 inside NHWC, where the two differ.
LAYERS = ("Conv", "Gemm", "MatMul")
ELEMENTWISE = {
    "Add": Cost(float_ns=0.22, int8_ns=0.19),
    "Mul": Cost(float_ns=0.29, int8_ns=0.31),
    "Concat": Cost(float_ns=0.13, int8_ns=0.05),
    "Sigmoid": Cost(float_ns=0.44, int8_ns=0.38),
    "LeakyRelu": Cost(float_ns=0.25, int8_ns=0.38),
    "Softmax": Cost(float_ns=0.49, int8_ns=3.1),
    "GlobalAveragePool": Cost(float_ns=0.10, int8_ns=0.08),
    "AveragePool": Cost(float_ns=0.27, int8_ns=8.2),
    # Relu and Clip become the saturation of the QuantizeLinear behind the layer before them
    "Relu": Cost(float_ns=0.16, int8_ns=0.0),
    "Clip": Cost(float_ns=0.18, int8_ns=0.0),
}
MOVERS = {
    "MaxPool": Cost(float_ns=0.09, int8_ns=0.08),
    "Reshape": Cost(float_ns=0.01, int8_ns=0.0),
    "Flatten": Cost(float_ns=0.01, int8_ns=0.0),
    "Squeeze": Cost(float_ns=0.01, int8_ns=0.0),
    "Unsqueeze": Cost(float_ns=0.01, int8_ns=0.0),
    "Transpose": Cost(float_ns=0.43, int8_ns=0.33),
    "Slice": Cost(float_ns=0.08, int8_ns=0.05),
    "Split": Cost(float_ns=0.19, int8_ns=0.04),
    "Gather": Cost(float_ns=0.08, int8_ns=0.04),
    "DepthToSpace": Cost(float_ns=3.7, int8_ns=2.3),
    "Resize": Cost(float_ns=0.17, int8_ns=1.35),
}
# What ONNX Runtime would do to a quantized graph at load, against the plan:
# SkipLayerNormFusion: SkipLayerNormalization's CPU kernel takes three times as long as Add and LayerNormalization apart.
# WeightBiasQuantization rounds the weight of a float Conv or Gemm between two int8 layers, with one scale for all channels.
# MatMulAddFusion: where shapes are fixed it makes MatMul and Add a Gemm, which then has no integer kernel and runs in float.
UNWANTED = ("SkipLayerNormFusion", "WeightBiasQuantization", "MatMulAddFusion")
SESSION = {"optimization.disable_specified_optimizers": ";".join(UNWANTED)}

X86_VNNI = Target(
    name="x86-vnni",
    summary="x86-64 with AVX512-VNNI or AVX-VNNI: u8·s8 products are summed in int32, weights use all 8 bits",
    pairs_in_int16=False,
    layers=LAYERS,
    elementwise=ELEMENTWISE,
    movers=MOVERS,
    # time of int8 over float, 3x3 at 28x28: 5.9 with 2 channels a group, 3.1 with 4, 1.3 with 8, 1.2 with 16, 0.7 with 32;
    # 3x3x3: 5.3 with 4 channels, 2.6 with 8, 0.9 with 16 (a QuantizeLinear and a DequantizeLinear included)
    copied_channels=16,
    # attention's products: 7 % faster in int8 on MiniLM at 128 tokens, and a point of WordSim worse
    activations_matmul=False,
    quantize_ns=0.15,
    dequantize_ns=0.18,
    crossing_ns=400.0,
    session=SESSION,
)
PORTABLE = replace(
    X86_VNNI,
    name="portable",
    summary="any 64-bit CPU: 8-bit weights under the pair rule, which no x86 since AVX2 saturates; ARM and wasm need no rule",
    pairs_in_int16=True,
)

TARGETS: Mapping[str, Target] = {target.name: target for target in (PORTABLE, X86_VNNI)}

# Why an op_type has no integer kernel, or none that a static plan may use
NO_KERNEL: Mapping[str, str] = {
    "LSTM": "ONNX Runtime has no static int8 kernel for LSTM; its state stays float",
    "GRU": "ONNX Runtime has no static int8 kernel for GRU; its state stays float",
    "RNN": "ONNX Runtime has no static int8 kernel for RNN; its state stays float",
    "ConvTranspose": "ONNX Runtime has no integer kernel for ConvTranspose, and this one is no plain sub-pixel convolution",
}


def by_name(name: str, where: str = "target") -> Target:
    """The target called `name`.

    Raises:
        RecipeError: no such target; suggests the nearest.
    """
    if name in TARGETS:
        return TARGETS[name]
    near = difflib.get_close_matches(name, TARGETS, n=1, cutoff=0.4)
    raise RecipeError(
        "unknown target",
        found=repr(name),
        expected=f"one of {', '.join(TARGETS)}",
        do=f"did you mean {near[0]!r}?" if near else "",
        where=where,
    )
