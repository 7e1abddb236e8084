from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime.quantization import QuantType

from exporter import lint, ort_format
from exporter.errors import QuantizeError
from exporter.lint import Finding
from exporter.target import ARM64, PORTABLE, TARGETS, WASM, X86_AVX2, X86_VNNI
from runtime.bundle import load
from runtime.errors import BundleError
from runtime.manifest import canonical
from runtime.session import open_session
from tests.exporter import graphs, int8
from tests.exporter.conftest import Exported

EVERY = (None, *TARGETS.values())
GOOD = np.tile(np.int8([[60, -60], [68, 100], [127, -127], [-127, 127]]), (2, 1))  # pairs sum to 128, or differ in sign
PRECISE = {"session.x64quantprecision": "1"}


def model(codes: np.ndarray = GOOD, activation: str = "u8", readers: int = 1) -> ir.Model:
    return ir.serde.deserialize_model(int8.matmul(codes, activation, readers))


def found(model: ir.Model, target: object = None, **session: str) -> list[tuple[str, str, str]]:
    return [(each.rule, each.severity, each.node) for each in lint.check(model, target)]  # type: ignore[arg-type]


def changed(row: int, column: int, code: int) -> np.ndarray:
    codes = GOOD.copy()
    codes[row, column] = code
    return codes


@pytest.mark.parametrize("target", EVERY)
def test_good_file_has_no_findings(target: object) -> None:
    assert found(model(), target) == []


def test_weight_minus_128_is_an_error_everywhere_but_on_x86() -> None:
    bad = model(changed(3, 0, -128))
    for target in (None, PORTABLE, ARM64, WASM):
        assert (lint.MINUS_128, "error", "fc0") in found(bad, target)
    assert found(bad, X86_VNNI) == []


def test_weight_minus_128_is_found_in_integer_operators_and_behind_constant_nodes() -> None:
    text = """(uint8[N,4] x) => (int32[N,2] y) {
        [w] w = Constant <value: tensor = int8[4,2] {1, 2, 3, 4, 5, 6, 7, -128}> ()
        [m] y = MatMulInteger(x, w)
    }"""
    assert (lint.MINUS_128, "error", "m") in found(graphs.model(text), ARM64)


def test_layer_inside_a_branch_is_held_against_the_rules() -> None:
    text = """(uint8[N,4] x, bool on) => (int32[N,2] y) {
        [if] y = If (on) <
            then_branch = g1 () => (int32[N,2] a) { [inner] a = MatMulInteger(x, w) },
            else_branch = g2 () => (int32[N,2] b) { [other] b = MatMulInteger(x, v) }
        >
    }"""
    weights = {"w": np.full((4, 2), -128, np.int8), "v": np.full((4, 2), 1, np.int8)}
    assert found(graphs.model(text, weights), ARM64) == [(lint.MINUS_128, "error", "inner")]


def test_operator_in_the_block_of_one_cpu_is_an_error_on_every_target() -> None:
    text = '<ir_version: 8, opset_import: ["" : 20, "com.microsoft.nchwc" : 1]> g (float[1,8,4,4] x) => (float[1,8,4,4] y) '
    made = onnx.parser.parse_model(text + "{ [blocked] y = com.microsoft.nchwc.ReorderOutput <channels=8> (x) }")
    for target in EVERY:
        assert found(ir.serde.deserialize_model(made), target) == [(lint.ONE_CPU, "error", "blocked")]


def test_shared_int8_weight_is_an_error_where_the_session_entry_is_set_and_no_session_opens_there() -> None:
    shared = model(readers=2)
    assert found(shared) == [(lint.SHARED, "warning", "dw1")]
    assert found(shared, X86_VNNI) == []
    assert found(shared, replace(X86_VNNI, session=PRECISE)) == [(lint.SHARED, "error", "dw1")]
    data = int8.matmul(GOOD, readers=2).SerializeToString()
    open_session(data)
    with pytest.raises(BundleError):
        open_session(data, entries=PRECISE)
    open_session(int8.matmul(GOOD).SerializeToString(), entries=PRECISE)


