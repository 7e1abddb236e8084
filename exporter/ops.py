"""Facts of operators, one row each: the table that stages ask instead of keeping lists of their own.

A row's default claims nothing. What an operator costs is its Target's; what is to be done about it is a stage's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Values = Literal["all", "some", "between", "new"]
Bits = Literal["anywhere", "x86", "here"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """What is known of an operator of ONNX, or of a kernel of ONNX Runtime that a file can hold.

    layer: it holds MACs. recurrent: it has a state.
    weights: the inputs that are weights where they are constant.
    kernel: ONNX Runtime's CPU provider has an integer kernel for it between Q/DQ. no_kernel: why it has none.
    integer: it reads or makes quantized values itself. plain: the layer that it is in integers.
    values: what the output holds of its first input's values: all of them and no others; some of them; values between
        them; others.
    in_place: each element of the output lies where its input's does.
    channels: of [N, C, positions...] it makes the same.
    squashes: by a function that keeps order and loses how far values are apart.
    selects: which numbers are larger decides what it makes: a small error may change its order, or its size.
    saturates: the QuantizeLinear behind a layer does its work.
    not_negative: its output is not.
    reads_shape: it reads the shape of its input and no value.
    bits: where it gives the same bits: on every CPU of a family ("anywhere": one rounding an element by IEEE 754, or
        none), on every x86, or on this CPU alone, as sums in an order of its own and functions by polynomials do.
    """

    layer: bool = False
    recurrent: bool = False
    weights: tuple[int, ...] = ()
    kernel: bool = False
    no_kernel: str = ""
    integer: bool = False
    plain: str = ""
    values: Values = "new"
    in_place: bool = False
    channels: bool = False
    squashes: bool = False
    selects: bool = False
    saturates: bool = False
    not_negative: bool = False
    reads_shape: bool = False
    bits: Bits = "here"


def _recurrent(name: str) -> Operator:
    why = f"ONNX Runtime has no static int8 kernel for {name}; its state stays float"
    return Operator(layer=True, recurrent=True, weights=(1, 2), no_kernel=why)


_CONV_TRANSPOSE = "ONNX Runtime has no integer kernel for ConvTranspose, and this one is no plain sub-pixel convolution"
_MOVER = Operator(kernel=True, values="all", bits="anywhere")
_SOME = Operator(kernel=True, values="some", bits="anywhere")
_FLOAT = Operator(bits="x86")

OPERATORS: Mapping[str, Operator] = {
    # layers
    "Conv": Operator(layer=True, weights=(1,), kernel=True),
    "ConvTranspose": Operator(layer=True, weights=(1,), no_kernel=_CONV_TRANSPOSE),
    "Gemm": Operator(layer=True, weights=(1,), kernel=True),
    "MatMul": Operator(layer=True, weights=(0, 1), kernel=True),
    **{name: _recurrent(name) for name in ("LSTM", "GRU", "RNN")},
    # layers in integers
    "QLinearConv": Operator(layer=True, integer=True, plain="Conv", weights=(3,), bits="anywhere"),
    "ConvInteger": Operator(layer=True, integer=True, plain="Conv", weights=(1,), bits="anywhere"),
    "QLinearMatMul": Operator(layer=True, integer=True, plain="MatMul", weights=(3,), bits="anywhere"),
    "MatMulInteger": Operator(layer=True, integer=True, plain="MatMul", weights=(1,), bits="anywhere"),
    "QGemm": Operator(layer=True, integer=True, plain="Gemm", weights=(3,), bits="anywhere"),
    # these add a float bias behind their integer product, in one instruction or two; an LSTM has exponentials, too
    "MatMulIntegerToFloat": Operator(layer=True, integer=True, plain="MatMul", weights=(1,), bits="x86"),
    "DynamicQuantizeMatMul": Operator(layer=True, integer=True, plain="MatMul", weights=(1,)),
    "DynamicQuantizeLSTM": Operator(layer=True, integer=True, recurrent=True, weights=(1, 2)),
    "QAttention": Operator(layer=True, integer=True, weights=(1,)),
    "MatMulNBits": Operator(layer=True, integer=True, weights=(1,)),
    # other quantized values
    "QuantizeLinear": Operator(in_place=True, bits="anywhere"),
    "DequantizeLinear": Operator(in_place=True, bits="anywhere"),
    "DynamicQuantizeLinear": Operator(integer=True, bits="x86"),
    "QEmbedLayerNormalization": Operator(integer=True),
    "GatherBlockQuantized": Operator(integer=True, weights=(0,)),
    # data movement
    "Reshape": _MOVER,
    "Flatten": _MOVER,
    "Squeeze": _MOVER,
    "Unsqueeze": _MOVER,
    "Transpose": _MOVER,
    "Identity": Operator(values="all", in_place=True, bits="anywhere"),
    "Slice": _SOME,
    "Split": _SOME,
    "Gather": Operator(weights=(0,), kernel=True, values="some", bits="anywhere"),
    "DepthToSpace": _SOME,
    "SpaceToDepth": Operator(values="some", bits="anywhere"),
    "Expand": Operator(values="some", bits="anywhere"),
    "Tile": Operator(values="some", bits="x86"),
    "MaxPool": Operator(kernel=True, values="some", channels=True, bits="anywhere"),
    "Resize": Operator(kernel=True, values="between"),
    "Concat": Operator(kernel=True, channels=True, bits="anywhere"),
    "Pad": Operator(bits="anywhere"),
    "Cast": Operator(in_place=True, bits="anywhere"),
    "Shape": Operator(reads_shape=True, bits="anywhere"),
    "Size": Operator(reads_shape=True),
    "Constant": _FLOAT,
    "ConstantOfShape": _FLOAT,
    "Dropout": _FLOAT,
    "Where": _FLOAT,
    "ReorderInput": _FLOAT,
    "ReorderOutput": _FLOAT,
    # element by element
    "Add": Operator(kernel=True, channels=True, bits="x86"),
    "Mul": Operator(kernel=True, channels=True, bits="anywhere"),
    "Sub": _FLOAT,
    "Div": _FLOAT,
    "Max": _FLOAT,
    "Min": _FLOAT,
    "Neg": _FLOAT,
    "Abs": Operator(not_negative=True, bits="x86"),
    "Sqrt": Operator(not_negative=True, bits="x86"),
    "Exp": Operator(not_negative=True),
    "Relu": Operator(kernel=True, in_place=True, channels=True, saturates=True, not_negative=True, bits="x86"),
    "Clip": Operator(kernel=True, in_place=True, channels=True, saturates=True, bits="anywhere"),
    "LeakyRelu": Operator(kernel=True, channels=True, bits="x86"),
    "Sigmoid": Operator(kernel=True, in_place=True, channels=True, squashes=True, not_negative=True),
    "HardSigmoid": Operator(kernel=True, channels=True, not_negative=True),
    "HardSwish": Operator(channels=True),
    "Gelu": Operator(channels=True),
    "Tanh": Operator(in_place=True, channels=True),
    # along an axis
    "Softmax": Operator(kernel=True, in_place=True, squashes=True, not_negative=True),
    "LogSoftmax": Operator(in_place=True, squashes=True),
    "GlobalAveragePool": Operator(kernel=True, values="between"),
    "AveragePool": Operator(kernel=True, channels=True),
    "GlobalMaxPool": _FLOAT,
    "ReduceMax": _FLOAT,
    "ReduceMin": _FLOAT,
    "BatchNormalization": Operator(weights=(1,), channels=True),
    "LayerNormalization": Operator(weights=(1,)),
    # what it makes depends on order
    "TopK": Operator(selects=True),
    "NonMaxSuppression": Operator(selects=True),
    "NonZero": Operator(selects=True),
    "Compress": Operator(selects=True),
    "Unique": Operator(selects=True),
}

UNKNOWN = Operator()


def of(op_type: str) -> Operator:
    """The operator's row; one that claims nothing where it has none."""
    return OPERATORS.get(op_type, UNKNOWN)


RECURRENT = tuple(name for name, row in OPERATORS.items() if row.recurrent and not row.integer)
LAYERS = tuple(name for name, row in OPERATORS.items() if row.layer and not row.integer)
INTEGER = frozenset(name for name, row in OPERATORS.items() if row.integer)
# their output holds the values of their input, all of them and no others
MOVES = frozenset(name for name, row in OPERATORS.items() if row.values == "all")
# their output holds values of their input, and no others
CARRIES = MOVES | {name for name, row in OPERATORS.items() if row.values == "some"}
SQUASHING = tuple(name for name, row in OPERATORS.items() if row.squashes)
SATURATES = tuple(name for name, row in OPERATORS.items() if row.saturates)
NO_KERNEL: Mapping[str, str] = {name: row.no_kernel for name, row in OPERATORS.items() if row.no_kernel}
