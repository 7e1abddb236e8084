"""packlight check | compare | eval: parse, one call, tell it wherever it is wanted. No logic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from runtime import ci, confined, gate, language_check, outcome, samples, scores, views
from runtime import compare as compares
from runtime import evaluate as evaluates
from runtime.bundle import load
from runtime.errors import PacklightError
from runtime.manifest import canonical, is_language
from runtime.opened import language
from runtime.printable import lines
from runtime.scores import Asked

Folder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder, as packlight export wrote it.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of one operator; ONNX Runtime's choice by default.")]
Ort = Annotated[
    bool | None,
    typer.Option(
        "--ort/--onnx", help="Run model.int8.ort, the phone's file, or the .onnx, which is the default if it is there."
    ),
]
Share = Annotated[
    float | None,
    typer.Option(
        "--min-integer-macs",
        min=0,
        max=1,
        metavar="SHARE",
        help="Ask for this share of MACs, 0..1, in integer kernels.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the value the API returns, as JSON.")]
Junit = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the verdict as JUnit XML.")]
Markdown = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write it as Markdown.")]
Sarif = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write it as SARIF 2.1.0, for code scanning.")]
FailOn = Annotated[
    str,
    typer.Option(metavar="LEVEL", help="error, or warning: then a note, or too few samples to tell, is not met too."),
]
Data = Annotated[
    Path | None,
    typer.Option(metavar="DATA", help="Samples: .npz, .npy, pictures, or a folder of them. Default: both probes."),
]
Labels = Annotated[
    Path | None, typer.Option(metavar="FILE", help="What the samples are: .npy, .txt, or .csv of name,label.")
]
Metric = Annotated[
    str | None,
    typer.Option(
        metavar="FILE.py:FUNCTION", help="(outputs, label) -> a number, more is better. Default: top-1, with labels."
    ),
]
Rounds = Annotated[int, typer.Option(min=0, help="Timed calls of each, taken in turn; 0 for none.")]
OneThread = Annotated[int, typer.Option(min=1, help="Threads of one operator.")]


def check(
    context: typer.Context,
    bundle: Folder,
    against: Annotated[
        Path | None, typer.Option(metavar="OLD", help="A bundle of the same model that this one may not be worse than.")
    ] = None,
    data: Data = None,
    junit: Junit = None,
    markdown: Markdown = None,
    sarif: Sarif = None,
    fail_on: FailOn = "error",
    min_integer_macs: Share = None,
    ort: Ort = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a bundle whose weights saturate in this CPU's kernels.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, metavar="SECONDS", help="Run it in a process that ends after so long.")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="And that may take so much memory, as 2GB. Linux.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run the bundle's own probe here: hold drift and integer share against its budget, and this device against the export."""
    where = ci.wanted(fail_on, junit=junit, markdown=markdown, sarif=sarif)
    if timeout is not None or max_memory is not None:
        raise typer.Exit(_confined(context, timeout, max_memory))
    if is_language(bundle):
        refuse_options(bundle, {
            "--ort": ort, "--strict": strict, "--min-integer-macs": min_integer_macs, "--against": against, "--data": data,
        })  # fmt: skip
        return _language(bundle, where, threads, as_json)
    if data is not None and against is None:
        raise typer.BadParameter(
            "--data is for --against; packlight eval holds a bundle against its budget on your data"
        )
    opened = load(bundle, threads, ort=ort, strict=strict)
    baseline = None if against is None else load(against, threads or 1)
    verdict, name = gate.check(opened, min_integer_macs), opened.manifest.name
    told = gate.outcome(verdict, name, str(bundle))
    found = None
    if baseline is not None:
        found = compares.compare(baseline, load(bundle, threads or 1, ort=ort), data)
        told = outcome.both(told, compares.outcome(found, str(bundle)))
    status = ci.tell(told, where)
    if as_json:
        views.show_json(
            verdict.to_json() if found is None else canonical({"check": verdict, "compare": found.fields()})
        )
    else:
        views.show(views.verdict(verdict, name))
        if found is not None:
            views.show(views.comparison(found))
    raise typer.Exit(status)


