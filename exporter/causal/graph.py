"""Decoder + where its weights lie -> ONNX graph in onnxruntime's fused operators, for the prompt and for each token after it.

    input_ids int64 [batch, sequence]                        tokens that are new
    attention_mask int64 [batch, total]                      1 for each token of a row, from the left; total = past + new
    past_key_values.I.key, .value float32 [batch, kv_heads, past, head_size]
 -> logits float32 [batch, 1, vocabulary]                    of each row's last token; [batch, sequence, vocabulary] with `every`
    present.I.key, .value                                    the same as past, with the new tokens; may be the same memory

    x -> SimplifiedLayerNormalization -> q, k, v -> GroupQueryAttention (rotary inside) -> o -> SkipSimplifiedLayerNormalization ...

Rows of a batch stand from the left and are filled up on the right. Tables of cos and sin are nodes of constants, which
onnxruntime computes once as it opens the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from exporter.causal.architecture import FULL, Decoder
from exporter.causal.scheme import EMBEDDING, HEAD
from exporter.causal.weights import Written

MS = "com.microsoft"
LEVEL = 4  # accuracy_level: activations in int8 by blocks, sums in int32; without it 8-bit weights are 50 times slower
FLOAT, INT64, INT32 = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32
Attributes = Mapping[str, Any]
NONE: Attributes = {}


def build(
    decoder: Decoder, written: Written, *, context: int, every: bool = False, also: Sequence[str] = ()
) -> onnx.ModelProto:
    """The graph.

    Args:
        written: where the weights lie; the graph must be saved into the same folder.
        context: tokens that there are rotary positions for.
        every: logits of every token, and not of the last alone.
        also: tensors inside that are the outputs instead, as `input_of` names them.
    """
    nodes = _Nodes(decoder, written)
    x = nodes.embedding()
    length, total = nodes.lengths()
    tables = [nodes.rope(number, context) for number in range(len(decoder.ropes))]
    skip = None
    for layer in range(decoder.layers):
        x, normed = nodes.normed(f"layers.{layer}.first", x, skip)
        mixed = nodes.attention(layer, normed, (length, total, *tables[decoder.rope_of[layer]]))
        if decoder.family.after:
            mixed = nodes.norm(f"layers.{layer}.after_attention", mixed)
        x, normed = nodes.normed(f"layers.{layer}.second", x, mixed)
        skip = nodes.mlp(layer, normed)
        if decoder.family.after:
            skip = nodes.norm(f"layers.{layer}.after_mlp", skip)
    if not every:  # the sum of two rows, and not of all
        index = nodes.last_index(length)
        x, skip = nodes.at(x, index), nodes.at(skip or x, index)
    _, normed = nodes.normed("norm", x, skip)
    nodes.logits(normed)
    return _model(decoder, nodes, every, also)


class _Nodes:
    """Nodes and initializers as they come; each method adds some and returns the name of what they give."""

    def __init__(self, decoder: Decoder, written: Written) -> None:
        self.decoder, self.written = decoder, written
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def add(self, op: str, inputs: Sequence[str], name: str, domain: str = "", attributes: Attributes = NONE) -> str:
        """A node with one output, which has the node's name."""
        return self.several(op, inputs, [name], domain, attributes)

    def several(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", attributes: Attributes = NONE
    ) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, outputs[0], domain=domain, **attributes))
        return outputs[0]

    def constant(self, name: str, value: Any, dtype: Any) -> str:
        self.initializers[name] = numpy_helper.from_array(np.array(value, dtype), name)
        return name

    def stored(self, name: str, shape: tuple[int, ...] | None = None, called: str = "") -> str:
        """A weight; under another name and in another shape it is still the same bytes of the file."""
        self.initializers[called or name] = self.written.tensors[name].tensor(called or name, shape)
        return called or name

    def maybe(self, name: str, shape: tuple[int, ...] | None = None) -> str:
        return self.stored(name, shape) if name in self.written.tensors else ""

    def embedding(self) -> str:
        decoder, blocks = self.decoder, self.written.formats[EMBEDDING]
        if blocks is None:
            x = self.add("Gather", [self.stored(f"{EMBEDDING}.weight"), "input_ids"], "embedded")
        else:
            rows, count = decoder.vocabulary, decoder.hidden // blocks.size
            weight = self.stored(f"{EMBEDDING}.weight", (rows, decoder.hidden * blocks.bits // 8))
            inputs = [weight, "input_ids", self.stored(f"{EMBEDDING}.scale", (rows, count))]
            if f"{EMBEDDING}.zero" in self.written.tensors:
                inputs.append(self.stored(f"{EMBEDDING}.zero"))
            settings = {"bits": blocks.bits, "block_size": blocks.size, "gather_axis": 0, "quantize_axis": 1}
            x = self.add("GatherBlockQuantized", inputs, "embedded", MS, settings)
        if decoder.embedding_scale == 1:
            return x
        return self.add("Mul", [x, self.constant("embedding.factor", decoder.embedding_scale, np.float32)], "scaled")

    def lengths(self) -> tuple[str, str]:
        """(tokens of each row less one, int32 [batch]; the longest row's tokens, int32)."""
        axis, one = self.constant("axis.1", [1], np.int64), self.constant("one", 1, np.int64)
        count = self.add("ReduceSum", ["attention_mask", axis], "tokens", attributes={"keepdims": 0})
        less = self.add("Sub", [count, one], "tokens.less")
        shape = self.add("Shape", ["attention_mask"], "mask.shape")
        total = self.add("Gather", [shape, one], "total")
        cast = {"to": INT32}
        return self.add("Cast", [less], "last", attributes=cast), self.add("Cast", [total], "all", attributes=cast)

    def rope(self, number: int, context: int) -> tuple[str, str]:
        """cos and sin, [context, rotated / 2]."""
        rope, name = self.decoder.ropes[number], f"rope.{number}"
        ends = [self.constant(f"rope.{each}", each, np.float32) for each in (0, context, 1)]
        axis, turns = (
            self.constant("axis.1", [1], np.int64),
            self.constant(f"{name}.frequencies", [rope.frequencies], np.float32),
        )
        places = self.add("Unsqueeze", [self.add("Range", ends, f"{name}.range"), axis], f"{name}.places")
        angles = self.add("Mul", [places, turns], f"{name}.angles")
        found = [self.add(op, [angles], f"{name}.{op.lower()}") for op in ("Cos", "Sin")]
        if rope.factor != 1:
            factor = self.constant(f"{name}.factor", rope.factor, np.float32)
            found = [self.add("Mul", [each, factor], f"{each}.times") for each in found]
        return found[0], found[1]

    def norm(self, name: str, x: str) -> str:
        settings = {"epsilon": self.decoder.epsilon, "axis": -1}
        return self.add("SimplifiedLayerNormalization", [x, self.stored(name)], f"{name}.out", attributes=settings)

    def normed(self, name: str, x: str, skip: str | None) -> tuple[str, str]:
        """(x + skip, its norm)."""
        if skip is None:
            return x, self.norm(name, x)
        outputs = [f"{name}.out", "", "", f"{name}.sum"]
        self.several(
            "SkipSimplifiedLayerNormalization", [x, skip, self.stored(name)], outputs, MS,
            {"epsilon": self.decoder.epsilon},
        )  # fmt: skip
        return outputs[3], outputs[0]

    def linear(self, name: str, x: str, rows: int, columns: int) -> str:
        blocks, bias = self.written.formats[name], self.maybe(f"{name}.bias")
        if blocks is None:
            product = self.add(
                "MatMul", [x, self.stored(f"{name}.weight")], f"{name}.product" if bias else f"{name}.out"
            )
            return self.add("Add", [product, bias], f"{name}.out") if bias else product
        inputs = [x, self.stored(f"{name}.weight"), self.stored(f"{name}.scale"), self.maybe(f"{name}.zero")]
        settings = {"bits": blocks.bits, "block_size": blocks.size, "N": rows, "K": columns, "accuracy_level": LEVEL}
        if bias:
            inputs += ["", bias]
        while not inputs[-1]:
            inputs.pop()
        return self.add("MatMulNBits", inputs, f"{name}.out", MS, settings)

    def attention(self, layer: int, x: str, positions: tuple[str, str, str, str]) -> str:
        decoder, name = self.decoder, f"layers.{layer}"
        wide, narrow = decoder.heads * decoder.head_size, decoder.kv_heads * decoder.head_size
        q = self.linear(f"{name}.q", x, wide, decoder.hidden)
        k = self.linear(f"{name}.k", x, narrow, decoder.hidden)
        v = self.linear(f"{name}.v", x, narrow, decoder.hidden)
        if decoder.family.head_norm:
            q, k = (
                self.each_head(f"{name}.q_norm", q, decoder.heads),
                self.each_head(f"{name}.k_norm", k, decoder.kv_heads),
            )
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        present = [f"present.{layer}.key", f"present.{layer}.value"]
        settings = {
            "num_heads": decoder.heads,
            "kv_num_heads": decoder.kv_heads,
            "scale": decoder.scale,
            "do_rotary": 1,
            "softcap": decoder.attention_cap,
        }
        if decoder.windows[layer] != FULL:
            settings["local_window_size"] = decoder.windows[layer]
        mixed = self.several(
            "GroupQueryAttention", [q, k, v, *past, *positions], [f"{name}.mixed", *present], MS, settings
        )
        return self.linear(f"{name}.o", mixed, decoder.hidden, wide)

    def each_head(self, name: str, x: str, heads: int) -> str:
        """The norm of each head's part of the last axis."""
        apart = self.constant(f"heads.{heads}", [0, 0, heads, self.decoder.head_size], np.int64)
        together = self.constant(f"together.{heads}", [0, 0, heads * self.decoder.head_size], np.int64)
        normed = self.norm(name, self.add("Reshape", [x, apart], f"{name}.apart"))
        return self.add("Reshape", [normed, together], f"{name}.together")

    def mlp(self, layer: int, x: str) -> str:
        decoder, name = self.decoder, f"layers.{layer}"
        gate = self.linear(f"{name}.gate", x, decoder.intermediate, decoder.hidden)
        up = self.linear(f"{name}.up", x, decoder.intermediate, decoder.hidden)
        op, settings = {
            "silu": ("QuickGelu", {"alpha": 1.0}),  # x sigmoid(alpha x)
            "gelu": ("Gelu", {}),
            "gelu_tanh": ("FastGelu", {}),
        }[decoder.activation]
        opened = self.add(op, [gate], f"{name}.opened", MS, settings)
        product = self.add("Mul", [opened, up], f"{name}.gated")
        return self.linear(f"{name}.down", product, decoder.hidden, decoder.intermediate)

    def last_index(self, length: str) -> str:
        """Where each row's last token stands among the new ones, int64 [batch, 1, hidden].

        With nothing before it that is token `length` of a row; later, when all rows have as many new tokens, the last one.
        """
        one = self.constant("one", 1, np.int64)
        count = self.add("Gather", [self.add("Shape", ["input_ids"], "ids.shape"), one], "sequence")
        most = self.add("Sub", [count, one], "sequence.less")
        wide = self.add("Cast", [length], "last.wide", attributes={"to": INT64})
        least = self.add("Min", [wide, most], "last.least")
        index = self.add("Unsqueeze", [least, self.constant("axes.12", [1, 2], np.int64)], "last.narrow")
        return self.add(
            "Expand", [index, self.constant("last.shape", [1, 1, self.decoder.hidden], np.int64)], "last.index"
        )

    def at(self, x: str, index: str) -> str:
        """[batch, sequence, hidden] -> [batch, 1, hidden]."""
        return self.add("GatherElements", [x, index], f"{x}.last", attributes={"axis": 1})

    def logits(self, x: str) -> None:
        decoder = self.decoder
        name = "logits" if not decoder.logit_cap else "logits.uncapped"
        if self.written.formats[HEAD] is not None:
            self.linear(HEAD, x, decoder.vocabulary, decoder.hidden)
            self.nodes[-1].output[0] = name
        else:
            flat = self.add("Reshape", [x, self.constant("flat", [-1, decoder.hidden], np.int64)], "head.flat")
            weight = EMBEDDING if decoder.tied else HEAD
            inputs = [flat, self.stored(f"{weight}.weight")] + ([bias] if (bias := self.maybe(f"{HEAD}.bias")) else [])
            made = self.add("Gemm", inputs, "head.product", attributes={"transB": 1})
            shape = self.add("Shape", [x], "head.shape")
            ends = self.constant("axis.0", [0], np.int64), self.constant("axis.2", [2], np.int64)
            first = self.add("Slice", [shape, *ends], "head.first")
            out = self.add(
                "Concat",
                [first, self.constant("head.size", [decoder.vocabulary], np.int64)],
                "head.out",
                "",
                {"axis": 0},
            )
            self.add("Reshape", [made, out], name)
        if decoder.logit_cap:
            cap = self.constant("logit.cap", decoder.logit_cap, np.float32)
            small = self.add("Tanh", [self.add("Div", [name, cap], "logits.small")], "logits.tanh")
            self.add("Mul", [small, cap], "logits")


def input_of(name: str) -> str:
    """The tensor that a linear layer reads, by the layer's name."""
    if name == HEAD:
        return "norm.out"
    layer, role = name.rsplit(".", 1)
    reads = {"o": "mixed", "gate": "second.out", "up": "second.out", "down": "gated"}
    return f"{layer}.{reads.get(role, 'first.out')}"


def _model(decoder: Decoder, nodes: _Nodes, every: bool, also: Sequence[str]) -> onnx.ModelProto:
    cache: list[str | int] = ["batch", decoder.kv_heads, "past", decoder.head_size]
    grown: list[str | int] = ["batch", decoder.kv_heads, "total", decoder.head_size]
    sides = ("key", "value")
    value = helper.make_tensor_value_info
    inputs = [
        value("input_ids", INT64, ["batch", "sequence"]),
        value("attention_mask", INT64, ["batch", "total"]),
        *(value(f"past_key_values.{n}.{side}", FLOAT, cache) for n in range(decoder.layers) for side in sides),
    ]
    logits = [
        value("logits", FLOAT, ["batch", "sequence" if every else 1, decoder.vocabulary]),
        *(value(f"present.{n}.{side}", FLOAT, grown) for n in range(decoder.layers) for side in sides),
    ]
    outputs = [value(name, FLOAT, None) for name in also] or logits
    graph = helper.make_graph(nodes.nodes, decoder.model_type, inputs, outputs, list(nodes.initializers.values()))
    versions = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=10, producer_name="packlight")
