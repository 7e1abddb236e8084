"""The forecast's outputs are those of a CPU without VNNI, bit for bit; without saturation, those of one that has it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from exporter.batches import Array
from exporter.forecast import predict, walk
from runtime import cpu
from runtime.errors import PacklightError
from runtime.session import open_session
from tests import devices
from tests.exporter.forecast import cases
from tests.exporter.forecast.cases import Case

NAMES = sorted([*cases.QUANTIZED, *cases.nodes()])
# Runs on the other CPU: numpy and onnxruntime alone.
RUN = """
import pathlib, sys
import numpy as np
from runtime.session import open_session
for file in sorted(pathlib.Path(sys.argv[1]).glob("*.onnx")):
    session = open_session(file, threads=1)
    with np.load(file.with_suffix(".inputs.npz")) as inputs:
        names = [output.name for output in session.get_outputs()]
        made = session.run(names, dict(inputs))
    np.savez(file.with_suffix(".outputs.npz"), **dict(zip(names, made)))
"""


@functools.cache
def outputs_on(device: str) -> Mapping[str, Mapping[str, Array]]:
    """{case: its outputs} on another CPU, all in one process."""
    with TemporaryDirectory() as folder:
        for number, name in enumerate(NAMES):
            case = cases.by_name(name)
            (Path(folder) / f"{number:03d}.onnx").write_bytes(case.model)
            np.savez(Path(folder) / f"{number:03d}.inputs.npz", **case.inputs)
        devices.run(device, RUN, folder)
        return {name: dict(np.load(Path(folder) / f"{number:03d}.outputs.npz")) for number, name in enumerate(NAMES)}


def outputs_here(case: Case) -> Mapping[str, Array]:
    opened = open_session(case.model)
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, opened.run(names, dict(case.inputs)), strict=True))


def model(case: Case) -> ir.Model:
    return ir.serde.deserialize_model(onnx.load_from_string(case.model))


def assert_same_bits(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("device", ["avx2", "avx512", "haswell"])
@pytest.mark.parametrize("name", NAMES)
def test_predicted_outputs_are_those_of_a_cpu_without_vnni_bit_for_bit(name: str, device: str) -> None:
    case = cases.by_name(name)
    assert_same_bits(predict(model(case), case.inputs), outputs_on(device)[name])


@pytest.mark.parametrize("name", NAMES)
def test_this_cpu_is_predicted_bit_for_bit_whether_it_saturates_or_not(name: str) -> None:
    case = cases.by_name(name)
    predicted = predict(model(case), case.inputs, saturates=cpu.pairs_in_int16())
    assert_same_bits(predicted, outputs_here(case))


EXACT = {"conv depthwise, 16 channels", "conv depthwise, 5 channels", "conv of one channel", "integer s8s8"}


@pytest.mark.parametrize("name", NAMES)
def test_every_case_clips_but_those_whose_kernels_are_exact(name: str) -> None:
    case = cases.by_name(name)
    cut = walk.cut(model(case))
    ran = walk.run(cut, case.inputs, saturates=True)
    assert any(clips.clipped for clips in ran.clips) == (name not in EXACT | {"conv depthwise weight given"})
    assert cut.rounds_here == ()
    if name in EXACT:
        assert cut.layers == ()
