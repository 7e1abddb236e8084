"""Tiny seeded ONNX models, and a whole valid bundle made of one of them, for the tests of the runtime."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from runtime import cpu
from runtime import manifest as manifests
from runtime.manifest import Budget, Machine, Manifest, Tensor
from runtime.probe import Probe, write_probe
from runtime.session import open_session

Array = NDArray[Any]
IMAGE = (3, 16, 16)
CLASSES = 10
# Multiply-adds of `classifier` for one image, by hand: conv 3x3 3 -> 24 at 16x16, depthwise stride 2 -> 8x8, 1x1 24 -> 16, gemm.
CLASSIFIER_MACS = 24 * 16 * 16 * 3 * 9 + 24 * 8 * 8 * 9 + 16 * 8 * 8 * 24 + 16 * 8 * 8 * CLASSES
PLAN = """# node | op_type | precision | reason
conv | Conv | int8 | the target runs Conv in integers
depthwise | Conv | int8 | the target runs Conv in integers
pointwise | Conv | int8 | the target runs Conv in integers
head | Gemm | int8 | the target runs Gemm in integers
"""


def build(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, list[int | str]],
    outputs: Mapping[str, list[int | str]],
    weights: Mapping[str, Array],
) -> onnx.ModelProto:
    """A checked opset-17 model; every input and output is float32."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def noise(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32) / 4


def classifier() -> onnx.ModelProto:
    """image [batch, 3, 16, 16] -> logits [batch, 10]: conv-relu, depthwise-relu, pointwise-relu, gemm.

    24 channels fill no whole NCHWc block of 16, so that padding shows wherever it is counted.
    """
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["image", "w0", "b0"], ["c0"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"], "relu0"),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], "depthwise", group=24, pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], "pointwise"),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("Flatten", ["r2"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["logits"], "head", transB=1),
    ]
    weights = {
        "w0": noise(rng, 24, 3, 3, 3),
        "b0": noise(rng, 24),
        "w1": noise(rng, 24, 1, 3, 3),
        "w2": noise(rng, 16, 24, 1, 1),
        "w3": noise(rng, CLASSES, 16 * 8 * 8),
        "b3": noise(rng, CLASSES),
    }
    return build(nodes, {"image": ["batch", *IMAGE]}, {"logits": ["batch", CLASSES]}, weights)


def pair_sum() -> onnx.ModelProto:
    """left, right [rows, 4] -> sum [rows, 4]: two inputs that share a named dimension."""
    shape: list[int | str] = ["rows", 4]
    return build(
        [helper.make_node("Add", ["left", "right"], ["sum"], "add")],
        {"left": shape, "right": shape},
        {"sum": shape},
        {},
    )


def images(seed: int, batches: int, size: int = 2) -> Iterator[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        yield {"image": rng.random((size, *IMAGE), dtype=np.float32)}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, batches: Iterator[dict[str, Array]]) -> None:
        self.batches = batches

    def get_next(self) -> dict[str, Array] | None:
        return next(self.batches, None)


def quantize(fp32: Path, int8: Path, batches: Iterator[dict[str, Array]]) -> None:
    """Static QDQ, u8 activations, s8 weights per channel of 7 bits, which keep the pair rule: the same bits on every x86."""
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "reduce_range": True}
    quantize_static(fp32, int8, _Reader(batches), per_channel=True, **types)


def run(model: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of bare ONNX Runtime, one thread."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(inputs)), strict=True))


def write_bundle(folder: Path, budget: Budget | None = None) -> Path:
    """Write a whole valid bundle of `classifier` into a new folder."""
    folder.mkdir(parents=True)
    fp32, int8 = folder / manifests.FP32, folder / manifests.INT8
    onnx.save(classifier(), fp32)
    quantize(fp32, int8, images(1, 8))
    probes = [Probe(inputs=each, fp32=run(fp32, each), int8=run(int8, each)) for each in images(2, 3)]
    write_probe(folder / manifests.PROBE, probes)
    (folder / "recipe.toml").write_text('format = 1\nname = "tiny"\n', encoding="utf-8")
    (folder / "plan.txt").write_text(PLAN, encoding="utf-8")
    for name in ("ranges.json", "report.json"):
        (folder / name).write_text("{}\n", encoding="utf-8")
    (folder / "report.html").write_text("<!doctype html>\n", encoding="utf-8")
    seal(folder, manifest(budget or Budget()))
    return folder


def add_ort(folder: Path, about: Manifest) -> Path:
    """Add the phone's file to a bundle: the model as ONNX Runtime optimized it, without what one CPU alone can run."""
    entries = {"session.save_model_format": "ORT", "optimization.disable_specified_optimizers": "NchwcTransformer"}
    open_session(folder / manifests.INT8, entries={**about.session, **entries}, optimized=folder / manifests.ORT)
    (folder / manifests.OPERATORS).write_text("# Generated\n", encoding="utf-8")
    seal(folder, about)
    return folder


def manifest(budget: Budget) -> Manifest:
    """The manifest of `classifier`'s bundle, files still to be listed by seal()."""
    return Manifest(
        name="tiny",
        target="x86-vnni",
        inputs=(Tensor(name="image", dtype="float32", shape=("batch", *IMAGE)),),
        outputs=(Tensor(name="logits", dtype="float32", shape=("batch", CLASSES)),),
        files={},
        pair_rule=True,
        exact_on=(),
        recorded_on=Machine(machine=platform.machine(), flags=cpu.flags()),
        session={"session.intra_op.allow_spinning": "0"},
        budget=budget,
        versions={"onnxruntime": ort.__version__},
    )


def seal(folder: Path, about: Manifest) -> None:
    """Write manifest.json over whatever the folder holds now."""
    found = sorted(path for path in folder.iterdir() if path.name != manifests.MANIFEST)
    files = {path.name: manifests.digest(path) for path in found}
    fields = {name: getattr(about, name) for name in Manifest.__dataclass_fields__}
    text = manifests.dumps(Manifest(**{**fields, "files": files}))
    (folder / manifests.MANIFEST).write_text(text, encoding="utf-8")
