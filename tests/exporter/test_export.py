"""What an export writes for phones and other CPUs, on two small graphs: one in integers, and one that saturates."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx
import pytest

import runtime
from exporter import Report
from exporter.report.value import Node
from runtime import BundleError, cpu
from runtime import manifest as manifests
from runtime.explain import ADDED, read_plan
from tests.exporter import graphs, int8
from tests.exporter.conftest import LIMITS, Exported, export


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def found(report: Report) -> dict[str, tuple[float, bool]]:
    return {line.what: (line.found, line.met) for line in report.lines}


def test_phones_file_and_its_operators_are_written_and_listed(phone: Exported) -> None:
    files = contents(phone.folder)
    listed = runtime.load(phone.folder).manifest.files
    assert files.keys() - {manifests.MANIFEST} == listed.keys()
    assert {manifests.INT8, manifests.ORT, manifests.OPERATORS} < listed.keys()
    assert phone.report.ort_bytes == listed[manifests.ORT].size_bytes == len(files[manifests.ORT])
    assert b"QLinearConv" in files[manifests.OPERATORS]
    assert f"model.int8.ort {len(files[manifests.ORT]) / 1e6:.2f}" in str(phone.report)


def test_phones_file_gives_the_outputs_of_the_onnx_file_and_passes_its_own_check(phone: Exported) -> None:
    as_onnx, as_ort = runtime.load(phone.folder, threads=1), runtime.load(phone.folder, threads=1, ort=True)
    for batch in int8.images(7, 3):
        np.testing.assert_array_equal(as_ort.run(batch)["logits"], as_onnx.run(batch)["logits"], strict=True)
    verdict = runtime.check(as_ort)
    assert (verdict.met, verdict.exact, verdict.integer_macs) == (True, True, 1.0)


def test_bundle_for_a_phone_needs_no_onnx_file_and_one_without_either_is_refused(
    phone: Exported, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(phone.folder, tmp_path / "copy"))
    for name in (manifests.INT8, manifests.FP32):
        (copy / name).unlink()
    assert runtime.check(runtime.load(copy, ort=True)).met
    (copy / manifests.ORT).unlink()
    with pytest.raises(BundleError, match="model.int8.onnx: found nothing, expected a file"):
        runtime.load(copy, ort=True)


def test_exporting_again_with_the_phones_file_gives_the_same_bytes(phone: Exported, cnn: Path, tmp_path: Path) -> None:
    again = export(cnn, tmp_path / "again", "portable", ort=True, **LIMITS)
    expected = contents(phone.folder)
    assert len(expected) == 12
    assert [name for name, content in contents(tmp_path / "again").items() if content != expected[name]] == []
    assert again.nodes == phone.report.nodes


def test_phones_file_is_not_written_unasked(saturating: Exported) -> None:
    assert saturating.report.ort_bytes is None and not saturating.report.mobile
    assert not {manifests.ORT, manifests.OPERATORS} & contents(saturating.folder).keys()
    assert saturating.report.ram_bytes is None


def test_report_says_for_both_files_what_a_phones_accelerator_would_take(phone: Exported) -> None:
    assert phone.report.mobile.keys() == {manifests.INT8, manifests.FP32}
    for judged in phone.report.mobile.values():
        assert [each.provider for each in judged][:1] == ["NNAPI"]
        assert all(0 <= each.taken <= each.nodes for each in judged)


def test_limits_on_size_memory_and_integers_are_measured_and_met(phone: Exported) -> None:
    lines = found(phone.report)
    assert lines["integer_macs"] == (1.0, True)
    assert lines["max_size_bytes"] == (phone.report.ort_bytes, True)
    assert lines["max_ram_bytes"] == (phone.report.ram_bytes, True)
    assert phone.report.ram_bytes is not None and 1e4 < phone.report.ram_bytes < 1e9
    assert phone.report.met
    assert "of memory to run it" in " ".join(str(phone.report).replace("\u00a0", " ").split())
    budget = runtime.load(phone.folder).manifest.budget
    assert {name: getattr(budget, name) for name in LIMITS} == LIMITS
    assert json.loads((phone.folder / "report.json").read_text())["ram_bytes"] is None


def test_size_limit_that_is_not_met_fails_the_report_and_keeps_the_bundle(cnn: Path, tmp_path: Path) -> None:
    report = export(cnn, tmp_path / "b", "portable", max_size_bytes=1000, max_ram_bytes=2000)
    size = (tmp_path / "b" / manifests.INT8).stat().st_size
    assert found(report)["max_size_bytes"] == (size, False)
    assert found(report)["max_ram_bytes"] == (report.ram_bytes, False)
    assert not report.met
    said = " ".join(str(report).split())
    assert f"verdict NOT MET: max_size_bytes: {size} (at most 1000); max_ram_bytes: " in said
    unmet = {line.what for line in runtime.check(runtime.load(tmp_path / "b")).lines if not line.met}
    assert unmet == {"exported", "max_size_bytes", "max_ram_bytes"}


def test_report_lists_every_kernel_with_the_plans_reason_and_no_time(phone: Exported) -> None:
    plan = read_plan(phone.folder / "plan.txt")
    ran = runtime.kernels(runtime.load(phone.folder, threads=1)).kernels
    assert [(n.node, n.kernel, n.types, n.macs, n.integer) for n in phone.report.nodes] == [
        (k.node, k.kernel, k.types, k.macs, k.integer) for k in ran
    ]
    planned = {n.node: n for n in phone.report.nodes if n.precision}
    assert {ADDED.sub("", name) for name in planned} >= {"stem", "branch0", "branch1", "add", "head"}
    for name, node in planned.items():
        line = plan[ADDED.sub("", name)]
        assert (node.precision, node.reason) == (line.precision, line.reason) and node.reason
    assert {n.kernel for n in phone.report.nodes if not n.precision} <= {
        "QuantizeLinear",
        "DequantizeLinear",
        "Transpose",
    }
    assert sum(n.macs for n in phone.report.nodes) == phone.report.macs
    assert not {"ms", "time"} & {field.name for field in fields(Node)}
    html = (phone.folder / "report.html").read_text()
    assert all(n.node in html and n.kernel in html for n in phone.report.nodes)


def test_plan_says_what_the_pair_rule_did_to_each_layer_of_a_portable_bundle(
    phone: Exported, saturating: Exported
) -> None:
    plan = read_plan(phone.folder / "plan.txt")
    assert [name for name, line in plan.items() if "pair rule: " in line.reason] == [
        "stem",
        "branch0",
        "branch1",
        "head",
    ]
    assert "of pairs would break it; weight SNR " in plan["branch0"].reason
    assert "pair rule" not in (saturating.folder / "plan.txt").read_text()


def test_manifest_says_whether_the_weights_keep_the_pair_rule_and_where_they_were_recorded(
    phone: Exported, saturating: Exported
) -> None:
    for exported, kept in ((phone, True), (saturating, False)):
        about = runtime.load(exported.folder).manifest
        assert about.pair_rule is kept
        assert (about.recorded_on.machine, about.recorded_on.flags) == (platform.machine(), cpu.flags())


def test_bits_are_promised_on_machines_of_this_kind_where_all_runs_in_integers(phone: Exported, tmp_path: Path) -> None:
    assert runtime.load(phone.folder).manifest.exact_on == (platform.machine(),)
    text = "(float[N,64] x) => (float[N,4] y) { [g] h = Gemm(x, w)\n [s] y = Softmax(h) }"
    onnx.save(graphs.proto(text, {"w": graphs.noise(1, 64, 4)}), tmp_path / "softmax.onnx")
    report = export(tmp_path / "softmax.onnx", tmp_path / "b", "portable")
    assert [(n.kernel, n.integer) for n in report.nodes if n.node == "s"] == [("Softmax", False)]
    assert runtime.load(tmp_path / "b").manifest.exact_on == ()
