from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import runtime
from runtime import cpu, drift, gate, outcome
from runtime import manifest as manifests
from runtime.cpu import Cpu
from runtime.drift import Drift
from runtime.errors import DriftExceeded, PacklightError
from runtime.gate import Verdict
from runtime.manifest import Budget, Machine, Manifest
from runtime.probe import Probe, write_probe
from tests.runtime import models

FAR = drift.measure([({"a": np.array([[3.0, 4.0]])}, {"a": np.array([[3.0, 4.5]])})])  # 20 dB, max 0.5, cosine < 1
EQUAL = drift.measure([({"a": np.array([[3.0, 4.0]])}, {"a": np.array([[3.0, 4.0]])})])


CPU = Cpu(name="a CPU", machine="x86_64", flags=("avx2",), pairs_in_int16=True)


def judge(drift: Drift = FAR, integer_macs: float = 0.9, **budget: float) -> Verdict:
    """A verdict on a device that gives the recorded outputs, bit for bit."""
    lines = tuple(gate.limits(Budget(**budget), drift, integer_macs, size_bytes=1000, ram_bytes=5000))
    return Verdict(
        met=all(line.met for line in lines),
        model="model.int8.onnx",
        lines=lines,
        integer_macs=integer_macs,
        drift=drift,
        quantization=drift,
        kernel=None,
        device=EQUAL,
        q={"a": 0.0},
        exact=True,
        cpu=CPU,
        recorded_on=Machine(machine="aarch64", flags=("i8mm",)),
        onnxruntime="1.31.1",
        notes=(),
    )


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
        ({"max_size_bytes": 1000}, True),
        ({"max_size_bytes": 999}, False),
        ({"max_ram_bytes": 5000}, True),
        ({"max_ram_bytes": 4999}, False),
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
    assert root.keys() == set(Verdict.__dataclass_fields__)
    assert root["cpu"] == {"name": "a CPU", "machine": "x86_64", "flags": ["avx2"], "pairs_in_int16": True}
    assert root["lines"] == [{"what": "snr_db a", "found": "inf", "limit": 30.0, "met": True, "cause": ""}]


def test_junit_has_a_case_a_limit_and_says_why_it_failed() -> None:
    suite = ET.fromstring(outcome.junit(gate.outcome(judge(min_snr_db=30.0, max_abs=1.0), 'a <"&> b')))
    assert suite.attrib == {"name": 'packlight check a <"&> b', "tests": "2", "failures": "1", "errors": "0"}
    failures = {case.get("name"): [f.get("message") for f in case] for case in suite.iter("testcase")}
    message = "snr_db a: 20 (at least 30), with 90.0 % of MACs in integer kernels"
    assert failures == {"snr_db a": [message], "max_abs a": []}
    properties = {each.get("name"): each.get("value") for each in suite.iter("property")}
    assert properties == {
        "integer_macs": "0.9",
        "worst_snr_db": "20",
        "exact": "true",
        "device_q": "0",
        "model": "model.int8.onnx",
        "cpu": "a CPU, x86_64 avx2, onnxruntime 1.31.1",
        "recorded_on": "aarch64 i8mm",
    }


def test_markdown_tells_drift_with_coverage_in_one_row() -> None:
    text = gate.markdown(judge(min_snr_db=30.0), "tiny")
    assert text.startswith("## `tiny`: not met\n\n90.0 % of MACs in integer kernels; int8 outputs equal those recorded")
    assert "| `snr_db a` | 20 | 30 | **no** |" in text
    assert "| `a` | 20.00 |  | 0.998460 | 0.5 | 100.00 % | 90.0 % |" in text


def test_markdown_without_limits_says_so() -> None:
    assert "No limit was asked for." in gate.markdown(judge(), "tiny")


def test_check_runs_the_probe_here(bundle_folder: Path) -> None:
    bundle = runtime.load(bundle_folder, threads=1)
    verdict = runtime.check(bundle)
    pairs = [(models.run(bundle_folder / manifests.FP32, p.inputs), bundle.run(p.inputs)) for p in bundle.probes()]
    assert verdict.drift == drift.measure(pairs)
    assert (verdict.exact, verdict.integer_macs, verdict.met) == (True, 1.0, True)
    assert 25 < verdict.drift.worst_snr_db < 60


