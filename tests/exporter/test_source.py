from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import exporter
from exporter import graph, prepare, source, trace
from exporter.errors import CalibrationError, TraceError
from tests import models
from tests.exporter import graphs

X = np.zeros((2, 16), np.float32)


def test_source_keeps_the_callers_module_and_traces_nothing() -> None:
    module = models.module("linear")
    made = exporter.from_module(module, inputs={"x": torch.ones(2, 16)}, outputs=["y"])
    assert made.model is module
    assert (made.name, made.outputs, dict(made.dynamic)) == ("Linear", ("y",), {})
    assert made.inputs["x"].dtype == np.float32 and made.inputs["x"].shape == (2, 16)


def test_dynamic_axes_of_outputs_are_accepted_and_follow_from_the_inputs() -> None:
    made = exporter.from_module(
        models.module("linear"), {"x": X}, ["y"], dynamic={"x": {0: "batch"}, "y": {0: "batch"}}, name="tiny"
    )
    assert made.dynamic == {"x": {0: "batch"}}
    assert made.name == "tiny"


@pytest.mark.parametrize(
    ("inputs", "outputs", "dynamic", "says"),
    [
        ({}, ["y"], None, "no inputs"),
        ({"x": X}, [], None, "no outputs"),
        ({"x": X}, "logits", None, r"a list: \['logits'\]"),
        ({"x": X}, ["x"], None, "names used twice"),
        ({"x": X}, ["y", "y"], None, "names used twice"),
        ({0: X}, ["y"], None, "names: found 0, expected texts"),
        ({"x": X}, [0], None, "names: found 0, expected texts"),
        ({"x": X}, 3, None, "outputs: found int, expected a list of names"),
        ({"x": X}, ["y"], "batch", "dynamic: found 'batch', expected {input: {axis: label}}"),
        ({"x": X}, ["y"], [0], "dynamic: found .0., expected {input"),
        ({"x": X}, ["y"], {"z": {0: "n"}}, "found 'z', expected one of x, y"),
        ({"x": X}, ["y"], {"x": {2: "n"}}, r"dynamic: x: found axis 2, expected 0\.\.1"),
    ],
)
def test_names_that_do_not_fit_are_refused(inputs: object, outputs: object, dynamic: object, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        exporter.from_module(nn.Linear(16, 4), inputs, outputs, dynamic)  # type: ignore[arg-type]


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TraceError, match="found function, expected a torch.nn.Module"):
        exporter.from_module(models.linear, {"x": X}, ["y"])  # type: ignore[arg-type]


def test_example_that_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(CalibrationError) as error:
        exporter.from_module(nn.Linear(16, 4), {"x": np.array(["a"])}, ["y"])
    assert error.value.tensor == "x"


def old_conv(opset: int) -> onnx.ModelProto:
    """Conv, then a Pad, a Clip and a mean in the form of each opset."""
    axes = "<axes=[2, 3], keepdims=0>"
    text = f"""(float[N,3,8,8] x) => (float[N,4] y) {{
        [pad] p = Pad(x, pads)
        [conv] c = Conv(p, w, b)
        [clip] k = Clip(c, low, high)
        [mean] y = ReduceMean {axes} (k)
    }}"""
    weights = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "w": graphs.noise(1, 4, 3, 3, 3), "b": graphs.noise(2, 4),
        "low": np.float32(0), "high": np.float32(6),
    }  # fmt: skip
    return graphs.proto(text, weights, opset)


@pytest.mark.parametrize("opset", [11, 12, 13, 17])
def test_older_opset_is_raised_until_per_channel_weights_work(opset: int, tmp_path: Path) -> None:
    onnx.save(old_conv(opset), tmp_path / "m.onnx")
    batch = {"x": graphs.noise(3, 2, 3, 8, 8)}
    made = prepare.to_quantizable(trace.to_onnx(exporter.from_onnx(tmp_path / "m.onnx")).model, batch)
    assert made.model.opset_imports[""] == trace.OPSET
    from exporter import quantize

    plan, ranges = graphs.planned(made.model, batch)
    int8 = quantize.to_int8(made.model, plan, ranges)
    scales = [
        np.shape(graph.constant(node.inputs[1]))
        for node in int8.graph
        if node.op_type == "DequantizeLinear" and getattr(graph.constant(node.inputs[0]), "dtype", None) == np.int8
    ]
    assert scales == [(4,)]


def test_opset_9_is_refused_with_what_to_do(tmp_path: Path) -> None:
    onnx.save(graphs.proto("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }", opset=9), tmp_path / "old.onnx")
    with pytest.raises(TraceError, match="found opset 9, expected opset 11 or newer; export the model again"):
        exporter.from_onnx(tmp_path / "old.onnx")


