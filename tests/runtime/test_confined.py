from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import runtime
from runtime import cli, confined
from runtime import manifest as manifests
from runtime.errors import PacklightError
from runtime.manifest import Budget, Tensor
from runtime.probe import Probe, write_probe
from tests.runtime import models

Captured = pytest.CaptureFixture[str]


def call(*args: object) -> int:
    with pytest.raises(SystemExit) as exit_status:
        cli.main([str(arg) for arg in args])
    return int(exit_status.value.code or 0)


def sealed(folder: Path, model: onnx.ModelProto) -> Path:
    """A bundle whose int8 model is this one of x [1] -> y."""
    folder.mkdir()
    (folder / manifests.INT8).write_bytes(model.SerializeToString())
    x = {"x": np.ones(1, np.float32)}
    write_probe(folder / manifests.PROBE, [Probe(inputs=x, fp32={"y": x["x"]}, int8={"y": x["x"]})])
    tensors = (Tensor(name="x", dtype="float32", shape=(1,)),), (Tensor(name="y", dtype="float32", shape=(1,)),)
    models.seal(folder, replace(models.manifest(Budget()), inputs=tensors[0], outputs=tensors[1], session={}))
    return folder


def looping(turns: int) -> onnx.ModelProto:
    """y = x + 1 + 1 ..., so many times."""
    scalar = TensorProto.FLOAT
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Add", ["before", "before"], ["after"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("before", scalar, [1]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("after", scalar, [1]),
        ],
    )
    weights = {"turns": np.array(turns, np.int64), "on": np.array(True)}
    return models.build(
        [helper.make_node("Loop", ["turns", "on", "x"], ["y"], body=body)], {"x": [1]}, {"y": [1]}, weights
    )


def growing(elements: int) -> onnx.ModelProto:
    """y = the sum of so many ones, which the graph makes when it runs."""
    nodes = [
        helper.make_node("Cast", ["x"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Mul", ["whole", "many"], ["shape"]),
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=numpy_helper.from_array(np.ones(1, np.float32))),
        helper.make_node("ReduceSum", ["ones"], ["y"], keepdims=1),
    ]
    return models.build(nodes, {"x": [1]}, {"y": [1]}, {"many": np.int64([elements])})


def test_verdict_and_status_are_those_of_the_command_itself(
    bundle_folder: Path, tmp_path: Path, capsys: Captured
) -> None:
    flags = ("--threads", 1, "--json", "--min-integer-macs", 0.5)
    assert call("check", bundle_folder, *flags) == 0
    alone = capsys.readouterr().out
    assert call("check", bundle_folder, *flags, "--timeout", 60, "--junit", tmp_path / "p.xml") == 0
    assert capsys.readouterr().out == alone
    assert "<testsuite" in (tmp_path / "p.xml").read_text()
    assert call("check", tmp_path / "none", "--timeout", 60) == 2
    assert capsys.readouterr().err.endswith(
        "found no folder, expected a bundle; give the folder that packlight export wrote\n"
    )


def test_loop_without_end_is_2_and_one_line_in_time(tmp_path: Path, capsys: Captured) -> None:
    short = sealed(tmp_path / "short", looping(3))
    assert runtime.load(short).run({"x": np.ones(1, np.float32)})["y"] == 8
    start = time.monotonic()
    assert call("check", sealed(tmp_path / "long", looping(2**62)), "--timeout", 4) == 2
    assert time.monotonic() - start < 20
    said = capsys.readouterr()
    assert said.err.startswith("error: the check was ended: found no verdict in 4 s") and said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux holds a process to its memory")
def test_tensor_of_a_terabyte_is_2_and_one_line_in_little_memory(tmp_path: Path, capsys: Captured) -> None:
    for elements in (1 << 30, 1 << 38):
        folder = sealed(tmp_path / str(elements), growing(elements))
        assert call("check", folder, "--threads", 1, "--max-memory", "512MB", "--timeout", 60) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("error: ")


@pytest.mark.parametrize("text", ["", "0", "2 XB", "-1GB", "1e9", "9" * 400, "\x1b[2J"])
def test_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(PacklightError, match="--max-memory: found "):
        confined.size(text, "--max-memory")


def test_sizes_have_units() -> None:
    assert [confined.size(each, "x") for each in ("7", "2GB", "512MiB", "1.5 kb")] == [7, 2 * 10**9, 512 << 20, 1500]
