from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import pytest
import torch

import exporter
import runtime
from exporter import trace
from exporter.errors import CalibrationError, RecipeError
from exporter.recipe import Recipe, limited, parse
from exporter.report import Report
from runtime import BundleError
from runtime import manifest as manifests
from runtime.explain import explain
from tests import models
from tests.exporter import graphs
from tests.exporter.conftest import Exported

VNNI = exporter.load_recipe("x86-vnni")
Batches = Iterator[dict[str, np.ndarray]]
T = TypeVar("T")


def batches(seed: int, count: int) -> Batches:
    return iter([{"x": graphs.noise(100 * seed + n, 4, 8)} for n in range(count)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def export(path: Path, out: Path, calibration: object = None, heldout: object = None) -> exporter.Report:
    seen = batches(1, 6) if calibration is None else calibration
    heldout = heldout or batches(2, 2)
    return exporter.export(exporter.from_onnx(path), VNNI, seen, heldout, out=out, max_evaluations=1)


def test_module_becomes_a_bundle_that_proves_itself(exported: Exported) -> None:
    verdict = runtime.check(runtime.load(exported.folder, threads=1))
    assert verdict.met and verdict.exact
    assert exported.report.integer_macs == verdict.integer_macs == 1.0
    (logits,) = exported.report.drift.outputs
    assert logits.snr_db > 40 and logits.varying_db > 12  # 31 dB of it are the same for every input
    assert exported.report.met and exported.report.traced_by == "dynamo"


def test_bundle_answers_what_torch_answers(exported: Exported) -> None:
    module, opened = models.module("residual").eval(), runtime.load(exported.folder)
    for batch in models.batches("residual", 9, 2):
        expected = module(torch.from_numpy(batch["image"])).detach().numpy()
        found = opened.run(batch)["logits"]
        assert 20 * np.log10(np.linalg.norm(expected) / np.linalg.norm(expected - found)) > 25


def test_report_counts_nodes_batches_and_bytes(exported: Exported) -> None:
    report, files = exported.report, contents(exported.folder)
    plan = (exported.folder / "plan.txt").read_text().splitlines()[1:]
    assert (report.int8_nodes, report.float_nodes) == (
        sum("| int8 |" in x for x in plan),
        sum("| float |" in x for x in plan),
    )
    assert (report.calibration_batches, report.drift.batches) == (4, 3)
    assert (report.fp32_bytes, report.int8_bytes) == (len(files["model.fp32.onnx"]), len(files["model.int8.onnx"]))
    assert report.macs == 2 * 64 * (16 * 36 + 16 * 16 * 9 + 4 * 16)
    assert report.timing is not None and report.timing.ratio is not None and report.timing.ratio > 0


def test_callers_module_is_what_it_was_before_the_export(tmp_path: Path) -> None:
    module = models.module("dynamic_batch")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    source = exporter.from_module(module, {"x": graphs.noise(0, 2, 16)}, ["y"], {"x": {0: "batch"}})
    exporter.export(source, VNNI, calibration=models.batches("dynamic_batch", 1, 4), out=tmp_path / "b")
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(part.training for part in module.modules())


AGAIN = """
import sys
import exporter
from tests import models
exporter.export(
    models.source("residual"), exporter.load_recipe("x86-vnni"),
    calibration=models.batches("residual", 1, 4), heldout=models.batches("residual", 2, 3), out=sys.argv[1],
    max_evaluations=1,
)
"""


def test_exporting_again_in_this_process_and_in_another_gives_the_same_bytes(
    exported: Exported, tmp_path: Path
) -> None:
    exporter.export(
        models.source("residual"),
        VNNI,
        calibration=models.batches("residual", 1, 4),
        heldout=models.batches("residual", 2, 3),
        out=tmp_path / "here",
        max_evaluations=1,
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path / "there")], cwd=root, check=True, capture_output=True)
    expected = contents(exported.folder)
    assert len(expected) == 10
    for folder in (tmp_path / "here", tmp_path / "there"):
        found = contents(folder)
        assert found.keys() == expected.keys()
        assert [name for name in found if found[name] != expected[name]] == []


