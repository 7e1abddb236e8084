"""The range of each tensor, as calibration saw it: the value between calibrate and quantize, and the file ranges.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """[low, high] in real numbers, over `elements` values of which `masked` were saturating constants and left out."""

    low: float
    high: float
    elements: int
    masked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranges:
    """{tensor: Range} after `batches` batches, by `method`."""

    tensors: Mapping[str, Range]
    batches: int
    method: str

    def to_json(self) -> str:
        body = {
            "method": self.method,
            "batches": self.batches,
            "tensors": {name: asdict(self.tensors[name]) for name in sorted(self.tensors)},
        }
        return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
