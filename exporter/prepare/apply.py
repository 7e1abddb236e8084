"""The rewrites in their order, each proved by running the graph before and after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from exporter import graph, proof
from exporter.batches import Array, Batch
from exporter.errors import QuantizeError
from exporter.prepare import (
    affine,
    batchnorm,
    channels,
    constants,
    contrib,
    conv_transpose,
    ends,
    factor,
    gelu,
    gemm,
    hardswish,
    kept,
    layernorm,
    linear,
    names,
    observed,
    offset,
    opset,
    pad,
    pool,
    shapes,
    stem,
    taken,
    unshare,
)
from exporter.prepare.kept import NOTHING_KEPT, Kept
from runtime import drift

ROUGHLY_DB = 10.0  # less is another model

# A rewrite owns the model it is given, edits it in place, and returns how often its rules matched.
Rewrite = Callable[[ir.Model], int]

RAISE: Mapping[str, Rewrite] = {"opset": opset.rewrite}
CLEAN: Mapping[str, Rewrite] = {
    "contrib": contrib.rewrite,
    "constants": constants.rewrite,
    "ends": ends.rewrite,
    "names": names.rewrite,
}
REWRITES: Mapping[str, Rewrite] = {
    "pad": pad.rewrite,
    "batchnorm": batchnorm.rewrite,
    "layernorm": layernorm.rewrite,
    "gelu": gelu.rewrite,
    "hardswish": hardswish.rewrite,
    "gemm": gemm.rewrite,
    "linear": linear.rewrite,
    "factor": factor.rewrite,
    "pool": pool.rewrite,
    "conv_transpose": conv_transpose.rewrite,
    "affine": affine.rewrite,
    "stem": stem.rewrite,
    "channels": channels.rewrite,  # those that stem left
    "constants": constants.rewrite,
    "unshare": unshare.rewrite,
    "ends": ends.rewrite,  # again: constants takes every Identity out
    "names": names.rewrite,
    "shapes": shapes.rewrite,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Two equal FP32 graphs: `reference` as traced, only cleaned, and `model`, rewritten so that it quantizes well.

    rewrites: {rewrite: times it matched}, those that matched.
    given_db: how near the file's own graph, in another precision, comes to it: SNR, dB; None where that says nothing.
    kept: what QuantizeLinear and DequantizeLinear in the file said, where there were any. They are in `reference`, and gone from
        `model`, which is equal up to their rounding.
    """

    reference: ir.Model
    model: ir.Model
    rewrites: Mapping[str, int]
    given_db: float | None = None
    kept: Kept = NOTHING_KEPT

    def as_given(self, batch: Batch) -> Prepared:
        """The file as it is, beside the real numbers that it stands for; beside itself where these are another model on a batch."""
        given, real = self.reference, self.kept.real
        if real is not None:
            pair = (graph.runner(real)(batch), graph.runner(given)(batch))
            real = real if drift.measure([pair]).worst_snr_db >= ROUGHLY_DB else None
        kept = Kept(grids={}, weights={}, anew={})
        return Prepared(
            reference=given if real is None else real,
            model=given.clone(),
            rewrites={},
            given_db=self.given_db,
            kept=kept,
        )

    @property
    def truth(self) -> ir.Model:
        """The graph that plans are compared with: as given, where the file has a rounding of its own, which it was trained with."""
        return self.model if self.kept is NOTHING_KEPT else self.reference


def to_quantizable(model: ir.Model, batch: Batch, given: ir.Model | None = None) -> Prepared:
    """Clean the graph, then rewrite it; after each rewrite that matched, outputs on `batch` must be the traced ones.

    `given` is the graph as its file has it, where `model` is the same in another precision.

    Raises:
        QuantizeError: a rewrite changed the outputs, or ONNX Runtime cannot run the graph. That is a fault of ours.
    """
    traced = model.clone()
    try:
        expected = observed.correct(traced, batch)
    except graph.RunError as error:
        raise _refused("the traced graph", error) from error
    given_db = None if given is None else _beside(given, expected, batch)
    # ONNX Runtime may or may not fuse what stands between Q/DQ, which rounds otherwise: such graphs are proved unfused
    fused = not taken.is_quantized(traced)
    expected = expected if fused else _run(traced, batch, "the traced graph", fused)
    raised = _proved(traced, RAISE, expected, batch, fused)[0]
    if any(node.domain for node in raised.graph):
        observed.fill(raised, batch)  # whose types and ranks no inference finds
    reference = _proved(raised, CLEAN, expected, batch, fused)[0]
    start = reference.clone()
    observed.fill(start, batch)
    codes = taken.take(start, batch) if taken.is_quantized(start) else None
    if codes is not None:
        constants.rewrite(start)
        expected = _run(start, batch, "the graph without Q/DQ", fused)
    real = start.clone() if codes is not None else None
    rewritten, counts = _proved(start, REWRITES, expected, batch, fused)
    observed.fill(rewritten, batch)
    if codes is None:  # what the file rounds to is not moved
        last = {"offset": partial(offset.rewrite, batch=batch)}
        rewritten, moved = _proved(rewritten, last, expected, batch, fused)
        counts |= moved
    said = NOTHING_KEPT if codes is None or real is None else kept.found(rewritten, codes, real)
    return Prepared(reference=reference, model=rewritten, rewrites=counts, given_db=given_db, kept=said)


def _proved(
    model: ir.Model, rewrites: Mapping[str, Rewrite], expected: Batch, batch: Batch, fused: bool
) -> tuple[ir.Model, dict[str, int]]:
    counts: dict[str, int] = {}
    for name, rewrite in rewrites.items():
        matched = rewrite(model)
        if not matched:
            continue
        wrong = proof.difference(expected, _run(model, batch, f"the graph after rewrite {name}", fused))
        if wrong:
            raise QuantizeError(
                f"rewrite {name} changed the model", found=wrong, expected="equal outputs", do="report this model to us"
            )
        counts[name] = counts.get(name, 0) + matched
    return model, counts


def _beside(given: ir.Model, expected: Batch, batch: Batch) -> float | None:
    """The worst SNR of the float outputs of the graph in another precision, beside those of the float32 one, dB.

    None where ONNX Runtime does not run it (its CPU provider has few kernels for bfloat16), or its numbers overflow.
    """
    try:
        found = graph.runner(given)(batch)
    except graph.RunError:
        return None
    real = [name for name, value in expected.items() if np.asarray(value).dtype.kind == "f"]
    same = [name for name in real if found[name].shape == expected[name].shape and np.isfinite(found[name]).all()]
    if not same:
        return None
    pair = {name: expected[name] for name in same}, {name: found[name] for name in same}
    return drift.measure([pair]).worst_snr_db


def _run(model: ir.Model, batch: Batch, what: str, fused: bool) -> dict[str, Array]:
    try:
        return graph.runner(model, optimize=fused)(batch)
    except graph.RunError as error:
        raise _refused(what, error) from error


def _refused(what: str, error: graph.RunError) -> QuantizeError:
    return QuantizeError(f"{what} does not run", found=str(error), expected="a graph ONNX Runtime runs")
