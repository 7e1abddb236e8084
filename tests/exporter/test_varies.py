from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper

from exporter import graph, varies
from exporter.batches import Array
from runtime.judged import Part


def two_heads(tail: list[object], shape: list[int]) -> ir.Model:
    """boxes [1, 4, 6] and scores [1, 2, 6], laid beside each other along axis 1, and what `tail` makes of that."""
    nodes = [helper.make_node("Concat", ["boxes", "scores"], ["c"], axis=1), *tail]
    told = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("boxes", [1, 4, 6]), ("scores", [1, 2, 6]))
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    between = [helper.make_tensor_value_info("c", TensorProto.FLOAT, [1, 6, 6])]
    model = helper.make_model(
        helper.make_graph(nodes, "g", told, [out], value_info=between), opset_imports=[helper.make_opsetid("", 17)]
    )
    return ir.serde.deserialize_model(model)


def parts(model: ir.Model, arrays: list[Array]) -> tuple[Part, ...]:
    found = varies.grounds(model, [{"y": each} for each in arrays], [{"x": np.zeros((1, 2))}] * len(arrays))["y"]
    return tuple(Part(axis=each.axis, runs=each.runs) for each in found.judged.parts)


def test_inputs_of_a_concat_are_parts_through_what_only_moves_them() -> None:
    rng = np.random.default_rng(0)
    model = two_heads([helper.make_node("Transpose", ["c"], ["y"], perm=[0, 2, 1])], [1, 6, 6])
    same = [rng.standard_normal((1, 6, 6)) for _ in range(4)]
    assert parts(model, same) == (Part(), Part(axis=2, runs=((0, 4),)), Part(axis=2, runs=((4, 6),)))


def test_channels_that_vary_far_less_than_the_others_are_a_part() -> None:
    rng = np.random.default_rng(0)
    model = two_heads([helper.make_node("Neg", ["c"], ["y"])], [1, 6, 6])  # no mover: the Concat is not seen
    scale = np.array([600, 600, 1, 600, 600, 1]).reshape(1, 6, 1)
    arrays = [scale * rng.standard_normal((1, 6, 6)) for _ in range(4)]
    assert parts(model, arrays) == (Part(), Part(axis=1, runs=((2, 3), (5, 6))), Part(axis=1, runs=((0, 2), (3, 5))))
    assert parts(model, [each / scale for each in arrays]) == (Part(),)


def test_channels_that_are_dead_beside_the_others_are_no_part() -> None:
    rng = np.random.default_rng(0)
    model = two_heads([helper.make_node("Neg", ["c"], ["y"])], [1, 6, 6])
    scale = np.array([1, 1, 1e-20, 1, 1e-9, 1]).reshape(1, 6, 1)
    assert parts(model, [scale * rng.standard_normal((1, 6, 6)) for _ in range(4)]) == (Part(),)


def test_rows_of_a_batch_and_axes_of_changing_size_share_one_constant() -> None:
    model = two_heads([helper.make_node("Neg", ["c"], ["y"])], [1, 6, 6])
    arrays = [np.full((size, 3), 7.0) * np.float32([1, 2, 3]) for size in (2, 5)]
    batches = [{"x": np.zeros((size, 9))} for size in (2, 5)]
    found = varies.grounds(model, [{"y": each} for each in arrays], batches)["y"]
    assert found.constant is not None and found.constant.tolist() == [[7.0, 14.0, 21.0]]


def test_nothing_is_known_of_what_varies_from_one_sample() -> None:
    model = two_heads([helper.make_node("Neg", ["c"], ["y"])], [1, 6, 6])
    assert varies.grounds(model, [{"y": np.ones((1, 4))}], [{"x": np.zeros((1, 2))}])["y"].constant is None


def test_what_selecting_nodes_read_is_compared_and_their_outputs_are_sets() -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["scores"], "neg"),
        helper.make_node("Abs", ["x"], ["boxes"], "abs"),
        helper.make_node("TopK", ["scores", "k"], ["v", "i"], "top"),
        helper.make_node("GatherElements", ["boxes", "i"], ["y"], "take", axis=1),
    ]
    told = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6])]
    out = [helper.make_tensor_value_info(n, t, [1, 2]) for n, t in (("y", TensorProto.FLOAT), ("i", TensorProto.INT64))]
    k = helper.make_tensor("k", TensorProto.INT64, [1], [2])
    between = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 6]) for n in ("scores", "boxes")]
    made = helper.make_graph(nodes, "g", told, out, [k], value_info=between)
    model = ir.serde.deserialize_model(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    )
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((1, 6)).astype(np.float32)} for _ in range(4)]
    outputs = [graph.runner(graph.unsquashed(model))(batch) for batch in batches]
    assert list(outputs[0]) == ["y", "i", "take reads 0", "top reads 0"]
    assert outputs[0]["top reads 0"].tolist() == (-batches[0]["x"]).tolist()
    found = varies.grounds(graph.unsquashed(model), outputs, batches)
    assert [found[name].judged.by for name in outputs[0]] == ["set", "set", "reals", "reals"]
    assert varies.of_read(model, batches).keys() == {"top reads 0", "take reads 0"}
