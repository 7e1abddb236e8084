"""packlight export | demo | check | bench | run | chat | explain: parse, one call, print. No logic.

Exit status: 0 met, 1 not met, 2 could not run, 130 interrupted. What could not run is one line on stderr; with
PACKLIGHT_TRACEBACK=1 a fault of nobody's has its traceback above it.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from runtime import ci, files, gate_cli, views
from runtime.bench import measure
from runtime.bundle import load
from runtime.errors import Interrupted, PacklightError, install
from runtime.explain import explain as explain_bundle
from runtime.explain import explain_file
from runtime.gate_cli import Folder, Json, Ort, Share, Threads
from runtime.manifest import canonical, is_language
from runtime.opened import language
from runtime.printable import lines, printable
from runtime.probe import read_arrays, write_arrays

COMMANDS = "packlight.commands"  # the entry points through which the exporter adds its commands
FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}

INTERRUPTED = 130  # of Ctrl-C, as shells have it; what newer releases of typer return, where older ones raise Abort

app = typer.Typer(
    name="packlight",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Turn a PyTorch model into an int8 bundle that proves itself: it runs in integers, it is faster, it agrees.",
    epilog="Exit status: 0 met, 1 not met, 2 could not run. Begin with: packlight demo",
)

MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, metavar="N", help="Tokens of the answer at most.")]
Temperature = Annotated[float, typer.Option(min=0, metavar="T", help="0 is the likeliest token each time.")]
Seed = Annotated[int | None, typer.Option(min=0, metavar="N", help="Of the draws; the same one draws the same text.")]


def main(args: list[str] | None = None) -> None:
    """Run the command line; whatever ends it early becomes one line on stderr and exit status 2, Ctrl-C 130."""
    warnings.showwarning = _warn  # type: ignore[assignment]  # it is called with places, which we do not name
    given = sys.argv[1:] if args is None else args
    try:
        status = app(
            args, prog_name="packlight", standalone_mode=False
        )  # else typer makes Ctrl-C status 1, which is "not met"
        if status == INTERRUPTED:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted: found Ctrl-C; run it again", given, INTERRUPTED)
    except Interrupted as stop:
        _fail(str(stop), given, INTERRUPTED)
    except PacklightError as error:
        _fail(str(error), given)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: found {files.said(error)}; {files.remedy(error)}", given)
    except (SystemExit, GeneratorExit):
        raise
    except (
        BaseException
    ) as error:  # status 1 is for a budget that is not met; a panic of a library in Rust is no Exception
        if hasattr(error, "format_message"):  # typer's: a flag or an argument that is wrong
            _wrong_usage(error, given)
        if os.environ.get("PACKLIGHT_TRACEBACK"):
            typer.echo(lines(traceback.format_exc()), err=True)
        said = f"{type(error).__name__}: {error}"[:300]
        _fail(f"this is a fault of packlight's or of your file: found {said}; PACKLIGHT_TRACEBACK=1 shows where", given)
    raise SystemExit(status if isinstance(status, int) else 0)


def _fail(said: str, args: Sequence[str], status: int = 2) -> NoReturn:
    if status == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one changes nothing
    typer.echo(f"error: {printable(said)}", err=True)
    ci.could_not_run(args, said)
    raise SystemExit(status) from None


def _wrong_usage(error: Any, args: Sequence[str]) -> NoReturn:
    """Typer's message as a line of ours; without any argument the help, as typer has it."""
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message(), err=True)
        raise SystemExit(2) from None
    command = error.ctx.command_path if getattr(error, "ctx", None) is not None else "packlight"
    _fail(f"{error.format_message().rstrip('.')}; see {command} --help", args)


def _warn(message: Warning | str, *where: object) -> None:
    """A warning as a line of ours, without the line of code that it came from."""
    typer.echo(f"warning: {printable(message)}", err=True)


