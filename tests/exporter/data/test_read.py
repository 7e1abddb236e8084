from __future__ import annotations

import ast
import operator
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter import batches, data
from exporter.errors import CalibrationError, RecipeError
from exporter.split import Split
from runtime.errors import install
from runtime.preprocess import Preprocessing
from tests.exporter.data.made import IDS, IMAGE, X, asked, picture, read, refusal, tokenizer

ONE = np.ones((2, 3), np.float32)


def test_iterables_arrays_and_loaders_are_read_as_before() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 3)), batch_size=2)
    for given in (
        [{"x": ONE}, {"x": ONE}],
        iter([ONE, ONE]),
        [(ONE,), (ONE,)],
        loader,
        (batch for batch in [ONE, ONE]),
    ):
        assert [batch["x"].shape for batch in read(given, asked(), X)] == [(2, 3), (2, 3)]
    assert data.stream(loader, (X,), "calibration") is loader


def test_random_data_stands_in_for_every_kind_of_data() -> None:
    for table in (asked(), asked(images={}), asked(text={"tokenizer": "none.json"}), asked(columns={})):
        assert len(read("random", table, IMAGE)) == batches.RANDOM_BATCHES


def test_nothing_and_one_batch_are_refused_as_before() -> None:
    assert "calibration: no data" in refusal(None, asked(), X)
    assert "found one dict, expected an iterable of dicts" in refusal({"x": ONE}, asked(), X)


def test_empty_folder_and_unknown_files_say_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no data")
    assert "found no .npz or .npy files, expected one of .npz or .npy files, pictures" in refusal(tmp_path, asked(), X)
    assert "found no pictures (.jpg, .jpeg, .png, .webp, .bmp)" in refusal(tmp_path, asked(images={}), IMAGE)
    assert "found no .txt files" in refusal(tmp_path, asked(text={"tokenizer": "t.json"}), IDS)
    assert "notes.md: found a file .md, expected .npz or .npy files" in refusal(tmp_path / "notes.md", asked(), X)
    assert "nowhere: found nothing there" in refusal(tmp_path / "nowhere", asked(), X)


def test_data_without_the_table_it_needs_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "pictures" / "a.png", 1)
    (tmp_path / "lines.txt").write_text("a cat")
    says = refusal(tmp_path / "pictures", asked(), IMAGE)
    assert "and no [images] in the recipe; add [images]: it says how they become the model's inputs" in says
    assert "and no [text] in the recipe" in refusal(tmp_path / "lines.txt", asked(), IDS)


def test_table_for_data_that_is_not_given_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=ONE)
    for table, tensor in (
        (asked(images={}), IMAGE),
        (asked(text={"tokenizer": "t.json"}), IDS),
        (asked(columns={}), X),
    ):
        (name,) = table.tables
        assert f"[{name}] in the recipe is of no use for calibration: " in refusal(tmp_path / "a.npz", table, tensor)
        assert f"[{name}] in the recipe is of no use for calibration: " in refusal(tmp_path, table, tensor)
    for table in (asked(images={}), asked(text={"tokenizer": "t.json"})):
        says = refusal([{"x": ONE}], table, X)
        assert "is of no use for calibration: found batches that are made already" in says
    picture(tmp_path / "a.png", 1)
    both = asked(images={}, text={"tokenizer": "t.json"})
    assert "[text] in the recipe is of no use" in refusal(tmp_path / "a.png", both, IMAGE)


def test_folder_of_several_kinds_is_read_as_the_recipe_means_it(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1, 8, 8)
    np.savez(tmp_path / "a.npz", x=ONE)
    assert [*read(tmp_path, asked(images={}), IMAGE)[0]] == ["image"]
    assert [*read(tmp_path, asked(), X)[0]] == ["x"]


def test_mistakes_are_found_before_the_model_is_known(tmp_path: Path) -> None:
    data.require([{"x": ONE}], "calibration")
    data.require("random", "calibration", asked(images={}))
    with pytest.raises(CalibrationError, match="nothing there"):
        data.require(tmp_path / "none.npz", "calibration")
    with pytest.raises(CalibrationError, match="no data"):
        data.require(None, "calibration")
    with pytest.raises(RecipeError, match="of no use for heldout"):
        data.require([{"x": ONE}], "heldout", asked(images={}))


def test_number_of_batches_is_told_where_files_tell_it(tmp_path: Path) -> None:
    for number in range(5):
        picture(tmp_path / f"{number}.png", number)
    stream = data.stream(tmp_path, (IMAGE,), "calibration", asked(images={"batch": 2, "resize": [8, 8]}))
    assert operator.length_hint(stream) == 3
    split = Split(stream, data.stream(tmp_path, (IMAGE,), "heldout", asked(images={"resize": [8, 8]})), (IMAGE,))
    assert split.total == 3
    assert len(list(split.calibration())) == 3
    tokenizer(tmp_path / "t.json")
    (tmp_path / "a.txt").write_text("a cat")
    lines = data.stream(tmp_path / "a.txt", (IDS,), "calibration", asked(tmp_path, text={"tokenizer": "t.json"}))
    assert operator.length_hint(lines) == 0
    assert Split(lines, lines, (IDS,)).total is None


def test_preprocessing_for_the_manifest_is_what_the_images_table_says() -> None:
    assert data.preprocessing(asked(), (IMAGE,)) is None
    table = asked(images={"resize": 8, "crop": [8, 8], "scale": "1/255", "mean": 0.5})
    wanted = Preprocessing(input="image", resize=8, crop=(8, 8), scale=1 / 255, mean=(0.5,))
    assert data.preprocessing(table, (IMAGE,)) == wanted


def test_wrong_dtype_names_the_batch(tmp_path: Path) -> None:
    for number in range(3):
        np.savez(tmp_path / f"{number}.npz", x=ONE if number < 2 else ONE.astype(np.float64))
    assert "calibration batch 2: input 'x': found dtype float64, expected float32" in refusal(tmp_path, asked(), X)


@pytest.mark.parametrize(("library", "extra"), [("PIL", "images"), ("tokenizers", "text"), ("pyarrow", "tables")])
def test_without_its_library_data_names_the_extra(
    tmp_path: Path, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "a.png", 1)
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "a.parquet").write_bytes(b"")
    tokenizer(tmp_path / "t.json")
    given, table, tensor = {
        "images": ("a.png", asked(images={}), IMAGE),
        "text": ("a.txt", asked(tmp_path, text={"tokenizer": "t.json"}), IDS),
        "tables": ("a.parquet", asked(), X),
    }[extra]
    monkeypatch.setitem(sys.modules, library, None)
    assert install(extra) in refusal(tmp_path / given, table, tensor)


def test_libraries_of_the_extras_are_imported_when_they_are_needed() -> None:
    for path in Path(data.__file__).parent.glob("*.py"):
        top = [
            node
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ImportFrom | ast.Import)
        ]
        assert not re.search(r"PIL|tokenizers|pyarrow|fsspec|datasets", "".join(map(ast.dump, top))), path
