from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

import runtime
from runtime import drift, gate
from runtime import manifest as manifests
from runtime.drift import Drift
from runtime.errors import DriftExceeded, PacklightError
from runtime.gate import Verdict
from runtime.manifest import Budget
from runtime.probe import Probe, write_probe
from tests.runtime import models

FAR = drift.measure([({"a": np.array([[3.0, 4.0]])}, {"a": np.array([[3.0, 4.5]])})])  # 20 dB, max 0.5, cosine < 1
EQUAL = drift.measure([({"a": np.array([[3.0, 4.0]])}, {"a": np.array([[3.0, 4.0]])})])


def judge(drift: Drift = FAR, integer_macs: float = 0.9, **budget: float) -> Verdict:
    return gate.judge(drift, integer_macs, EQUAL, Budget(**budget))


@pytest.mark.parametrize(
    ("budget", "met"),
    [
        ({}, True),
        ({"min_snr_db": 19.9}, True),
        ({"min_snr_db": 20.1}, False),
        ({"min_cosine": 0.998}, True),
        ({"min_cosine": 0.999}, False),
        ({"max_abs": 0.5}, True),
        ({"max_abs": 0.49}, False),
        ({"min_same_top1": 1.0}, True),
        ({"min_integer_macs": 0.9}, True),
        ({"min_integer_macs": 0.91}, False),
        ({"min_snr_db": 19.9, "max_abs": 0.49}, False),
    ],
)
def test_budget_is_met_when_every_limit_is(budget: dict[str, float], met: bool) -> None:
    verdict = judge(**budget)
    assert verdict.met is met
    assert len(verdict.lines) == len(budget)


def test_limit_holds_for_every_output_by_itself() -> None:
    reference = {"good": np.array([1.0]), "bad": np.array([1.0])}
    both = drift.measure([(reference, {"good": np.array([1.0]), "bad": np.array([0.9])})])
    lines = judge(both, min_snr_db=30.0).lines
    assert [(line.what, line.met) for line in lines] == [("snr_db good", True), ("snr_db bad", False)]


def test_infinite_snr_meets_any_limit_and_minus_infinity_none() -> None:
    assert judge(EQUAL, min_snr_db=300.0).met
    nan = drift.measure([({"a": np.array([1.0])}, {"a": np.array([math.nan])})])
    assert not judge(nan, min_snr_db=-300.0).met


def test_top1_limit_without_classes_is_refused() -> None:
    flat = drift.measure([({"a": np.array([1.0])}, {"a": np.array([1.0])})])
    with pytest.raises(PacklightError, match="budget min_same_top1: found no such output"):
        judge(flat, min_same_top1=0.9)


def test_require_raises_with_every_unmet_line_and_the_coverage() -> None:
    verdict = judge(min_snr_db=30.0, max_abs=0.1, min_cosine=0.5)
    with pytest.raises(DriftExceeded) as refusal:
        verdict.require()
    assert refusal.value.verdict is verdict
    expected = "budget not met, with 90.0 % of MACs in integer kernels: "
    expected += "found snr_db a: 20 (at least 30); max_abs a: 0.5 (at most 0.1)"
    assert str(refusal.value) == expected
    assert judge().require() is None


def test_json_has_every_field_and_is_strict() -> None:
    root = json.loads(judge(EQUAL, min_snr_db=30.0).to_json())
    assert root.keys() == {"met", "lines", "drift", "integer_macs", "device", "exact"}
    assert root["lines"] == [{"what": "snr_db a", "found": "inf", "limit": 30.0, "met": True}]


def test_junit_has_a_case_a_limit_and_says_why_it_failed() -> None:
    suite = ET.fromstring(gate.junit(judge(min_snr_db=30.0, max_abs=1.0), 'a <"&> b'))
    assert suite.attrib == {"name": 'packlight a <"&> b', "tests": "2", "failures": "1"}
    failures = {case.get("name"): [f.get("message") for f in case] for case in suite.iter("testcase")}
    message = "snr_db a: 20 (at least 30), with 90.0 % of MACs in integer kernels"
    assert failures == {"snr_db a": [message], "max_abs a": []}
    properties = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert properties == {"integer_macs": "0.9", "worst_snr_db": "20", "exact": "true"}


def test_markdown_tells_drift_with_coverage_in_one_row() -> None:
    text = gate.markdown(judge(min_snr_db=30.0), "tiny")
    assert text.startswith("## tiny: not met\n\n90.0 % of MACs in integer kernels; int8 outputs equal those recorded")
    assert "| snr_db a | 20 | 30 | **no** |" in text
    assert "| a | 20.00 | 0.998460 | 0.5 | 100.00 % | 90.0 % |" in text


def test_markdown_without_limits_says_so() -> None:
    assert "No limit was asked for." in gate.markdown(judge(), "tiny")


def test_check_runs_the_probe_here(bundle_folder: Path) -> None:
    bundle = runtime.load(bundle_folder, threads=1)
    verdict = runtime.check(bundle)
    pairs = [(models.run(bundle_folder / manifests.FP32, p.inputs), bundle.run(p.inputs)) for p in bundle.probes()]
    assert verdict.drift == drift.measure(pairs)
    assert (verdict.exact, verdict.integer_macs, verdict.met) == (True, 1.0, True)
    assert 25 < verdict.drift.worst_snr_db < 60


def test_device_that_computes_otherwise_is_told_apart_from_drift(own_bundle: Path) -> None:
    bundle = runtime.load(own_bundle)
    recorded = [
        Probe(inputs=p.inputs, fp32=p.fp32, int8={"logits": p.int8["logits"] + np.float32(0.5)})
        for p in bundle.probes()
    ]
    write_probe(own_bundle / manifests.PROBE, recorded)
    models.seal(own_bundle, models.manifest(Budget(min_snr_db=25.0)))
    verdict = runtime.check(runtime.load(own_bundle))
    assert (verdict.met, verdict.exact) == (True, False)
    assert verdict.device.outputs[0].max_abs == pytest.approx(0.5, abs=1e-5)
