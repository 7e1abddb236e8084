"""Steps that an export can do without, each made to fail: the export goes on, and says in one line what it went without."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest

import exporter
import runtime
from exporter import optional
from exporter.errors import QuantizeError, RecipeError
from exporter.recipe import limited
from tests.exporter import graphs

PORTABLE = exporter.load_recipe("portable")
NET = """(float[N,3,8,8] x) => (float[N,5] y) {
    [first] a = Conv <pads=[1,1,1,1]> (x, w, b)
    [act] r = Relu(a)
    [pool] g = GlobalAveragePool(r)
    [flat] f = Flatten(g)
    [last] y = Gemm(f, v)
}"""
WEIGHTS = {"w": graphs.noise(1, 8, 3, 3, 3), "b": graphs.noise(2, 8), "v": graphs.noise(3, 8, 5)}


def batches(first: int, count: int) -> list[dict[str, graphs.Array]]:
    return [{"x": graphs.noise(first + number, 2, 3, 8, 8)} for number in range(count)]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    onnx.save(graphs.proto(NET, WEIGHTS), path)
    return path


def export(path: Path, out: Path, recipe: exporter.Recipe = PORTABLE, **given: object) -> exporter.Report:
    return exporter.export(exporter.from_onnx(path), recipe, batches(10, 9), batches(50, 3), out, **given)  # type: ignore[arg-type]


def test_what_a_step_returns_is_its_value() -> None:
    assert optional.attempt(lambda: 3, None) == optional.Tried(value=3, why="")


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (MemoryError(), "not enough memory"),
        (np.linalg.LinAlgError("Matrix is\nnot   definite"), "LinAlgError: Matrix is not definite"),
        (QuantizeError("the weights", found="none"), "the weights: found none"),
        (ValueError("x" * 5000), f"ValueError: {'x' * 184} ..."),
        (KeyError(), "KeyError"),
    ],
)
def test_reason_is_one_short_line(error: Exception, why: str) -> None:
    def step() -> int:
        raise error

    tried = optional.attempt(step, 7)
    assert (tried.value, tried.why, tried.error) == (7, why, error)
    assert len(tried.why) <= optional.LONGEST


@pytest.mark.parametrize("error", [RecipeError("--costs"), KeyboardInterrupt()])
def test_what_was_asked_and_an_interruption_pass_through(error: BaseException) -> None:
    def step() -> int:
        raise error

    with pytest.raises(type(error)):
        optional.attempt(step, 7)


def test_error_of_the_callers_own_function_passes_through_and_ours_inside_it_does_not() -> None:
    theirs = optional.callers(lambda key: {"a": 1}[key])
    with pytest.raises(KeyError):
        optional.attempt(partial(theirs, "b"), 0)

    def runs(_: object) -> int:
        raise QuantizeError("a plan")

    assert optional.attempt(partial(optional.callers(runs), None), 0).why == "a plan"


@pytest.mark.parametrize(
    ("target", "step"),
    [
        ("exporter.calibrate.auto.choose", "choice of ranges"),
        ("exporter.search.improve.search", "search"),
        ("exporter.shrink.weights", "weights stored as codes"),
        ("exporter.collect.enough.judge", "look at held-out values"),
        ("exporter.report.make.measure", "timing of the bundle"),
    ],
)
def test_export_goes_on_without_a_step_and_says_why(net: Path, tmp_path: Path, target: str, step: str) -> None:
    with mock.patch(target, side_effect=np.linalg.LinAlgError("singular\n" * 1000)) as failing:
        report = export(net, tmp_path / "out", max_evaluations=1)
    assert failing.called
    assert [*report.untried] == [step] and report.untried[step].startswith("LinAlgError: singular singular")
    assert f"{step} not tried, because LinAlgError" in " ".join(str(report).split())
    assert json.loads(report.to_json())["untried"] == dict(report.untried)
    assert runtime.check(runtime.load(tmp_path / "out", threads=1)).met
    if step != "timing of the bundle":  # which is taken of the finished bundle
        assert step in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("exporter.correct.smooth.find", ["smooth"]),
        ("exporter.correct.rounding.at_best_scale", ["scale"]),
        ("exporter.correct.gptq.rounded", ["gptq"]),
    ],
)
def test_export_goes_on_without_a_correction_and_says_why(
    net: Path, tmp_path: Path, target: str, names: list[str]
) -> None:
    with mock.patch(target, side_effect=MemoryError):
        report = export(net, tmp_path / "out", max_evaluations=1)
    without = [each for each in report.corrections if each.why]
    assert [each.name for each in without] == names
    assert all(each.why == "not enough memory" and each.after_db is None and not each.kept for each in without)
    assert f"{names[0]} correction not tried, because not enough memory" in " ".join(str(report).split())
    assert "not tried, because not enough memory" in (tmp_path / "out" / "report.html").read_text()


def test_page_that_cannot_be_made_is_the_text(net: Path, tmp_path: Path) -> None:
    with mock.patch("exporter.report.html._ENVIRONMENT.get_template", side_effect=RuntimeError("no template")):
        report = export(net, tmp_path / "out", max_evaluations=1)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "RuntimeError: no template" in page and f"{report.int8_nodes} nodes int8" in page


def test_single_calibration_batch_leaves_gptq_untried(net: Path, tmp_path: Path) -> None:
    report = exporter.export(
        exporter.from_onnx(net), PORTABLE, batches(1, 1), batches(50, 2), tmp_path / "out", max_evaluations=1
    )
    (gptq,) = (each for each in report.corrections if each.name == "gptq")
    assert gptq.why == "there is one calibration batch, and none to fit weights to" and report.drift.worst_snr_db > 20


def test_evaluate_that_fails_in_a_search_is_seen_by_its_author(net: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def evaluate(run: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) > 1:
            raise ZeroDivisionError("mine")
        return {"top1": 1.0}

    with pytest.raises(ZeroDivisionError, match="mine"):
        export(net, tmp_path / "out", limited(PORTABLE, {"metric_drops": ["top1 drop<=0.5%"]}), evaluate=evaluate)
