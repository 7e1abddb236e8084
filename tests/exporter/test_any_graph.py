"""Random graphs that ONNX Runtime runs: every one is exported, and few are less accurate than plain quantize_static.

The fast suite tries a few. The slow part takes PACKLIGHT_FUZZ_SECONDS (two minutes by default) and goes further in one order of
graphs, or in another by PACKLIGHT_FUZZ_SEED: `PACKLIGHT_FUZZ_SECONDS=600 PACKLIGHT_FUZZ_SEED=7 pytest -m slow FILE`.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import exporter
import runtime
from exporter.source import from_onnx
from runtime import cpu, drift
from tests.exporter.any_graph import Array, Case, cases, quiet_options

SECONDS = float(os.environ.get("PACKLIGHT_FUZZ_SECONDS", "120"))
SEED = int(os.environ.get("PACKLIGHT_FUZZ_SEED", "0"))
# Of the graphs, that may be worse: a static plan, without a search, on random weights and few batches; one in twenty is
WORSE_SHARE = 0.15
ENOUGH_DB, WORSE_DB = 35.0, 1.0
FEW = 64  # values of an output whose SNR is no more than luck
Outputs = list[dict[str, Array]]


class Reader(CalibrationDataReader):
    """Batches as ONNX Runtime asks for them."""

    def __init__(self, batches: Outputs) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


def ran(model: bytes | Path, batches: Outputs) -> Outputs:
    session = ort.InferenceSession(
        model if isinstance(model, bytes) else str(model), quiet_options(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, batch), strict=True)) for batch in batches]


def plainly(case: Case, folder: Path) -> Outputs | None:
    """What plain quantize_static makes of the held-out batches; None where it, or its model, fails."""
    source, clean, made = folder / "model.onnx", folder / "clean.onnx", folder / "plain.onnx"
    logging.disable(logging.WARNING)
    try:
        try:
            quant_pre_process(source, clean)
        except Exception:  # of ONNX Runtime's own tools, whatever it is
            clean = source
        quantize_static(
            clean,
            made,
            Reader(case.calibration),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return ran(made, case.heldout)
    except Exception:
        return None
    finally:
        logging.disable(logging.NOTSET)


def snr_db(reference: Outputs, candidate: Outputs, name: str) -> float:
    pairs = (({name: r[name]}, {name: c[name]}) for r, c in zip(reference, candidate, strict=True))
    return drift.measure(pairs).worst_snr_db


def judge(case: Case, folder: Path) -> list[str]:
    """Export the case and hold its outputs against FP32's; those that plain quantize_static makes better, and by how much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (folder / "model.onnx").write_bytes(case.model)
        recipe = exporter.load_recipe("x86-vnni")
        exporter.export(
            from_onnx(folder / "model.onnx"),
            recipe,
            case.calibration,
            case.heldout,
            out=folder / "bundle",
            max_evaluations=0,
        )
        bundle = runtime.load(folder / "bundle", threads=1)
        found = [dict(bundle.run(batch)) for batch in case.heldout]
        expected = ran(case.model, case.heldout)
        assert [list(each) for each in found] == [list(each) for each in expected]
        for here, there in zip(found, expected, strict=True):
            assert all((here[n].dtype, here[n].shape) == (there[n].dtype, there[n].shape) for n in there)
        plain = plainly(case, folder)
    if plain is None or cpu.read().pairs_in_int16:
        return []
    worse = []
    for name, value in expected[0].items():
        if value.dtype == np.float32 and sum(each[name].size for each in expected) >= FEW:
            ours, theirs = snr_db(expected, found, name), snr_db(expected, plain, name)
            if ours < min(ENOUGH_DB, theirs - WORSE_DB):
                worse.append(f"{name}: {ours:.1f} dB, plain {theirs:.1f} dB")
    return worse


FEWER = settings(
    max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
SOME = settings(
    max_examples=20,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@given(case=cases())
@FEWER
def test_few_random_graphs_are_exported_and_no_worse_than_plain(
    case: Case, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert not judge(case, tmp_path_factory.mktemp("any"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Generating overly large repr")
def test_random_graphs_are_exported_and_few_are_worse_than_plain(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    end, found, number = time.monotonic() + SECONDS, list[list[str]](), SEED * 1000
    while time.monotonic() < end:

        @seed(number)
        @given(case=cases())
        @SOME
        def judged(case: Case) -> None:
            if time.monotonic() < end:
                found.append(judge(case, tmp_path_factory.mktemp("any")))

        judged()
        number += 1
    worse = [each for each in found if each]
    assert len(worse) <= max(2, WORSE_SHARE * len(found)), worse


def test_case_tells_its_nodes() -> None:
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "any", [], [])
    case = Case(model=onnx.helper.make_model(graph).SerializeToString(), calibration=[], heldout=[])
    assert repr(case) == "y = Relu (x)"
