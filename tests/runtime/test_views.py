from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import runtime
from runtime import views
from runtime.explain import Explained, Explanation, Planned, explain
from runtime.kernels import Kernel
from runtime.manifest import canonical


@pytest.fixture(scope="module")
def bundle(bundle_folder: Path) -> runtime.Bundle:
    return runtime.load(bundle_folder, threads=1)


def test_every_view_fits_80_columns(bundle: runtime.Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a_name_of_a_tensor/" * 12
    views.show(views.verdict(runtime.check(bundle), "tiny"))
    views.show(views.timing(runtime.bench(bundle, rounds=1), "tiny"))
    views.show(views.explanation(explain(bundle), "tiny"))
    views.show(views.outputs({long: np.ones((2, 3)), "empty": np.ones((0, 3))}))
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80


def test_big_model_with_long_names_is_explained_in_80_columns_with_its_numbers_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    big = Kernel(
        node="/encoder/layer.11/attention/self/query/MatMul_token_123",
        kernel="DynamicQuantizeMatMul",
        types="f32s8",
        ms=1234.567,
        macs=12_345_678_000,
        integer=True,
    )
    planned = Planned(op_type="MatMul", precision="float", reason="measured: it is faster in float here " * 4)
    nodes = (Explained(kernel=big, planned=planned),)
    views.show(views.explanation(Explanation(integer_macs=1.0, macs=big.macs, ms=big.ms, nodes=nodes), "big"))
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 80
    row = next(line for line in text.splitlines() if line.startswith("/enc"))
    assert row.split()[2:] == ["f32s8", "1234.567", "12345.678", "float", "1"]
    assert "1  measured: it is faster in float here" in text


def test_drift_stands_beside_coverage(bundle: runtime.Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    views.show(views.verdict(runtime.check(bundle), "tiny"))
    text = capsys.readouterr().out
    assert text.splitlines()[:1] == ["tiny: met"]
    assert "100.0 % of MACs in integer kernels; int8 outputs equal those recorded at" in text
    row = next(line for line in text.splitlines() if line.startswith("logits"))
    assert row.split()[-2:] == ["100.00", "%"]


def test_long_name_keeps_both_ends() -> None:
    assert views.middle("/model/layer1/block2/conv3/Conv", 12) == "/mode…3/Conv"
    assert views.middle("conv", 12) == "conv"


def test_outputs_in_json_have_strings_for_what_json_lacks() -> None:
    text = canonical(views.outputs_table({"y": np.float32([[1.5, np.nan, -np.inf]])}))
    assert json.loads(text) == {"y": {"dtype": "float32", "shape": [1, 3], "values": [1.5, "nan", "-inf"]}}
