"""packlight export | targets | lint | explain --as | demo: parse, one call, print. No logic. The device commands are runtime.cli's.

Exit status: 0 met, 1 not met, 2 could not run.
"""

from __future__ import annotations

import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from exporter import forecast, given, lint, views
from exporter import target as targets
from exporter.budget import Evaluate, parse
from exporter.causal import folder, limits
from exporter.causal import pipeline as causal
from exporter.causal.pipeline import Asked
from exporter.causal.scheme import AUTO, SCHEMES
from exporter.errors import RecipeError
from exporter.forecast import text as forecast_text
from exporter.pipeline import export
from exporter.recipe import Recipe, limited, load_recipe, presets
from exporter.report import Report, text, told
from exporter.source import Sample, Source, from_file
from exporter.terminal import Terminal
from runtime import ci, cpu, files
from runtime.bundle import load
from runtime.errors import Interrupted, PacklightError, install
from runtime.gate import coverage
from runtime.gate_cli import Junit, Markdown, Sarif
from runtime.manifest import canonical
from runtime.printable import lines, printable
from runtime.views import show, show_json

DEFAULT_RECIPE = "portable"


def _app() -> typer.Typer:
    """One command of `packlight`, which runtime.cli finds by its entry point."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


export_app = _app()
lint_app = _app()
forecast_app = _app()
targets_app = _app()
demo_app = _app()

Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print all of the report: what was asked, decided, measured.")
]


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
            help="Files, a folder or a URL of .npz, .npy, pictures, .txt or Parquet (docs/data.md); or file.py:function; "
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
    ort: Annotated[bool, typer.Option("--ort", help="Write model.int8.ort for phones too, and prove it.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Calibrate on Dask workers: tcp://host:port, or local:N. The bundle has the same bytes.",
        ),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out and count pictures that do not decode.")
    ] = False,
    trust_source: Annotated[
        bool, typer.Option("--trust-source", help="Let a model.pt2 run what is written in it, as a file.py does.")
    ] = False,
    max_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Fail if the model that ships is larger, as in 6MB.")
    ] = None,
    max_ram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Fail if running it takes more memory, as in 40MB.")
    ] = None,
    min_integer_macs: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="SHARE", help="Fail if fewer MACs, 0..1, run in integers.")
    ] = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="LIMIT",
            help="What the bundle must meet, as often as you like: snr>=25dB, same-top1>=0.995, cosine>=0.999, max-abs<=0.1, "
            "'top1 drop<=0.5%' of the sample's evaluate(), speedup>=1.8.",
        ),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="costs.json of another export: the same plan, and nothing is timed."),
    ] = None,
    max_evals: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Look at no more plans than this; 0 takes the static one.")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(min=0, metavar="MINUTES", help="Time and search for a plan no longer than this.")
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Of a language model's weights: {', '.join(SCHEMES)}. Default: auto."),
    ] = None,
    distill: Annotated[
        float,
        typer.Option(
            min=0, metavar="MINUTES", help="Train a language model's block scales so long against FP32's logits."
        ),
    ] = 0.0,
    junit: Junit = None,
    markdown: Markdown = None,
    sarif: Sarif = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Trace a model, calibrate it, decide what runs in integers, and write a bundle that proves itself."""
    where = ci.wanted(junit=junit, markdown=markdown, sarif=sarif)
    if task == "auto" and folder.is_causal(Path(source)):
        given.refuse_others(
            source, {
                "--target": target, "--recipe": recipe, "--heldout": heldout, "--images": images, "--ort": ort,
                "--cluster": cluster, "--skip-bad": skip_bad, "--max-ram": max_ram, "--costs": costs,
                "--min-integer-macs": min_integer_macs, "--max-evals": max_evals, "--max-minutes": max_minutes,
            },
        )  # fmt: skip
        asked = Asked(
            scheme=scheme or AUTO,
            calibration=calibration,
            limits=limits.parse(budgets or (), given.size_bytes(max_size, "--max-size")),
            distill_minutes=distill,
        )
        with Terminal() as progress:
            written = causal.export(source, out, asked, progress)
        ci.tell(told.outcome(out.name, str(out), written.lines, str(written)), where)
        if as_json:
            show_json(written.to_json())
        else:
            typer.echo(f"{lines(str(written))}\n{'bundle':<10}{printable(out)}")
        raise typer.Exit(0 if written.met else 1)
    if scheme is not None or distill:
        raise typer.BadParameter("--scheme and --distill are for a causal language model's folder")
    if target and recipe:
        raise typer.BadParameter("give --target or --recipe, not both: a recipe names its target")
    named = recipe or target
    said, drops = parse(budgets or ())
    most = {
        "max_size_bytes": given.size_bytes(max_size, "--max-size"),
        "max_ram_bytes": given.size_bytes(max_ram, "--max-ram"),
        "min_integer_macs": min_integer_macs,
        **said,
        "metric_drops": tuple(map(str, drops)) or None,
    }
    read = load_recipe(named) if named else None
    model, seen, unseen, sample = given.model_and_data(source, task, calibration, heldout, images, trust_source)
    chosen = read or load_recipe((sample.recipe if sample else None) or DEFAULT_RECIPE)
    report = _export(
        model, limited(chosen, most), seen, unseen, out, ort, skip_bad, cluster, _evaluate(sample), costs, max_evals, max_minutes
    )  # fmt: skip
    beside = f", with {coverage(report.integer_macs)}"
    ci.tell(told.outcome(report.name, str(out), report.lines, str(report), beside), where)
    _finish(report, printable(out), verbose, as_json)