def recorded_elsewhere(folder: Path, shift: float, about: Manifest) -> runtime.Bundle:
    """A bundle whose probe says that the export saw int8 outputs `shift` away from those that are computed here."""
    bundle = runtime.load(folder)
    moved = [
        Probe(inputs=p.inputs, fp32=p.fp32, int8={"logits": p.int8["logits"] + np.float32(shift)})
        for p in bundle.probes()
    ]
    write_probe(folder / manifests.PROBE, moved)
    models.seal(folder, about)
    return runtime.load(folder)


def test_device_that_computes_otherwise_is_told_apart_from_drift(own_bundle: Path) -> None:
    verdict = runtime.check(recorded_elsewhere(own_bundle, 0.5, models.manifest(Budget(min_snr_db=25.0))))
    assert [(line.what, line.met) for line in verdict.lines] == [
        ("reference logits", True), ("snr_db logits", True), ("device_q logits", False),
    ]  # fmt: skip
    assert (verdict.met, verdict.exact) == (False, False)
    assert verdict.device.outputs[0].max_abs == pytest.approx(0.5, abs=1e-5)
    assert verdict.q["logits"] == pytest.approx(0.5 / verdict.quantization.outputs[0].rms, rel=1e-3)


def test_small_device_error_is_met_unless_the_target_promised_exact_bits(own_bundle: Path) -> None:
    small = recorded_elsewhere(own_bundle, 1e-3, models.manifest(Budget()))
    assert runtime.check(small).met
    about = replace(models.manifest(Budget()), exact_on=(cpu.machine(),))
    promised = runtime.check(recorded_elsewhere(own_bundle, 1e-3, about))
    assert [(line.what, line.met) for line in promised.lines] == [
        ("reference logits", True), ("device_q logits", True), ("exact logits", False),
    ]  # fmt: skip


@pytest.mark.parametrize(("recorded", "share", "met"), [(0, 1.0, True), (1, 0.95, True), (4, 0.8, False)])
def test_integers_that_a_device_has_otherwise_are_not_met(recorded: int, share: float, met: bool) -> None:
    fp32, here = np.arange(20), np.arange(20)
    other = np.where(np.arange(20) < recorded, -1, here)
    device, quantization = (drift.measure([({"y": one}, {"y": here})]) for one in (other, fp32))
    line = gate._same(device.outputs[0], quantization.outputs[0])
    assert (line.what, line.found, line.limit, line.met) == ("device_same y", share, pytest.approx(0.85), met)


def test_device_keeps_of_a_set_what_quantization_kept() -> None:
    fp32, recorded, here = (np.float32([[n, n] for n in each]) for each in ([1, 5, 9, 20], [1, 50, 80], [1, 70, 30, 2]))
    device, quantization = (drift.measure([({"y": r}, {"y": c})]) for r, c in ((recorded, here), (fp32, recorded)))
    line = gate._same(device.outputs[0], quantization.outputs[0])
    assert (line.found, line.limit, line.met) == (pytest.approx(1 / 3), 0.25, True)
    assert not gate._same(device.outputs[0], drift.measure([({"y": fp32}, {"y": fp32[:3]})]).outputs[0]).met


def test_promise_of_another_machine_is_not_held_against_this_one(own_bundle: Path) -> None:
    about = replace(models.manifest(Budget()), exact_on=("riscv64",))
    assert runtime.check(recorded_elsewhere(own_bundle, 1e-3, about)).met


def test_kernel_error_is_between_the_kernels_and_their_own_file_in_float(bundle_folder: Path) -> None:
    bundle = runtime.load(bundle_folder, threads=1)
    verdict = runtime.check(bundle)
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    in_float = ort.InferenceSession(bundle.model, settings, providers=["CPUExecutionProvider"])
    pairs = [({"logits": in_float.run(None, dict(p.inputs))[0]}, bundle.run(p.inputs)) for p in bundle.probes()]
    assert verdict.kernel is not None
    assert verdict.kernel.worst_snr_db == pytest.approx(drift.measure(pairs).worst_snr_db, abs=0.5)
    assert verdict.kernel.worst_snr_db > verdict.quantization.worst_snr_db


def test_other_onnxruntime_and_a_cpu_that_saturates_are_notes_and_no_failures(for_vnni: Path) -> None:
    about = replace(models.manifest(Budget()), versions={"onnxruntime": "0.1"}, pair_rule=False)
    models.seal(for_vnni, about)
    with pytest.warns(RuntimeWarning, match="this CPU adds pairs"):
        verdict = runtime.check(runtime.load(for_vnni))
    assert verdict.met and verdict.cpu.pairs_in_int16
    assert [note.split(",")[0] for note in verdict.notes] == [
        "the manifest does not say whether the export met its budget: export again",
        "made for x86-vnni",
        "exported with onnxruntime 0.1",
    ]
    assert verdict.notes[-1] == f"exported with onnxruntime 0.1, run here by {ort.__version__}"


