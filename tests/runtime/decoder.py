"""A decoder of one layer in plain ONNX, small enough to know its logits: each token's are the mean of all embeddings before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

VOCABULARY, WIDE = 11, 16


def embedding() -> NDArray[np.float32]:
    return np.random.default_rng(4).standard_normal((VOCABULARY, WIDE)).astype(np.float32)


def expected(ids: list[int]) -> NDArray[np.float32]:
    """Logits behind the last token: queries and keys are zero, so that attention is the mean of all values."""
    table = embedding()
    return np.asarray(table[ids].mean(axis=0) @ table.T)


def save(path: Path) -> Path:
    """Save the decoder, with the inputs and outputs of every decoder of a bundle."""
    value, make = helper.make_tensor_value_info, helper.make_node
    ints = {"axis": [1], "one": 1, "axes": [1, 2], "shape": [1, 1, WIDE]}
    weights = [numpy_helper.from_array(np.array(each, np.int64), name) for name, each in ints.items()]
    weights += [
        numpy_helper.from_array(embedding(), "table"),
        numpy_helper.from_array(np.ascontiguousarray(embedding().T), "head"),
        numpy_helper.from_array(np.float32(0), "none"),
    ]
    nodes = [
        make("Gather", ["table", "input_ids"], ["x"]),
        make("Mul", ["x", "none"], ["zeros"]),
        make("ReduceSum", ["attention_mask", "axis"], ["count"], keepdims=0),
        make("Sub", ["count", "one"], ["less"]),
        make("Cast", ["less"], ["last"], to=TensorProto.INT32),
        make("Shape", ["attention_mask"], ["mask_shape"]),
        make("Gather", ["mask_shape", "one"], ["total"]),
        make("Cast", ["total"], ["all"], to=TensorProto.INT32),
        make(
            "GroupQueryAttention",
            ["zeros", "zeros", "x", "past_key_values.0.key", "past_key_values.0.value", "last", "all"],
            ["mixed", "present.0.key", "present.0.value"],
            domain="com.microsoft", num_heads=2, kv_num_heads=2,
        ),
        make("Shape", ["input_ids"], ["ids_shape"]),
        make("Gather", ["ids_shape", "one"], ["new"]),
        make("Sub", ["new", "one"], ["most"]),
        make("Min", ["less", "most"], ["at"]),
        make("Unsqueeze", ["at", "axes"], ["narrow"]),
        make("Expand", ["narrow", "shape"], ["index"]),
        make("GatherElements", ["mixed", "index"], ["row"], axis=1),
        make("MatMul", ["row", "head"], ["logits"]),
    ]  # fmt: skip
    sides = ("key", "value")
    graph = helper.make_graph(
        nodes,
        "mean",
        [
            value(name, TensorProto.INT64, ["batch", axis])
            for name, axis in (("input_ids", "s"), ("attention_mask", "t"))
        ]
        + [value(f"past_key_values.0.{side}", TensorProto.FLOAT, ["batch", 2, "past", WIDE // 2]) for side in sides],
        [value("logits", TensorProto.FLOAT, ["batch", 1, VOCABULARY])]
        + [value(f"present.0.{side}", TensorProto.FLOAT, ["batch", 2, "t", WIDE // 2]) for side in sides],
        weights,
    )
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=versions, ir_version=10), path)
    return path
