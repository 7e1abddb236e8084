"""Tensors that vary by little beside a step of their codes, between an input or output of the graph and what makes it more.

Codes cover 0, so 288 ± 0.1 is two of 256 steps; so are scores of 0..1 in the codes of boxes of 0..640. What reads such a tensor
behind an input, or makes it before an output, is float. Elsewhere the search weighs what its rounding costs the outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from exporter import graph, ops
from exporter.batches import Array, Batch

Ends = tuple[float, float]  # the smallest and the largest value of a tensor

STEPS = 255
NOTHING: Ends = (0.0, 0.0)
SAMPLES = 8  # rows, for the range of a single element to be one
FEW = 16  # steps: what varies within them comes out at 24 dB at most


def is_flat(of: Ends, codes_of: Ends) -> bool:
    """Whether the values of one tensor span fewer than FEW steps of the codes of another; a constant has a code of its own.

    255 (high - low) / (max(high', 0) - min(low', 0)) < FEW
    """
    span = max(codes_of[1], 0.0) - min(codes_of[0], 0.0)
    return 0 < STEPS * (of[1] - of[0]) < FEW * span


def nodes(model: ir.Model, ends: Mapping[str, Ends], int8: Collection[str], batches: Sequence[Batch]) -> dict[str, str]:
    """{int8 node: why it is float} of those whose codes would hold nothing of what varies.

    Args:
        model: the prepared graph.
        ends: of the tensors that int8 nodes touch, without those whose codes are given.
        int8: names of the int8 nodes.
        batches: run where an input is flat, for what is behind it varies as little about a constant of each channel or element.
    """
    found: dict[str, str] = {}
    given = _given(model, batches)
    inputs = [value for value in model.graph.inputs if is_flat(its := given.get(value.name or "", NOTHING), its)]
    behind = _behind(inputs)
    apart = _spreads(model, [name for value in behind[len(inputs) :] if (name := value.name or "") in ends], batches)
    for value in behind:
        name, maker = value.name or "", value.producer()
        its = ends.get(name, NOTHING)
        spread = its[1] - its[0] if value in inputs else apart.get(name, 0.0)
        if is_flat((0.0, spread), its):
            for node in (*graph.consumers(value), *([] if maker is None else [maker])):
                found.setdefault(node.name or "", _told(value, spread, value, its))
    seen = set[tuple[ir.Value, ir.Node | None]]()
    for value in model.graph.outputs:
        _before(value, (), ends, found, seen)
    return {name: why for name, why in found.items() if name in int8}


def _given(model: ir.Model, batches: Sequence[Batch]) -> dict[str, Ends]:
    """The ends of the inputs that are real numbers."""
    found: dict[str, Ends] = {}
    for value in model.graph.inputs:
        arrays = [array for batch in batches if (array := batch.get(value.name or "")) is not None and array.size]
        if value.dtype == ir.DataType.FLOAT and arrays:
            found[value.name or ""] = (
                float(min(each.min() for each in arrays)),
                float(max(each.max() for each in arrays)),
            )
    return found


def _behind(values: Sequence[ir.Value]) -> list[ir.Value]:
    """These tensors and all that are made of them."""
    found = dict.fromkeys(values)
    for value in (waiting := list(values)):
        made = [each for node in graph.consumers(value) for each in node.outputs if each not in found]
        found |= dict.fromkeys(made)
        waiting += made
    return list(found)


def _spreads(model: ir.Model, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, float]:
    """{tensor: how far it varies about a constant in each channel, or in each element}, over all of the batches.

    The widest range of a channel, along axis 1 or the last, or of an element over SAMPLES rows and more: the narrowest of these.
    """
    if not names:
        return {}
    run = graph.runner(graph.with_outputs(model, names))
    low: dict[tuple[str, tuple[int, ...]], Array] = {}
    high = dict(low)
    rows = dict.fromkeys(names, 0)
    for batch in batches:
        for name, array in ((name, array) for name, array in run(batch).items() if name in rows):
            if array.ndim < 2 or not array.size:
                continue
            rows[name] += len(array)
            every = range(array.ndim)
            for axes in {(0,), *(tuple(each for each in every if each != axis) for axis in (1, array.ndim - 1))}:
                least, most = array.min(axis=axes), array.max(axis=axes)
                before = low.get((name, axes), least), high.get((name, axes), most)
                if before[0].shape != least.shape:  # of another size in each batch
                    before = np.asarray(-np.inf), np.asarray(np.inf)
                low[name, axes], high[name, axes] = np.minimum(before[0], least), np.maximum(before[1], most)
    found: dict[str, float] = {}
    for (name, axes), least in low.items():
        if axes != (0,) or rows[name] >= SAMPLES or least.ndim == 1:
            found[name] = min(found.get(name, np.inf), float((high[name, axes] - least).max()))
    return found


def _before(
    value: ir.Value, behind: tuple[ir.Node, ...], ends: Mapping[str, Ends], found: dict[str, str],
    seen: set[tuple[ir.Value, ir.Node | None]],
) -> None:  # fmt: skip
    """The makers of a flat output, and of what they read as long as that is flat; Concat and moves between them and the output.

    behind: the nodes between this tensor and the output, which hand its values on; the nearest first. seen: (tensor, the nearest),
    each of which is looked at once: Concat of one tensor with itself, again and again, would have 2^n ways through it.
    """
    node, its, way = value.producer(), ends.get(value.name or ""), (value, behind[0] if behind else None)
    if node is None or way in seen:
        return
    seen.add(way)
    if its is not None:
        for each in behind:
            mixed = ends.get(each.outputs[0].name or "")
            if mixed is not None and is_flat(its, mixed):
                why = _told(value, its[1] - its[0], each.outputs[0], its)
                found |= {other.name or "": why for other in behind if (other.name or "") not in found}
                break
        if is_flat(its, its):
            if (node.name or "") in found and not behind:
                return
            found[node.name or ""] = _told(value, its[1] - its[0], value, its)
            for read in graph.activations(node):
                _before(read, (), ends, found, seen)
    if graph.op(node) in ops.MOVES or graph.op(node) == "Concat":
        for read in graph.activations(node):
            _before(read, (node, *behind), ends, found, seen)


def _told(value: ir.Value, spread: float, codes_of: ir.Value, its: Ends) -> str:
    where = "its codes" if codes_of is value else f"the codes of {codes_of.name}"
    middle = (
        f" about {sum(its) / 2:.6g}" if spread == its[1] - its[0] else " about a constant in each channel or element"
    )
    return f"{value.name} varies by {spread:.3g}{middle}: fewer than {FEW} steps of {where}"
