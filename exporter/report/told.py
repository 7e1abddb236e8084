"""An export's report for CI: what was asked and found as test cases, all of it as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.exported import Line
from runtime.outcome import MET, Case, Outcome, of_lines
from runtime.printable import code, lines


def outcome(name: str, place: str, limits: Sequence[Line], text: str, beside: str = "") -> Outcome:
    """One case a limit, and one for the bundle that was written whether it meets them or not.

    text: the report as people read it. beside: what is said with each limit that is not met.
    """
    cases = (Case(what="written", level=MET), *of_lines(limits, beside))
    verdict = "met" if all(limit.met for limit in limits) else "not met"
    shown = lines(text).replace("```", "'''")
    return Outcome(
        command="export", about=name, path=place, cases=cases, page=f"## {code(name)}: {verdict}\n\n```\n{shown}\n```\n"
    )
