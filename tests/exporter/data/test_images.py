from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest

from exporter import data
from exporter.data.images import Images
from runtime import preprocess
from runtime.manifest import Tensor
from tests.exporter.data.made import IMAGE, asked, picture, read, refusal

TABLE = {"resize": 8, "crop": 8, "scale": "1/255", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
ASKED = asked(images=TABLE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(["b.png", "a.jpg", "dogs/c.webp", "cats/d.bmp", "cats/E.JPG"]):
        picture(tmp_path / name, number)
    (tmp_path / "labels.csv").write_text("a,b")
    (tmp_path / ".hidden.png").write_text("what some systems leave behind")
    return tmp_path


def test_folder_gives_one_picture_a_batch_in_the_order_of_their_paths(folder: Path) -> None:
    wanted = data.preprocessing(ASKED, (IMAGE,))
    assert wanted is not None
    names = ["a.jpg", "b.png", "cats/E.JPG", "cats/d.bmp", "dogs/c.webp"]
    found = read(folder, ASKED, IMAGE)
    assert len(found) == 5
    for name, batch in zip(names, found, strict=True):
        np.testing.assert_array_equal(batch["image"], preprocess.image(folder / name, wanted), strict=True)


def test_what_the_device_computes_is_what_calibration_saw_byte_for_byte(folder: Path) -> None:
    wanted = data.preprocessing(ASKED, (IMAGE,))
    assert wanted is not None
    assert (
        read(folder / "a.jpg", ASKED, IMAGE)[0]["image"].tobytes()
        == preprocess.image(folder / "a.jpg", wanted).tobytes()
    )


def test_batch_says_how_many_pictures_and_the_last_one_has_the_rest(folder: Path) -> None:
    found = read(folder, asked(images=TABLE | {"batch": 2}), IMAGE)
    assert [batch["image"].shape[0] for batch in found] == [2, 2, 1]
    np.testing.assert_array_equal(
        np.concatenate([batch["image"] for batch in found]),
        np.concatenate([batch["image"] for batch in read(folder, ASKED, IMAGE)]),
    )


def test_fixed_batch_of_the_graph_is_kept_to_and_the_rest_is_counted(folder: Path) -> None:
    pairs = Tensor(name="image", dtype="float32", shape=(2, 3, 8, 8))
    stream = data.stream(folder, (pairs,), "calibration", ASKED)
    assert [batch["image"].shape[0] for batch in stream] == [2, 2]
    assert stream.left.over == 1
    assert "[images]: batch: found 3, expected 2, the fixed first size" in refusal(
        folder, asked(images=TABLE | {"batch": 3}), pairs
    )
    eight = Tensor(name="image", dtype="float32", shape=(8, 3, 8, 8))
    assert "0 that do not decode and 5 that fill no batch" in refusal(folder, ASKED, eight)


def test_reading_again_gives_the_same_bytes(folder: Path) -> None:
    stream = data.stream(folder, (IMAGE,), "calibration", ASKED)
    first, second = ([batch["image"].tobytes() for batch in stream] for _ in range(2))
    assert first == second


def test_picture_that_does_not_decode_is_named_and_refused(folder: Path) -> None:
    (folder / "cats" / "broken.png").write_bytes((folder / "b.png").read_bytes()[:50])
    says = refusal(folder, ASKED, IMAGE)
    assert "cats/broken.png: found " in says and "--skip-bad" in says


def test_skip_bad_leaves_it_out_counts_it_and_keeps_batches_full(folder: Path) -> None:
    (folder / "aa.png").write_text("no picture")
    (folder / "z.jpg").write_bytes(b"")
    stream = data.stream(folder, (IMAGE,), "calibration", asked(images=TABLE | {"batch": 2}), skip_bad=True)
    for _ in range(2):  # a second pass counts anew
        assert [batch["image"].shape[0] for batch in stream] == [2, 2, 1]
        assert [Path(name).name for name in stream.left.skipped] == ["aa.png", "z.jpg"]


def test_folder_of_nothing_but_bad_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    assert "found 1 that do not decode and 0 that fill no batch" in refusal(tmp_path, ASKED, IMAGE, skip_bad=True)


def test_pictures_of_several_sizes_need_a_crop_to_share_a_batch(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 1, 12, 16)
    picture(tmp_path / "b.png", 2, 16, 12)
    free = Tensor(name="image", dtype="float32", shape=("batch", 3, "height", "width"))
    assert [b["image"].shape for b in read(tmp_path, asked(images={}), free)] == [(1, 3, 12, 16), (1, 3, 16, 12)]
    says = refusal(tmp_path, asked(images={"batch": 2}), free)
    assert "expected one shape in a batch; add crop" in says


def test_picture_smaller_than_the_crop_is_named_even_with_skip_bad(tmp_path: Path) -> None:
    picture(tmp_path / "small.png", 1, 4, 4)
    says = refusal(tmp_path, asked(images={"crop": 8}), IMAGE, skip_bad=True)
    assert "small.png: found 4x4 pixels, expected at least the crop, 8x8" in says


def test_input_of_several_must_be_named_and_all_must_be_filled(folder: Path) -> None:
    other = Tensor(name="scale", dtype="float32", shape=(1,))
    assert "[images]: missing key 'input': found a model with 2 inputs" in refusal(folder, ASKED, IMAGE, other)
    says = refusal(folder, asked(images=TABLE | {"input": "imag"}), IMAGE, other)
    assert "no input 'imag'" in says and "did you mean 'image'?" in says
    says = refusal(folder, asked(images=TABLE | {"input": "image"}), IMAGE, other)
    assert "[images]: input 'scale': found values for image only" in says


def test_dtype_of_the_graph_is_asked_for_by_the_table(folder: Path) -> None:
    raw = Tensor(name="image", dtype="uint8", shape=("batch", 8, 8, 3))
    assert "[images]: dtype: found float32, expected uint8, as input 'image'" in refusal(folder, ASKED, raw)
    found = read(folder, asked(images={"resize": [8, 8], "dtype": "uint8", "layout": "NHWC"}), raw)
    assert found[0]["image"].dtype == np.uint8 and found[0]["image"].shape == (1, 8, 8, 3)


def test_shape_that_the_table_makes_and_the_graph_does_not_take_is_named(folder: Path) -> None:
    says = refusal(folder, asked(images=TABLE | {"layout": "NHWC"}), IMAGE)
    assert "calibration batch 0: input 'image': found shape [1, 8, 8, 3], expected shape ['batch', 3, 8, 8]" in says


def test_fractions_numbers_and_lists_of_toml_are_read() -> None:
    table = Images.model_validate({"scale": "1/255", "mean": 0.5, "std": ["1/2", 0.25, 1], "resize": [8, 9], "crop": 8})
    assert (table.scale, table.mean, table.std) == (1 / 255, (0.5,), (0.5, 0.25, 1.0))
    assert (table.resize, table.crop) == ((8, 9), (8, 8))
    assert hash(table) == hash(table.model_copy())


@pytest.mark.parametrize(
    ("table", "key", "expected"),
    [
        ({"resize": 0}, "resize", "pixels of the shorter side, or [height, width]"),
        ({"resize": [8]}, "resize", "pixels of the shorter side, or [height, width]"),
        ({"resize": "8"}, "resize", "pixels of the shorter side, or [height, width]"),
        ({"crop": [8, True]}, "crop", "pixels of a square's side, or [height, width]"),
        ({"resize": 8, "crop": 9}, "crop", "at most resize, 8"),
        ({"resize": [8, 9], "crop": [9, 8]}, "crop", "at most resize, [8, 9]"),
        ({"scale": "1/0"}, "scale", 'a number, or a fraction such as "1/255"'),
        ({"mean": "half"}, "mean", 'a number, or a fraction such as "1/255"'),
        ({"mean": [0.1, 0.2]}, "mean", "one number, or 3 of them for RGB"),
        ({"channels": "L", "mean": [0.1, 0.2, 0.3]}, "mean", "one number, or 1 of them for L"),
        ({"std": [1, 0, 1]}, "std", "numbers above 0"),
        ({"dtype": "uint8", "scale": "1/255"}, "dtype", "float32, or uint8 without scale, mean and std"),
    ],
)
def test_wrong_value_names_its_key_and_what_is_expected(table: dict[str, Any], key: str, expected: str) -> None:
    with pytest.raises(pydantic.ValidationError) as error:
        Images.model_validate(table)
    first = error.value.errors()[0]
    assert first["loc"] == (key,)
    assert first["ctx"]["expected"] == expected
