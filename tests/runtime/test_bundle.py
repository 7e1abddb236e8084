from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import runtime
from runtime import cpu
from runtime import manifest as manifests
from runtime.errors import BundleError, InputError, PacklightError
from runtime.manifest import Budget, Tensor
from tests.runtime import models


@pytest.fixture(scope="module")
def bundle(bundle_folder: Path) -> runtime.Bundle:
    return runtime.load(bundle_folder, threads=1)


@pytest.fixture(scope="module")
def pair(bundle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> runtime.Bundle:
    """A bundle with two inputs that share a named dimension."""
    folder = tmp_path_factory.mktemp("pair")
    onnx.save(models.pair_sum(), folder / manifests.INT8)
    (folder / manifests.PROBE).write_bytes((bundle_folder / manifests.PROBE).read_bytes())
    about = replace(
        models.manifest(Budget()),
        name="pair",
        inputs=tuple(Tensor(name=name, dtype="float32", shape=("rows", 4)) for name in ("left", "right")),
        outputs=(Tensor(name="sum", dtype="float32", shape=("rows", 4)),),
    )
    models.seal(folder, about)
    return runtime.load(folder)


def rows(count: int, dtype: type = np.float32) -> models.Array:
    return np.ones((count, 4), dtype)


def test_run_gives_the_bits_of_bare_onnxruntime(bundle: runtime.Bundle) -> None:
    for probe in bundle.probes():
        expected = models.run(bundle.path / manifests.INT8, probe.inputs)
        np.testing.assert_array_equal(bundle.run(probe.inputs)["logits"], expected["logits"], strict=True)


def test_any_size_of_a_named_dimension_runs(bundle: runtime.Bundle) -> None:
    for size in (1, 5):
        assert bundle.run(next(models.images(0, 1, size)))["logits"].shape == (size, models.CLASSES)


def test_attributes_say_what_was_opened(bundle: runtime.Bundle, bundle_folder: Path) -> None:
    assert (bundle.path, bundle.threads, bundle.manifest.name) == (bundle_folder, 1, "tiny")
    assert bundle.providers == ("CPUExecutionProvider",)
    assert repr(bundle).endswith("name='tiny', target='x86-vnni')")


def test_lists_are_taken_as_arrays_but_never_converted(pair: runtime.Bundle) -> None:
    with pytest.raises(InputError, match="input left: found float64, expected float32; convert it with astype"):
        pair.run({"left": [[1.0] * 4], "right": rows(1)})  # type: ignore[dict-item]


def test_missing_and_unknown_names_are_refused(pair: runtime.Bundle) -> None:
    with pytest.raises(InputError, match="input is missing: found left, expected right") as missing:
        pair.run({"left": rows(1)})
    with pytest.raises(InputError, match="input is unknown: found middle, expected left, right") as unknown:
        pair.run({"left": rows(1), "middle": rows(1), "right": rows(1)})
    assert (missing.value.name, unknown.value.name) == ("right", "middle")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32])
def test_another_dtype_is_refused(pair: runtime.Bundle, dtype: type) -> None:
    with pytest.raises(InputError, match=f"input right: found {np.dtype(dtype)}, expected float32"):
        pair.run({"left": rows(1), "right": rows(1, dtype)})


