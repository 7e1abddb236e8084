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
from tests.exporter import graphs
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


@pytest.mark.parametrize("entries", [{"session.qdqisint8allowed": "1"}, {"session.x64quantprecision": "1"}])
def test_session_entries_decide_which_kernels_run_and_so_what_clips(entries: Mapping[str, str]) -> None:
    case = cases.by_name("chain s8s8")
    assert len(walk.cut(model(case)).layers) == 3
    cut = walk.cut(model(case), entries)
    assert cut.layers == ()
    opened = open_session(case.model, entries=entries)
    assert_same_bits(walk.run(cut, case.inputs, saturates=True).outputs, {"y": opened.run(None, dict(case.inputs))[0]})


def test_float_nodes_that_other_cpus_round_otherwise_are_named() -> None:
    made = graphs.model(
        "(float[N,4] x) => (float[N,4] y) { [add] a = Add(x, x) [soft] b = Softmax(a) [relu] c = Relu(b) [dot] y = MatMul(c, w) }",
        {"w": cases.leaning(0, 4, 4)},
    )
    assert walk.cut(made).rounds_here == ("soft", "dot")


def lstm(lean: int) -> Case:
    """A DynamicQuantizeLSTM whose weights are `lean`."""
    shape = {"w": (1, 4, 32), "r": (1, 8, 32)}
    inputs: dict[str, Array | None] = {
        "x": cases.real(0, 3, 1, 4),
        **{name: np.full(size, lean, np.int8) for name, size in shape.items()},
        **dict.fromkeys(("b", "lengths", "h", "c", "p"), None),
        "w_scale": np.full(1, 0.01, np.float32), "w_zero": np.zeros(1, np.int8),
        "r_scale": np.full(1, 0.01, np.float32), "r_zero": np.zeros(1, np.int8),
    }  # fmt: skip
    return cases.node("DynamicQuantizeLSTM", inputs, ("x",), "com.microsoft", hidden_size=8)


def test_weights_that_break_the_rule_inside_a_kernel_that_is_not_followed_are_refused_by_name() -> None:
    with pytest.raises(PacklightError, match=r"^DynamicQuantizeLSTM \(DynamicQuantizeLSTM\): found weights that break"):
        walk.cut(model(lstm(65)))
    assert walk.cut(model(lstm(64))).layers == ()


def test_conv_integer_of_int8_activations_by_uint8_weights_is_refused() -> None:
    inputs = {"x": cases.codes(0, np.int8, 1, 3, 5, 5), "w": cases.codes(1, np.uint8, 4, 3, 3, 3)}
    with pytest.raises(PacklightError, match="found int8 activations, uint8 weights"):
        walk.cut(model(cases.node("ConvInteger", inputs, ("x",))))


def test_layer_that_can_clip_inside_a_branch_is_refused_by_both_names() -> None:
    made = graphs.model(
        """(bool b, uint8[4,8] a) => (int32[4,2] y) {
            [choice] y = If (b) <
                then_branch = then () => (int32[4,2] t) { [inner] t = MatMulInteger(a, w) },
                else_branch = other () => (int32[4,2] e) { [same] e = MatMulInteger(a, w) }
            >
        }""",
        {"w": np.full((8, 2), 100, np.int8)},
    )
    with pytest.raises(PacklightError, match=r"(inner|same) \(MatMulInteger\).* inside choice \(If\)"):
        walk.cut(made)


def test_scale_for_each_row_is_refused() -> None:
    inputs = {
        "a": cases.codes(0, np.uint8, 3, 8), "b": cases.codes(1, np.int8, 8, 2),
        "a_scale": cases.real(2, 3), "b_scale": cases.real(3, 2),
    }  # fmt: skip
    case = cases.node("MatMulIntegerToFloat", inputs, ("a",), "com.microsoft")
    with pytest.raises(PacklightError, match=r"cannot be forecast: found a scale of shape \[3\]"):
        predict(model(case), case.inputs)


def test_dynamic_layer_inside_a_branch_is_refused() -> None:
    made = graphs.model(
        """(bool b, float[4,8] a) => (float[4,2] y) {
            [choice] y = If (b) <
                then_branch = then () => (float[4,2] t) {
                    c, s, z = DynamicQuantizeLinear(a)
                    i = MatMulInteger(c, w, z)
                    f = Cast<to=1>(i)
                    m = Mul(s, k)
                    t = Mul(f, m)
                },
                else_branch = other () => (float[4,2] e) { e = MatMul(a, v) }
            >
        }""",
        {"w": np.full((8, 2), 100, np.int8), "k": np.float32(0.1), "v": cases.leaning(0, 8, 2)},
    )
    with pytest.raises(PacklightError, match="DynamicQuantizeMatMul|MatMulInteger"):
        walk.cut(made)


def test_sequence_and_body_cross_the_cut_as_they_are() -> None:
    made = graphs.model(
        """(uint8[2,8] a, float[4,3] x) => (float[2,3] y) {
            parts = SplitToSequence<axis=0>(x, two)
            [dot] i = MatMulInteger(a, b)
            k = ArgMax<axis=1, keepdims=0>(i)
            first = Gather<axis=0>(k, zero)
            picked = SequenceAt(parts, first)
            yes = Cast<to=9>(first)
            y = If (yes) <
                then_branch = then () => (float[2,3] t) { t = Add(picked, x2) },
                else_branch = other () => (float[2,3] e) { e = Identity(picked) }
            >
        }""",
        {
            "b": np.array([[127, 127, 127, 127, -64, -63, -64, -63], [10] * 8], np.int8).T,
            "two": np.int64(2), "zero": np.int64(0), "x2": np.full((2, 3), 10, np.float32),
        },
    )  # fmt: skip
    batch = {"a": np.full((2, 8), 255, np.uint8), "x": cases.real(0, 4, 3)}
    # the first column sums to 255 · 254 = 64770, clipped to 65534 - 64770 = 764; the second to 20400
    np.testing.assert_array_equal(predict(made, batch, saturates=False)["y"], batch["x"][:2])
    np.testing.assert_array_equal(predict(made, batch)["y"], batch["x"][2:] + 10)
