"""A file with Q/DQ inside, as `taken` takes it: what its tests and those of `kept` share."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from exporter import graph
from exporter.prepare import taken
from runtime import drift
from tests.exporter import graphs

X = {"x": graphs.noise(0, 4, 8)}
SCALE = (np.abs(graphs.noise(1, 8, 6)).max(axis=0) / 127).astype(np.float32)
CODES = np.clip(np.rint(graphs.noise(1, 8, 6) / SCALE), -127, 127).astype(np.int8)
ACTIVATION = {"sx": np.float32(0.02), "zx": np.uint8(100)}


def take(text: str, weights: dict[str, Any], opset: int = 20) -> tuple[ir.Model, ir.Model, taken.Taken]:
    before = graphs.model(text, weights, opset)
    after = before.clone()
    return before, after, taken.take(after, X)


def snr_db(before: ir.Model, after: ir.Model) -> float:
    return drift.measure([(graph.runner(before)(X), graph.runner(after)(X))]).worst_snr_db
