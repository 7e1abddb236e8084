"""What an export asked, decided and measured, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exporter.calibrate.enough import Coverage
from exporter.correct import Correction
from exporter.mobile import Usability
from exporter.report import plot, text
from exporter.search import Point, frontier
from exporter.shrink import Stored
from runtime.bench import Timing
from runtime.drift import Drift
from runtime.exported import Line
from runtime.manifest import canonical


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatLayer:
    """A node that holds MACs and runs in float, with its reason."""

    node: str
    op_type: str
    macs: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCount:
    """How many nodes one kernel ran, in which types (`u8s8` is activation and weight), and their MACs."""

    kernel: str
    types: str
    nodes: int
    macs: int
    integer: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node as ONNX Runtime ran it, and the plan's line for it; empty where ONNX Runtime made the node itself.

    No time: it belongs to a machine, and `packlight explain` measures it.
    """

    node: str
    kernel: str
    types: str
    macs: int
    integer: bool
    precision: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """The search for a plan: what it aimed at, every plan it looked at (SNR on calibration batches, ms), the chosen one.

    first: the static plan. accepted: whether the chosen one meets the budget; reached: and the aim. capped: whether a cap ended
    the search. worst: the groups of layers in which most noise arises. costs: where the ms come from.
    fp32_ms: of the FP32 model, as it was timed beside the static plan, in the ms of the plans; None where it was not.
    """

    aim_snr_db: float
    max_slower: float
    accepted: bool
    reached: bool
    capped: bool
    worst: tuple[tuple[str, ...], ...]
    first: Point
    chosen: Point
    points: tuple[Point, ...]
    announced: int
    evaluations: int
    costs: str
    fp32_ms: float | None

    @property
    def frontier(self) -> tuple[Point, ...]:
        """The points that no other beats in both error and ms, fastest first."""
        return frontier(self.points)

    def plot(self, width: int, height: int) -> plot.Plot:
        """All points as dots in a picture of that size."""
        return plot.scatter(self.points, self.frontier, self.chosen, width, height)


@dataclass(frozen=True, slots=True, kw_only=True)
class Took:
    """Elapsed seconds of the search and of the whole models that it timed: as announced, and as it was."""

    announced_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """asked: name, recipe, target. decided: the plan in numbers. measured: coverage, drift, sizes, time.

    notes: what was taken for granted about the model and its data, or left out: a sentence each.
    proved: the sizes at which the trace was proved equal to torch, one {label: size} each.
    rewrites: {rewrite: times it matched} of the preparation.
    skipped: names of the pictures that did not decode and were left out, as was asked.
    ranges_by: the method of the ranges. enough: one sentence, whether more calibration data would change anything.
    coverage: how the values of the first coverage_batches held-out batches fit the ranges, every tensor, the worst first.
    untried: {step that an export can do without: why there is nothing of it}, on one line each.
    stored: large float weights, which are int8 codes in the file, or why they are not.
    drift is over held-out batches, integer_macs the share 0..1 of MACs in integer kernels on the probe's first batch.
    repeated_batches: held-out batches that calibration had seen; overlapping: there were no others, so drift is optimistic.
    ort_bytes: size of the phone's file, where it was asked for; with it the share of its MACs in integer kernels, on how many
        batches its outputs had the bits of the .onnx file, and mobile: {file: what NNAPI and Core ML would take}.

    ram_bytes: what opening and running the model once adds to a process, where a limit asks for it; None like timing.
    timing: a property of this machine and moment; None in the bundle's own report, so that its bytes are the export's.
    search_took: None like timing.
    scores: {metric: (FP32, int8)} of the user's evaluate(); empty like timing.
    kept: what the plan has of the codes and scales that the file came with; empty, and not in the JSON, where it came with none.
    """

    name: str
    recipe: str
    target: str
    notes: tuple[str, ...]
    traced_by: str
    proved: tuple[Mapping[str, int], ...]
    rewrites: Mapping[str, int]
    calibration_batches: int
    skipped: tuple[str, ...]
    ranges_by: str
    enough: str
    coverage: tuple[Coverage, ...]
    coverage_batches: int
    random_data: bool
    repeated_batches: int
    overlapping: bool
    int8_nodes: int
    dynamic_nodes: int
    float_nodes: int
    float_layers: tuple[FloatLayer, ...]
    corrections: tuple[Correction, ...]
    untried: Mapping[str, str]
    search: Searched
    stored: tuple[Stored, ...]
    kernels: tuple[KernelCount, ...]
    nodes: tuple[Node, ...]
    integer_macs: float
    macs: int
    drift: Drift
    fp32_bytes: int
    int8_bytes: int
    ort_bytes: int | None
    ort_integer_macs: float | None
    ort_batches: int | None
    mobile: Mapping[str, tuple[Usability, ...]]
    met: bool
    lines: tuple[Line, ...]
    ram_bytes: int | None
    timing: Timing | None
    search_took: Took | None
    scores: Mapping[str, tuple[float, float]]
    kept: str = ""

    @property
    def search_sentence(self) -> str:
        return text.search(self)

    def to_json(self) -> str:
        """Canonical JSON of every field; ±inf as the strings "inf" and "-inf"."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return canonical(fields if self.kept else {name: value for name, value in fields.items() if name != "kept"})

    @property
    def outside(self) -> tuple[Coverage, ...]:
        """The tensors of which held-out values lie outside the range."""
        return tuple(each for each in self.coverage if each.outside)

    def __str__(self) -> str:
        return text.render(self)
