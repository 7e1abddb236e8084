from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import pytest
from PIL import Image

from exporter import data
from exporter.data import files, tables
from runtime import preprocess
from runtime.manifest import Tensor
from tests.exporter.data.made import IDS, IMAGE, MASK, X, asked, picture, read, refusal, tokenizer

ROWS = 10
VALUES = np.arange(ROWS * 3, dtype=np.float32).reshape(ROWS, 3)


def write(path: Path, group: int = 4, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.parquet", x=VALUES.tolist(), label=[*range(ROWS)])


def stacked(found: list[Any], name: str = "x") -> Any:
    return np.concatenate([batch[name] for batch in found])


def test_columns_of_the_inputs_names_need_no_table(rows: Path) -> None:
    found = read(rows, asked(), X)
    assert len(found) == ROWS
    np.testing.assert_array_equal(stacked(found), VALUES, strict=True)


@pytest.mark.parametrize("batch", [1, 3, 4, 10, 100])
def test_rows_are_stacked_over_the_ends_of_row_groups_and_files(rows: Path, batch: int) -> None:
    write(rows.parent / "more.parquet", x=(VALUES + 100).tolist())
    found = read(rows.parent, asked(columns={"batch": batch}), X)
    sizes = [each["x"].shape[0] for each in found]
    assert sizes[:-1] == [batch] * (len(sizes) - 1) and sum(sizes) == 2 * ROWS
    np.testing.assert_array_equal(stacked(found), np.concatenate([VALUES + 100, VALUES]), strict=True)


def test_mapping_says_which_column_an_input_gets(tmp_path: Path) -> None:
    write(tmp_path / "r.parquet", features=VALUES.tolist(), other=[*range(ROWS)])
    two = Tensor(name="n", dtype="int64", shape=("batch",))
    found = read(tmp_path / "r.parquet", asked(columns={"inputs": {"x": "features", "n": "other"}, "batch": 5}), X, two)
    assert found[1]["n"].tolist() == [5, 6, 7, 8, 9]
    np.testing.assert_array_equal(stacked(found), VALUES)


def test_missing_column_is_named_with_what_was_meant(rows: Path) -> None:
    says = refusal(rows, asked(columns={"inputs": {"x": "labels"}}), X)
    assert "rows.parquet: no column 'labels' for input 'x': expected one of x, label; did you mean 'label'?" in says
    says = refusal(rows, asked(columns={"inputs": {"y": "label"}}), X)
    assert "[columns]:inputs: no input 'y': expected one of x" in says


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (pa.list_(pa.float32()), (3, 2, 4)),
        (pa.large_list(pa.float64()), (3, 2, 4)),
        (pa.list_(pa.list_(pa.float16()), 2), (3, 2, 4)),
        (pa.list_(pa.float32(), 8), (3, 8)),
    ],
)
def test_lists_of_every_kind_become_the_shape_of_the_graph(tmp_path: Path, kind: Any, shape: tuple[int, ...]) -> None:
    tensor = Tensor(name="x", dtype="float32", shape=("batch", 2, 4))
    values = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    given = values.reshape(3, 8) if not pa.types.is_list(kind.value_type) else values
    pq.write_table(pa.table({"x": pa.array(given.tolist(), kind)}), tmp_path / "t.parquet")
    np.testing.assert_array_equal(stacked(read(tmp_path / "t.parquet", asked(), tensor)), values, strict=True)


def test_tensors_of_arrow_keep_their_shape(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    pq.write_table(pa.table({"x": pa.FixedShapeTensorArray.from_numpy_ndarray(values)}), tmp_path / "t.parquet")
    tensor = Tensor(name="x", dtype="float32", shape=("batch", 2, "n"))
    np.testing.assert_array_equal(stacked(read(tmp_path / "t.parquet", asked(), tensor)), values, strict=True)


def test_rows_of_several_lengths_take_a_batch_each(tmp_path: Path) -> None:
    write(tmp_path / "r.parquet", input_ids=[[1, 2], [3], [4, 5, 6]])
    found = read(tmp_path / "r.parquet", asked(), IDS)
    assert [batch["input_ids"].tolist() for batch in found] == [[[1, 2]], [[3]], [[4, 5, 6]]]
    says = refusal(tmp_path / "r.parquet", asked(columns={"batch": 2}), IDS)
    assert "column 'input_ids': found rows of 1, 2 values in one batch, expected one size; take batch = 1" in says


def test_values_that_the_input_cannot_hold_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "r.parquet", halves=[0.5], large=[1 << 40], null=[None, 1.0][:1], word=["cat"])
    for column, dtype, says in (
        ("halves", "int64", "column 'halves': found float64 values, expected what int64 can hold, for input 'x'"),
        ("large", "int32", "column 'large': found int64 values, expected what int32 can hold"),
        ("null", "float32", "column 'null': found null"),
        ("word", "float32", "column 'word': found string, expected numbers or lists of them; prepare it with [text]"),
    ):
        tensor = Tensor(name="x", dtype=dtype, shape=("batch",))
        assert says in refusal(tmp_path / "r.parquet", asked(columns={"inputs": {"x": column}}), tensor)