@pytest.mark.parametrize("shape", [(4,), (1, 1, 4), (1, 5), ()])
def test_another_rank_or_size_is_refused(pair: runtime.Bundle, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as refusal:
        pair.run({"left": np.ones(shape, np.float32), "right": rows(1)})
    assert str(refusal.value).startswith(f"input left: found shape {list(shape)}, expected ['rows', 4]")


def test_one_named_dimension_has_one_size(pair: runtime.Bundle) -> None:
    with pytest.raises(InputError, match=r"input right: found shape \[3, 4\], expected \['rows', 4\] with rows=2"):
        pair.run({"left": rows(2), "right": rows(3)})


def test_probe_of_other_tensors_is_refused(pair: runtime.Bundle) -> None:
    with pytest.raises(BundleError, match=r"probe.npz: found tensors \['image'\], expected \['left', 'right'\]"):
        pair.probes()


def test_failure_inside_onnxruntime_is_our_error(bundle_folder: Path, own_bundle: Path) -> None:
    gather = onnx.helper.make_node("Gather", ["table", "image"], ["logits"], "gather")
    model = models.build(
        [gather],
        {"image": ["batch"]},
        {"logits": ["batch", 2]},
        {"table": models.noise(np.random.default_rng(0), 3, 2)},
    )
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    onnx.save(model, own_bundle / manifests.INT8)
    about = replace(
        models.manifest(Budget()),
        inputs=(Tensor(name="image", dtype="int64", shape=("batch",)),),
        outputs=(Tensor(name="logits", dtype="float32", shape=("batch", 2)),),
    )
    models.seal(own_bundle, about)
    with pytest.raises(PacklightError, match="ONNX Runtime failed while running: found .*indices element out of data"):
        runtime.load(own_bundle).run({"image": np.array([7])})


@pytest.mark.parametrize(
    ("role", "tensor"),
    [
        ("inputs", Tensor(name="picture", dtype="float32", shape=("batch", 3, 16, 16))),
        ("inputs", Tensor(name="image", dtype="uint8", shape=("batch", 3, 16, 16))),
        ("outputs", Tensor(name="logits", dtype="float32", shape=("batch",))),
    ],
)
def test_model_that_is_not_the_manifests_is_refused(own_bundle: Path, role: str, tensor: Tensor) -> None:
    about = models.manifest(Budget())
    tensors = {"inputs": about.inputs, "outputs": about.outputs, role: (tensor,)}
    models.seal(own_bundle, replace(about, **tensors))
    with pytest.raises(BundleError, match=rf"model.int8.onnx: found {role} .*\(dtype, rank\) of the manifest"):
        runtime.load(own_bundle)


def test_fp32_model_may_be_left_off_and_no_other_file(own_bundle: Path) -> None:
    (own_bundle / manifests.FP32).unlink()
    assert runtime.load(own_bundle).manifest.files.keys() > {manifests.FP32}
    (own_bundle / "plan.txt").unlink()
    with pytest.raises(BundleError, match=r"plan.txt: found nothing, expected a file"):
        runtime.load(own_bundle)


def test_phones_file_gives_the_outputs_of_the_onnx_file(ort_bundle: Path) -> None:
    as_onnx, as_ort = runtime.load(ort_bundle, threads=1), runtime.load(ort_bundle, threads=1, ort=True)
    assert (as_onnx.model.name, as_ort.model.name) == ("model.int8.onnx", "model.int8.ort")
    for probe in as_ort.probes():
        found = as_ort.run(probe.inputs)["logits"]
        np.testing.assert_array_equal(found, as_onnx.run(probe.inputs)["logits"], strict=True)
        np.testing.assert_array_equal(found, probe.int8["logits"], strict=True)


def test_device_needs_one_of_the_two_forms(ort_bundle: Path) -> None:
    probe = runtime.load(ort_bundle).probes()[0]
    onnx_file, ort_file = ort_bundle / manifests.INT8, ort_bundle / manifests.ORT
    onnx_content, ort_content = onnx_file.read_bytes(), ort_file.read_bytes()
    onnx_file.unlink()
    found = runtime.load(ort_bundle, ort=True).run(probe.inputs)["logits"]
    np.testing.assert_array_equal(found, probe.int8["logits"], strict=True)
    with pytest.raises(BundleError, match=r"model.int8.onnx: found nothing, .*; copy that file too, or use the other"):
        runtime.load(ort_bundle, ort=False)
    assert runtime.load(ort_bundle).form == "ort"
    ort_file.unlink()
    for ort_form in (None, False, True):
        with pytest.raises(
            BundleError, match=r"model.int8.onnx: found nothing, expected a file; copy the whole bundle"
        ):
            runtime.load(ort_bundle, ort=ort_form)
    onnx_file.write_bytes(onnx_content)
    assert runtime.load(ort_bundle).form == "onnx"
    with pytest.raises(BundleError, match=r"model.int8.ort: found nothing, .*; copy that file too, or use the other"):
        runtime.load(ort_bundle, ort=True)
    ort_file.write_bytes(ort_content[:-1])
    with pytest.raises(BundleError, match=r"model.int8.ort: found \d+ bytes"):
        runtime.load(ort_bundle)


def test_bundle_without_the_phones_file_says_how_it_is_made(bundle_folder: Path) -> None:
    with pytest.raises(
        BundleError, match=r"model.int8.ort: found nothing, expected the phone's file; export with --ort"
    ):
        runtime.load(bundle_folder, ort=True)


def test_phones_file_that_onnxruntime_refuses_names_the_versions(ort_bundle: Path) -> None:
    (ort_bundle / manifests.ORT).write_bytes(b"no flatbuffer at all")
    models.seal(ort_bundle, models.manifest(Budget()))
    with pytest.raises(BundleError, match="model.int8.ort: ONNX Runtime .* cannot open it.*copy the bundle again"):
        runtime.load(ort_bundle, ort=True)


def test_bundle_whose_weights_saturate_on_this_cpu_warns_and_strict_refuses_it(for_vnni: Path) -> None:
    with pytest.warns(RuntimeWarning) as told:
        assert runtime.load(for_vnni).manifest.pair_rule is False
    (warning,) = told
    assert str(warning.message).startswith(
        f"{for_vnni}: made for x86-vnni, whose weights are not held to the pair rule"
    )
    assert warning.filename == __file__
    with pytest.raises(
        BundleError, match="may saturate, without an error, expected a CPU with VNNI; export with --target"
    ):
        runtime.load(for_vnni, strict=True)


def test_cpu_that_sums_in_int32_needs_no_warning(for_vnni: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "pairs_in_int16", lambda: False)
    assert runtime.load(for_vnni, strict=True).manifest.pair_rule is False


def test_bundle_that_keeps_the_pair_rule_never_asks_what_the_cpu_computes(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "pairs_in_int16", lambda: pytest.fail("measured"))
    assert runtime.load(own_bundle, strict=True).manifest.pair_rule is True


@pytest.mark.parametrize(
    "given", ["hello", None, [np.zeros((1, 4), np.float32)], np.zeros((1, 4), np.float32), 3, rows]
)
def test_what_is_no_dict_of_arrays_is_refused_with_the_line_to_write(pair: runtime.Bundle, given: Any) -> None:
    with pytest.raises(InputError) as error:
        pair.run(given)
    assert error.value.found == type(given).__name__
    assert error.value.do == 'call run({"left": ..., "right": ...}) with arrays'


class OnGpu:
    """A tensor that another library keeps from numpy."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> None:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


@pytest.mark.parametrize("value", [OnGpu(), [[1.0], [1.0, 2.0]]])
def test_value_that_numpy_cannot_take_is_refused(pair: runtime.Bundle, value: Any) -> None:
    with pytest.raises(InputError, match="input left: found .*: .*, expected an array; for a torch tensor: x.detach"):
        pair.run({"left": value, "right": rows(1)})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("text", "found <U4, expected float32"),
        (None, "found object, expected float32"),
        (rows(1, np.uint8), "found uint8, expected float32; pixels 0..255 are scaled first as at export, by x / 255"),
    ],
)
def test_value_of_another_dtype_is_refused_with_what_to_do(pair: runtime.Bundle, value: Any, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        pair.run({"left": value, "right": rows(1)})


def test_names_that_are_no_strings_are_refused(pair: runtime.Bundle) -> None:
    with pytest.raises(InputError, match="input is missing: found 0, 1, expected left"):
        pair.run({0: rows(1), 1: rows(1)})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="input is unknown: found 1"):
        pair.run({"left": rows(1), "right": rows(1), 1: rows(1)})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"threads": "2"}, "threads: found '2', expected 1 or more"),
        ({"threads": 1.5}, "threads: found 1.5"),
        ({"threads": True}, "threads: found True"),
        ({"providers": "CPUExecutionProvider"}, r"expected a list: \['CPUExecutionProvider'\]"),
    ],
)
def test_load_refuses_settings_of_another_type(bundle_folder: Path, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(PacklightError, match=says):
        runtime.load(bundle_folder, **wrong)


def test_load_of_what_is_no_folder_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match="found a file, expected a bundle; give the folder"):
        runtime.load(tmp_path / "m.onnx")
    with pytest.raises(BundleError, match="load: found None, expected the path"):
        runtime.load(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("use", [runtime.check, runtime.bench, runtime.kernels])
def test_path_where_a_bundle_is_meant_says_the_line_to_write(use: Any) -> None:
    with pytest.raises(
        BundleError, match=r"expected a Bundle, from runtime.load; open it: runtime.load\('build/lite0'\)"
    ):
        use("build/lite0")
    with pytest.raises(BundleError, match="found NoneType, expected a Bundle"):
        use(None)


@pytest.mark.parametrize("share", ["0.9", 1.5, -1, True, float("nan")])
def test_share_that_is_none_is_refused(bundle: runtime.Bundle, share: Any) -> None:
    with pytest.raises(PacklightError, match="min_integer_macs: found .* expected a share"):
        runtime.check(bundle, share)
