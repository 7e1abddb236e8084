"""Findings -> SARIF 2.1.0, the form in which code scanning reads them.

Source: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html, sections 3.14, 3.19, 3.20, 3.27.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from runtime.printable import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One finding: the rule, "error" or "warning", what to say, the file it is about, and the node or tensor in it."""

    rule: str
    level: str
    message: str
    path: str
    node: str = ""


def log(results: Iterable[Result], rules: Mapping[str, str], failed: str = "") -> dict[str, object]:
    """One run with every rule and one result a finding: a file's path is its URI, the node a logical location.

    failed: why the command could not run; empty where it ran.
    """
    from urllib.parse import quote  # here: `import runtime` need not load it

    ids = list(rules)
    driver = {
        "name": "packlight",
        "version": _version(),
        "rules": [{"id": rule, "shortDescription": {"text": why}} for rule, why in rules.items()],
    }
    said: dict[str, object] = {"executionSuccessful": not failed}
    if failed:
        said["toolExecutionNotifications"] = [{"level": "error", "message": {"text": printable(failed)}}]
    found = [
        {
            "ruleId": each.rule,
            "ruleIndex": ids.index(each.rule),
            "level": each.level,
            "message": {"text": each.message},
            "locations": [
                {"physicalLocation": {"artifactLocation": {"uri": quote(each.path, errors="replace")}}}
                | ({"logicalLocations": [{"name": each.node}]} if each.node else {})
            ],
        }
        for each in results
    ]
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "invocations": [said], "results": found}],
    }


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # the same

    try:
        return version("packlight")
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        return "0"
