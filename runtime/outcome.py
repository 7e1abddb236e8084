"""What a command found, in the words of CI: Outcome -> JUnit XML, SARIF, Markdown, GitHub annotations, an exit status.

Every command that judges makes one, of its own value; so does whatever kept it from running. An annotation is a line on stderr,
written without being asked where GITHUB_ACTIONS is set: a job's log is where people look first, and elsewhere nobody reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from runtime import sarif as logs
from runtime.printable import code, printable, xml
from runtime.sarif import Result

if TYPE_CHECKING:
    from runtime.exported import Line
MET, WARNING, FAILURE, ERROR = "met", "warning", "failure", "error"
COULD_NOT_RUN = "could not run"
# Of a metric, what SARIF says of it; others are their own name
RULES: Mapping[str, str] = MappingProxyType(
    {
        "exported": "The export met its budget.",
        "reference": "model.fp32.onnx gives the FP32 outputs that the probe holds.",
        "device_q": "This machine computes what the export recorded.",
        "device_same": "This machine computes the integers that the export recorded.",
        "exact": "This machine computes the recorded bits.",
        "snr_db": "Signal of the FP32 outputs over the error of int8.",
        "same_top1": "Share of rows whose largest number is at FP32's place.",
        "median_ms": "Time of one call, both models in turn.",
        COULD_NOT_RUN: "The command could not run, so nothing is known of the bundle.",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing that was judged: MET, WARNING, FAILURE or ERROR (it could not be), and what to say of it."""

    what: str
    level: str
    said: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All that a command judged. about: the bundle's name, path: where it is, page: it all as Markdown."""

    command: str
    about: str
    path: str
    cases: tuple[Case, ...]
    page: str
    properties: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def status(self) -> int:
        """The exit status: 0 met, 1 not met, 2 could not run."""
        levels = {case.level for case in self.cases}
        return 2 if ERROR in levels else int(FAILURE in levels)


def of_lines(lines: Iterable[Line], beside: str = "") -> tuple[Case, ...]:
    """Limits as cases; `beside` is said with each that is not met, as the coverage is."""
    return tuple(Case(what=each.what, level=MET if each.met else FAILURE, said=f"{each}{beside}") for each in lines)


def warnings(said: Sequence[str]) -> tuple[Case, ...]:
    return tuple(Case(what=f"note {number}", level=WARNING, said=each) for number, each in enumerate(said, start=1))


def could_not_run(command: str, path: str, said: str) -> Outcome:
    """What kept a command from running is an error, never a failure of the model, and never nothing."""
    page = f"## {code(path or command)}: could not run\n\n{code(said)}\n"
    case = Case(what=COULD_NOT_RUN, level=ERROR, said=said)
    return Outcome(command=command, about=path or command, path=path, cases=(case,), page=page)


def strict(outcome: Outcome) -> Outcome:
    """The same where a warning is a failure (`--fail-on warning`)."""
    cases = (replace(case, level=FAILURE) if case.level == WARNING else case for case in outcome.cases)
    return replace(outcome, cases=tuple(cases))


def both(first: Outcome, second: Outcome) -> Outcome:
    """Two commands' outcomes of one bundle as one."""
    return replace(
        first, cases=first.cases + second.cases, page=f"{first.page}\n{second.page}",
        properties={**first.properties, **second.properties},
    )  # fmt: skip


def junit(outcome: Outcome) -> str:
    """JUnit XML: one suite, one test case a thing that was judged, the measured numbers as properties.

    Source: junit-10.xsd of Jenkins' xUnit plugin, which also GitLab, Azure and GitHub's reporters read.
    """
    levels = [case.level for case in outcome.cases]
    named = "".join(
        f'    <property name="{xml(name)}" value="{xml(value)}"/>\n' for name, value in outcome.properties.items()
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<testsuite name="packlight {xml(outcome.command)} {xml(outcome.about)}" tests="{len(levels)}" '
        f'failures="{levels.count(FAILURE)}" errors="{levels.count(ERROR)}">\n'
        + (f"  <properties>\n{named}  </properties>\n" if named else "")
        + "".join(_case(case, outcome.about) for case in outcome.cases)
        + "</testsuite>\n"
    )


def _case(case: Case, about: str) -> str:
    said = xml(case.said)
    inside = {
        MET: "",
        WARNING: f"<system-out>{said}</system-out>",
        FAILURE: f'<failure message="{said}"/>',
        ERROR: f'<error message="{said}"/>',
    }[case.level]
    return f'  <testcase classname="{xml(about)}" name="{xml(case.what)}">{inside}</testcase>\n'


def sarif(outcome: Outcome) -> dict[str, object]:
    """SARIF 2.1.0: what is not met is an error, a note a warning; the metric is the rule, its output the logical location."""
    told = [(case, *_rule(case.what)) for case in outcome.cases]
    rules = {rule: RULES.get(rule, f"{rule}, as docs/drift.md and docs/ci.md define it.") for _, rule, _ in told}
    results = [
        Result(
            rule=rule, level="warning" if case.level == WARNING else "error", message=printable(case.said),
            path=outcome.path or ".", node=printable(node) if node else "",
        )
        for case, rule, node in told
        if case.level != MET
    ]  # fmt: skip
    failed = "; ".join(case.said for case in outcome.cases if case.level == ERROR)
    return logs.log(results, rules, failed)


def _rule(what: str) -> tuple[str, str]:
    if what == COULD_NOT_RUN:
        return what, ""
    metric, _, output = what.partition(" ")
    return printable(metric), output if metric != "note" else ""


def wants_annotations() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"


def annotated(outcome: Outcome) -> str:
    """GitHub's workflow commands, one line each; nothing of what a name holds can begin another.

    Source: https://docs.github.com/actions/reference/workflow-commands-for-github-actions
    """
    kinds = {WARNING: "warning", FAILURE: "error", ERROR: "error"}
    return "".join(
        f"::{kinds[case.level]} title={_property(f'packlight {outcome.command} {outcome.about}: {case.what}')}"
        f"::{_data(case.said)}\n"
        for case in outcome.cases
        if case.level != MET
    )


def _data(text: str) -> str:
    return printable(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