@demo_app.command(epilog="Example: packlight demo --out build/digits")
def demo(
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Keep the bundle here.")] = None,
    target: Annotated[str, typer.Option(metavar="NAME", help=f"A preset: {', '.join(presets())}.")] = DEFAULT_RECIPE,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Train a small network on real handwritten digits, export it, and prove the bundle. No network needed."""
    recipe = load_recipe(target)
    if find_spec("sklearn") is None:
        raise PacklightError("packlight demo: its digits", found="no scikit-learn", do=install("demo"))
    here = Path(__file__).parent
    sample = from_file(str(next(p for p in (here / "samples/digits", here.parent / "samples/digits") if p.is_dir())))
    if not as_json:
        Console(stderr=True).print("[dim]training a digits CNN on 1,297 real scans (about 15 s)[/dim]")
    with tempfile.TemporaryDirectory(prefix="packlight-demo-") as folder:
        place = out or Path(folder) / "digits"
        seen, unseen = given.data(sample.calibration, None, None), given.data(sample.heldout, None, None)
        report = _export(given.own(sample.source), recipe, seen, unseen, place, evaluate=_evaluate(sample))
        kept = printable(out) if out else "not kept: packlight demo --out build/digits"
        _finish(report, kept, verbose, as_json, picture=True)


@targets_app.command(epilog="Example: packlight targets x86-avx2")
def list_targets(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One target, every fact with its source.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the values as JSON.")] = False,
) -> None:
    """List the targets, and say which one this machine is; with a NAME, what that target says and why."""
    if name is not None:
        facts = targets.facts(targets.by_name(name))
        return show_json(canonical(facts)) if as_json else show(views.facts(name, facts))
    here = cpu.read()
    if as_json:
        table = {"here": targets.of(here).name, "cpu": here, "targets": [*targets.TARGETS.values()]}
        return show_json(canonical(table))
    return show(views.targets([*targets.TARGETS.values()], targets.of(here), here))


@lint_app.command(epilog="Example: packlight lint build/lite0 --sarif lint.sarif")
def lint_model(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A bundle's folder, model.onnx or model.ort.")],
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The CPUs it is meant for. Default: the bundle's own; of a file, every CPU."),
    ] = None,
    sarif: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the findings as SARIF 2.1.0.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look for what would make a model wrong, slow or impossible to open on a CPU it is meant for."""
    asked = targets.by_name(target) if target else None
    if sarif is not None:
        files.require_file(sarif, "--sarif")
    if model.is_dir():
        bundle = load(model)
        named = lint.check_bundle(bundle, asked or targets.by_name(bundle.manifest.target))
        found = {str(model / name): each for name, each in named.items()}
    else:
        found = {str(model): lint.check(model, asked)}
    if sarif is not None:
        files.write(sarif, canonical(lint.sarif(found)), "--sarif")
    show_json(canonical(found)) if as_json else typer.echo(lines(lint.render(found)))
    raise typer.Exit(1 if lint.count(found, "error") else 0)


@forecast_app.command()
def forecast_model(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A bundle's folder, or an int8 .onnx with --inputs.")],
    target: Annotated[str, typer.Option("--as", metavar="TARGET", help="The CPU to forecast, as x86-avx2.")],
    inputs: Annotated[str | None, typer.Option(metavar="DATA", help="Batches for a bare .onnx: .npz files.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the forecast as JSON.")] = False,
) -> None:
    """Say what another CPU's kernels would make of an int8 model: which layers clip, how often, and what comes out."""
    asked = targets.by_name(target, "--as")
    if not asked.pairs_in_int16:
        raise RecipeError(
            "--as", found=target, expected="x86-avx2 or portable",
            do=f"nothing clips on {target}: its kernels sum u8·s8 products in int32",
        )  # fmt: skip
    with Terminal() as progress:
        if model.is_dir():
            found = forecast.of_bundle(model, progress)
        else:
            if inputs is None or not model.is_file():
                raise PacklightError(
                    str(model), found="no --inputs" if model.is_file() else "nothing",
                    expected="a bundle's folder, or an int8 .onnx and --inputs DATA",
                )  # fmt: skip
            found = forecast.of_model(model, inputs, progress=progress)
    show_json(canonical(found)) if as_json else typer.echo(lines(forecast_text.render(found, model.name)))


def _export(
    source: Source | torch.nn.Module,
    recipe: Recipe,
    seen: Any,
    unseen: Any,
    out: Path,
    ort: bool = False,
    skip_bad: bool = False,
    cluster: str | None = None,
    evaluate: Evaluate | None = None,
    costs: Path | None = None,
    max_evaluations: int | None = None,
    max_minutes: float | None = None,
) -> Report:
    try:
        with Terminal() as progress:
            return export(
                source,
                recipe,
                calibration=seen,
                heldout=unseen,
                out=out,
                ort=ort,
                skip_bad=skip_bad,
                progress=progress,
                workers=cluster,
                evaluate=evaluate,
                costs=costs,
                max_evaluations=max_evaluations,
                max_minutes=max_minutes,
            )
    except KeyboardInterrupt as stop:
        raise Interrupted(str(stop) or "interrupted; no half-written bundle was left") from None


def _finish(report: Report, place: str, verbose: bool, as_json: bool, picture: bool = False) -> None:
    """Print the report, its first rows or all of it, and where the bundle is; exit 0 or 1."""
    if as_json:
        show_json(report.to_json())
    else:
        typer.echo(lines(text.summary(report, place)))
        if picture:
            typer.echo(text.picture(report))
        if verbose:
            typer.echo(lines(str(report)))
    raise typer.Exit(0 if report.met else 1)


def _evaluate(sample: Sample | None) -> Evaluate | None:
    """The sample's own metrics, whose faults are told as the user's."""
    if sample is None or sample.evaluate is None:
        return None
    return partial(given.own, sample.evaluate)
