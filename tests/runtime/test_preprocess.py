from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import manifest, preprocess
from runtime.errors import BundleError, InputError, PacklightError, install
from runtime.preprocess import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET = Preprocessing(input="image", resize=64, crop=(56, 56), scale=1 / 255, mean=MEAN, std=STD)


def pixels(height: int, width: int, channels: int = 3) -> Any:
    shape = (height, width, channels)[: 2 + (channels > 1)]
    return np.random.default_rng(height * width).integers(0, 256, shape).astype(np.uint8)


def asked(**changes: Any) -> Preprocessing:
    return dataclasses.replace(Preprocessing(input="image"), **changes)


def test_pixels_are_scaled_by_the_formula_and_rounded_once() -> None:
    given = pixels(5, 7)
    found = preprocess.image(given, asked(scale=1 / 255, mean=MEAN, std=STD))
    exact = ((given.astype(np.float64) * (1 / 255) - np.array(MEAN)) / np.array(STD)).astype(np.float32)
    np.testing.assert_array_equal(found, exact.transpose(2, 0, 1)[None], strict=True)
    assert found.flags.c_contiguous


def test_without_scale_pixels_are_what_they_were() -> None:
    given = pixels(4, 6)
    np.testing.assert_array_equal(
        preprocess.image(given, asked(layout="NHWC"))[0], given.astype(np.float32), strict=True
    )
    np.testing.assert_array_equal(preprocess.image(given, asked(layout="NHWC", dtype="uint8"))[0], given, strict=True)


