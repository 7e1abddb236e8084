from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import runtime
from runtime import gate, outcome
from runtime import manifest as manifests
from runtime.errors import BundleError
from runtime.exported import Exported, Line, Measured
from runtime.manifest import Budget
from runtime.probe import write_probe
from tests.runtime import models
from tests.runtime.test_manifest import SMALL, SMALL_JSON

LOST = Line(what="snr_db logits", found=-1.5, limit=10.0, met=False, cause="nothing is left")
SLOW = Line(what="speedup", found=None, limit=1.0, met=False)
SEEN = Measured(
    snr_db=-1.5, varying_db=-math.inf, cosine=0.1, max_abs=3.0, same_top1=0.5, equal=0.0, matched=None, elements=20
)
FAILED = Exported(
    met=False, lines=(LOST, SLOW), batches=9, outputs={"logits": SEEN}, probe=(0, 1, 7), hardest=7
)  # fmt: skip


def written(**other: Any) -> str:
    """The manifest with this verdict, of which some keys are others."""
    root = json.loads(manifests.dumps(replace(SMALL, verdict=FAILED)))
    root["verdict"] |= other
    return json.dumps(root)


def test_verdict_of_the_export_is_read_as_it_was_written() -> None:
    about = replace(SMALL, verdict=FAILED)
    assert manifests.loads(manifests.dumps(about), "manifest.json") == about
    assert manifests.loads(SMALL_JSON, "manifest.json").verdict is None


def test_bundle_of_format_1_is_read_and_says_nothing_of_its_export() -> None:
    root = json.loads(SMALL_JSON) | {"format": 1}
    del root["verdict"]
    found = manifests.loads(json.dumps(root), "manifest.json")
    assert (found.format, found.verdict) == (1, None)
    with pytest.raises(BundleError, match="verdict: found nothing, expected this key"):
        manifests.loads(json.dumps(root | {"format": 2}), "manifest.json")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"met": True}, "verdict.met: found True, expected true where every line is met"),
        ({"met": 0}, "verdict.met: found 0"),
        ({"batches": -1}, "verdict.batches: found -1"),
        ({"batches": True}, "verdict.batches: found True"),
        ({"probe": [0.5]}, r"verdict.probe: found \[0.5\]"),
        ({"hardest": "x"}, "verdict.hardest: found x"),
        ({"lines": [{}]}, r"verdict.lines\[0\]: found nothing"),
        ({"outputs": {"logits": 3}}, "verdict.outputs.logits: found 3"),
        ({"more": 1}, "verdict: found batches, hardest"),
    ],
)
def test_verdict_that_is_none_is_refused_by_its_place(other: dict[str, Any], says: str) -> None:
    with pytest.raises(BundleError, match=says):
        manifests.loads(written(**other), "manifest.json")


def test_number_of_a_line_is_a_number() -> None:
    line = {"what": "a", "found": "nan", "limit": 1, "met": True, "cause": ""}
    with pytest.raises(BundleError, match=r"lines\[0\].found: found nan"):
        manifests.loads(written(met=True, lines=[line]), "manifest.json")


def test_bundle_that_failed_at_export_fails_where_it_is_checked(own_bundle: Path) -> None:
    models.seal(own_bundle, replace(models.manifest(Budget()), verdict=FAILED))
    verdict = runtime.check(runtime.load(own_bundle))
    assert not verdict.met
    assert [str(line) for line in verdict.lines if not line.met] == [
        "exported: 0 (at least 1), snr_db logits: -1.5 (at least 10), nothing is left; "
        "speedup: as measured at export (at least 1)"
    ]
    assert "nothing is left" in outcome.junit(gate.outcome(verdict, "tiny")) and "nothing is left" in gate.markdown(
        verdict, "tiny"
    )
    models.seal(own_bundle, replace(models.manifest(Budget()), verdict=replace(FAILED, met=True, lines=())))
    assert runtime.check(runtime.load(own_bundle)).met


def test_recorded_fp32_outputs_are_those_of_the_fp32_model(own_bundle: Path) -> None:
    bundle = runtime.load(own_bundle)
    probes = bundle.probes()
    (line,) = [line for line in runtime.check(bundle).lines if line.what == "reference logits"]
    assert line.found is not None and line.found > 100
    write_probe(own_bundle / manifests.PROBE, [replace(probe, fp32=probe.int8) for probe in probes])
    models.seal(own_bundle, models.manifest(Budget()))
    verdict = runtime.check(runtime.load(own_bundle))
    assert not verdict.met
    (line,) = [line for line in verdict.lines if line.what == "reference logits"]
    assert (line.met, line.cause) == (False, "the probe's FP32 outputs are not those of model.fp32.onnx")
    (own_bundle / manifests.FP32).unlink()  # a device has left it off
    assert not [line for line in runtime.check(runtime.load(own_bundle)).lines if line.what.startswith("reference")]


def test_fp32_model_of_other_inputs_is_refused(own_bundle: Path) -> None:
    other = models.build([models.helper.make_node("Relu", ["x"], ["y"])], {"x": [1, 3]}, {"y": [1, 3]}, {})
    (own_bundle / manifests.FP32).write_bytes(other.SerializeToString())
    models.seal(own_bundle, models.manifest(Budget()))
    with pytest.raises(BundleError, match=r"model.fp32.onnx: found inputs \{'x'"):
        runtime.check(runtime.load(own_bundle))
