from __future__ import annotations

from pathlib import Path

import pytest

import runtime
from runtime import manifest as manifests
from runtime.errors import BundleError
from runtime.explain import HEADER, Planned, explain, explain_file, read_plan
from runtime.manifest import Budget
from tests.runtime import models


def test_every_node_with_macs_meets_its_line_of_the_plan(bundle_folder: Path) -> None:
    found = explain(runtime.load(bundle_folder, threads=1))
    planned = {n.kernel.node.split("_token")[0]: n.planned for n in found.nodes if n.kernel.macs}
    reason = "the target runs {} in integers"
    assert planned == {
        **{
            name: Planned(op_type="Conv", precision="int8", reason=reason.format("Conv"))
            for name in ("conv", "depthwise", "pointwise")
        },
        "head": Planned(op_type="Gemm", precision="int8", reason=reason.format("Gemm")),
    }
    assert found.macs == 2 * models.CLASSIFIER_MACS


def test_node_onnxruntime_made_itself_has_no_plan(bundle_folder: Path) -> None:
    found = explain(runtime.load(bundle_folder, threads=1))
    assert {n.kernel.kernel for n in found.nodes if n.planned is None} >= {"QuantizeLinear", "DequantizeLinear"}


def test_bundle_without_a_plan_is_explained_by_its_kernels(own_bundle: Path) -> None:
    (own_bundle / "plan.txt").unlink()
    models.seal(own_bundle, models.manifest(Budget()))
    assert {n.planned for n in explain(runtime.load(own_bundle)).nodes} == {None}


@pytest.mark.parametrize(
    "node", ["conv", "conv_token_12", "conv_nchwc", "fused conv", "conv/MatMulAddFusion", "conv/MatmulTransposeFusion/"]
)
def test_names_that_onnxruntime_makes_meet_the_plan(node: str) -> None:
    from runtime.explain import ADDED

    assert ADDED.sub("", node) == "conv"


def test_reason_may_hold_the_separator(tmp_path: Path) -> None:
    (tmp_path / "plan.txt").write_text(f"{HEADER}\na/b | Conv | float | kept: x | y\n")
    assert read_plan(tmp_path / "plan.txt") == {"a/b": Planned(op_type="Conv", precision="float", reason="kept: x | y")}


@pytest.mark.parametrize(("text", "where"), [("", ":1"), ("# other\n", ":1"), (f"{HEADER}\na | Conv | int8\n", ":2")])
def test_plan_of_another_form_is_refused_by_line(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "plan.txt").write_text(text)
    with pytest.raises(BundleError, match=f"plan.txt{where}: "):
        read_plan(tmp_path / "plan.txt")


def test_file_of_no_bundle_is_explained_by_its_kernels(bundle_folder: Path) -> None:
    batch = next(models.images(3, 1))
    bundled = explain(runtime.load(bundle_folder, threads=1))
    for name, share in ((manifests.INT8, 1.0), (manifests.FP32, 0.0)):
        found = explain_file(bundle_folder / name, batch)
        assert (found.integer_macs, found.macs) == (share, 2 * models.CLASSIFIER_MACS)
        assert {node.planned for node in found.nodes} == {None}
    as_int8 = explain_file(bundle_folder / manifests.INT8, batch)
    assert [node.kernel.kernel for node in as_int8.nodes] == [node.kernel.kernel for node in bundled.nodes]


def test_phones_file_is_explained_with_the_plan(ort_bundle: Path) -> None:
    found = explain(runtime.load(ort_bundle, threads=1, ort=True))
    assert (found.integer_macs, found.macs) == (1.0, 2 * models.CLASSIFIER_MACS)
    assert {n.planned.op_type for n in found.nodes if n.kernel.macs and n.planned} == {"Conv", "Gemm"}
    bare = explain_file(ort_bundle / manifests.ORT, next(models.images(3, 1)))
    assert (bare.integer_macs, bare.macs) == (1.0, 2 * models.CLASSIFIER_MACS)


def test_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no")
    with pytest.raises(BundleError, match="no.onnx: ONNX Runtime .* cannot open it"):
        explain_file(tmp_path / "no.onnx", {})
