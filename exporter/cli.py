"""packlight export | demo: parse, one call, print. No logic. The device commands are runtime.cli's.

Exit status: 0 met, 1 not met, 2 could not run.
"""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from exporter import batches
from exporter.errors import CalibrationError, TraceError
from exporter.pipeline import export
from exporter.recipe import Recipe, load_recipe, presets
from exporter.report import Report
from exporter.source import Sample, Source, from_file, from_onnx, from_pretrained, from_program, load_python
from runtime import manifest as manifests
from runtime.bundle import load
from runtime.errors import PacklightError
from runtime.manifest import canonical
from runtime.session import open_session

T = TypeVar("T")
DEFAULT_RECIPE = "portable"

export_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
demo_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")

Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


@export_app.command(epilog="Example: packlight export samples/lite0 --target x86-vnni --out build/lite0")
def run(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="file.py, file.py:function or a folder with sample.py, which offers source(), calibration(), heldout(); "
            "or, with --calibration, model.onnx, model.pt2 or a Hugging Face folder.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The bundle to write; an old bundle is replaced.")] = Path(
        "build/model"
    ),
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"A preset: {', '.join(presets())}. Default: {DEFAULT_RECIPE}.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE", help="Your own recipe, a TOML file, instead of a preset.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="One batch a file: .npz (an array per input) or .npy, or a folder of them; or file.py:function; "
            "or the word random, for plumbing only.",
        ),
    ] = None,
    heldout: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="The same, for drift. Without it every fourth calibration batch is kept apart."
        ),
    ] = None,
    task: Annotated[
        str, typer.Option(metavar="NAME", help="What a Hugging Face model is for, in optimum's words.")
    ] = "auto",
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Pictures for a sample whose calibration(images) takes them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Trace a model, calibrate it, decide what runs in integers, and write a bundle that proves itself."""
    if target and recipe:
        raise typer.BadParameter("give --target or --recipe, not both: a recipe names its target")
    given = recipe or target
    asked = load_recipe(given) if given else None
    model, seen, unseen, sample = _read(source, task, calibration, heldout, images)
    chosen = asked or load_recipe((sample.recipe if sample else None) or DEFAULT_RECIPE)
    report = _export(model, chosen, seen, unseen, out)
    _finish(report, _scores(out, sample), out, as_json)


@demo_app.command(epilog="Example: packlight demo --out build/digits")
def demo(
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Keep the bundle here.")] = None,
    target: Annotated[str, typer.Option(metavar="NAME", help=f"A preset: {', '.join(presets())}.")] = DEFAULT_RECIPE,
    as_json: Json = False,
) -> None:
    """Train a small network on real handwritten digits, export it, and prove the bundle. No network needed."""
    recipe = load_recipe(target)
    if find_spec("sklearn") is None:
        raise PacklightError("packlight demo: its digits", found="no scikit-learn", do="pip install 'packlight[demo]'")
    here = Path(__file__).parent
    sample = from_file(str(next(p for p in (here / "samples/digits", here.parent / "samples/digits") if p.is_dir())))
    if not as_json:
        Console(stderr=True).print("[dim]training a digits CNN on 1,297 real scans (about 15 s)[/dim]")
    with tempfile.TemporaryDirectory(prefix="packlight-demo-") as folder:
        place = out or Path(folder) / "digits"
        seen, unseen = _data(sample.calibration, None, None), _data(sample.heldout, None, None)
        report = _export(_own(sample.source), recipe, seen, unseen, place)
        _finish(report, _scores(place, sample), out, as_json)


def _read(
    source: str, task: str, calibration: str | None, heldout: str | None, images: Path | None
) -> tuple[Source, Any, Any, Sample | None]:
    """The model and its data, from a Python file or a model file."""
    reader: dict[str, Callable[[str], Source]] = {".onnx": from_onnx, ".pt2": from_program}
    suffix = Path(source).suffix
    if suffix in (".pt", ".pth", ".pkl", ".bin"):
        raise TraceError(
            source, found="a pickle, which runs code when it is read", expected="file.py, model.pt2 or model.onnx",
            do="load the weights in a file.py that offers source(), or save the model with torch.export.save",
        )  # fmt: skip
    if suffix in reader:
        return reader[suffix](source), _given(calibration), _given(heldout), None
    if (Path(source) / "config.json").is_file():
        return from_pretrained(source, task), _given(calibration), _given(heldout), None
    sample = from_file(source)
    return (
        _own(sample.source),
        _data(sample.calibration, calibration, images),
        _data(sample.heldout, heldout, images),
        sample,
    )


def _data(function: Callable[..., Any] | None, given: str | None, images: Path | None) -> Any:
    """What the command line gave, else what the sample's function returns."""
    if given is not None or function is None:
        return _given(given)
    if images is not None and "images" not in inspect.signature(function).parameters:
        raise CalibrationError(
            "--images", found=f"{function.__name__}() takes no images", expected=f"{function.__name__}(images)"
        )
    return _own(function, images=images)


