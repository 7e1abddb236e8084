"""One bundle a session, made from torch, which no test may change, and a small ONNX file for exports of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

import exporter
from exporter import Report
from tests import models
from tests.exporter import graphs


@dataclass(frozen=True)
class Exported:
    """What export() returned, and where it wrote."""

    folder: Path
    report: Report


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported") / "residual"
    report = exporter.export(
        models.source("residual"),
        exporter.load_recipe("x86-vnni"),
        calibration=models.batches("residual", 1, 4),
        heldout=models.batches("residual", 2, 3),
        out=folder,
    )
    return Exported(folder=folder, report=report)


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x [N, 8] -> y [N, 4]: two Gemm and a Relu."""
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    text = "(float[N,8] x) => (float[N,4] y) { [a] h = Gemm(x, v, b)\n [r] r = Relu(h)\n [e] y = Gemm(r, w) }"
    weights = {"v": graphs.noise(1, 8, 16), "b": graphs.noise(2, 16), "w": graphs.noise(3, 16, 4)}
    onnx.save(graphs.proto(text, weights), path)
    return path