def test_paths_and_names_of_this_machine_are_in_no_file(exported: Exported) -> None:
    home = [str(Path.home()), str(Path(__file__).parents[2]), str(exported.folder.parent)]
    for name, content in contents(exported.folder).items():
        assert not [word for word in home if len(word) > 5 and word.encode() in content], name


def test_probe_inputs_are_held_out_batches(exported: Exported) -> None:
    from runtime.probe import read_probe

    unseen = list(models.batches("residual", 2, 3))
    probes = read_probe(exported.folder / manifests.PROBE)
    assert len(probes) == 3
    for probe, batch in zip(probes, unseen, strict=True):
        np.testing.assert_array_equal(probe.inputs["image"], batch["image"], strict=True)


def test_drift_comes_from_batches_that_calibration_did_not_see(onnx_file: Path, tmp_path: Path) -> None:
    seen = list(batches(1, 4))
    report = export(onnx_file, tmp_path / "b", seen, [seen[2], *batches(2, 2), seen[0]])
    assert (report.drift.batches, report.repeated_batches, report.overlapping) == (2, 2, False)
    report = export(onnx_file, tmp_path / "b", seen, seen[:2])
    assert report.overlapping
    assert "drift is optimistic" in str(report)


def test_heldout_values_outside_the_ranges_are_reported_and_choose_nothing(onnx_file: Path, tmp_path: Path) -> None:
    def scaled(by: float) -> Batches:
        return ({"x": batch["x"] * np.float32(by)} for batch in batches(2, 70))

    like = export(onnx_file, tmp_path / "a", batches(1, 64), scaled(0.1))
    other = export(onnx_file, tmp_path / "b", batches(1, 64), scaled(3))
    assert (like.coverage_batches, other.coverage_batches, other.drift.batches) == (64, 64, 70)
    assert [each.outside for each in like.coverage] == [0] * 3 and like.outside == ()
    assert {each.tensor for each in other.outside} == {"x", "r", "y"}
    x = next(each for each in other.coverage if each.tensor == "x")
    ends = json.loads((tmp_path / "b" / "ranges.json").read_text())["tensors"]["x"]
    values = np.concatenate([batch["x"] for batch in itertools.islice(scaled(3), 64)])
    assert x.outside == pytest.approx(np.mean((values < ends["low"]) | (values > ends["high"])), abs=0.001)
    assert "held-out values lie outside the range of" in other.enough
    assert "held-out" not in like.enough
    for name in ("ranges.json", "model.int8.onnx", "plan.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class Stop(Exception):
    """Someone else's error."""


def interrupted(error: type[BaseException]) -> Batches:
    yield from batches(1, 3)
    raise error("in calibration")


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop, MemoryError])
def test_interruption_in_calibration_leaves_the_old_bundle_or_none(
    error: type[BaseException], onnx_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(error):
        export(onnx_file, tmp_path / "new" / "b", interrupted(error))
    assert [*tmp_path.iterdir()] == []
    export(onnx_file, tmp_path / "old")
    before = contents(tmp_path / "old")
    with pytest.raises(error):
        export(onnx_file, tmp_path / "old", interrupted(error))
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert contents(tmp_path / "old") == before
    assert runtime.check(runtime.load(tmp_path / "old")).met


def test_new_export_replaces_the_old_bundle_whole(onnx_file: Path, tmp_path: Path) -> None:
    export(onnx_file, tmp_path / "b")
    before = contents(tmp_path / "b")
    export(onnx_file, tmp_path / "b", batches(5, 3))
    after = contents(tmp_path / "b")
    assert before.keys() == after.keys()
    assert before["ranges.json"] != after["ranges.json"] and before["model.fp32.onnx"] == after["model.fp32.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_folder_that_is_no_bundle_is_refused_before_any_work(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    monkeypatch.setattr(trace, "to_onnx", lambda source: pytest.fail("traced"))
    with pytest.raises(BundleError, match="found a folder that is not a bundle, expected a new folder"):
        export(onnx_file, tmp_path, iter([]))
    with pytest.raises(BundleError, match="found a file"):
        export(onnx_file, tmp_path / "thesis.tex", iter([]))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_recipe_that_was_changed_in_python_is_refused_before_any_work(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "to_onnx", lambda source: pytest.fail("traced"))
    changed = VNNI.model_copy(update={"budget": VNNI.budget.model_copy(update={"min_snr_db": 0.0})})
    with pytest.raises(RecipeError, match="its text: found other values than the recipe's"):
        exporter.export(exporter.from_onnx(onnx_file), changed, batches(1, 4), out=tmp_path / "b")


def test_one_dict_as_heldout_is_refused_before_any_work(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "to_onnx", lambda source: pytest.fail("traced"))
    with pytest.raises(CalibrationError, match="heldout: found one dict"):
        export(onnx_file, tmp_path / "b", heldout=next(batches(2, 1)))


def test_unknown_target_is_refused_before_any_work(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "to_onnx", lambda source: pytest.fail("traced"))
    with pytest.raises(RecipeError, match="did you mean 'x86-vnni'"):
        exporter.export(
            exporter.from_onnx(onnx_file),
            VNNI.model_copy(update={"target": "x86-vni"}),
            batches(1, 4),
            out=tmp_path / "b",
        )


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        (iter([]), "calibration: no batches"),
        ([{"y": np.zeros((1, 8), np.float32)}], "found inputs y, expected inputs x"),
        ([{"x": np.zeros((1, 8))}], "found dtype float64, expected float32"),
        ([{"x": np.zeros((1, 9), np.float32)}], r"found shape \[1, 9\], expected shape \['x_0', 8\]"),
        ([np.full((1, 8), np.nan, np.float32)], "calibration batch 0: input 'x': found NaN"),
    ],
)
def test_calibration_data_that_does_not_fit_is_refused_and_nothing_is_written(
    calibration: object, says: str, onnx_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=says):
        export(onnx_file, tmp_path / "b", calibration)
    assert [*tmp_path.iterdir()] == []