def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="The baseline: a bundle of the same model.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The bundle that is to be judged.")],
    data: Data = None,
    labels: Labels = None,
    metric: Metric = None,
    rounds: Rounds = 60,
    junit: Junit = None,
    markdown: Markdown = None,
    sarif: Sarif = None,
    fail_on: FailOn = "error",
    threads: OneThread = 1,
    as_json: Json = False,
) -> None:
    """Say what became better and worse beyond noise between two bundles of one model: paired tests on the same samples."""
    where, asked = ci.wanted(fail_on, junit=junit, markdown=markdown, sarif=sarif), _asked(labels, metric)
    found = compares.compare(load(old, threads), load(new, threads), data, asked, rounds)
    status = ci.tell(compares.outcome(found, str(new)), where)
    views.show_json(found.to_json()) if as_json else views.show(views.comparison(found))
    raise typer.Exit(status)


def evaluate(
    bundle: Folder,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Samples: .npz, .npy, pictures, or a folder of them.")],
    labels: Labels = None,
    metric: Metric = None,
    worst: Annotated[int, typer.Option(min=0, metavar="N", help="Samples to name, the worst first.")] = evaluates.WORST,
    junit: Junit = None,
    markdown: Markdown = None,
    sarif: Sarif = None,
    fail_on: FailOn = "error",
    ort: Ort = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run FP32 and int8 on your own data: each limit of the budget is met when its bound meets it; worst samples first."""
    where, asked = ci.wanted(fail_on, junit=junit, markdown=markdown, sarif=sarif), _asked(labels, metric)
    opened = load(bundle, threads, ort=ort)
    found, name = evaluates.evaluate(opened, data, asked, worst), opened.manifest.name
    status = ci.tell(evaluates.outcome(found, name, str(bundle)), where)
    views.show_json(found.to_json()) if as_json else views.show(views.evaluation(found, name))
    raise typer.Exit(status)


def _asked(labels: Path | None, metric: str | None) -> Asked:
    given = None if labels is None else samples.labels(labels)
    chosen = scores.function(metric) if metric else scores.top1 if labels is not None else None
    return Asked(metric=chosen, labels=given)


def _language(bundle: Path, where: ci.Wanted, threads: int | None, as_json: bool) -> None:
    model = language(bundle, threads)
    verdict, name = language_check.check(model), model.manifest.name
    status = ci.tell(language_check.outcome(verdict, name, str(bundle)), where)
    views.show_json(verdict.to_json()) if as_json else typer.echo(language_check.markdown(verdict, name), nl=False)
    raise typer.Exit(status)


def _confined(context: typer.Context, timeout: float | None, max_memory: str | None) -> int:
    """Run the same command without these two options in a process of its own; its status."""
    most = None if max_memory is None else confined.size(max_memory, "--max-memory")
    given, named = [context.info_name or ""], []
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if value is None or value == parameter.default or parameter.name in ("timeout", "max_memory"):
            continue
        if parameter.param_type_name == "argument":
            named.append(str(value))
        elif isinstance(value, bool):
            given.append(parameter.opts[0] if value else parameter.secondary_opts[0])
        else:
            given += [parameter.opts[0], str(value)]
    ended = confined.run([*given, "--", *named], timeout, most)
    typer.echo(lines(ended.err), err=True, nl=False)
    typer.echo(lines(ended.out), nl=False)
    return ended.status


def refuse_options(bundle: Path, options: Mapping[str, object]) -> None:
    """Refuse what is given to a language model and is not for one."""
    for name, value in options.items():
        if value not in (None, False):
            raise PacklightError(name, found=f"{bundle}, a language model", expected="a bundle of arrays in and out")
