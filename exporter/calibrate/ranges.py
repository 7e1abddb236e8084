"""The range of each tensor, as calibration saw it: the value between calibrate and quantize, and the file ranges.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from exporter.numerics.quantized import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """[low, high] in real numbers, over `elements` values of which `masked` were saturating constants and left out."""

    low: float
    high: float
    elements: int
    masked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """{tensor: Range} after `batches` batches, by `method`.

    kept: {tensor: codes that the file came with}; its range is theirs.
    """

    tensors: Mapping[str, Range]
    batches: int
    method: str
    kept: Mapping[str, Grid] = field(default_factory=dict)

    def keeping(self, grids: Mapping[str, Grid]) -> Ranges:
        """The same, but for tensors that have a grid: the range of its codes."""
        kept = {name: grid for name, grid in grids.items() if name in self.tensors}
        if not kept:
            return self
        tensors = {
            name: replace(found, low=kept[name].low, high=kept[name].high) if name in kept else found
            for name, found in self.tensors.items()
        }
        return replace(self, tensors=tensors, kept=kept)

    def to_json(self) -> str:
        body: dict[str, object] = {
            "method": self.method,
            "batches": self.batches,
            "tensors": {name: asdict(self.tensors[name]) for name in sorted(self.tensors)},
        }
        if self.kept:
            body["kept"] = {name: asdict(self.kept[name]) for name in sorted(self.kept)}
        return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