def test_no_calibration_data_is_refused_and_never_made_up(onnx_file: Path, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="calibration: no data"):
        exporter.export(exporter.from_onnx(onnx_file), VNNI, calibration=None, out=tmp_path / "b")


def test_random_data_is_used_where_it_is_named_and_the_report_says_so(onnx_file: Path, tmp_path: Path) -> None:
    report = export(onnx_file, tmp_path / "b", "random", "random")
    assert report.random_data
    assert "RANDOM data: ranges and drift mean nothing" in " ".join(str(report).split())


def test_nan_in_batch_17_names_batch_and_tensor(onnx_file: Path, tmp_path: Path) -> None:
    seen = list(batches(1, 20))
    seen[17]["x"][2, 3] = np.nan
    with pytest.raises(CalibrationError) as error:
        export(onnx_file, tmp_path / "b", seen)
    assert (error.value.batch, error.value.tensor) == (17, "x")


def test_stages_are_told_in_order_and_batches_are_counted(onnx_file: Path, tmp_path: Path) -> None:
    told: list[str] = []
    counted: list[int] = []

    class Listener:
        def stage(self, text: str) -> None:
            told.append(text)

        def note(self, text: str) -> None:
            told.append(f"note: {text}")

        def each(
            self, items: Iterable[T], text: str, total: int | None = None, samples: Callable[[T], int] | None = None
        ) -> Iterator[T]:
            told.append(f"{text} {total}")
            for item in items:
                if samples is not None:
                    counted.append(samples(item))
                yield item

    exporter.export(
        exporter.from_onnx(onnx_file),
        VNNI,
        calibration=list(batches(1, 4)),
        heldout=batches(2, 1),
        out=tmp_path / "b",
        progress=Listener(),
        max_evaluations=1,
    )
    # "time" once a model: costs are remembered
    assert [word for text in told if (word := text.split()[0]) != "time"] == [
        "trace",
        "rewrite",
        "decide",
        "calibrate",
        "choose",
        "quantize,",
        "search",
        "measure",
        "write",
        "write",
    ]
    assert told[3] == "calibrate 4"
    assert counted == [4] * 5  # samples of each batch