def test_infinity_in_a_column_is_named_with_its_batch(tmp_path: Path) -> None:
    write(tmp_path / "r.parquet", x=[[0.0, 0.0, 0.0], [0.0, float("inf"), 0.0]])
    assert "calibration batch 1: input 'x': found infinity" in refusal(tmp_path / "r.parquet", asked(), X)
    write(tmp_path / "large.parquet", x=[[0.0, 1e300, 0.0]])  # more than float32 holds
    assert "calibration batch 0: input 'x': found infinity" in refusal(tmp_path / "large.parquet", asked(), X)


def test_damaged_and_misnamed_tables_are_refused(rows: Path) -> None:
    content = rows.read_bytes()
    (rows.parent / "short.parquet").write_bytes(content[:-20])
    (rows.parent / "text.parquet").write_text("no table")
    for name in ("short.parquet", "text.parquet", "none.parquet"):
        assert f"{name}: found " in refusal(rows.parent / name, asked(), X)
    broken = bytearray(content)
    broken[10:60] = bytes(50)
    (rows.parent / "broken.parquet").write_bytes(broken)
    assert "broken.parquet: found " in refusal(rows.parent / "broken.parquet", asked(), X)


def test_table_without_rows_is_no_batch(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": pa.array([], pa.list_(pa.float32()))}), tmp_path / "r.parquet")
    assert read(tmp_path / "r.parquet", asked(), X) == []


def test_rows_of_an_iterable_are_stacked_by_columns_and_read_once() -> None:
    pulled = []

    def rows() -> Any:
        for number in range(5):
            pulled.append(number)
            yield {"features": VALUES[number].tolist(), "label": number}

    stream = data.read(rows(), (X,), "calibration", asked(columns={"inputs": {"x": "features"}, "batch": 2}))
    first = next(stream)
    np.testing.assert_array_equal(first["x"], VALUES[:2], strict=True)
    assert pulled == [0, 1]
    assert [batch["x"].shape[0] for batch in stream] == [2, 1]
    says = refusal([{"feature": 1}], asked(columns={"inputs": {"x": "features"}}), X)
    assert "row 0: no column 'features' for input 'x': expected one of feature; did you mean 'feature'?" in says
    assert "row 0: found int, expected {column: value}" in refusal([1], asked(columns={}), X)


def save(folder: Path, shards: int = 2) -> Path:
    """A folder as datasets.save_to_disk writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for number, name in enumerate(names):
        table = pa.table({"x": VALUES[number * 5 : number * 5 + 5].tolist(), "label": [number] * 5})
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_saved_data_set_is_read_shard_by_shard(tmp_path: Path) -> None:
    found = read(save(tmp_path / "saved"), asked(columns={"batch": 3}), X)
    assert [batch["x"].shape[0] for batch in found] == [3, 3, 3, 1]
    np.testing.assert_array_equal(stacked(found), VALUES, strict=True)


def test_saved_splits_are_named_and_damaged_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "dataset_dict.json").write_text("{}")
    train = save(tmp_path / "all" / "train")
    assert "found the splits train, expected one of them; give train of it" in refusal(tmp_path / "all", asked(), X)
    (train / "state.json").write_text("{}")
    assert "state.json: found '_data_files', expected what datasets.save_to_disk writes" in refusal(train, asked(), X)
    (train / "state.json").write_text(json.dumps({"_data_files": [{"filename": "gone.arrow"}]}))
    assert "gone.arrow: found " in refusal(train, asked(), X)


def encoded(seed: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3)).astype(np.uint8)).save(sink, "PNG")
    return sink.getvalue()


PICTURES = asked(columns={"inputs": {"image": "photo"}, "batch": 2}, images={"resize": 8, "crop": 8})


def test_column_of_pictures_is_prepared_by_the_images_table(tmp_path: Path) -> None:
    wanted = data.preprocessing(PICTURES, (IMAGE,))
    assert wanted is not None
    exact = np.concatenate([preprocess.image(io.BytesIO(encoded(seed)), wanted) for seed in range(3)])
    write(tmp_path / "plain.parquet", photo=[encoded(seed) for seed in range(3)])
    write(tmp_path / "hub.parquet", photo=[{"bytes": encoded(seed), "path": None} for seed in range(3)])
    opened = [{"photo": Image.open(io.BytesIO(encoded(seed)))} for seed in range(3)]
    paths = [{"photo": str(picture(tmp_path / f"{seed}.png", seed))} for seed in range(3)]
    for given in (tmp_path / "plain.parquet", tmp_path / "hub.parquet", opened, paths):
        found = read(given, PICTURES, IMAGE)
        assert [batch["image"].shape[0] for batch in found] == [2, 1]
        np.testing.assert_array_equal(stacked(found, "image"), exact, strict=True)


def test_bad_picture_of_a_row_is_refused_or_skipped(tmp_path: Path) -> None:
    write(tmp_path / "r.parquet", photo=[encoded(0), b"none", encoded(1), encoded(2)])
    assert "row 1: found no picture of a known kind" in refusal(tmp_path / "r.parquet", PICTURES, IMAGE)
    stream = data.stream(tmp_path / "r.parquet", (IMAGE,), "calibration", PICTURES, skip_bad=True)
    assert [batch["image"].shape[0] for batch in stream] == [2, 1]
    assert stream.left.skipped == ["row 1"]


def test_column_of_text_is_prepared_by_the_text_table(tmp_path: Path) -> None:
    tokenizer(tmp_path / "tokenizer.json")
    write(tmp_path / "r.parquet", sentence=["a cat", "the cat sat", "mat"])
    table = asked(
        tmp_path, columns={"inputs": {"input_ids": "sentence"}, "batch": 2}, text={"tokenizer": "tokenizer.json"}
    )
    first, last = read(tmp_path / "r.parquet", table, IDS, MASK)
    assert first["input_ids"].tolist() == [[2, 4, 5, 3, 0], [2, 8, 5, 6, 3]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert last["input_ids"].tolist() == [[2, 9, 3]]
    assert "column 'sentence': found int, expected text" in refusal([{"sentence": 1}], table, IDS, MASK)


def test_size_of_a_batch_stands_in_one_table(rows: Path) -> None:
    both = asked(columns={}, images={"batch": 2})
    assert "[images]: batch: found one beside [columns]" in refusal(rows, both, X)


class Told(io.BytesIO):
    """A file that remembers how much of it was read at a time."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.amounts: list[int] = []

    def read(self, amount: int | None = -1, /) -> bytes:
        found = super().read(amount)
        self.amounts.append(len(found))
        return found


@pytest.mark.parametrize("group", [500, 1_000_000])
def test_a_file_is_read_in_small_parts_even_if_it_is_one_row_group(
    tmp_path: Path, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).standard_normal((4000, 1024)).astype(np.float32)
    rows = pa.FixedSizeListArray.from_arrays(values.ravel(), 1024)
    told = Told(write(tmp_path / "r.parquet", group, x=rows).read_bytes())
    monkeypatch.setattr(files, "opened", lambda file: contextlib.nullcontext(told))
    wide = Tensor(name="x", dtype="float32", shape=("batch", 1024))
    stream = data.read(tmp_path / "r.parquet", (wide,), "calibration", asked(columns={"batch": 32}))
    np.testing.assert_array_equal(next(stream)["x"], values[:32])
    assert sum(told.amounts) < values.nbytes / 2
    assert sum(len(batch["x"]) for batch in stream) == 4000 - 32
    assert max(told.amounts) <= tables.BUFFER + (1 << 16)


def test_mapping_is_a_frozen_value_and_wrong_ones_are_refused() -> None:
    table = data.Columns.model_validate({"inputs": {"x": "a", "y": "b"}})
    assert table.inputs == (("x", "a"), ("y", "b")) and hash(table) == hash(table.model_copy())
    for wrong in ({"x": 1}, {"x": ""}, ["x"], "x", {"x": ["a"]}):
        with pytest.raises(pydantic.ValidationError) as error:
            data.Columns.model_validate({"inputs": wrong})
        assert error.value.errors()[0]["ctx"]["expected"] == '{input = "column"}'
