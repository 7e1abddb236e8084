"""What a command line names -> the model, its data and its sample: files, folders, `file.py:function`, sizes."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from exporter import batches, sniff
from exporter.data import files
from exporter.errors import CalibrationError, RecipeError, TraceError
from exporter.source import Sample, Source, from_file, from_onnx, from_pretrained, from_program, load_python
from runtime.errors import PacklightError

T = TypeVar("T")


def model_and_data(
    source: str,
    task: str,
    calibration: str | None,
    heldout: str | None,
    images: Path | None,
    trust: bool = False,
) -> tuple[Source | torch.nn.Module, Any, Any, Sample | None]:
    """The model and its data, from a Python file or a model file; `trust`: a .pt2 may run code."""
    reader: dict[str, Callable[[str], Source]] = {".onnx": from_onnx, ".pt2": partial(from_program, trust=trust)}
    suffix = Path(source).suffix.lower()
    if suffix in sniff.NO_MODELS:
        raise TraceError(
            source, found=sniff.NO_MODELS[suffix], expected="file.py, model.pt2 or model.onnx",
            do="load the weights in a file.py that offers source(), or save the model with torch.export.save",
        )  # fmt: skip
    if suffix in sniff.FOREIGN:
        raise TraceError(
            source, found=sniff.FOREIGN[suffix], expected="file.py, model.pt2 or model.onnx", do=sniff.TF2ONNX
        )
    if suffix in reader:
        return reader[suffix](source), _given(calibration), _given(heldout), None
    if (Path(source) / "config.json").is_file():
        return from_pretrained(source, task), _given(calibration), _given(heldout), None
    sample = from_file(source)
    return (
        sample.source if isinstance(sample.source, Source | torch.nn.Module) else own(sample.source),
        data(sample.calibration, calibration, images),
        data(sample.heldout, heldout, images),
        sample,
    )


def data(function: Any, given: str | None, images: Path | None) -> Any:
    """What the command line gave, else what the sample's function returns, or the batches that stand in its place."""
    if given is not None or function is None:
        return _given(given)
    if not callable(function):
        if images is not None:
            raise CalibrationError(
                "--images", found="batches in the place of a function", expected="calibration(images)"
            )
        return function
    if images is not None and "images" not in inspect.signature(function).parameters:
        name = name_of(function)
        raise CalibrationError("--images", found=f"{name}() takes no images", expected=f"{name}(images)")
    return own(function, images=images)


def _given(text: str | None) -> Any:
    """A path, the word random, or what file.py:function returns."""
    if text is None or text == batches.RANDOM or files.is_remote(text) or ":" not in text or Path(text).exists():
        return text
    path, _, name = text.rpartition(":")
    if not Path(path).is_file():
        raise CalibrationError(text, found=f"no file {path}", expected="file.py:function, or a path of .npz files")
    function = getattr(load_python(Path(path)), name, None)
    if not callable(function):
        raise CalibrationError(text, found=f"no function {name}", expected="a function that returns batches")
    return own(function)


def own(function: Callable[..., Any], *given: Any, images: Path | None = None) -> Any:
    """What a function of the user's file returns; an error inside it, or inside the generator that it is, names it."""
    try:
        made = function(*given) if images is None else function(images=images)
    except PacklightError:
        raise
    except (Exception, SystemExit) as error:  # theirs may be any
        raise _fault(function, error) from error
    if made is None:
        raise PacklightError(f"{name_of(function)}() of your file", found="None", expected="a value: return it")
    return _watched(function, made) if isinstance(made, Iterator) else made


def _watched(function: Callable[..., Any], stream: Iterator[T]) -> Iterator[T]:
    try:
        yield from stream
    except PacklightError:
        raise
    except Exception as error:
        raise _fault(function, error) from error


def name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _fault(function: Callable[..., Any], error: BaseException) -> PacklightError:
    """`calibration() of your file: found ValueError: ... (sample.py:12)`: the last line of their file that ran."""
    frames = traceback.extract_tb(error.__traceback__)
    home = getattr(getattr(function, "__code__", None), "co_filename", "")
    own = [frame for frame in frames if frame.filename == home] or frames
    where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
    said = f"{type(error).__name__}: {error}"[:200]
    return PacklightError(f"{name_of(function)}() of your file", found=f"{said} ({where})")


def refuse_others(source: str, options: Mapping[str, Any]) -> None:
    """Refuse what a language model's export does not take.

    Raises:
        RecipeError: names the first option that was given.
    """
    for name, value in options.items():
        if value not in (None, False):
            raise RecipeError(
                name,
                found=f"{source}, a causal language model",
                expected="--calibration, --scheme, --budget, --max-size, --out",
            )


def size_bytes(size: str | None, flag: str) -> int | None:
    """6MB -> 6000000, 40MiB -> 41943040; a bare number is bytes."""
    if size is None:
        return None
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", size.strip())
    if found is None or found[2].upper() not in units or int(float(found[1]) * units[found[2].upper()]) < 1:
        raise RecipeError(flag, found=repr(size[:40]), expected="a number above 0 with B, KB, MB, GB, KiB, MiB or GiB")
    return int(float(found[1]) * units[found[2].upper()])