def test_signed_activations_are_an_error_on_x86_and_none_on_arm() -> None:
    signed = model(activation="s8")
    assert found(signed) == [(lint.TYPES, "warning", "fc0")]
    assert found(signed, PORTABLE) == found(signed, X86_VNNI) == found(signed, WASM) == [(lint.TYPES, "error", "fc0")]
    assert found(signed, ARM64) == []


def test_unsigned_weights_are_a_warning_where_vnni_is() -> None:
    unsigned = model(GOOD.astype(np.uint8))
    assert found(unsigned, X86_VNNI) == [(lint.TYPES, "warning", "fc0")]
    assert found(unsigned, PORTABLE) == found(unsigned, ARM64) == found(unsigned) == []


@pytest.mark.parametrize("target", EVERY)
def test_wide_activations_have_no_kernel_anywhere(target: object) -> None:
    wide = lint.check(model(activation="u16"), target)  # type: ignore[arg-type]
    assert [(each.rule, each.severity) for each in wide] == [(lint.TYPES, "error")]
    assert "u16s8 in 1 layer" in wide[0].found and "float" in wide[0].found


def test_pair_that_saturates_is_an_error_where_pairs_are_summed_in_int16() -> None:
    bad = model(changed(0, 0, 61))  # 61 + 68 = 129
    assert found(bad) == [(lint.PAIRS, "warning", "fc0")]
    assert found(bad, PORTABLE) == found(bad, X86_AVX2) == [(lint.PAIRS, "error", "fc0")]
    assert found(bad, X86_VNNI) == found(bad, ARM64) == found(bad, WASM) == []


def test_depthwise_conv_needs_no_pair_rule_and_other_convs_do() -> None:
    text = """(uint8[N,C,8,8] x) => (int32[N,4,6,6] y) { [c] y = ConvInteger <group=GROUP> (x, w) }"""
    for group, channels, expected in ((4, 1, []), (2, 2, [(lint.PAIRS, "error", "c")])):
        weight = {"w": np.full((4, channels, 3, 3), 127, np.int8)}
        graph = graphs.model(text.replace("GROUP", str(group)).replace("C,8", f"{group * channels},8"), weight)
        assert found(graph, PORTABLE) == expected


def island(between: str) -> ir.Model:
    """x -> int8 Conv -> what is between, in Q/DQ -> int8 Conv."""
    text = f"""(float[N,4,6,6] x) => (float[N,4,H,W] y) {{
        a = QuantizeLinear(x, s, z)
        b = DequantizeLinear(a, s, z)
        [first] c = Conv(b, w)
        d = QuantizeLinear(c, s, z)
        e = DequantizeLinear(d, s, z)
        {between}
        g = QuantizeLinear(f, s, z)
        h = DequantizeLinear(g, s, z)
        [second] y = Conv(h, w) }}"""
    weights = {
        "s": np.float32(0.1),
        "z": np.uint8(128),
        "w": graphs.noise(1, 4, 4, 1, 1),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    }
    return graphs.model(text, weights)


@pytest.mark.parametrize("target", EVERY)
def test_float_node_between_int8_layers_is_named(target: object) -> None:
    for between in ("[alone] f = Pad(e, pads)", "[alone] f = Sin(e)"):
        assert (lint.ISLAND, "warning", "alone") in found(island(between), target)
    for between in ("f = Relu(e)", "f = MaxPool<kernel_shape=[2,2]>(e)", "f = Transpose<perm=[0,1,3,2]>(e)"):
        assert not [each for each in found(island(between), target) if each[0] == lint.ISLAND]


@pytest.fixture(scope="module")
def signed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return int8.quantized(tmp_path_factory.mktemp("signed") / "model.int8.onnx")


def test_ort_file_that_would_run_float_is_an_error_and_the_one_made_for_arm_is_not(
    signed_file: Path, tmp_path: Path
) -> None:
    batch = next(int8.images(2, 1))
    for target, expected in (("x86-vnni", [(lint.FLOAT_ORT, "error")]), ("arm64", [])):
        file = tmp_path / f"{target}.ort"
        file.write_bytes(ort_format.convert(signed_file.read_bytes(), {}, target).ort)
        findings = lint.check_ort(file, signed_file, batch, {}, "arm64")
        assert [(each.rule, each.severity) for each in findings] == expected
        assert lint.check(file) == ()