def test_integer_inputs_keep_their_dtype(tmp_path: Path) -> None:
    text = "(int64[N,5] ids) => (float[N,5,8] y) { y = Gather(table, ids) }"
    onnx.save(graphs.proto(text, {"table": graphs.noise(1, 20, 8)}), tmp_path / "m.onnx")
    traced = trace.to_onnx(exporter.from_onnx(tmp_path / "m.onnx"))
    assert [(i.name, i.dtype, i.shape) for i in graph.inputs(traced.model)] == [("ids", "int64", ("N", 5))]


@pytest.mark.parametrize("content", [None, b"", b"hello, this is no protobuf", pickle.dumps({"a": 1})])
def test_what_is_no_onnx_file_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TraceError, match=r"m\.onnx: found "):
        exporter.from_onnx(path)


def external(folder: Path, location: str) -> Path:
    """A model whose weight lies in another file of `folder`, then points to `location`."""
    folder.mkdir(exist_ok=True)
    text = "(float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }"
    onnx.save(
        graphs.proto(text, {"w": graphs.noise(1, 4, 4)}), folder / "m.onnx",
        save_as_external_data=True, location="w.bin", size_threshold=0,
    )  # fmt: skip
    model = onnx.load(folder / "m.onnx", load_external_data=False)
    next(entry for entry in model.graph.initializer[0].external_data if entry.key == "location").value = location
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def test_external_data_in_the_folder_is_read(tmp_path: Path) -> None:
    made = exporter.from_onnx(external(tmp_path / "m", "w.bin"))
    run = graph.runner(trace.to_onnx(made).model)
    x = graphs.noise(2, 3, 4)
    np.testing.assert_allclose(run({"x": x})["y"], x @ graphs.noise(1, 4, 4), rtol=1e-5)


@pytest.mark.parametrize("location", ["../w.bin", "sub/../../w.bin", "{outside}/w.bin", "link.bin", "..\\w.bin", ""])
def test_external_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    path = external(tmp_path / "m", location.format(outside=tmp_path))
    shutil.copy(path.parent / "w.bin", tmp_path / "w.bin")
    (path.parent / "link.bin").symlink_to(tmp_path / "w.bin")
    with pytest.raises(TraceError, match="tensor w: found external data .* expected a file in the model's own folder"):
        exporter.from_onnx(path)


def test_external_data_that_is_missing_is_named(tmp_path: Path) -> None:
    path = external(tmp_path / "m", "w.bin")
    (path.parent / "w.bin").unlink()
    with pytest.raises(TraceError, match=r"tensor w: found no file w\.bin"):
        exporter.from_onnx(path)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch.export program with a dynamic first axis."""
    path = tmp_path_factory.mktemp("pt2") / "tiny.pt2"
    module, x = models.module("linear").eval(), torch.from_numpy(graphs.noise(1, 3, 16))
    with torch.no_grad():
        torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)), path)
    return path


def test_exported_program_brings_its_examples_and_dynamic_axes(program: Path) -> None:
    made = exporter.from_program(program)
    assert made.name == "tiny"
    np.testing.assert_array_equal(made.inputs["input"], graphs.noise(1, 3, 16))
    assert [*made.dynamic["input"]] == [0]
    assert made.outputs == ("output_0",)


def test_exported_program_becomes_an_equal_graph_at_every_batch(program: Path) -> None:
    traced = trace.to_onnx(exporter.from_program(program, outputs=["logits"]))
    module = models.module("linear").eval()
    for size in (1, 3, 7):
        x = graphs.noise(size, size, 16)
        expected = module(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(graph.runner(traced.model)({"input": x})["logits"], expected, rtol=1e-4, atol=1e-6)
    assert [next(iter(sizes.values())) for sizes in traced.sizes] == [3, 4, 6]


class Trap:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("sprung",)


def with_trap(program: Path, out: Path, part: str) -> None:
    """The program with one part replaced by a pickle."""
    trap = io.BytesIO()
    torch.save((([Trap()],), {}), trap)
    with zipfile.ZipFile(program) as source_file, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as changed:
        for name in source_file.namelist():
            content = source_file.read(name)
            if part == "weights" and name.endswith("model_weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
            if (part == "inputs" and name.endswith("model.pt")) or (part == "weights" and "/weight_" in name):
                content = trap.getvalue()
            changed.writestr(name, content)


@pytest.mark.parametrize("part", ["inputs", "weights"])
def test_program_with_a_pickle_inside_is_refused_and_never_run(
    part: str, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with_trap(program, tmp_path / "bad.pt2", part)
    with pytest.raises(TraceError, match=r"bad\.pt2: found a pickle"):
        exporter.from_program(tmp_path / "bad.pt2")
    assert not (tmp_path / "sprung").exists()


def torch_save(path: Path) -> None:
    torch.save({"a": Trap()}, path)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Trap()))


def not_there(path: Path) -> None:
    pass


@pytest.mark.parametrize("write", [torch_save, plain_pickle, not_there])
def test_what_is_no_program_is_refused_quietly_and_never_run(
    write: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "m.pt2")
    with pytest.raises(TraceError, match=r"expected a program saved by torch\.export\.save"):
        exporter.from_program(tmp_path / "m.pt2")
    assert not (tmp_path / "sprung").exists()
    assert capfd.readouterr() == ("", "")


SAMPLE = """
import sizes
from exporter import from_module
import torch