def test_rule_of_the_recipe_reaches_the_plan_and_the_report(onnx_file: Path, tmp_path: Path) -> None:
    text = VNNI.toml + '\n[[rules]]\nmatch = "e"\nprecision = "float"\nwhy = "the last layer"\n'
    from exporter.recipe import parse

    report = exporter.export(
        exporter.from_onnx(onnx_file), parse(text, "own.toml"), batches(1, 4), batches(2, 1), out=tmp_path / "b"
    )
    assert "e | Gemm | float | rule 'e': the last layer" in (tmp_path / "b" / "plan.txt").read_text()
    assert ("e", 4 * 16 * 4) in [(layer.node, layer.macs) for layer in report.float_layers]
    assert (tmp_path / "b" / "recipe.toml").read_text() == text
    assert report.integer_macs <= 8 * 16 / (8 * 16 + 16 * 4)


def test_budget_that_is_not_met_is_reported_and_the_bundle_is_written_all_the_same(
    onnx_file: Path, tmp_path: Path
) -> None:
    from exporter.recipe import parse

    text = VNNI.toml.replace("min_snr_db = 10.0", "min_snr_db = 90.0")
    report = exporter.export(
        exporter.from_onnx(onnx_file), parse(text, "own.toml"), batches(1, 4), batches(2, 1), out=tmp_path / "b"
    )
    assert not report.met
    verdict = runtime.check(runtime.load(tmp_path / "b"))
    assert [(line.what, line.limit) for line in verdict.lines if not line.met] == [
        ("exported", 1.0),
        ("snr_db y", 90.0),
        ("varying_db y", 80.0),
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(float[N,8] x) => (float[N,8] y) { y = Relu(x) }", "no layers"),
        (
            "(float[N,8] x) => (float[N,N] y) { [t] t = Transpose(x) [m] y = Gemm(x, t) }",
            "its weight is computed at run time",
        ),
    ],
)
def test_model_without_anything_to_quantize_is_a_bundle_that_says_so(text: str, why: str, tmp_path: Path) -> None:
    onnx.save(graphs.proto(text, {}), tmp_path / "m.onnx")
    report = export(tmp_path / "m.onnx", tmp_path / "b")
    assert (report.met, report.integer_macs, report.drift.worst_snr_db) == (True, 0.0, float("inf"))
    said = " ".join(str(report).split())
    assert f"verdict met, but NOTHING RUNS IN INTEGERS: {why}" in said
    assert runtime.check(runtime.load(tmp_path / "b")).met


def test_limit_on_speed_that_was_not_met_travels_without_the_time(onnx_file: Path, tmp_path: Path) -> None:
    recipe = limited(VNNI, {"min_speedup": 1e6})
    report = exporter.export(
        exporter.from_onnx(onnx_file), recipe, batches(1, 4), batches(2, 6), out=tmp_path / "b", max_evaluations=0
    )
    (slow,) = [line for line in report.lines if not line.met]
    assert slow.what == "speedup" and slow.found is not None and slow.found < 1e6
    bundle = runtime.load(tmp_path / "b")
    travels = bundle.manifest.verdict
    assert travels is not None and not travels.met
    assert (travels.batches, len(travels.probe), travels.hardest in travels.probe) == (6, 4, True)
    assert [(line.what, line.found, line.met) for line in travels.lines][-1] == ("speedup", None, False)
    assert travels.outputs["y"].snr_db == report.drift.outputs[0].snr_db
    verdict = runtime.check(bundle)
    assert [str(line) for line in verdict.lines if not line.met] == [
        "exported: 0 (at least 1), speedup: as measured at export (at least 1,000,000)"
    ]
    said = json.loads((tmp_path / "b" / "report.json").read_text())
    assert (said["met"], said["timing"], said["lines"][-1]["found"]) == (False, None, None)
    page = (tmp_path / "b" / "report.html").read_text()
    assert "Budget NOT met" in page and "as measured at export" in page


def transformer(recipe: Recipe, out: Path, max_evaluations: int | None = None) -> Report:
    """Exported with the phone's file beside it."""
    return exporter.export(
        models.source("transformer"),
        recipe,
        calibration=models.batches("transformer", 1, 4),
        heldout=models.batches("transformer", 2, 2),
        out=out,
        ort=True,
        max_evaluations=max_evaluations,
    )


