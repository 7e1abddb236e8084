"""Where a positive scale per channel can move through a graph: out of what makes a tensor, into the weights that read it.

    x'_j = x_j / s_j,   W'_ij = W_ij s_j        hence        W' x' = W x

A layer begins a slot for each of its output channels, for it can divide its weight and its bias by any scale; a
LayerNormalization does too. Slots end well in a layer that takes their scales into its weight. In between:

1. Relu, LeakyRelu, PRelu, poolings and other f with f(x / s) = f(x) / s hand slots on, each in its place;
2. Reshape, Transpose, Concat and their like send them where the values go; a sum of two tensors makes two slots one;
3. a product by a tensor without slots hands on those of the other, and P·V those of V's columns;
4. at whatever else they are FIXED, back to where they began. HardSwish, GELU and Clip(x, 0, 6) are no f of the first kind; the
   residual past a LayerNormalization, which reads what its layers read, is not one either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.batches import Array
from exporter.correct.slots import FIXED, Joined, Slots, Taken, chains
from exporter.graph import Shape

NOTHING: Array = np.zeros((), np.int32)


def find(model: ir.Model, shapes: Mapping[str, Shape]) -> Slots:
    """The slots of every tensor of the prepared graph.

    Args:
        model: the prepared graph.
        shapes: of its tensors on one batch (`graph.shapes`); what is found holds for others, as far as channels stay channels.
    """
    walk = _Walk(shapes)
    for node in model.graph:
        walk.through(node)
    for value in model.graph.outputs:
        walk.end(value, "the model returns it")
    return walk.result()


class _Walk:
    """One pass over the nodes in order. What was handed on may still become FIXED, at a node behind."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes
        self.joined = Joined(FIXED + 1)
        self.slots: dict[ir.Value, Array] = {}
        self.taken: list[Taken] = []
        self.read: dict[str, Array] = {}  # by layers
        self.why = {FIXED: "it has none"}  # of the least slot of those that are one

    def through(self, node: ir.Node) -> None:
        if node.op_type not in BEGIN and not any(map(self.varies, node.inputs)):
            return
        handle = HANDLERS.get(node.op_type) if not node.domain else None
        whole = all(value.name in self.shapes and 0 not in self.shape(value) for value in node.outputs if value.name)
        if handle is None or not whole or not handle(self, node):
            for read in node.inputs:
                self.end(read, f"{node.op_type} {node.name} reads it")
        for made in node.outputs:
            if any(usage.node.graph is not node.graph for usage in made.uses()):
                self.end(made, "a branch or loop body reads it")

    def end(self, value: ir.Value | None, why: str) -> None:
        for slot in np.unique(self.of(value)):
            self.why.setdefault(self.joined.root(int(slot)), why)

    def join(self, one: int, two: int, by: str) -> None:
        """Let two slots be one; where one is FIXED, or ended, so does the other."""
        if FIXED in (one, two):
            self.why.setdefault(self.joined.root(max(one, two)), f"{by} adds what has no scale")
            return
        reasons = [self.why[root] for root in map(self.joined.root, (one, two)) if root in self.why]
        self.joined.join(one, two)
        if reasons:
            self.why[self.joined.root(one)] = reasons[0]

    def result(self) -> Slots:
        roots = self.joined.roots()
        kept = np.where(np.isin(roots, [*self.why]), FIXED, roots)
        _, numbers = np.unique(kept, return_inverse=True)  # FIXED stays 0: it is the smallest
        number = numbers.astype(np.int32)
        count = int(number.max()) + 1
        of = {value.name or "": number[slots] for value, slots in self.slots.items() if number[slots].any()}
        taken = tuple(
            Taken(constant=each.constant, times=number[each.times], over=number[each.over], layer=each.layer)
            for each in self.taken
            if number[each.times].any() or number[each.over].any()
        )
        ended = {
            name: self.why[int(roots[slots.max()])]
            for name, slots in self.read.items()
            if name not in of and slots.any()
        }
        return Slots(of=of, count=count, taken=taken, chain=chains(of.values(), count), ended=ended)

    def of(self, value: ir.Value | None) -> Array:
        found = self.slots.get(value) if value is not None else None
        return NOTHING.reshape((1,) * len(self.shape(value))) if found is None else found

    def shape(self, value: ir.Value | None) -> Shape:
        return self.shapes.get(value.name or "", ()) if value is not None else ()

    def varies(self, value: ir.Value | None) -> bool:
        return value in self.slots and any(
            self.joined.root(int(slot)) not in self.why for slot in np.unique(self.of(value))
        )

    def along(self, value: ir.Value | None, axis: int, count: int) -> Array | None:
        """Slots along one axis, int32 [count]; None where they differ along another."""
        slots = self.of(value)
        if slots.ndim == 0 or slots.size != slots.shape[axis] or slots.size not in (1, count):
            return None
        return np.broadcast_to(slots.reshape(-1), count)

    def constant(self, node: ir.Node, index: int) -> Array | None:
        """A float32 constant that nobody else reads."""
        value = node.inputs[index] if index < len(node.inputs) else None
        array = graph.constant(value)
        alone = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
        return array if alone and array is not None and array.dtype == np.float32 else None

    def take(self, node: ir.Node, index: int, times: Array = NOTHING, over: Array = NOTHING, layer: str = "") -> None:
        value = node.inputs[index]
        assert value is not None
        self.taken.append(Taken(constant=value.name or "", times=times, over=over, layer=layer))

    def lay(self, value: ir.Value, slots: Array, axis: int) -> None:
        shape = [1] * len(self.shape(value))
        shape[axis] = -1
        self.slots[value] = slots.reshape(shape)