def _say_version(asked: bool) -> None:
    if asked:
        try:
            typer.echo(f"packlight {version('packlight')}")
        except PackageNotFoundError:  # a checkout on PYTHONPATH
            typer.echo("packlight, not installed")
        raise typer.Exit


@app.callback()
def packlight(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn a PyTorch model into an int8 bundle that proves itself: it runs in integers, it is faster, it agrees."""


@app.command(context_settings=FORWARD, add_help_option=False)
def export(context: typer.Context) -> None:
    """Calibrate a model, decide what runs in integers, write a bundle. [dim]Needs packlight\\[export].[/dim]"""
    forward("export", context.args)


@app.command(context_settings=FORWARD, add_help_option=False)
def demo(context: typer.Context) -> None:
    """Export a small model made on the spot and prove the bundle. [dim]Needs packlight\\[demo].[/dim]"""
    forward("demo", context.args)


@app.command(context_settings=FORWARD, add_help_option=False)
def targets(context: typer.Context) -> None:
    """List the CPUs to export for, and say which one this machine is. [dim]Needs packlight\\[export].[/dim]"""
    forward("targets", context.args)


@app.command(context_settings=FORWARD, add_help_option=False)
def lint(context: typer.Context) -> None:
    """Look for what would make a model wrong or slow on a CPU. [dim]Needs packlight\\[export].[/dim]"""
    forward("lint", context.args)


app.command(epilog="Example: packlight check build/lite0 --junit parity.xml")(gate_cli.check)
app.command(epilog="Example: packlight compare build/old build/new --data heldout.npz")(gate_cli.compare)
app.command("eval", epilog="Example: packlight eval build/lite0 pictures --labels labels.csv")(gate_cli.evaluate)


@app.command(epilog="Example: packlight bench build/lite0 --threads 1")
def bench(
    bundle: Folder,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one operator.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each model, taken in turn.")] = 30,
    ort: Ort = None,
    as_json: Json = False,
) -> None:
    """Time int8 against FP32 on the probe's first batch: medians, taken in turn in one run."""
    opened = load(bundle, threads, ort=ort)
    timing = measure(opened, rounds)
    if as_json:
        views.show_json(canonical(timing))
    else:
        views.show(views.timing(timing, opened.manifest.name))


@app.command(epilog="Example: packlight run build/lite0 inputs.npz --out outputs.npz")
def run(
    bundle: Folder,
    inputs: Annotated[
        Path | None, typer.Argument(metavar="[INPUTS.npz]", help="One array per input, under its name.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="OUT.npz", help="Write the outputs, each under its name.")] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What a language model is to go on with.")] = None,
    tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    ort: Ort = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run the model on one batch of inputs, or a language model on a prompt."""
    if is_language(bundle):
        gate_cli.refuse_options(bundle, {"INPUTS.npz": inputs, "--out": out, "--ort": ort})
        if prompt is None:
            raise PacklightError(
                str(bundle), found="no --prompt", expected="a text that the language model goes on with"
            )
        model = language(bundle, threads)
        pieces = model.generate(prompt, tokens, temperature=temperature, seed=seed)
        if as_json:
            return views.show_json(canonical({"text": "".join(pieces)}))
        _stream(pieces)
        return None
    if prompt is not None or inputs is None:
        found = "--prompt" if prompt is not None else "no INPUTS.npz"
        raise PacklightError(str(bundle), found=found, expected="arrays: packlight run BUNDLE INPUTS.npz")
    if out is not None:
        files.require_file(out, "--out")
    outputs = load(bundle, threads, ort=ort).run(read_arrays(inputs))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(out, outputs)
    if as_json:
        views.show_json(canonical(views.outputs_table(outputs)))
    else:
        views.show(views.outputs(outputs))


@app.command(epilog="Example: packlight chat build/gemma --temperature 0.7")
def chat(
    bundle: Folder,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told before it begins.")] = None,
    tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    seed: Seed = None,
    threads: Threads = None,
) -> None:
    """Talk with a language model that has a chat template; an empty line or Ctrl-D ends it. [dim]Needs packlight\\[chat].[/dim]"""
    model = language(bundle, threads)
    said = [] if system is None else [{"role": "system", "content": system}]
    model.chat([*said, {"role": "user", "content": "."}])  # no template, or none that works: told before the first line
    while line := _asked():
        said.append({"role": "user", "content": line})
        answer = _stream(model.generate(said, tokens, temperature=temperature, seed=seed))
        said.append({"role": "assistant", "content": answer})


def _asked() -> str:
    """A line from the terminal; empty at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _stream(pieces: Iterable[str]) -> str:
    """Print text as it comes, and give all of it."""
    parts = []
    for piece in pieces:
        typer.echo(lines(piece.expandtabs(4)), nl=False)
        sys.stdout.flush()
        parts.append(piece)
    typer.echo("")
    return "".join(parts)


@app.command(epilog="Example: packlight explain build/lite0 --as x86-avx2")
def explain(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder; or an .onnx or .ort with --inputs.")
    ],
    min_integer_macs: Share = None,
    ort: Ort = None,
    target: Annotated[
        str | None,
        typer.Option("--as", metavar="TARGET", help="Forecast another CPU, as x86-avx2. Needs packlight\\[export]."),
    ] = None,
    inputs: Annotated[Path | None, typer.Option(metavar="FILE.npz", help="One batch for a bare .onnx or .ort.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show every node: the kernel that ran, its types, time and MACs, and why the plan chose so."""
    if target is not None:
        if ort is not None or min_integer_macs is not None or threads is not None:
            raise typer.BadParameter("--as is a forecast: it takes neither --ort, --min-integer-macs nor --threads")
        given = [] if inputs is None else ["--inputs", str(inputs)]
        return forward("forecast", [str(bundle), "--as", target, *given, *(["--json"] if as_json else [])])
    if bundle.is_dir():
        if inputs is not None:
            raise typer.BadParameter("a bundle has inputs of its own: --inputs is for a bare .onnx or .ort")
        explanation = explain_bundle(load(bundle, threads, ort=ort))
    else:
        if ort is not None:
            raise typer.BadParameter("--ort and --onnx are for a bundle: a file has one form")
        explanation = explain_file(bundle, read_arrays(_required(inputs, bundle)), threads)
    if as_json:
        views.show_json(canonical(explanation))
    else:
        views.show(views.explanation(explanation, bundle.name))
    if min_integer_macs is not None and explanation.integer_macs < min_integer_macs:
        typer.echo(f"integer_macs: {explanation.integer_macs:.6g} (at least {min_integer_macs:.6g}): NOT MET", err=True)
        raise typer.Exit(1)


def _required(inputs: Path | None, model: Path) -> Path:
    if inputs is None or not model.is_file():
        found = "no --inputs" if model.is_file() else "nothing"
        raise PacklightError(str(model), found=found, expected="a bundle's folder, or a model and --inputs FILE.npz")
    return inputs


def forward(command: str, args: list[str]) -> None:
    """Hand a command line, --help and all, to the exporter's command of that name."""
    found = [point for point in entry_points(group=COMMANDS) if point.name == command]
    try:
        if not found:
            raise ImportError(f"no entry point {command} in {COMMANDS}")
        apply = found[0].load()
    except ImportError as error:
        if error.name and error.name.split(".")[0] in ("exporter", "runtime") and found:
            raise  # a fault of ours, and not of what is installed
        named = "explain --as" if command == "forecast" else command
        do = install("demo" if command == "demo" else "export")
        raise PacklightError(f"packlight {named} is not installed here", found=str(error), do=do) from error
    status = apply(args, prog_name=f"packlight {command}", standalone_mode=False)
    raise typer.Exit(status if isinstance(status, int) else 0)
