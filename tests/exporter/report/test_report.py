"""The Report value and its views: text, JSON, HTML, and the manifest."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import onnxruntime
import pytest

import exporter
import runtime
from exporter import Report
from exporter.calibrate.enough import Coverage
from exporter.correct import Correction
from exporter.place import Plan
from exporter.report import FloatLayer, html, text
from exporter.report.value import Took
from exporter.target import X86_VNNI
from runtime import manifest as manifests
from runtime.bench import Timing
from runtime.drift import Drift, OutputDrift
from tests.exporter import graphs
from tests.exporter.conftest import Exported


def flat(report: Report) -> str:
    return " ".join(str(report).split())


def test_json_has_every_field_and_is_canonical(exported: Exported) -> None:
    found = json.loads(exported.report.to_json())
    assert [*found] == sorted(
        field.name for field in fields(Report) if field.name != "kept"
    )  # the network came in float
    assert found["integer_macs"] == 1.0
    assert found["drift"]["outputs"][0]["name"] == "logits"
    assert found["timing"]["ratio"] == exported.report.timing.ratio  # type: ignore[union-attr]


def test_bundles_own_report_is_the_same_but_for_the_time_of_this_machine(exported: Exported) -> None:
    inside = json.loads((exported.folder / "report.json").read_text())
    assert inside["timing"] is inside["search_took"] is None
    assert inside == json.loads(replace(exported.report, timing=None, search_took=None).to_json())


def test_infinite_snr_is_strict_json(exported: Exported) -> None:
    same = OutputDrift(
        name="y", snr_db=float("inf"), cosine=1.0, max_abs=0.0, mean_abs=0.0, rms=0.0, same_top1=None, elements=4
    )
    report = replace(exported.report, drift=Drift(outputs=(same,), batches=1))
    found = json.loads(report.to_json(), parse_constant=lambda word: pytest.fail(word))
    assert found["drift"]["outputs"][0]["snr_db"] == "inf"


def test_text_fits_80_columns_whatever_the_names(exported: Exported) -> None:
    long = FloatLayer(node="/encoder/" + "layer/" * 30 + "MatMul", op_type="MatMul", macs=3, reason="no kernel " * 20)
    report = replace(exported.report, name="m" * 200, float_layers=(long,) * 3)
    for each in (exported.report, report):
        lines = str(each).splitlines()
        assert max(map(len, lines)) <= text.WIDTH == 80
        assert lines[0].startswith("asked     ")


def test_drift_never_stands_without_the_integer_share_before_it(exported: Exported) -> None:
    lines = [line.split()[0] for line in str(exported.report).splitlines() if not line.startswith(" ")]
    assert lines.index("integers") == lines.index("drift") - 1
    assert any(re.match(r"integers +100\.0.% of ", line) for line in str(exported.report).splitlines())
    html = (exported.folder / "report.html").read_text()
    assert "SNR" in html and re.search(r"100(\.0)?.{0,8}%", html)


def test_text_says_what_was_asked_decided_and_measured(exported: Exported) -> None:
    report = exported.report
    said = flat(report)
    assert "residual for x86-vnni (recipe x86-vnni)" in said
    assert "by dynamo; equals torch at 3 sizes" in said
    assert f"{report.int8_nodes} nodes int8, {report.float_nodes} float" in said
    assert f"4 batches calibrated ({report.ranges_by}), 3 held out" in said
    assert f"SNR {report.drift.outputs[0].snr_db:.1f} dB" in said
    assert re.search(r"verdict met(, but SLOWER than FP32 here \([\d.]+x\))?$", said)


def test_text_says_what_is_bad_as_loudly(exported: Exported) -> None:
    line = replace(exported.report.lines[0], met=False)
    report = replace(
        exported.report, met=False, lines=(line,), repeated_batches=2, random_data=True, traced_by="onnx",
        float_layers=(FloatLayer(node="lstm", op_type="LSTM", macs=9, reason="no kernel"),),
        corrections=(Correction(name="bias", before_db=20.0, after_db=19.0, kept=False),),
    )  # fmt: skip
    said = flat(report)
    for words in (
        "NOT MET: snr_db logits", "2 more left out: calibration had seen them", "RANDOM data", "given as ONNX",
        "float: LSTM lstm: no kernel", "bias correction not kept: 20.0 -> 19.0 dB",
    ):  # fmt: skip
        assert words in said
    assert "ALL of them were calibrated on too" in flat(replace(report, overlapping=True))


def test_worst_heldout_coverage_is_in_the_text_and_all_of_it_in_json_and_html(exported: Exported) -> None:
    covered = [Coverage(tensor=f"t{n}", outside=0.36 / 3**n, values=9, beyond=0.5, error=3 - n) for n in range(8)]
    fine = Coverage(tensor="fine", outside=0, values=0, beyond=0, error=1)
    report = replace(exported.report, coverage=(*covered, fine), coverage_batches=64)
    said = flat(report)
    assert "1 of 9 ranges hold every value of 64 held-out batches" in said
    assert "outside: t0: 36 % of values, by up to 50 % of the range" in said
    assert "t1: 12 %" in said and "t2: 4.0 %" in said and "t4: 0.444 %" in said and "nearly" not in said
    assert "t5" not in said and "outside: 3 more, less of each" in said
    assert [each["tensor"] for each in json.loads(report.to_json())["coverage"]] == [
        *(c.tensor for c in covered),
        "fine",
    ]
    page = html.render(report, Plan(decisions=(), tensors=()))
    assert all(f"<code>{each.tensor}</code>" in page for each in covered)
    assert page.count('unmet">3.00x') == 1 and ">2.00x" in page
    none = replace(report, coverage=(fine,))
    assert "1 of 1 ranges hold every value of 64 held-out batches" in flat(none) and "outside" not in flat(none)
    assert "No value of 64 held-out batches lies outside." in html.render(none, Plan(decisions=(), tensors=()))


def test_text_names_no_tensor_that_holds_nearly_all_values_unless_the_others_cost(exported: Exported) -> None:
    def covered(name: str, outside: float, values: int, error: float) -> Coverage:
        return Coverage(tensor=name, outside=outside, values=values, beyond=0.5, error=error)

    many, costly = covered("many", 1.0e-4, 9, 1.1), covered("costly", 2e-6, 9, 2.1)
    few, chance = covered("few", 0.9e-4, 9, 1.9), covered("chance", 2e-6, 7, 50.0)
    fine = covered("fine", 0, 0, 1)
    report = replace(exported.report, coverage=(many, few, chance, costly, fine), coverage_batches=64)
    said = flat(report)
    assert "1 of 5 ranges hold every value of 64 held-out batches, 2 nearly all" in said
    assert "outside: many: 0.010 % of values" in said and "outside: costly: under 0.001 % of values" in said
    assert "outside: few" not in said and "outside: chance" not in said and "less of each" not in said
    page = html.render(report, Plan(decisions=(), tensors=()))
    assert all(f"<code>{name}</code>" in page for name in ("many", "few", "chance", "costly"))
    assert len(json.loads(report.to_json())["coverage"]) == 5


def test_html_needs_no_network_and_lists_every_node(exported: Exported) -> None:
    html = (exported.folder / "report.html").read_text()
    assert not re.search(r"(src|href)=|@import|url\(|<script", html)
    for line in (exported.folder / "plan.txt").read_text().splitlines()[1:]:
        assert line.split(" | ")[0] in html
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "br", "hr", "link", "img", "col"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Checker().feed(html)
    assert open_tags == []


def test_manifest_says_inputs_outputs_target_session_budget_and_versions(exported: Exported) -> None:
    found = runtime.load(exported.folder).manifest
    assert [(t.name, t.dtype, t.shape) for t in found.inputs] == [("image", "float32", ("batch", 3, 8, 8))]
    assert [(t.name, t.shape) for t in found.outputs] == [("logits", ("batch", 4))]
    assert (found.name, found.target, found.budget.min_snr_db) == ("residual", "x86-vnni", 10.0)
    assert found.session == X86_VNNI.session
    assert found.versions["onnxruntime"] == onnxruntime.__version__
    assert {"onnx", "torch", "numpy"} <= found.versions.keys()
    assert manifests.loads((exported.folder / "manifest.json").read_text(), "m") == found


def test_layer_inside_a_branch_is_listed_as_float_with_its_reason(tmp_path: Path) -> None:
    proto = graphs.proto(
        """(float[N,3,6,6] x, bool[1] c) => (float[N,4,6,6] y) {
            [a] h = Conv(x, w)
            z = Relu(h)
            y = If (c) <then_branch = t () => (float[N,4,6,6] p) { [inner] p = Conv(z, v) },
                        else_branch = e () => (float[N,4,6,6] q) { q = Neg(z) }>
        }""",
        {"w": graphs.noise(1, 4, 3, 1, 1), "v": graphs.noise(2, 4, 4, 1, 1)},
    )
    onnx.save(proto, tmp_path / "if.onnx")
    seen = [{"x": graphs.noise(n, 1, 3, 6, 6), "c": np.array([True])} for n in range(8)]
    source, recipe = exporter.from_onnx(tmp_path / "if.onnx"), exporter.load_recipe("portable")
    report = exporter.export(source, recipe, calibration=seen, out=tmp_path / "b")
    assert [(layer.node, layer.macs, layer.reason) for layer in report.float_layers] == [
        ("inner", 4 * 4 * 36, "inside a branch or loop body, which is not quantized")
    ]
    assert report.integer_macs == pytest.approx(4 / 8)  # the first Conv reads four channels, one of them 0


def test_search_says_how_fast_the_plan_was_beside_fp32_and_plainly_if_it_is_slower(exported: Exported) -> None:
    report, first = exported.report, exported.report.search.first

    def said(fp32_ms: float | None, ms: float, timed: bool = True) -> str:
        chosen = replace(first, ms=ms, timed=timed)
        points = (chosen, replace(first, ms=1.0))
        found = replace(report.search, chosen=chosen, points=points, fp32_ms=fp32_ms)
        return text.search(replace(report, search=found))

    assert "FP32" not in said(None, 1.0)
    assert "1.50x as fast as FP32 when it was timed;" in said(1.5, 1.0)
    assert "0.90x as fast as FP32 when it was timed: NO PLAN WITH AN INT8 LAYER IS FASTER;" in said(0.9, 1.0)
    assert "0.75x as fast as FP32 when it was timed: a faster plan is not accurate enough;" in said(1.5, 2.0)
    assert "1.25x as fast as FP32 as predicted;" in said(1.5, 1.2, timed=False)


def test_page_marks_the_plans_that_were_timed(exported: Exported) -> None:
    first = exported.report.search.first
    points = (first, replace(first, ms=first.ms / 2, snr_db=1.0, timed=True))
    found = replace(exported.report.search, points=points)
    page = html.render(replace(exported.report, search=found), Plan(decisions=(), tensors=()))
    assert f"{first.ms / 2:.3f}*</td>" in page and f"{first.ms:.3f}</td>" in page
    assert "predicted ms" not in page


def test_search_says_what_was_announced_and_what_it_took(exported: Exported) -> None:
    found = replace(exported.report.search, evaluations=92, announced=97)
    report = replace(exported.report, search=found, search_took=None)
    assert "92 evaluations (97 announced) on calibration data" in text.search(report)
    took = Took(announced_seconds=100.0, seconds=88.0)
    said = "92 evaluations in 88 s (announced: 97 in 1.7 min) on calibration data"
    assert said in text.search(replace(report, search_took=took))
    one = replace(found, evaluations=1, announced=1)
    assert "1 evaluation in 88 s on" in text.search(replace(report, search=one, search_took=took))


@pytest.mark.parametrize(
    ("ms", "here", "int8", "met"),
    [
        ((3.0, 2.0), True, 5, False),
        ((3.0, 2.0), False, 5, True),  # of another machine's plan nobody knows
        ((3.0, 2.0), True, 0, True),  # it is the FP32 model
        ((2.05, 2.0), True, 5, True),  # noise
        ((0.15, 0.1), True, 5, True),  # too small to tell
        ((1.0, 2.0), True, 5, True),
    ],
)
def test_bundle_that_is_slower_than_fp32_where_its_plan_was_chosen_is_not_met(
    ms: tuple[float, float], here: bool, int8: int, met: bool, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Timing(
        int8_ms=ms[0], fp32_ms=ms[1], ratio=ms[1] / ms[0], threads=1, rounds=3, cpu="a CPU", onnxruntime="1"
    )  # fmt: skip
    make = importlib.import_module("exporter.report.make")
    monkeypatch.setattr(make, "measure", lambda bundle, clock: taken)
    before = replace(exported.report, int8_nodes=int8, integer_macs=float(int8 > 0), timing=None)
    found = make.timed(
        before,
        exported.folder,
        exporter.load_recipe("x86-vnni"),
        (),
        None,
        Mock(announced_seconds=0.0, seconds=0.0),
        here,
    )
    assert found.met is met
    said = " ".join(str(found).split())
    assert ("speedup: 0.666667 (at least 0.95), slower than FP32" in said) is not met
    assert said.count("SLOWER than FP32 here") == (met and ms[0] > ms[1] and int8 > 0)