def test_ort_file_saved_for_one_cpu_is_found_by_its_operators(tmp_path: Path) -> None:
    """Every .ort file has the domain's name in its text, so that the text cannot tell."""
    file = tmp_path / "model.ort"
    entries = {"session.save_model_format": "ORT"}
    session = open_session(int8.cnn().SerializeToString(), entries=entries, optimized=file)
    assert session is not None and b"com.microsoft.nchwc" in file.read_bytes()
    blocked = "com.microsoft.nchwc" in ort_format.domains(file.read_bytes())  # on x86 alone
    assert [each.rule for each in lint.check(file)] == [lint.ONE_CPU] * blocked


def test_files_types_are_named_once_a_pair_with_the_number_of_layers(tmp_path: Path) -> None:
    unsigned = int8.quantized(tmp_path / "u8u8.onnx", QuantType.QUInt8, QuantType.QUInt8)
    findings = lint.check(unsigned, X86_VNNI)
    assert [each.rule for each in findings] == [lint.TYPES] and "u8u8 in 4 layers" in findings[0].found


def test_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"\xff\xffno")
    with pytest.raises(QuantizeError, match="expected an ONNX file"):
        lint.check(tmp_path / "no.onnx")


FINDINGS = {
    "model.int8.onnx": (
        *lint.check(ir.serde.deserialize_model(int8.matmul(changed(3, 0, -128), "s8"))),
        Finding(rule=lint.ONE_CPU, severity="error", node="", found="this", expected="that", do="do it"),
    ),
    "model.int8.ort": (),
}


def test_text_has_errors_first_fits_80_columns_and_ends_with_the_count() -> None:
    text = lint.render(FINDINGS)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "model.int8.onnx: error weight-minus-128" and lines[-1] == "2 errors, 1 warning"
    assert lint.render({"a.onnx": ()}) == "0 errors, 0 warnings"


def test_text_names_one_fault_once_with_its_first_nodes() -> None:
    one = lint.check(model(changed(0, 0, 61), readers=5), PORTABLE)
    assert [each.node for each in one] == [f"fc{n}" for n in range(5)]
    lines = lint.render({"a.onnx": one}).splitlines()
    assert lines[:1] == ["a.onnx: error pair-rule"] and lines[-1] == "5 errors, 0 warnings"
    assert lines[1].startswith("  fc0, fc1, fc2 and 2 more: found neighbouring weights") and len(lines) == 5


def test_sarif_has_every_rule_and_one_result_a_finding() -> None:
    log = json.loads(canonical(lint.sarif(FINDINGS)))
    assert (log["version"], len(log["runs"])) == ("2.1.0", 1)
    driver, results = log["runs"][0]["tool"]["driver"], log["runs"][0]["results"]
    assert [rule["id"] for rule in driver["rules"]] == list(lint.RULES)
    assert len(results) == len(FINDINGS["model.int8.onnx"])
    for result, finding in zip(results, FINDINGS["model.int8.onnx"], strict=True):
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"] == finding.rule
        assert (result["level"], result["message"]["text"]) == (finding.severity, finding.message)
        place = result["locations"][0]
        assert place["physicalLocation"]["artifactLocation"]["uri"] == "model.int8.onnx"
        assert [each["name"] for each in place.get("logicalLocations", [])] == [finding.node] * bool(finding.node)


def test_bundle_is_held_against_its_own_target_and_its_ort_file_is_run(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.folder, tmp_path / "bundle")
    bundle = load(tmp_path / "bundle")
    assert lint.check_bundle(bundle, X86_VNNI) == {"model.int8.onnx": ()}
    fp32 = (bundle.path / "model.fp32.onnx").read_bytes()
    for model, expected in ((bundle.path / "model.int8.onnx").read_bytes(), []), (fp32, [lint.FLOAT_ORT]):
        (bundle.path / "model.int8.ort").write_bytes(ort_format.convert(model, bundle.manifest.session, "x86-vnni").ort)
        findings = lint.check_bundle(bundle, X86_VNNI)
        assert [each.rule for each in findings["model.int8.ort"]] == expected


def test_sarif_names_a_file_by_a_uri() -> None:
    log = lint.sarif({"my models/a b.onnx": FINDINGS["model.int8.onnx"]})
    assert '"uri": "my%20models/a%20b.onnx"' in canonical(log)
