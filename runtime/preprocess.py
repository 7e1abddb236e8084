"""A picture -> the array a model takes. The exporter calibrates with these very functions, so a device that calls them
feeds the model what its ranges were taken from.

    array = preprocess.image("cat.jpg", bundle.manifest.preprocessing)
    logits = bundle.run({"image": array})["logits"]

Needs Pillow (the extra `images`); importing this module does not.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

import numpy as np

from runtime.errors import InputError, PacklightError, install

if TYPE_CHECKING:
    from types import ModuleType

    from PIL.Image import Image

    from runtime.drift import Array

CHANNELS = {"RGB": 3, "BGR": 3, "L": 1}
LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "uint8")
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
LARGEST = 1 << 16  # pixels of a side; a typing error, not a picture
LARGEST_NUMBER = 1e30
PIXELS = (
    1 << 26
)  # of a picture: more than any camera has, and 200 MB; a PNG of some kB can claim a thousand times as many

# Of the kinds that Pillow reads these are photographs and drawings; to read some others it starts other programs
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO")

# Pillow converts these to 8 bit by cutting off what is above 255, without a word
WIDE_MODES = ("I", "F", "I;")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """What happens to a picture before the graph's input `input` gets it, in the order of the fields.

    channels: the picture is made upright (EXIF), alpha is dropped, and it becomes RGB, BGR or L (grey, ITU-R 601).
    resize: the shorter side in pixels (the longer one is floor(resize * longer / shorter)), or (height, width).
    interpolation: Pillow's filter of that name.
    crop: the centre, (height, width), beginning at round((size - crop) / 2), a half rounded to even.
    scale, mean, std: x = (pixel * scale - mean[c]) / std[c] for pixels 0..255; in float64, rounded once to float32.
        One value holds for every channel. Channels are counted in the order of `channels`.
    layout: NCHW or NHWC.
    dtype: float32, or uint8: the pixels as they are.
    """

    input: str
    channels: str = "RGB"
    resize: int | tuple[int, int] | None = None
    interpolation: str = "bilinear"
    crop: tuple[int, int] | None = None
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "NCHW"
    dtype: str = "float32"


def image(picture: Any, preprocessing: Preprocessing) -> Array:
    """One picture as a batch of one: [1, C, H, W], or [1, H, W, C] in the layout NHWC.

    Args:
        picture: a path, an open binary file, a PIL image, or uint8 pixels [H, W], [H, W, 1] or [H, W, 3] in RGB.
        preprocessing: the manifest's.

    Raises:
        InputError: see `decode`; a picture smaller than the crop.
        PacklightError: `preprocessing` is none, as in a bundle that was not made from pictures; Pillow is not installed.
    """
    if not isinstance(preprocessing, Preprocessing):
        raise PacklightError(
            "preprocessing", found="none in this bundle" if preprocessing is None else type(preprocessing).__name__,
            expected="bundle.manifest.preprocessing of a bundle made from pictures",
            do="make the arrays as calibration's were made; or give the exporter pictures, and [images] in the recipe",
        )  # fmt: skip
    wanted = preprocessing
    upright = decode(picture).convert("L" if wanted.channels == "L" else "RGB")
    if wanted.resize is not None:
        filters, sides = _pillow()[0].Resampling, _size(upright.size, wanted.resize)
        if math.prod(sides) > PIXELS:
            found = f"{sides[0]} x {sides[1]} pixels after resizing"
            raise InputError(_name(picture), found=found, expected=f"at most {PIXELS}", do="resize to fewer")
        upright = upright.resize(sides, filters[wanted.interpolation.upper()])
    if wanted.crop is not None:
        upright = upright.crop(_centre(upright.size, wanted.crop, _name(picture)))
    pixels = np.asarray(upright, np.uint8).reshape(upright.height, upright.width, -1)
    if wanted.channels == "BGR":
        pixels = pixels[:, :, ::-1]
    values = _scaled(pixels, wanted)
    return np.ascontiguousarray((values if wanted.layout == "NHWC" else values.transpose(2, 0, 1))[None])


def decode(picture: Any) -> Image:
    """The picture as Pillow has it, upright and with all its pixels read; takes what `image` takes.

    Raises:
        InputError: what was given does not decode or has more than 8 bits a channel; pixels of another dtype or shape.
        PacklightError: Pillow is not installed.
    """
    pillow, ops = _pillow()
    if isinstance(picture, np.ndarray):
        return _from_pixels(picture, pillow)
    name = _name(picture)
    if not isinstance(picture, str | os.PathLike | pillow.Image) and not hasattr(picture, "read"):
        raise InputError(
            name, found=type(picture).__name__, expected="a path, an open file, a PIL image, or uint8 pixels of numpy"
        )
    try:
        if isinstance(picture, pillow.Image):
            opened = picture
        else:
            pillow.init()
            with pillow.open(picture, formats=[kind for kind in FORMATS if kind in pillow.OPEN]) as opened:
                if math.prod(opened.size) > PIXELS:
                    raise ValueError(f"{opened.width} x {opened.height} pixels, where at most {PIXELS} may be")
                opened.load()
    except Exception as error:  # a decoder that meets a damaged file raises whatever it likes
        raise InputError(name, found=_said(error), expected="a picture that Pillow can decode") from error
    if opened.mode.startswith(WIDE_MODES):
        raise InputError(name, found=f"more than 8 bits a channel ({opened.mode})", expected="8 bits", do="convert it")
    return cast("Image", ops.exif_transpose(opened))


def _scaled(pixels: Array, wanted: Preprocessing) -> Array:
    """x = (pixel * scale - mean) / std by a table of the 256 values a channel: the same bits on every machine."""
    if wanted.dtype == "uint8":
        return pixels
    count = pixels.shape[2]
    mean, std = (np.broadcast_to(np.array(each, np.float64), count) for each in (wanted.mean, wanted.std))
    table = ((np.arange(256.0)[:, None] * wanted.scale - mean) / std).astype(np.float32)  # [256, C]
    return table[pixels, np.arange(count)]


def _size(size: tuple[int, int], resize: int | tuple[int, int]) -> tuple[int, int]:
    """(width, height) after resizing, as Pillow has it."""
    if not isinstance(resize, int):
        return resize[1], resize[0]
    width, height = size
    shorter = min(size)
    return max(1, resize * width // shorter), max(1, resize * height // shorter)


def _centre(size: tuple[int, int], crop: tuple[int, int], name: str) -> tuple[int, int, int, int]:
    (width, height), (tall, wide) = size, crop
    if width < wide or height < tall:
        raise InputError(
            name, found=f"{height}x{width} pixels", expected=f"at least the crop, {tall}x{wide}",
            do="resize to the crop or more",
        )  # fmt: skip
    left, top = round((width - wide) / 2), round((height - tall) / 2)
    return left, top, left + wide, top + tall


def _from_pixels(pixels: Array, pillow: ModuleType) -> Image:
    shape = pixels.shape
    plain = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))
    if pixels.dtype != np.uint8 or not plain or 0 in shape:
        raise InputError(
            "pixels", found=f"{pixels.dtype} {list(shape)}", expected="uint8 [H, W], [H, W, 1] or [H, W, 3] in RGB"
        )
    flat = pixels[:, :, 0] if shape[2:] == (1,) else pixels
    return cast("Image", pillow.fromarray(np.ascontiguousarray(flat)))


def _name(picture: Any) -> str:
    return str(picture) if isinstance(picture, str) or hasattr(picture, "__fspath__") else "picture"


def _said(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "no picture of a known kind"
    return (str(error).splitlines() or [""])[0][:120] or type(error).__name__


def _pillow() -> tuple[ModuleType, ModuleType]:
    """(PIL.Image, PIL.ImageOps)."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise PacklightError("pictures", found="no Pillow", do=install("images")) from error
    return Image, ImageOps


