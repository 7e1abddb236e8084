from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnxruntime.quantization import QuantType

from exporter import ort_format
from exporter.errors import QuantizeError
from exporter.ort_format import OrtModel
from exporter.target import SESSION, TARGETS
from runtime.kernels import trace
from runtime.session import open_session
from tests.exporter import int8

ROOT = Path(__file__).parents[2]
AGAIN = """
import hashlib, sys
from exporter import ort_format
from exporter.target import SESSION, TARGETS
print(hashlib.sha256(ort_format.convert(sys.stdin.buffer.read(), SESSION, "portable").ort).hexdigest())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("int8") / "model.int8.onnx"
    return int8.quantized(path, QuantType.QUInt8, QuantType.QInt8).read_bytes()


@pytest.fixture(scope="module")
def made(model: bytes) -> OrtModel:
    return ort_format.convert(model, SESSION, "portable")


def batches(count: int = 3) -> list[dict[str, np.ndarray]]:
    return list(int8.images(3, count))


def test_ort_file_gives_the_bits_and_the_integer_share_of_the_onnx_file(model: bytes, made: OrtModel) -> None:
    proof = ort_format.prove(made, model, batches(), SESSION, "portable")
    assert (proof.batches, proof.onnx_integer_macs, proof.ort_integer_macs) == (3, 1.0, 1.0)
    assert proof.kernels.macs == int8.CNN_MACS


def test_bytes_are_the_same_again_and_in_another_process(model: bytes, made: OrtModel) -> None:
    assert ort_format.convert(model, SESSION, "portable") == made
    ran = subprocess.run([sys.executable, "-c", AGAIN], input=model, capture_output=True, check=True, cwd=ROOT)
    assert ran.stdout.decode().strip() == hashlib.sha256(made.ort).hexdigest()


def test_sorting_moves_no_tensor_off_its_alignment_and_changes_no_number(
    model: bytes, made: OrtModel, tmp_path: Path
) -> None:
    entries = {**ort_format.entries(model, SESSION, "portable"), "session.save_model_format": "ORT"}
    open_session(model, entries=entries, optimized=tmp_path / "plain.ort")
    plain = (tmp_path / "plain.ort").read_bytes()
    assert abs(len(made.ort) - len(plain)) < 1024 and (len(made.ort) - len(plain)) % ort_format.ALIGNMENT == 0
    assert made.ort[-len(plain) // 2 :] == plain[-len(plain) // 2 :]
    (batch,) = batches(1)
    for ours, theirs in zip(open_session(made.ort).run(None, batch), open_session(plain).run(None, batch), strict=True):
        assert np.array_equal(ours, theirs)


def test_list_of_operators_covers_exactly_what_ran(model: bytes, made: OrtModel) -> None:
    proof = ort_format.prove(made, model, batches(1), SESSION, "portable")
    listed = {name for _, _, name in ort_format.operators(made.operators)}
    assert listed == {kernel.kernel for kernel in proof.kernels.kernels}
    assert {"QLinearConv", "QLinearAdd", "QGemm", "QuantizeLinear"} <= listed
    assert ort_format.domains(made.ort) == {"ai.onnx", "com.microsoft"}


def test_line_of_the_list_is_read_whatever_types_it_names() -> None:
    line = 'ai.onnx;13,14;Cast{"inputs": {"0": ["float", "int64_t"]}},Expand{"custom": [["a", "b"]]},Reshape\n'
    assert ort_format.operators("# Generated\n" + line) == {
        ("ai.onnx", opset, name) for opset in (13, 14) for name in ("Cast", "Expand", "Reshape")
    }


def test_no_path_and_no_name_of_this_machine_is_in_the_files(made: OrtModel) -> None:
    assert made.operators.startswith("# Generated from model/s:\n# - model.int8.ort\n")
    assert b"/tmp" not in made.ort and b"packlight-" not in made.ort and "/" not in made.operators.split("\n", 2)[2]


def test_onnxruntimes_tool_leaves_logging_as_it_was(model: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.root.handlers[:], logging.root.level
    ort_format.convert(model, SESSION, "portable")
    assert (logging.root.handlers, logging.root.level) == before
    assert capfd.readouterr() == ("", "")


def test_signed_activations_run_in_integers_on_every_target_that_may_be_arm(tmp_path: Path) -> None:
    signed = int8.quantized(tmp_path / "s8s8.onnx").read_bytes()
    for target in TARGETS.values():
        entry = ort_format.entries(signed, {}, target.name).get(ort_format.SIGNED_RUN_IN_INTEGERS)
        assert (entry == "1") == (target.machine in ("", "aarch64")), target.name
    proof = ort_format.prove(ort_format.convert(signed, {}, "arm64"), signed, batches(1), {}, "arm64")
    assert proof.ort_integer_macs == 1.0


def test_unsigned_activations_need_no_entry(model: bytes) -> None:
    assert ort_format.SIGNED_RUN_IN_INTEGERS not in ort_format.entries(model, {}, "arm64")


def test_ort_file_with_a_smaller_integer_share_is_refused(tmp_path: Path) -> None:
    """As convert_onnx_models_to_ort makes it without --target_platform arm."""
    signed = int8.quantized(tmp_path / "s8s8.onnx").read_bytes()
    half_float = ort_format.convert(signed, {}, "x86-vnni")
    shares = []
    for name, content in (("m.onnx", signed), ("m.ort", half_float.ort)):
        (tmp_path / name).write_bytes(content)
        entries = {"session.qdqisint8allowed": "1"}
        shares.append(trace(tmp_path / name, batches(1)[0], entries=entries, runs=1))
    with pytest.raises(QuantizeError, match=r"found 45\.7%.*expected 100\.0%.*qdqisint8allowed") as raised:
        ort_format.refuse_float(*shares)
    assert raised.value.node == "stem"


def test_ort_file_of_another_model_is_refused(model: bytes, made: OrtModel) -> None:
    wrong = replace(made, ort=ort_format.convert(int8.cnn().SerializeToString(), {}, "portable").ort)
    with pytest.raises(QuantizeError, match="output 0 of batch 0: found other bits"):
        ort_format.prove(wrong, model, batches(1), SESSION, "portable")


def test_damaged_ort_file_and_model_are_refused(model: bytes, made: OrtModel) -> None:
    with pytest.raises(QuantizeError, match="does not run as the .onnx file does"):
        ort_format.prove(replace(made, ort=made.ort[:1000]), model, batches(1), SESSION, "portable")
    unknown = int8.matmul(np.ones((4, 4), np.int8))
    unknown.graph.node[0].op_type = "Unheard"
    with pytest.raises(QuantizeError, match="cannot write it"):
        ort_format.convert(unknown.SerializeToString(), {}, "portable")
