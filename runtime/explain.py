"""Why each node runs as it does: the kernels that ran here beside the plan that asked for them. bundle -> Explanation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime import trusted
from runtime.bundle import Bundle
from runtime.errors import BundleError
from runtime.kernels import Kernel, Kernels, kernels, trace

if TYPE_CHECKING:
    from runtime.drift import Array

PLAN = "plan.txt"
PLAN_BYTES = 64 << 20
HEADER = "# node | op_type | precision | reason"
# What ONNX Runtime 1.31 puts around a node's name when it fuses or moves it, and what stands behind a dynamic layer's for
# the nodes that it is made of.
ADDED = re.compile(r"^(fused )+|(_token_\d+|_nchwc|_quant|/\w*Fusion/?|_dynamic_(codes|cast|scale|real|bias))+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One line of the plan."""

    op_type: str
    precision: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """One node as it ran, and the plan's line for it; None where ONNX Runtime made the node itself."""

    kernel: Kernel
    planned: Planned | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Every node in order of execution, under the sums of runtime.Kernels."""

    integer_macs: float
    macs: int
    ms: float
    nodes: tuple[Explained, ...]


def explain(bundle: Bundle) -> Explanation:
    """Trace the bundle on its probe's first batch and put the plan's precision and reason beside each kernel."""
    listed = PLAN in bundle.manifest.files
    plan = read_plan(bundle.path / PLAN, bundle.content(PLAN, PLAN_BYTES)) if listed else {}
    return _beside(kernels(bundle), plan)


def explain_file(model: Path, inputs: Mapping[str, Array], threads: int | None = None) -> Explanation:
    """The same for a model that is in no bundle: as ONNX Runtime runs it by itself, and without a plan.

    Raises:
        BundleError: ONNX Runtime cannot open it.
        PacklightError: it cannot run it on these inputs.
    """
    return _beside(trace(model, inputs, threads=threads or 1), {})


def _beside(ran: Kernels, plan: Mapping[str, Planned]) -> Explanation:
    nodes = tuple(Explained(kernel=kernel, planned=plan.get(ADDED.sub("", kernel.node))) for kernel in ran.kernels)
    return Explanation(integer_macs=ran.integer_macs, macs=ran.macs, ms=ran.ms, nodes=nodes)


def read_plan(path: Path, content: bytes | None = None) -> Mapping[str, Planned]:
    """Read plan.txt: node name -> its line.

    Args:
        path: of the file.
        content: its bytes, where they are read already; `path` is then for messages.

    Raises:
        BundleError: not UTF-8, another header, or a line that has not four fields.
    """
    whole = trusted.read(path, PLAN_BYTES) if content is None else content
    try:
        header, *lines = whole.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        found = f"bytes that are not UTF-8, from {error.start} on"
        raise BundleError(str(path), path=str(path), found=found, expected="the plan's text") from error
    if lines and not lines[-1]:
        lines.pop()
    if header != HEADER:
        raise BundleError(f"{path}:1", path=str(path), found=header[:80], expected=HEADER)
    plan: dict[str, Planned] = {}
    for number, line in enumerate(lines, start=2):
        fields = line.split(" | ", 3)
        if len(fields) != 4:
            raise BundleError(f"{path}:{number}", path=str(path), found=line[:80], expected="four fields between ' | '")
        node, op_type, precision, reason = fields
        plan[node] = Planned(op_type=op_type, precision=precision, reason=reason)
    return plan