def source():
    return from_module(torch.nn.Linear(sizes.WIDTH, 2), {"x": torch.zeros(1, sizes.WIDTH)}, ["y"])

def other():
    return from_module(torch.nn.Linear(sizes.WIDTH, 3), {"x": torch.zeros(1, sizes.WIDTH)}, ["y"])

def calibration():
    return []
"""


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    (tmp_path / "sizes.py").write_text("WIDTH = 5\n")
    (tmp_path / "sample.py").write_text(SAMPLE)
    yield tmp_path / "sample.py"
    sys.modules.pop("sizes", None)


def test_python_file_offers_source_and_data(sample: Path) -> None:
    offered = source.from_file(str(sample))
    assert offered.source().inputs["x"].shape == (1, 5)
    assert offered.calibration is not None and offered.calibration() == []
    assert (offered.heldout, offered.evaluate, offered.recipe) == (None, None, None)
    assert str(sample.parent) not in sys.path


def test_function_after_a_colon_is_the_source(sample: Path) -> None:
    assert source.from_file(f"{sample}:other").source().model.out_features == 3


def test_folder_means_its_sample_and_its_recipe(sample: Path) -> None:
    (sample.parent / "recipe.toml").write_text("format = 1\n")
    offered = source.from_file(str(sample.parent))
    assert offered.source().model.out_features == 2
    assert offered.recipe == sample.parent / "recipe.toml"


def test_file_that_offers_something_else_lists_what_it_has(sample: Path) -> None:
    with pytest.raises(
        TraceError, match=r"found functions calibration, .*other, source, expected a function sorce\(\)"
    ):
        source.from_file(f"{sample}:sorce")


def test_file_that_is_missing_or_needs_an_absent_package_says_so(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="found no such file"):
        source.from_file(str(tmp_path / "none.py"))
    (tmp_path / "needs.py").write_text("import no_such_package_of_ours\n")
    with pytest.raises(TraceError, match="No module named 'no_such_package_of_ours'; install what the file imports"):
        source.from_file(str(tmp_path / "needs.py"))


@pytest.mark.parametrize("dynamic", [{"x": [0]}, {"x": {"0": "b"}}, {"x": {0: 1}}, {"x": {True: "b"}}])
def test_dynamic_in_another_form_is_refused_with_the_right_one(dynamic: object) -> None:
    with pytest.raises(TraceError, match=r'dynamic: x: found .*, expected \{axis: label\}, as in \{0: "batch"\}'):
        exporter.from_module(nn.Linear(16, 4), {"x": X}, ["y"], dynamic)  # type: ignore[arg-type]


def test_inputs_without_names_are_refused() -> None:
    with pytest.raises(TraceError, match="inputs: found Tensor, expected a dict"):
        exporter.from_module(nn.Linear(16, 4), torch.ones(2, 16), ["y"])  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The onnxtxt format")
@pytest.mark.parametrize("suffix", ["json", "textproto", "onnxtxt"])
def test_other_files_with_a_suffix_that_onnx_knows_are_refused(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"m.{suffix}").write_text("no model {")
    with pytest.raises(TraceError, match="found no ONNX graph, expected a file saved by onnx.save"):
        exporter.from_onnx(tmp_path / f"m.{suffix}")


def test_external_data_that_is_too_short_is_refused(tmp_path: Path) -> None:
    proto = graphs.proto("(float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", {"w": graphs.noise(1, 4, 4)})
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:5])
    with pytest.raises(TraceError, match="external data: found .*5 bytes"):
        exporter.from_onnx(tmp_path / "m.onnx")


def test_input_of_unknown_rank_is_refused_in_words(tmp_path: Path) -> None:
    proto = graphs.proto("(float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(TraceError, match="input x: found no shape, expected a tensor with a number of axes"):
        exporter.from_onnx(tmp_path / "m.onnx")


def test_outputs_that_are_no_numbers_are_refused_and_what_to_export_instead_is_said(tmp_path: Path) -> None:
    proto = graphs.proto("(float[N,4] x) => (float[N,4] y, string[N,4] z) { y = Relu(x) z = Cast <to = 8> (x) }")
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(TraceError, match="output z: found strings, expected arrays of numbers; of a classifier"):
        exporter.from_onnx(tmp_path / "m.onnx")
    listed = onnx.helper.make_tensor_sequence_value_info("z", onnx.TensorProto.FLOAT, None)
    proto.graph.output[1].CopyFrom(listed)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(TraceError, match="output z: found a sequence or map"):
        exporter.from_onnx(tmp_path / "m.onnx")


def test_error_inside_a_python_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(TraceError, match=r"bad\.py: running it failed: found ZeroDivisionError: division by zero"):
        source.from_file(str(tmp_path / "bad.py"))
