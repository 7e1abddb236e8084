"""What new users give to export(): taken where it is plain, else refused with the line to write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import exporter
import exporter.batches
import runtime
import runtime.manifest
from exporter import meant
from exporter.errors import CalibrationError, RecipeError, TraceError
from runtime.errors import PacklightError


def rows(seed: int, count: int = 4) -> torch.Tensor:
    return torch.rand(count, 8, generator=torch.Generator().manual_seed(seed))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(8, 4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = self.drop(self.layer(x))
        return {"y": y if scale is None else y * scale, "sum": y.sum(1)}


def test_bare_module_takes_its_example_from_the_first_batch_and_names_from_its_forward() -> None:
    module = Two().train()
    stream = iter([(rows(0), torch.zeros(4)), (rows(1), torch.zeros(4))])
    found = meant.source(module, stream)
    assert (list(found.source.inputs), found.source.outputs) == (["x"], ("output_0", "output_1"))
    assert found.source.dynamic == {"x": {0: "batch"}}
    assert [len(batch) for batch in found.calibration] == [2, 2]  # the one that was looked at is still there
    assert module.training and module.drop.training
    assert "inputs x from its forward" in found.notes[0] and "training mode" in found.notes[1]


def test_arguments_are_taken_from_a_dict_by_name() -> None:
    found = meant.source(Two(), [{"label": torch.zeros(4), "scale": torch.ones(1), "x": rows(0)}])
    assert list(found.source.inputs) == ["x", "scale"]
    assert found.source.dynamic == {}  # scale has another first size: which axis is the batch's is not plain


def test_module_that_takes_one_size_keeps_it() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(4, 8).sum(0)

    assert meant.source(Fixed(), [rows(0)]).source.dynamic == {}


class Starred(nn.Module):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return args[0]


@pytest.mark.parametrize(
    ("given", "calibration", "says"),
    [
        (
            Two(),
            [{"image": rows(0)}],
            r"its forward takes x, scale: found a calibration batch of image, .* a value for x",
        ),
        (Starred(), [rows(0)], r"its forward takes \*args: .* write exporter.from_module\(model"),
        (Two(), "pictures", "found a module, and calibration data at 'pictures'"),
        (Two(), [torch.zeros(4, 8, dtype=torch.uint8)], "forward fails on the first .* divide by 255"),
        (Two(), [np.zeros((4, 8))], r"forward fails on the first .* x float64\[4, 8\]; convert float64 with .astype"),
        (Two(), [], "no batches"),
        (Two, [rows(0)], r"found the class Two, .* make one: Two\(...\)"),
        (rows, [rows(0)], r"found function, .* call it: rows\(\)"),
        (None, [rows(0)], "found None"),
        (Two().state_dict(), [rows(0)], "load the weights into their module"),
        (onnx.ModelProto(), [rows(0)], "save it with onnx.save"),
        ("model.pth", [rows(0)], "found 'model.pth', expected a Source, or a torch.nn.Module"),
        ("none.onnx", [rows(0)], "expected a readable ONNX file"),
    ],
)
def test_what_is_no_source_is_refused_with_what_to_do(given: Any, calibration: Any, says: str) -> None:
    with pytest.raises((TraceError, CalibrationError), match=says):
        meant.source(given, calibration)


def test_recipe_is_taken_by_its_name_and_path(tmp_path: Path) -> None:
    portable = exporter.load_recipe("portable")
    (tmp_path / "r.toml").write_text(portable.toml)
    assert meant.recipe("portable") == meant.recipe(portable) == portable
    assert meant.recipe(tmp_path / "r.toml").name == meant.recipe(str(tmp_path / "r.toml")).name == "portable"
    for wrong in (None, {"target": "portable"}, 3):
        with pytest.raises(RecipeError, match="expected a Recipe, or its name: exporter.load_recipe"):
            meant.recipe(wrong)
    with pytest.raises(RecipeError, match="did you mean 'portable'"):
        meant.recipe("portabel")


STREAM = iter([rows(0)])
WRONG = [
    ({"heldout": STREAM}, "heldout: found the iterator that calibration reads, too"),
    ({"evaluate": {"top1": 0.9}}, "evaluate: found dict, expected a function"),
    ({"workers": 2}, "workers: found 2, expected"),
    ({"costs": "none.json"}, "costs: found 'none.json'"),
    ({"costs": 3}, "costs: found 3"),
    ({"max_evaluations": "3"}, "max_evaluations: found '3'"),
    ({"progress": "yes"}, "progress: found 'yes', expected an object with stage"),
    ({"out": "a\0b"}, "found embedded null byte, expected a path that can be made"),
    ({"out": "a" * 300}, "found File name too long"),
    ({"calibration": type("Bad", (), {"__iter__": lambda self: 3})()}, "calibration: found Bad: iter"),
    ({"max_evaluations": -1}, "max_evaluations: found -1"),
    ({"max_minutes": "1"}, "max_minutes: found '1'"),
    ({"max_minutes": float("nan")}, "max_minutes: found nan"),
    ({"out": ""}, "out: found '', expected a path"),
    ({"out": None}, "out: found None"),
    ({"out": "."}, "out: found '.', expected a folder's name"),
    ({"out": "file/below"}, "file is not a folder"),
    ({"calibration": rows}, r"calibration: found function, .* call it: rows\(\)"),
    ({"calibration": 3}, "calibration: found int"),
    ({"calibration": None}, "calibration: no data"),
    ({"calibration": list}, "calibration: found type"),
    (
        {"calibration": ["a.npz", "b.npz"]},
        "found the text 'a.npz', expected arrays: x; files are given by their folder",
    ),
    ({"calibration": iter(())}, "a generator can be read once: make a new one"),
    ({"calibration": [rows(0)[0]] * 4}, r"found shape \[8\], .* add the axis of the batch: x\[None\]"),
    ({"calibration": [rows(0).to(torch.uint8)] * 4}, "found dtype uint8, expected float32; pixels .* divide by 255"),
    ({"calibration": [{"x": [[1.0] * 8]}] * 4}, "found dtype float64, expected float32; convert it with .astype"),
    ({"calibration": [None] * 4}, "found dtype object, expected numbers"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG, ids=[f"{next(iter(w))}-{n}" for n, (w, _) in enumerate(WRONG)])
def test_argument_of_another_kind_is_refused_and_nothing_is_written(
    wrong: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    source = exporter.from_module(nn.Linear(8, 4), {"x": rows(0)}, ["y"], {"x": {0: "n"}})
    given = {
        "calibration": STREAM if wrong.get("heldout") is STREAM else [rows(n) for n in range(8)],
        "out": "b",
    } | wrong
    with pytest.raises(PacklightError, match=says):
        exporter.export(source, "portable", **given)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_table_of_another_library_says_how_its_values_are_given() -> None:
    class Frame:
        columns = ("a", "b")

        def to_numpy(self) -> None: ...

        def __iter__(self) -> Iterator[str]:
            return iter(self.columns)

    with pytest.raises(CalibrationError, match=r"found Frame, .* give its values: \[frame.to_numpy\('float32'\)\]"):
        exporter.batches.require(Frame(), "calibration")


@pytest.mark.parametrize(
    ("shape", "wanted", "line"),
    [
        ((3, 8, 8), ("n", 3, 8, 8), "x[None]"),
        ((2, 8, 8, 3), ("n", 3, 8, 8), "x.transpose(0, 3, 1, 2)"),
        ((8, 8, 3), (1, 3, 8, 8), "x.transpose(2, 0, 1)[None]"),
    ],
)
def test_shape_that_one_line_makes_fit_names_it(shape: tuple[int, ...], wanted: tuple[Any, ...], line: str) -> None:
    tensor = runtime.manifest.Tensor(name="x", dtype="float32", shape=wanted)
    with pytest.raises(CalibrationError) as error:
        list(exporter.batches.read([np.zeros(shape, np.float32)], [tensor], "calibration"))
    assert line in error.value.do


def test_report_says_in_one_line_what_was_taken_for_granted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)).train()
    labelled = torch.utils.data.DataLoader([(row, 1) for row in rows(0, 24)], batch_size=4)
    report = exporter.export(
        module, "portable", labelled, [{"input": rows(9), "id": "a"}], tmp_path / "b", max_evaluations=0
    )
    assert module.training
    assert "left out of batches: what is behind the inputs, such as labels (6 of them)" in report.notes
    assert "left out of batches: 'id', which is no input (1 of them)" in report.notes
    line = " ".join(str(report).split("traced")[0].split())
    assert "note a module without names: inputs input from its forward" in line and "training mode" in line
    bundle = runtime.load(tmp_path / "b", threads=1)
    assert bundle.run({"input": rows(1, 3).numpy()})["output_0"].shape == (3, 4)