# What each node does with slots: it hands them on and returns True, or returns False, and they end.


def _layer(walk: _Walk, node: ir.Node) -> bool:
    """Conv, Gemm, MatMul with a constant weight."""
    x, weight = node.inputs[0], walk.constant(node, 1)
    if weight is None or x is None:
        return node.op_type == "MatMul" and _product(walk, node)
    conv = node.op_type == "Conv"
    rows_first = conv or node.attributes.get_int("transB", 0) == 1
    if (node.op_type == "MatMul" and weight.ndim != 2) or node.attributes.get_int("transA", 0) == 1:
        return False
    groups = node.attributes.get_int("group", 1) if conv else 1
    outputs, inputs = weight.shape[:2] if rows_first else weight.shape[::-1]
    axis = 1 if conv else -1
    slots = walk.along(x, axis, inputs * groups)
    if slots is None:
        return False
    has_bias, bias = len(node.inputs) > 2 and node.inputs[2] is not None, walk.constant(node, 2)
    begins = not has_bias or (bias is not None and bias.size == outputs)
    made = walk.joined.more(outputs) if begins else np.full(outputs, FIXED, np.int32)
    walk.read[x.name or ""] = slots
    times, over = np.repeat(slots.reshape(groups, inputs), outputs // groups, axis=0), made[:, None]
    if not rows_first:
        times, over = times.T, over.T
    kernel = (1,) * (weight.ndim - 2)
    walk.take(node, 1, times.reshape(*times.shape, *kernel), over.reshape(*over.shape, *kernel), node.name or "")
    if bias is not None and begins:
        walk.take(node, 2, over=made.reshape(bias.shape))
    walk.lay(node.outputs[0], made, axis)
    return True


def _product(walk: _Walk, node: ir.Node) -> bool:
    """P·V of two activations: no sum mixes the columns of V."""
    slots, rank = walk.of(node.inputs[1]), len(walk.shape(node.outputs[0]))
    if walk.varies(node.inputs[0]) or slots.ndim != rank or rank < 2 or slots.shape[-2] != 1:
        return False
    walk.slots[node.outputs[0]] = slots
    return True


def _normalization(walk: _Walk, node: ir.Node) -> bool:
    """LayerNormalization over the last axis: what it reads must not be scaled, what it makes may be."""
    x, scale, bias = node.inputs[0], walk.constant(node, 1), walk.constant(node, 2)
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    last = node.attributes.get_int("axis", -1) in (-1, len(walk.shape(x)) - 1)
    if scale is None or scale.ndim != 1 or not last or walk.varies(x):
        return False
    if has_bias and (bias is None or bias.shape != scale.shape):
        return False
    made = walk.joined.more(scale.size)
    for index in (1, 2)[: 1 + has_bias]:
        walk.take(node, index, over=made)
    walk.lay(node.outputs[0], made, -1)
    return True


def _homogeneous(walk: _Walk, node: ir.Node) -> bool:
    """f(x / s) = f(x) / s, element by element or along axes on which slots do not differ."""
    if any(map(walk.varies, node.inputs[1:])):
        return False
    walk.slots[node.outputs[0]] = walk.of(node.inputs[0])
    return True


def _pool(walk: _Walk, node: ir.Node) -> bool:
    slots = walk.of(node.inputs[0])
    return slots.size == slots.shape[1] and _homogeneous(walk, node)


def _resize(walk: _Walk, node: ir.Node) -> bool:
    """Where positions are made or left out, slots must not differ."""
    x, y = node.inputs[0], node.outputs[0]
    kept = all(s == 1 or a == b for s, a, b in zip(walk.of(x).shape, walk.shape(x), walk.shape(y), strict=True))
    return kept and node.attributes.get_float("extrapolation_value", 0.0) == 0 and _homogeneous(walk, node)


def _pad(walk: _Walk, node: ir.Node) -> bool:
    """With zeros, or with what is there."""
    given = node.inputs[2] if len(node.inputs) > 2 else None
    value = graph.constant(given)
    zero = given is None or (value is not None and not value.any())
    return (zero or node.attributes.get_string("mode", "constant") != "constant") and _resize(walk, node)


def _reshape(walk: _Walk, node: ir.Node) -> bool:
    x, y = node.inputs[0], node.outputs[0]
    walk.slots[y] = _narrow(np.broadcast_to(walk.of(x), walk.shape(x)).reshape(walk.shape(y)))
    return True


def _transpose(walk: _Walk, node: ir.Node) -> bool:
    slots = walk.of(node.inputs[0])
    walk.slots[node.outputs[0]] = slots.transpose(node.attributes.get_ints("perm", range(slots.ndim)[::-1]))
    return True


def _concat(walk: _Walk, node: ir.Node) -> bool:
    y = node.outputs[0]
    axis = node.attributes.get_int("axis", 0) % len(walk.shape(y))
    slots = [walk.of(value) for value in node.inputs]
    others = np.broadcast_shapes(*((*each.shape[:axis], 1, *each.shape[axis + 1 :]) for each in slots))
    sizes = [walk.shape(value)[axis] for value in node.inputs]
    parts = [
        np.broadcast_to(each, (*others[:axis], size, *others[axis + 1 :]))
        for each, size in zip(slots, sizes, strict=True)
    ]
    walk.slots[y] = _narrow(np.concatenate(parts, axis=axis))
    return True


def _split(walk: _Walk, node: ir.Node) -> bool:
    slots, axis = walk.of(node.inputs[0]), node.attributes.get_int("axis", 0)
    ends = np.cumsum([walk.shape(value)[axis] for value in node.outputs])[:-1]
    same = slots.shape[axis] == 1
    parts = [slots] * len(node.outputs) if same else np.split(slots, ends, axis=axis)
    walk.slots |= dict(zip(node.outputs, parts, strict=True))
    return True


def _reduction(walk: _Walk, node: ir.Node) -> bool:
    slots, axes = walk.of(node.inputs[0]), graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or not axes.size or any(slots.shape[axis] != 1 for axis in axes.tolist()):
        return False
    keeps = slots.ndim == len(walk.shape(node.outputs[0]))
    walk.slots[node.outputs[0]] = slots if keeps else np.squeeze(slots, axis=tuple(axes.tolist()))
    return True


def _sum(walk: _Walk, node: ir.Node) -> bool:
    """Add, Sub: a constant takes the scales of the other; of two tensors slots become one."""
    for index, value in enumerate(node.inputs):
        if graph.constant(value) is not None:
            return _shift(walk, node, index)
    one, two = map(walk.of, node.inputs)
    if walk.shape(node.inputs[0]) != walk.shape(node.inputs[1]):
        return False
    both = np.broadcast_arrays(one, two)
    for a, b in np.unique(np.stack([each.reshape(-1) for each in both]), axis=1).T.tolist():
        walk.join(a, b, f"{node.op_type} {node.name}")
    walk.slots[node.outputs[0]] = _narrow(both[0])
    return True


def _shift(walk: _Walk, node: ir.Node, index: int) -> bool:
    array, slots = walk.constant(node, index), walk.of(node.inputs[1 - index])
    if array is None or slots.ndim != len(walk.shape(node.outputs[0])):
        return False
    if math.prod(np.broadcast_shapes(array.shape, slots.shape)) != array.size:  # the constant would have to grow
        return False
    walk.take(node, index, over=slots.reshape(slots.shape[slots.ndim - array.ndim :]))
    walk.slots[node.outputs[0]] = slots
    return True


def _factor(walk: _Walk, node: ir.Node) -> bool:
    """Mul; Div, of what is divided."""
    varying = [index for index, value in enumerate(node.inputs) if walk.varies(value)]
    if len(varying) != 1 or (node.op_type == "Div" and varying != [0]):
        return False
    slots = walk.of(node.inputs[varying[0]])
    if slots.ndim != len(walk.shape(node.outputs[0])):
        return False
    walk.slots[node.outputs[0]] = slots
    return True


def _shape(walk: _Walk, node: ir.Node) -> bool:
    """Shape, Size: they read no values."""
    return True


def _narrow(slots: Array) -> Array:
    """The same slots, with size 1 on every axis along which they do not differ."""
    for axis in range(slots.ndim):
        first = slots.take([0], axis=axis)
        slots = first if (slots == first).all() else slots
    return slots


BEGIN = frozenset({"Conv", "Gemm", "MatMul", "LayerNormalization"})
HANDLERS: Mapping[str, Callable[[_Walk, ir.Node], bool]] = {
    **dict.fromkeys(("Conv", "Gemm", "MatMul"), _layer),
    "LayerNormalization": _normalization,
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout"), _homogeneous),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pool),
    "Resize": _resize,
    "Pad": _pad,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"), _reduction),
    **dict.fromkeys(("Add", "Sub"), _sum),
    **dict.fromkeys(("Mul", "Div"), _factor),
    **dict.fromkeys(("Shape", "Size"), _shape),
}