def test_layout_and_order_of_channels() -> None:
    given = pixels(4, 6)
    rgb = preprocess.image(given, asked())
    assert rgb.shape == (1, 3, 4, 6)
    np.testing.assert_array_equal(preprocess.image(given, asked(layout="NHWC")), rgb.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(preprocess.image(given, asked(channels="BGR")), rgb[:, ::-1])
    mean = preprocess.image(given, asked(channels="BGR", mean=(1.0, 2.0, 3.0)))
    np.testing.assert_array_equal(mean, rgb[:, ::-1] - np.array([1, 2, 3], np.float32)[:, None, None])


def test_grey_is_one_channel_and_becomes_three_of_one_value() -> None:
    grey = pixels(4, 6, 1)
    assert preprocess.image(grey, asked(channels="L")).shape == (1, 1, 4, 6)
    np.testing.assert_array_equal(preprocess.image(grey[:, :, None], asked(channels="L"))[0, 0], grey)
    assert (preprocess.image(grey, asked()) == grey).all()


@pytest.mark.parametrize(
    ("height", "width", "resize", "shape"),
    [
        (100, 200, 50, (50, 100)),
        (200, 101, 50, (99, 50)),  # floor(50 * 200 / 101)
        (30, 30, 50, (50, 50)),
        (100, 200, (20, 30), (20, 30)),
        (500, 2, 1, (250, 1)),
        (7, 9, None, (7, 9)),
    ],
)
def test_resize_is_of_the_shorter_side_or_to_a_size(
    height: int, width: int, resize: Any, shape: tuple[int, int]
) -> None:
    assert preprocess.image(pixels(height, width), asked(resize=resize)).shape[2:] == shape


@pytest.mark.parametrize(("size", "crop", "first"), [(10, 4, 3), (11, 4, 4), (13, 4, 4), (4, 4, 0)])
def test_crop_is_the_centre_and_half_a_pixel_goes_to_the_even_side(size: int, crop: int, first: int) -> None:
    given = np.broadcast_to(np.arange(size, dtype=np.uint8)[:, None], (size, 9))
    found = preprocess.image(given, asked(channels="L", crop=(crop, 9)))
    assert found[0, 0, :, 0].tolist() == [*range(first, first + crop)]


def test_interpolations_are_pillows() -> None:
    given = pixels(40, 40)
    for name in preprocess.INTERPOLATIONS:
        theirs = Image.fromarray(given).resize((16, 16), Image.Resampling[name.upper()])
        found = preprocess.image(given, asked(resize=16, interpolation=name, layout="NHWC", dtype="uint8"))
        np.testing.assert_array_equal(found[0], np.asarray(theirs))


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "jpg"])
def test_path_file_bytes_and_picture_give_the_same_array(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(pixels(80, 100)).save(path)
    first = preprocess.image(path, IMAGENET)
    assert first.shape == (1, 3, 56, 56)
    with open(path, "rb") as file, Image.open(path) as picture:
        for given in (str(path), file, picture, io.BytesIO(path.read_bytes())):
            np.testing.assert_array_equal(preprocess.image(given, IMAGENET), first, strict=True)


def test_picture_is_turned_upright_as_its_camera_says(tmp_path: Path) -> None:
    given = pixels(20, 30)
    turned = Image.fromarray(given)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    found = preprocess.image(tmp_path / "turned.png", asked(layout="NHWC", dtype="uint8"))
    np.testing.assert_array_equal(found[0], np.rot90(given, -1))


def test_alpha_is_dropped_and_palettes_are_looked_up(tmp_path: Path) -> None:
    given = pixels(8, 8)
    alpha = np.dstack([given, np.full((8, 8), 7, np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(
        preprocess.image(tmp_path / "alpha.png", asked(layout="NHWC", dtype="uint8"))[0], given
    )
    flat = Image.new("RGB", (4, 4), (10, 20, 30)).convert("P")
    flat.save(tmp_path / "palette.png")
    exact = flat.convert("RGB").getpixel((0, 0))
    assert preprocess.image(tmp_path / "palette.png", asked())[0, :, 0, 0].tolist() == list(exact)


def test_what_does_not_decode_is_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(pixels(80, 100)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "script.eps")  # a program, which Pillow would have run
    (tmp_path / "script.eps").rename(tmp_path / "script.jpg")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    for name, says in (
        ("cut.jpg", "truncated"),
        ("empty.jpg", "no picture of a known kind"),
        ("text.png", "no picture of a known kind"),
        ("script.jpg", "no picture of a known kind"),
        ("none.jpg", "No such file"),
        ("deep.png", "more than 8 bits a channel (I;16)"),
    ):
        with pytest.raises(InputError) as error:
            preprocess.image(tmp_path / name, asked())
        assert f"{name}: found " in str(error.value) and says in str(error.value)


def test_pixels_of_another_kind_are_refused() -> None:
    for wrong in (
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((0, 4), np.uint8),
    ):
        with pytest.raises(InputError, match=r"pixels: found .* expected uint8 \[H, W\]"):
            preprocess.image(wrong, asked())


def test_picture_smaller_than_the_crop_is_refused() -> None:
    with pytest.raises(InputError, match=r"found 4x6 pixels, expected at least the crop, 5x5"):
        preprocess.image(pixels(4, 6), asked(crop=(5, 5)))


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(PacklightError, match=re.escape(install("images"))):
        preprocess.image(pixels(4, 6), asked())


def test_importing_it_does_not_load_pillow() -> None:
    code = "import runtime.preprocess, sys; print('PIL' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


PLACE = manifest._Place("manifest.json").key("preprocessing")


@pytest.mark.parametrize(
    "made", [asked(), IMAGENET, asked(resize=(3, 4), channels="L", mean=(1.5,), dtype="float32", layout="NHWC")]
)
def test_what_is_written_is_what_is_read(made: Preprocessing) -> None:
    assert preprocess.read(json.loads(manifest.canonical(made)), PLACE) == made


def test_null_is_no_preprocessing() -> None:
    assert preprocess.read(None, PLACE) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("input", ""),
        ("input", None),
        ("channels", "RGBA"),
        ("resize", 0),
        ("resize", True),
        ("resize", 2.5),
        ("resize", [1]),
        ("resize", 1 << 40),
        ("interpolation", "cubic"),
        ("crop", 224),
        ("crop", [224, -1]),
        ("scale", "1/255"),
        ("scale", None),
        ("scale", 10**400),
        ("scale", float("nan")),
        ("mean", 0.5),
        ("mean", []),
        ("mean", [0.5, 0.5]),
        ("mean", [0.5, True, 0.5]),
        ("std", [0.0]),
        ("std", [1.0, 1.0, -1.0]),
        ("layout", "CHW"),
        ("dtype", "float64"),
        ("dtype", "uint8"),
        ("dtype", ["float32"]),
    ],
)
def test_wrong_value_is_refused_by_its_key(key: str, value: Any) -> None:
    good = json.loads(manifest.canonical(IMAGENET))
    with pytest.raises(BundleError, match=f"^manifest.json:preprocessing.{key}: found "):
        preprocess.read(good | {key: value}, PLACE)


def test_missing_and_unknown_keys_are_refused() -> None:
    good = json.loads(manifest.canonical(IMAGENET))
    for name in good:
        with pytest.raises(BundleError, match=f"preprocessing.{name}: found nothing"):
            preprocess.read({key: value for key, value in good.items() if key != name}, PLACE)
    with pytest.raises(BundleError, match="preprocessing.gamma: found an unknown key"):
        preprocess.read(good | {"gamma": 2.2}, PLACE)
    with pytest.raises(BundleError, match="preprocessing: found list, expected an object or null"):
        preprocess.read([], PLACE)


@pytest.mark.parametrize(("given", "found"), [(None, "none in this bundle"), ("RGB", "str")])
def test_bundle_that_was_not_made_from_pictures_says_so(given: Any, found: str) -> None:
    with pytest.raises(PacklightError, match=rf"preprocessing: found {found}, .* and \[images\] in the recipe"):
        preprocess.image(pixels(4, 6), given)


@pytest.mark.parametrize("given", [None, 3, [1], b"bytes"])
def test_what_is_no_picture_is_refused_by_its_type(given: Any) -> None:
    with pytest.raises(InputError, match=f"found {type(given).__name__}, expected a path, an open file, a PIL image"):
        preprocess.image(given, asked())
