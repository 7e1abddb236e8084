"""Bundles, one of each a session, which no test may change, and a small ONNX file for exports of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

import exporter
from exporter import Report
from exporter.recipe import limited, load_recipe
from tests import models
from tests.exporter import graphs, int8

LIMITS = {"max_size_bytes": 1_000_000, "max_ram_bytes": 2_000_000_000, "min_integer_macs": 0.9}


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
        max_evaluations=1,  # the static plan: models this small are faster in float
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


def export(model: Path, out: Path, target: str, seed: int = 1, ort: bool = False, **limits: float) -> Report:
    """Export an ONNX file; its one input is drawn from 0..1."""
    (given,) = onnx.load(model).graph.input
    shape = [dim.dim_value or 4 for dim in given.type.tensor_type.shape.dim]
    rng = np.random.default_rng(seed)
    batches = [{given.name: rng.random(shape, dtype=np.float32)} for _ in range(6)]
    recipe = limited(load_recipe(target), limits)
    return exporter.export(
        exporter.from_onnx(model), recipe, batches[:4], batches[4:], out=out, ort=ort, max_evaluations=1
    )


@pytest.fixture(scope="session")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cnn") / "cnn.onnx"
    onnx.save(int8.cnn(), path)
    return path


@pytest.fixture(scope="session")
def phone(cnn: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The CNN for every CPU, with the phone's file and three limits."""
    folder = tmp_path_factory.mktemp("phone") / "cnn"
    return Exported(folder=folder, report=export(cnn, folder, "portable", ort=True, **LIMITS))


@pytest.fixture(scope="session")
def one_signed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """x [N, 64] -> y [N, 4]: weights of one sign, nothing cancels, and at full range nearly every pair saturates."""
    path = tmp_path_factory.mktemp("signed") / "signed.onnx"
    text = "(float[N,64] x) => (float[N,4] y) { [a] h = Gemm(x, v)\n [r] r = Relu(h)\n [e] y = Gemm(r, w) }"
    rng = np.random.default_rng(3)
    weights = {name: rng.uniform(0.8, 1, shape).astype(np.float32) for name, shape in (("v", (64, 16)), ("w", (16, 4)))}
    onnx.save(graphs.proto(text, weights), path)
    return path


@pytest.fixture(scope="session")
def saturating(one_signed_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("saturating") / "signed"
    return Exported(folder=folder, report=export(one_signed_file, folder, "x86-vnni"))