def test_products_of_two_activations_are_on_signed_codes_and_the_ort_file_runs_them_so(tmp_path: Path) -> None:
    report = transformer(VNNI, tmp_path / "b", max_evaluations=1)
    assert report.integer_macs == report.ort_integer_macs == 1.0
    assert {count.types for count in report.kernels if count.integer} == {"u8s8"}
    assert runtime.load(tmp_path / "b").manifest.session["session.qdqisint8allowed"] == "1"
    assert runtime.check(runtime.load(tmp_path / "b")).met


def test_bundle_of_dynamic_layers_needs_no_range_and_runs_as_its_ort_file_does(tmp_path: Path) -> None:
    rules = '\n[[rules]]\nmatch = "*_gemm"\nprecision = "dynamic"\nwhy = "loud and quiet inputs"\n'
    rules += '\n[[rules]]\nmatch = "MatMul"\nprecision = "float"\nwhy = "products of loud and quiet inputs"\n'
    recipe = parse(VNNI.toml + rules, "dynamic")
    report = transformer(recipe, tmp_path / "b")
    plan = (tmp_path / "b" / "plan.txt").read_text().splitlines()[1:]
    assert (report.int8_nodes, report.dynamic_nodes) == (0, 4)
    assert report.dynamic_nodes == sum("| dynamic | rule '*_gemm': loud and quiet inputs" in line for line in plan)
    assert f"0 nodes int8, 4 dynamic, {report.float_nodes} float" in str(report)
    assert json.loads((tmp_path / "b" / "ranges.json").read_text())["tensors"] == {}
    assert {count.kernel for count in report.kernels if count.integer} == {"DynamicQuantizeMatMul"}
    assert report.integer_macs == report.ort_integer_macs > 0.9
    assert report.drift.worst_snr_db > 40
    bundle = runtime.load(tmp_path / "b", threads=1)
    verdict = runtime.check(bundle)
    assert verdict.met and not bundle.manifest.exact_on
    explained = explain(bundle).nodes
    assert {each.planned.precision for each in explained if each.planned and each.kernel.integer} == {"dynamic"}


def test_metric_that_evaluate_does_not_return_is_refused_before_calibration(onnx_file: Path, tmp_path: Path) -> None:
    asked = limited(VNNI, {"metric_drops": ["topp1 drop<=0.5%"]})

    def never() -> Batches:
        yield from itertools.islice(batches(1, 9), 1)
        pytest.fail("calibration has begun")

    with pytest.raises(RecipeError, match="did you mean 'top1'"):
        exporter.export(
            exporter.from_onnx(onnx_file),
            asked,
            never(),
            batches(2, 2),
            tmp_path / "b",
            evaluate=lambda run: {"top1": 1.0},
        )


def test_input_with_a_default_may_be_left_out_of_a_bundle_and_given(tmp_path: Path) -> None:
    """t is a default that no calibration batch gives: it is neither dropped nor asked for."""
    proto = graphs.proto(
        "(float[N,8] x, float[1] t) => (float[N,4] y) { m = MatMul(x, w)\n y = Mul(m, t) }",
        {"w": graphs.noise(1, 8, 4), "t": np.ones(1, np.float32)},
    )
    onnx.save(proto, tmp_path / "m.onnx")
    made = [{"x": graphs.noise(seed, 4, 8)} for seed in range(8)]
    source, recipe = exporter.from_onnx(tmp_path / "m.onnx"), exporter.load_recipe("portable")
    exporter.export(source, recipe, made[:4], made[4:], tmp_path / "b", max_evaluations=0)
    bundle = runtime.load(tmp_path / "b")
    assert [tensor.name for tensor in bundle.manifest.inputs] == ["x"]
    assert runtime.check(bundle).drift.worst_snr_db > 20
    plain, doubled = (bundle.run(made[0] | given)["y"] for given in ({}, {"t": np.full(1, 2, np.float32)}))
    np.testing.assert_allclose(doubled, 2 * plain, rtol=1e-6)
    with pytest.raises(runtime.InputError, match=r"input t: found float64\[1\], expected float32\[1\]"):
        bundle.run(made[0] | {"t": np.ones(1)})
