"""What a CPU does in int8, as data: types, which op_types have an integer kernel, what each costs, and which session keys to set.

Costs are nanoseconds on one thread, measured with onnxruntime 1.31.1 by `python benchmarks/costs.py` on an x86-64 server core
with AVX512-VNNI; for x86-avx2 on the same core with AVX512 and VNNI hidden (tests/devices); for wasm by `python
benchmarks/costs.py wasm` with onnxruntime-web 1.30.0 in node on that core. Placement compares them with each other, so only
their ratios matter. A target differs from another only where its hardware does.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from exporter import ops
from exporter.errors import RecipeError
from runtime.cpu import Cpu, read
from runtime.session import LISTED


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Nanoseconds of one kernel in float and in int8, per element of its largest tensor."""

    float_ns: float
    int8_ns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCost:
    """Nanoseconds of a layer: of a multiply-add in float and in int8, and what int8 pays beside them.

    output_ns: of an output, summed in int32 and written as a code or a float.
    weight_ns, transposed_ns: of an element of a MatMul's or Gemm's weight, which is packed at every run; with transB.
    """

    float_ns: float
    int8_ns: float
    output_ns: float
    weight_ns: float
    transposed_ns: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A CPU family.

    machine: `runtime.cpu.machine()` of its CPUs; empty where there are several.
    pairs_in_int16: some of its CPUs add two u8·s8 products in int16, which saturates (vpmaddubsw, before VNNI); weights
        then keep the pair rule (exporter/correct/rounding.py).
    layers: op_types that hold the MACs.
    layer: what they cost, where int8 is chosen for or against; None where it saves on every layer, which then is int8
        wherever a kernel exists.
    elementwise, movers: other op_types with an integer kernel, which placement chooses for or against by cost. A mover
        leaves codes as they are: its output has its input's scale and zero point.
    quantize_ns, dequantize_ns: per element; crossing_ns: of either, whatever its size.
    copied_channels: input channels a group from which a Conv that copies its input position by position pays in int8.
    depthwise: whether a depthwise Conv has a kernel of its own that pays in int8.
    dynamic: op_types that may be layers in dynamic int8 (exporter/dynamic.py, recurrent.py).
    range_ns: per element, to find the range of what they read.
    activations_matmul: whether a MatMul of two activations pays in int8: its B cannot be packed ahead of time.
    session: session config entries.
    costs_from: where the costs were measured; a target whose hardware was not there says whose they are.
    slower: {node of one model: whether int8 is slower, as timed}: products, Conv of `copied_channels` (exporter/kinds.py).
    """

    name: str
    summary: str
    machine: str
    pairs_in_int16: bool
    layers: tuple[str, ...]
    elementwise: Mapping[str, Cost]
    movers: Mapping[str, Cost]
    layer: LayerCost | None
    copied_channels: int
    depthwise: bool
    dynamic: tuple[str, ...]
    range_ns: float
    activations_matmul: bool
    quantize_ns: float
    dequantize_ns: float
    crossing_ns: float
    session: Mapping[str, str]
    costs_from: str
    slower: Mapping[str, bool] = field(default_factory=dict)


# Float is measured inside the NCHWc layout that ORT's fp32 CNNs run in, int8 inside NHWC, where the two differ.
LAYERS = ("Conv", "Gemm", "MatMul")
ELEMENTWISE = {
    "Add": Cost(float_ns=0.22, int8_ns=0.19),
    "Mul": Cost(float_ns=0.29, int8_ns=0.31),
    "Concat": Cost(float_ns=0.13, int8_ns=0.05),
    "Sigmoid": Cost(float_ns=0.44, int8_ns=0.38),
    "LeakyRelu": Cost(float_ns=0.25, int8_ns=0.38),
    # its codes are its input's, clipped
    "HardSigmoid": Cost(float_ns=0.22, int8_ns=0.05),
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
# What ONNX Runtime would do to a quantized graph at load, against the plan
UNWANTED = {
    "SkipLayerNormFusion": "the CPU kernel SkipLayerNormalization takes three times as long as Add and LayerNormalization apart",
    "WeightBiasQuantization": "it rounds the weight of a float layer between two int8 ones, with one scale for all channels",
    "MatMulAddFusion": "where shapes are fixed it makes MatMul and Add a Gemm, which then has no integer kernel",
}
# LSTM is not among them where codes must keep the pair rule, or nobody has timed it
DYNAMIC = ("Gemm", "MatMul")
SESSION = {LISTED: ";".join(UNWANTED)}
SERVER = "x86 with VNNI"

X86_VNNI = Target(
    name="x86-vnni",
    summary="x86 with AVX512-VNNI, AVX-VNNI",
    machine="x86_64",
    # vpdpbusd sums four u8·s8 products in int32
    pairs_in_int16=False,
    layers=LAYERS,
    elementwise=ELEMENTWISE,
    movers=MOVERS,
    layer=None,
    # time of int8 over float, 3x3 at 28x28: 5.9 with 2 channels a group, 3.1 with 4, 1.3 with 8, 1.2 with 16, 0.7 with 32;
    # 3x3x3: 5.3 with 4 channels, 2.6 with 8, 0.9 with 16 (a QuantizeLinear and a DequantizeLinear included)
    copied_channels=16,
    depthwise=True,
    # as fast as static on MiniLM; DynamicQuantizeLinear takes 1.4 times the time of QuantizeLinear
    dynamic=(*DYNAMIC, "LSTM"),
    range_ns=0.06,
    # attention's products: u8·s8 by `products`, 6 % faster on MiniLM at 128 tokens, 13 % on ViT-S; the search may have them float
    activations_matmul=True,
    quantize_ns=0.15,
    dequantize_ns=0.18,
    crossing_ns=400.0,
    session=SESSION,
    costs_from=SERVER,
)
# vpmaddubsw adds two u8·s8 products in int16: a bundle of full-range weights fell from 24 to 8 dB on EfficientNet-Lite0
X86_AVX2 = replace(
    X86_VNNI,
    name="x86-avx2",
    summary="x86 with AVX2, no VNNI",
    pairs_in_int16=True,
    activations_matmul=False,  # activations cannot keep to the pair rule, and u8·u8 hardly pays
    dynamic=DYNAMIC,
    # its kernel works on 8 values at a time where AVX512's works on 16
    quantize_ns=0.30,
    costs_from="x86 with AVX512 hidden",
)
PORTABLE = replace(
    X86_VNNI,
    name="portable",
    summary="any 64-bit CPU, one file",
    machine="",
    pairs_in_int16=True,
    activations_matmul=False,
    dynamic=DYNAMIC,
)
# Every ARM core sums in int32, those with dot products (sdot) and those without alike: all gave the same bits under qemu.
# None was there to be timed: emulation tells bits, not times.
ARM64 = replace(
    X86_VNNI,
    name="arm64",
    summary="64-bit ARM: phones, boards",
    machine="aarch64",
    activations_matmul=False,  # nobody has timed it
    dynamic=DYNAMIC,
    costs_from=f"predicted: {SERVER}",
)
# The wasm build rounds and saturates one value at a time, with branches: an int8 output costs 3 ns, and 8 behind a Relu or Clip.
# In float these two are measured inside the Conv that they fuse into.
IN_WASM = {
    "Add": Cost(float_ns=0.26, int8_ns=1.1),
    "Mul": Cost(float_ns=0.26, int8_ns=1.2),
    "Concat": Cost(float_ns=0.16, int8_ns=0.09),
    "Sigmoid": Cost(float_ns=2.9, int8_ns=0.59),
    "LeakyRelu": Cost(float_ns=5.3, int8_ns=0.60),
    "HardSigmoid": Cost(float_ns=2.3, int8_ns=1.0),
    "Softmax": Cost(float_ns=2.3, int8_ns=4.8),
    "GlobalAveragePool": Cost(float_ns=0.32, int8_ns=0.36),
    "AveragePool": Cost(float_ns=36.6, int8_ns=8.3),
    "Relu": Cost(float_ns=0.5, int8_ns=5.0),
    "Clip": Cost(float_ns=0.5, int8_ns=5.0),
}
MOVED_IN_WASM = {
    "MaxPool": Cost(float_ns=1.0, int8_ns=1.3),
    "Reshape": Cost(float_ns=0.05, int8_ns=0.05),
    "Flatten": Cost(float_ns=0.05, int8_ns=0.05),
    "Squeeze": Cost(float_ns=0.05, int8_ns=0.05),
    "Unsqueeze": Cost(float_ns=0.05, int8_ns=0.05),
    "Transpose": Cost(float_ns=0.57, int8_ns=0.57),
    "Slice": Cost(float_ns=0.13, int8_ns=0.09),
    "Split": Cost(float_ns=0.17, int8_ns=0.11),
    "Gather": Cost(float_ns=0.11, int8_ns=0.08),
    "DepthToSpace": Cost(float_ns=3.1, int8_ns=3.8),
    "Resize": Cost(float_ns=0.27, int8_ns=2.4),
}
# i32x4.dot_i16x8_s widens first; the build in npm does not use relaxed SIMD, whose products may saturate
WASM = replace(
    X86_VNNI,
    name="wasm",
    summary="browsers and node",
    machine="wasm32",
    activations_matmul=False,
    dynamic=DYNAMIC,
    elementwise=IN_WASM,
    movers=MOVED_IN_WASM,
    # int8 does 22 multiply-adds in the time of 8 in float, and then pays for the output: a 1x1 Conv of 16 channels takes twice
    # as long as in float, one of 64 is 1.3 times as fast, one of 256 twice as fast. A Gemm packs its weight at every run: with
    # one row, 1280 -> 1280 and transB it takes eight times as long.
    layer=LayerCost(float_ns=0.12, int8_ns=0.045, output_ns=3.0, weight_ns=0.15, transposed_ns=0.75),
    # time of int8 over float: 3x3 7 at 56x56 and 2 at 14x14; 5x5 2 at 14x14 and 0.7 at 7x7; 7x7 1.2
    depthwise=False,
    # as fast as static, and a fifth faster where a weight lies transposed: it is turned ahead of time
    range_ns=0.40,
    quantize_ns=0.67,
    dequantize_ns=0.27,
    crossing_ns=630.0,
    costs_from="onnxruntime-web in node",
)

TARGETS: Mapping[str, Target] = {each.name: each for each in (PORTABLE, X86_VNNI, X86_AVX2, ARM64, WASM)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing that a target says, and the measurement or source behind it."""

    what: str
    value: str
    why: str