def test_phones_file_is_checked_as_it_runs_and_without_the_onnx_file_no_kernel_error_is_known(ort_bundle: Path) -> None:
    both = runtime.check(runtime.load(ort_bundle, threads=1, ort=True))
    assert (both.met, both.exact, both.integer_macs) == (True, True, 1.0)
    assert both.kernel is not None and both.kernel.worst_snr_db > both.quantization.worst_snr_db
    (ort_bundle / manifests.INT8).unlink()
    alone = runtime.check(runtime.load(ort_bundle, threads=1, ort=True))
    assert (alone.met, alone.exact, alone.kernel) == (True, True, None)
    assert alone.drift == both.drift
    assert "| kernel | not known | 100.0 % |" in gate.markdown(alone, "tiny")


def test_size_limit_is_held_against_the_form_that_runs(ort_bundle: Path) -> None:
    size = (ort_bundle / manifests.ORT).stat().st_size
    assert size != (ort_bundle / manifests.INT8).stat().st_size
    models.seal(ort_bundle, models.manifest(Budget(max_size_bytes=size - 1)))
    (line,) = [x for x in runtime.check(runtime.load(ort_bundle, ort=True)).lines if x.what == "max_size_bytes"]
    assert (line.found, line.met) == (size, False)


def test_integer_share_can_be_asked_for_beside_the_budget(bundle_folder: Path) -> None:
    bundle = runtime.load(bundle_folder)
    what = [line.what for line in runtime.check(bundle, min_integer_macs=0.9).lines]
    assert what == ["reference logits", "integer_macs", "device_q logits"]


def test_peak_memory_is_measured_only_where_a_limit_asks_for_it(own_bundle: Path) -> None:
    models.seal(own_bundle, models.manifest(Budget(max_ram_bytes=10**9)))
    (line,) = [line for line in runtime.check(runtime.load(own_bundle)).lines if line.what == "max_ram_bytes"]
    assert line.met
    assert 1e4 < line.found < 1e8


def one(values: list[float]) -> Drift:
    """Drift of `values` against [1, 1, 1, 1]."""
    return drift.measure([({"a": np.ones(4)}, {"a": np.array(values)})])


@pytest.mark.parametrize(
    ("device", "quantization", "q"),
    [
        ([1, 1, 1, 1], [1, 1, 1, 1], 0.0),
        ([1.1, 1, 1, 1], [1.2, 1, 1, 1], 0.5),
        ([1 + 1e-7, 1, 1, 1], [1, 1, 1, 1], 0.0),  # float's own rounding, of an output that is not quantized
        ([1.1, 1, 1, 1], [1, 1, 1, 1], 0.1 / 2 / 1e-5),
        ([math.nan, 1, 1, 1], [1.2, 1, 1, 1], math.inf),
    ],
)
def test_q_is_the_device_error_in_units_of_the_quantization_error(
    device: list[float], quantization: list[float], q: float
) -> None:
    assert gate.relative(one(device), one(quantization))["a"] == pytest.approx(q, rel=1e-6)


def test_asked_share_does_not_weaken_the_budgets(own_bundle: Path) -> None:
    models.seal(own_bundle, models.manifest(Budget(min_integer_macs=0.8)))
    line = runtime.check(runtime.load(own_bundle), min_integer_macs=0.1).lines[1]
    assert (line.what, line.limit) == ("integer_macs", 0.8)


def test_promise_of_exact_bits_is_that_of_one_onnxruntime(own_bundle: Path) -> None:
    about = replace(models.manifest(Budget()), exact_on=(cpu.machine(),), versions={"onnxruntime": "0.1"})
    found = runtime.check(recorded_elsewhere(own_bundle, 1e-3, about))
    assert found.met and not found.exact


def test_a_file_of_the_current_folder_is_not_run_for_a_module_of_ours(
    own_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.seal(own_bundle, models.manifest(Budget(max_ram_bytes=10**9)))
    (tmp_path / "runtime.py").write_text("raise SystemExit('run')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert runtime.check(runtime.load(own_bundle)).met
