from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from exporter import correct, graph
from exporter.calibrate import observe
from exporter.correct import bias
from exporter.target import PORTABLE, X86_VNNI
from tests.exporter import graphs

Batches = list[dict[str, np.ndarray]]


def improve(model: ir.Model, batches: Batches) -> correct.Corrected:
    plan, ranges = graphs.planned(model, *batches)
    means = observe(model, plan.tensors, iter(batches), bias.channels(model, plan)).means
    return correct.improve(model, plan, ranges, means, PORTABLE, batches)


def gemm(columns: int = 4) -> ir.Model:
    weights = {"w": graphs.noise(1, 64, columns), "b": graphs.noise(2, columns)}
    return graphs.model(f"(float[N,64] x) => (float[N,{columns}] y) {{ [g] y = Gemm(x, w, b) }}", weights)


def test_correction_that_helps_is_kept() -> None:
    """Inputs around 5 with little spread: nearly all of the error is its mean."""
    batches: Batches = [{"x": 5 + graphs.noise(n, 32, 64) / 10} for n in range(4)]
    found = improve(gemm(), batches)
    (tried,) = found.corrections
    assert tried.name == "bias" and tried.kept
    assert tried.after_db > tried.before_db + 1


def test_correction_that_does_not_help_is_not_kept() -> None:
    """Inputs around 0 with E[x] taken from other data: it would shift what stands right."""
    model = gemm()
    batches: Batches = [{"x": graphs.noise(n, 256, 64)} for n in range(2)]
    plan, ranges = graphs.planned(model, *batches)
    wrong = {("x", -1): np.full(64, 50.0)}
    found = correct.improve(model, plan, ranges, wrong, X86_VNNI, batches)
    (tried,) = found.corrections
    assert not tried.kept and tried.after_db < tried.before_db
    assert graph.to_bytes(found.int8) == graph.to_bytes(_plain(model, batches))


def _plain(model: ir.Model, batches: Batches) -> ir.Model:
    from exporter import quantize

    plan, ranges = graphs.planned(model, *batches)
    return quantize.to_int8(model, plan, ranges)


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_what_is_kept_is_never_worse_than_what_was_there(offset: float) -> None:
    batches: Batches = [{"x": offset + graphs.noise(n, 64, 64)} for n in range(3)]
    found = improve(gemm(), batches)
    (tried,) = found.corrections
    run, reference = graph.runner(found.int8), graph.runner(gemm())
    error = [np.linalg.norm(run(b)["y"] - reference(b)["y"]) / np.linalg.norm(reference(b)["y"]) for b in batches]
    assert -20 * np.log10(np.mean(error)) > max(tried.before_db, tried.after_db if tried.kept else -np.inf) - 1
    assert tried.kept == (tried.after_db > tried.before_db + 0.1)