def facts(target: Target) -> tuple[Fact, ...]:
    """What `packlight targets NAME` prints."""
    paired = (
        "on x86 before VNNI two u8·s8 products are added in int16: without the rule EfficientNet-Lite0 fell from 24 to 8 dB "
        "there, with it every bit is the same (benchmarks/saturation.py)"
    )
    whole = "its kernels sum u8·s8 products in int32; -128 wraps in int16 on Cortex-A53 and A72, so no code is -128"
    dear = [op for op, cost in {**target.elementwise, **target.movers}.items() if cost.int8_ns > cost.float_ns]
    lstm = (
        "; LSTM of 32 thousand weights and more, as many as the outputs bear: DynamicQuantizeLSTM"
        if "LSTM" in target.dynamic
        else ""
    )
    return (
        Fact(
            what="types", value="uint8 activations, int8 weights per channel",
            why="s8·s8, quantize_static's default, left 5 of 10 Conv of a ResNet18 in float on x86 and was slower than FP32; "
            "u8·u8 is exact everywhere and half as fast with VNNI",
        ),
        Fact(
            what="weights", value="-127..127, under the pair rule" if target.pairs_in_int16 else "-127..127",
            why=paired if target.pairs_in_int16 else whole,
        ),
        Fact(
            what="layers", value=", ".join(target.layers),
            why="QLinearConv, QGemm, QLinearMatMul and MatMulIntegerToFloat are on every CPU that ONNX Runtime runs on"
            + ("" if target.layer is None else "; by cost as well: one that writes much and multiplies little is slower in int8"),
        ),
        Fact(
            what="dynamic", value=", ".join(target.dynamic) or "none",
            why="by a constant matrix, where the search finds that a range for each input pays: DynamicQuantizeMatMul and "
            "MatMulIntegerToFloat" + lstm,
        ),
        Fact(
            what="products", value="MatMul of two activations" if target.activations_matmul else "none",
            why="u8·s8, the second factor's codes signed: 1.8 times as fast as float for attention of 197 tokens; float where the "
            "search finds that this buys accuracy worth the time"
            if target.activations_matmul
            else "two activations cannot keep to the pair rule, or nobody has timed it; u8·u8 hardly pays",
        ),
        Fact(
            what="by cost", value=", ".join([*target.elementwise, *target.movers]),
            why=f"int8 where it saves more than Q/DQ cost; slower in int8 by itself: {', '.join(dear)} (benchmarks/costs.py, "
            f"{target.costs_from})",
        ),
        Fact(
            what="float", value=f"all others, {'GRU' if 'LSTM' in target.dynamic else 'LSTM and GRU'} among them",
            why="ONNX Runtime has no static integer kernel for them on a CPU",
        ),
        *(Fact(what=f"off at load: {name}", value=LISTED, why=why) for name, why in UNWANTED.items()),
    )  # fmt: skip


def is_here(target: Target) -> bool:
    """Whether this machine is the target."""
    return target.name == of(read()).name


def of(cpu: Cpu) -> Target:
    """The target that a CPU is: by its machine, and on x86 by what its kernels compute."""
    if cpu.machine == "aarch64":
        return ARM64
    if cpu.machine != "x86_64":
        return PORTABLE
    return X86_AVX2 if cpu.pairs_in_int16 else X86_VNNI if any("vnni" in flag for flag in cpu.flags) else PORTABLE


# Why an op_type has no integer kernel, or none that a static plan may use
NO_KERNEL: Mapping[str, str] = ops.NO_KERNEL


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