def _given(text: str | None) -> Any:
    """A path, the word random, or what file.py:function returns."""
    if text is None or text == batches.RANDOM or ":" not in text or Path(text).exists():
        return text
    path, _, name = text.rpartition(":")
    if not Path(path).is_file():
        raise CalibrationError(text, found=f"no file {path}", expected="file.py:function, or a path of .npz files")
    function = getattr(load_python(Path(path)), name, None)
    if not callable(function):
        raise CalibrationError(text, found=f"no function {name}", expected="a function that returns batches")
    return _own(function)


def _own(function: Callable[..., Any], *given: Any, images: Path | None = None) -> Any:
    """What a function of the user's file returns; an error inside it, or inside the generator that it is, names it."""
    try:
        made = function(*given) if images is None else function(images=images)
    except PacklightError:
        raise
    except Exception as error:  # theirs may be any
        raise _fault(function, error) from error
    return _watched(function, made) if isinstance(made, Iterator) else made


def _watched(function: Callable[..., Any], stream: Iterator[T]) -> Iterator[T]:
    try:
        yield from stream
    except PacklightError:
        raise
    except Exception as error:
        raise _fault(function, error) from error


def _fault(function: Callable[..., Any], error: Exception) -> PacklightError:
    """`calibration() of your file: found ValueError: ... (sample.py:12)`: the last line of their file that ran."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == inspect.getfile(function)] or frames
    where = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
    said = f"{type(error).__name__}: {error}"[:200]
    return PacklightError(f"{function.__name__}() of your file", found=f"{said} ({where})")


def _export(source: Source, recipe: Recipe, seen: Any, unseen: Any, out: Path) -> Report:
    try:
        with Terminal() as progress:
            return export(source, recipe, calibration=seen, heldout=unseen, out=out, progress=progress)
    except KeyboardInterrupt:
        raise PacklightError(
            "interrupted", found="Ctrl-C", do="run it again; no half-written bundle was left"
        ) from None


def _finish(report: Report, scores: dict[str, tuple[float, float]], kept: Path | None, as_json: bool) -> None:
    """Print the report, the sample's own metrics and where the bundle is kept; exit 0 or 1."""
    if as_json:
        typer.echo(report.to_json() if not scores else canonical({"report": report, "scores": scores}), nl=False)
    else:
        typer.echo(str(report))
        for metric, (fp32, int8) in scores.items():
            typer.echo(f"{'score':<10}{metric}: FP32 {fp32:.4f}, int8 {int8:.4f}")
        typer.echo(f"{'bundle':<10}{kept}" if kept else f"{'keep it':<10}packlight demo --out build/digits")
    raise typer.Exit(0 if report.met else 1)


def _scores(out: Path, sample: Sample | None) -> dict[str, tuple[float, float]]:
    """{metric: (FP32, int8)} from the sample's evaluate(run), on the bundle as it was written."""
    if sample is None or sample.evaluate is None:
        return {}
    bundle = load(out)
    fp32 = open_session(out / manifests.FP32)
    names = [output.name for output in fp32.get_outputs()]
    reference = _own(sample.evaluate, lambda batch: dict(zip(names, fp32.run(names, dict(batch)), strict=True)))
    candidate = _own(sample.evaluate, bundle.run)
    return {metric: (float(reference[metric]), float(candidate[metric])) for metric in reference}


def _console() -> Console:
    """A console on a copy of stderr: while a tracer works, stderr itself is kept quiet, and the bars go on."""
    if not sys.stderr.isatty():
        return Console(stderr=True)
    return Console(file=open(os.dup(sys.stderr.fileno()), "w", encoding="utf-8"))  # Terminal closes it


class Terminal:
    """Draws the stages on stderr: a spinner and the stage's name, and a bar where batches are counted."""

    def __init__(self) -> None:
        self._console = _console()
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]✓[/green]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> Terminal:
        self._bars.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if failure[0] is None:
            self._end()
        self._bars.stop()
        if self._console.file is not sys.stderr:
            self._console.file.close()

    def stage(self, text: str) -> None:
        self._end()
        self._bars.add_task(text, total=1)

    def each(self, items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
        self._end()
        bar = self._bars.add_task(text, total=total)
        count = 0
        for count, item in enumerate(items, start=1):
            yield item
            self._bars.update(bar, completed=count)
        self._bars.update(bar, total=count)

    def _end(self) -> None:
        for task in self._bars.tasks:
            if not task.finished:
                self._bars.update(
                    task.id, total=task.total or task.completed or 1, completed=task.total or task.completed or 1
                )