class Place(Protocol):
    """Where in the manifest a reader stands, as in runtime.manifest: it names the key and refuses."""

    def key(self, name: str) -> Place: ...

    def refuse(self, *, found: str, expected: str, do: str = "") -> NoReturn: ...


def read(value: object, at: Place) -> Preprocessing | None:
    """The manifest's `preprocessing`, read strictly; null is none.

    Raises:
        BundleError: a missing or unknown key, or a value that is not one of `Preprocessing`.
    """
    if value is None:
        return None
    if not isinstance(value, dict):
        at.refuse(found=type(value).__name__, expected="an object or null")
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    for name in [*names, *value]:
        if name not in value:
            at.key(name).refuse(found="nothing", expected="this key")
        if name not in names:
            at.key(name).refuse(found="an unknown key", expected=f"one of {', '.join(names)}")
    made: dict[str, Any] = {}
    for name in names:
        of, expected = _READERS[name]
        made[name] = of(value[name])
        if made[name] is _BAD:
            at.key(name).refuse(found=repr(value[name])[:80], expected=expected)
    wanted = Preprocessing(**made)
    _require_agreement(wanted, at)
    return wanted


def _require_agreement(wanted: Preprocessing, at: Place) -> None:
    channels = CHANNELS[wanted.channels]
    for name, each in (("mean", wanted.mean), ("std", wanted.std)):
        if len(each) not in (1, channels):
            at.key(name).refuse(found=f"{len(each)} numbers", expected=f"1 or {channels}, for {wanted.channels}")
    if wanted.dtype == "uint8" and (wanted.scale, wanted.mean, wanted.std) != (1.0, (0.0,), (1.0,)):
        at.key("dtype").refuse(found="uint8 with scale, mean or std", expected="float32, or the pixels as they are")


_BAD: Any = object()


def _one_of(names: tuple[str, ...]) -> tuple[Callable[[object], Any], str]:
    return lambda value: value if isinstance(value, str) and value in names else _BAD, f"one of {', '.join(names)}"


def _side(value: object) -> Any:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST else _BAD


def _pair(value: object) -> Any:
    if not isinstance(value, list) or len(value) != 2 or any(_side(each) is _BAD for each in value):
        return _BAD
    return tuple(value)


def _number(value: object) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _BAD
    return float(value) if -LARGEST_NUMBER < value < LARGEST_NUMBER else _BAD  # no NaN is between


def _numbers(value: object) -> Any:
    found = [_number(each) for each in value] if isinstance(value, list) else []
    return tuple(found) if found and _BAD not in found else _BAD


_PAIR = "[height, width], each 1..65536"
_READERS: dict[str, tuple[Callable[[object], Any], str]] = {
    "input": (lambda value: value if isinstance(value, str) and value else _BAD, "an input's name"),
    "channels": _one_of(tuple(CHANNELS)),
    "resize": (
        lambda value: value if value is None else _pair(value) if isinstance(value, list) else _side(value),
        f"null, a side 1..65536, or {_PAIR}",
    ),
    "interpolation": _one_of(INTERPOLATIONS),
    "crop": (lambda value: value if value is None else _pair(value), f"null, or {_PAIR}"),
    "scale": (_number, "a finite number"),
    "mean": (_numbers, "a list of finite numbers"),
    "std": (
        lambda value: _BAD if (found := _numbers(value)) is _BAD or min(found) <= 0 else found,
        "a list of finite numbers above 0",
    ),
    "layout": _one_of(LAYOUTS),
    "dtype": _one_of(DTYPES),
}
