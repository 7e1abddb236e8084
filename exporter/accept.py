"""Plan + ranges -> the plan without the nodes that cannot be quantized, each float for a reason, and its int8 graph.

What is handed to ONNX Runtime's quantizer is made so that it has nothing to refuse (`prepare`, `quantize`). Where it does all the
same, where its graph does not follow the plan, or does not run, the node that is named turns float, and the rest is placed anew.
Where none is named the plan is halved: each half is tried with all else float, and so on down to the nodes at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporter import graph, optional, quantize
from exporter.batches import Batch
from exporter.calibrate import Ranges
from exporter.errors import QuantizeError
from exporter.place import Plan

MOST_TRIES = 40  # of the quantizer, for one graph
SMALLEST = float(np.finfo(np.float32).tiny)

# ({node: why it is not taken}, nodes that are float for now) -> the plan
Place = Callable[[Mapping[str, str], Sequence[str]], Plan]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Accepted:
    """plan: what the quantizer takes; `refused` says what it does not. int8: its graph, with Q/DQ around every gate."""

    plan: Plan
    int8: ir.Model


def accepted(model: ir.Model, plan: Plan, ranges: Ranges, batch: Batch, decide: Place) -> Accepted:
    """The plan, or the next to it that can be quantized.

    Args:
        model: the prepared graph.
        plan: what `decide` makes of no refusals.
        ranges: for each of `plan.tensors`; those of a plan with fewer int8 nodes are among them.
        batch: on which the int8 graph must run.
        decide: places the nodes.

    Raises:
        QuantizeError: the graph does not run even where all that was refused is float.
    """
    return _Trial(model, ranges, batch, decide).accepted(plan)


class _Trial:
    def __init__(self, model: ir.Model, ranges: Ranges, batch: Batch, decide: Place) -> None:
        self.model, self.ranges, self.batch, self.decide = model, ranges, batch, decide
        self.refused: dict[str, str] = {}
        self.tries = 0

    def accepted(self, plan: Plan) -> Accepted:
        """Try the plan; while it is refused, turn what is at fault float and try what is left."""
        self.refused |= _too_small(self.model, plan, self.ranges)
        plan = self.decide(self.refused, ()) if self.refused else plan
        while True:
            made = self.quantized(plan)
            if made.value is not None:
                return Accepted(plan=plan, int8=made.value)
            if not plan.int8:  # nothing is left
                raise (
                    made.error
                    if isinstance(made.error, QuantizeError)
                    else QuantizeError(
                        "the graph without an int8 node", found=made.why, expected="one that ONNX Runtime runs"
                    )
                ) from made.error
            self.refused |= self.at_fault(plan, made) or dict.fromkeys(plan.int8, made.why)
            plan = self.decide(self.refused, ())

    def quantized(self, plan: Plan) -> optional.Tried[ir.Model | None]:
        """The int8 graph, which runs; or why there is none."""

        def made() -> ir.Model:
            int8 = quantize.to_int8(self.model, plan, self.ranges, gates_on_codes=False)
            graph.runner(int8)(self.batch)
            return int8

        self.tries += 1
        return optional.attempt(made, None)

    def at_fault(self, plan: Plan, made: optional.Tried[ir.Model | None]) -> dict[str, str]:
        """{node: why}, of those that the error names, else of those that are found by halves."""
        named = {name: made.why for name in plan.int8 if name and name == getattr(made.error, "node", "")}
        return named or self.halved(plan.int8)

    def halved(self, names: Sequence[str]) -> dict[str, str]:
        """The nodes among these without which the quantizer takes the others, each by itself with all else float."""
        others = {each.name or "" for each in self.model.graph} - set(names)
        plan = self.decide(self.refused, sorted(others))
        if not plan.int8 or self.tries >= MOST_TRIES:
            return {}
        made = self.quantized(plan)
        if made.value is not None:
            return {}
        if len(names) == 1:
            return {names[0]: made.why}
        middle = len(names) // 2
        found = self.halved(names[:middle]) | self.halved(names[middle:])
        return found or dict.fromkeys(names[middle:], made.why)  # they are refused together alone


def _too_small(model: ir.Model, plan: Plan, ranges: Ranges) -> dict[str, str]:
    """{int8 node: why} of those that touch a tensor whose values are not 0 and have no scale in float32."""
    found: dict[str, str] = {}
    int8 = set(plan.int8)
    for node in model.graph:
        for value in (*graph.activations(node), *node.outputs) if node.name in int8 else ():
            its = ranges.tensors.get(value.name or "")
            width = 0.0 if its is None else max(its.high, 0.0) - min(its.low, 0.0)
            if 0 < width < 255 * SMALLEST:
                found[node.name or ""] = f"the values of {value.name} reach {width:.3g}, which has no scale in float32"
    return found
