"""Pictures -> batches, with the preprocessing that the recipe's `[images]` writes down and the bundle's manifest keeps.

The work itself is runtime.preprocess: what calibration sees is what a device will feed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, PlainValidator, ValidationInfo, field_validator

from exporter.data import files
from exporter.data.files import File
from exporter.data.group import Left, by_name, grouped, require_filled, size
from exporter.data.table import Table, refuse
from exporter.errors import CalibrationError, RecipeError
from runtime.errors import InputError
from runtime.manifest import Tensor
from runtime.preprocess import CHANNELS, LARGEST, Preprocessing, decode, image

NUMBER = re.compile(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})([eE][+-]?\d{1,3})?(/\d{1,20})?")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def _pair(value: Any, one: str) -> Any:
    if isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_side, value)):
        return tuple(value)
    if value is None or _is_side(value):
        return value
    refuse(f"{one}, or [height, width]")


def _resize(value: Any) -> Any:
    return _pair(value, "pixels of the shorter side")


def _crop(value: Any) -> Any:
    found = _pair(value, "pixels of a square's side")
    return (found, found) if isinstance(found, int) else found


def _fraction(value: Any) -> Any:
    """A number, or a fraction such as "1/255"."""
    if isinstance(value, str):
        if not NUMBER.fullmatch(value.strip()):  # of "1e999999999" a fraction would be made for ever
            refuse('a number, or a fraction such as "1/255"')
        try:
            return float(Fraction(value))
        except (ValueError, ZeroDivisionError, OverflowError):
            refuse('a number, or a fraction such as "1/255"')
    return value


def _each(value: Any) -> Any:
    """A number, or a list of them; fractions too."""
    return tuple(_fraction(each) for each in (value if isinstance(value, list | tuple) else [value]))


Number = Annotated[float, BeforeValidator(_fraction), Field(gt=-1e30, lt=1e30)]
Each = Annotated[tuple[Annotated[float, Field(gt=-1e30, lt=1e30)], ...], BeforeValidator(_each), Field(min_length=1)]


class Images(Table):
    """`[images]`: how a picture becomes an input; runtime.preprocess.Preprocessing gives the formulas.

    input: which of the graph's inputs; the only one if not given. batch: pictures a batch; the graph's own first size
    if that is fixed, else 1. crop: one number is a square.
    """

    input: str | None = Field(default=None, min_length=1)
    batch: int | None = Field(default=None, ge=1)
    channels: Literal["RGB", "BGR", "L"] = "RGB"
    resize: Annotated[int | tuple[int, int] | None, PlainValidator(_resize)] = None
    interpolation: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bilinear"
    crop: Annotated[tuple[int, int] | None, PlainValidator(_crop)] = None
    scale: Number = 1.0
    mean: Each = (0.0,)
    std: Each = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    dtype: Literal["float32", "uint8"] = "float32"

    @field_validator("crop")
    @classmethod
    def _fits(cls, crop: tuple[int, int] | None, info: ValidationInfo) -> tuple[int, int] | None:
        resize = info.data.get("resize")
        if crop and isinstance(resize, int) and min(crop) > resize:
            refuse(f"at most resize, {resize}")
        if crop and isinstance(resize, tuple) and (crop[0] > resize[0] or crop[1] > resize[1]):
            refuse(f"at most resize, {list(resize)}")
        return crop

    @field_validator("mean", "std")
    @classmethod
    def _by_channel(cls, each: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        channels = info.data.get("channels", "RGB")
        if len(each) not in (1, CHANNELS[channels]):
            refuse(f"one number, or {CHANNELS[channels]} of them for {channels}")
        if info.field_name == "std" and min(each) <= 0:
            refuse("numbers above 0")
        return each

    @field_validator("dtype")
    @classmethod
    def _plain(cls, dtype: str, info: ValidationInfo) -> str:
        plain = {"scale": 1.0, "mean": (0.0,), "std": (1.0,)}
        if dtype == "uint8" and any(info.data.get(key, value) != value for key, value in plain.items()):
            refuse("float32, or uint8 without scale, mean and std")
        return dtype


def preprocessing(asked: Images, tensors: Sequence[Tensor]) -> Preprocessing:
    """What the table says, for the graph's input that it is about.

    Raises:
        RecipeError: no such input, several where the table names none, or an input of another dtype.
    """
    names = [tensor.name for tensor in tensors]
    if asked.input is None and len(names) != 1:
        raise RecipeError(
            "missing key 'input'", found=f"a model with {len(names)} inputs", expected=f"one of {', '.join(names)}",
            where="[images]",
        )  # fmt: skip
    tensor = by_name(tensors, asked.input or names[0], "[images]:input")
    if tensor.dtype != asked.dtype:
        raise RecipeError(
            "dtype", found=asked.dtype, expected=f"{tensor.dtype}, as input {tensor.name!r}", where="[images]"
        )
    values = asked.model_dump(exclude={"input", "batch"})
    return Preprocessing(input=tensor.name, **values)


def batches(found: Iterable[File], asked: Images, tensors: Sequence[Tensor], left: Left) -> Iterator[Mapping[str, Any]]:
    """Batches of pictures, read one by one.

    Raises:
        RecipeError: see `preprocessing`.
        CalibrationError: a picture that does not decode, unless `left.skip_bad`; one that is smaller than the crop;
            pictures of different sizes in one batch.
    """
    wanted = preprocessing(asked, tensors)
    require_filled(tensors, [wanted.input], "[images]")
    rows = ((file.name, array) for file in found if (array := converted(file.name, file, wanted, left)) is not None)
    for group in grouped(rows, size(asked.batch, by_name(tensors, wanted.input, "[images]"), "images"), left):
        yield {wanted.input: joined([array for _, array in group], group[0][0])}


def converted(name: str, picture: Any, wanted: Preprocessing, left: Left) -> np.ndarray[Any, Any] | None:
    """One picture as a batch of one; None if it does not decode and may be skipped.

    Args:
        name: of the file or row, for messages.
        picture: a File, encoded bytes, {"bytes": ...} as Hugging Face's image columns have it, a path or URL, a PIL
            image, or pixels.
        wanted: what is done to it.
        left: where a skipped one is told.
    """
    given = _source(picture)
    try:
        upright = decode(given)
    except InputError as error:
        if left.skip_bad:
            left.skipped.append(name)
            return None
        raise CalibrationError(
            name, found=error.found, expected=error.expected, do="take it out, or leave out all such with --skip-bad"
        ) from error
    try:
        return image(upright, wanted)
    except InputError as error:
        raise CalibrationError(name, found=error.found, expected=error.expected, do=error.do) from error


def joined(arrays: Sequence[np.ndarray[Any, Any]], name: str) -> np.ndarray[Any, Any]:
    """Batches of one as one batch."""
    shapes = {array.shape[1:] for array in arrays}
    if len(shapes) > 1:
        raise CalibrationError(
            f"{name} and the next pictures", found=f"shapes {', '.join(str(list(s)) for s in sorted(shapes)[:3])}",
            expected="one shape in a batch", do="add crop, resize to [height, width], or take batch = 1",
        )  # fmt: skip
    return np.concatenate(arrays)


def _source(picture: Any) -> Any:
    if isinstance(picture, Mapping) and picture.get("bytes") is not None:
        picture = picture["bytes"]
    elif isinstance(picture, Mapping) and isinstance(picture.get("path"), str):
        picture = picture["path"]
    if isinstance(picture, str):
        picture = files.at(picture)
    if isinstance(picture, File):
        return files.contents(picture)
    return io.BytesIO(picture) if isinstance(picture, bytes | bytearray | memoryview) else picture
