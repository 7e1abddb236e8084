"""What CI reads, for met, not met and could not run: JUnit held against its schema's rules, SARIF against 2.1.0's."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from runtime import ci, outcome
from runtime.errors import PacklightError
from runtime.manifest import Budget
from runtime.outcome import Case, Outcome
from tests.command import call
from tests.runtime import models

# Of junit-10.xsd (Jenkins' xUnit plugin): element -> (attributes it must have, ones it may have, elements it may hold)
JUNIT: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"group", "time", "skipped", "timestamp", "hostname", "id", "package", "file", "log", "url"},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "properties": (set(), set(), {"property"}),
    "property": ({"name", "value"}, set(), set()),
    "testcase": (
        {"name"},
        {"time", "classname", "group"},
        {"skipped", "error", "failure", "system-out", "system-err"},
    ),
    "failure": (set(), {"type", "message"}, set()),
    "error": (set(), {"type", "message"}, set()),
    "system-out": (set(), set(), set()),
}
# Of the SARIF 2.1.0 schema: object -> (properties it must have, ones it may have); what packlight writes and no more
SARIF: dict[str, tuple[set[str], set[str]]] = {
    "log": ({"version", "runs"}, {"$schema"}),
    "run": ({"tool"}, {"invocations", "results"}),
    "tool": ({"driver"}, set()),
    "driver": ({"name"}, {"version", "rules"}),
    "rule": ({"id"}, {"shortDescription"}),
    "invocation": ({"executionSuccessful"}, {"toolExecutionNotifications"}),
    "notification": ({"message"}, {"level"}),
    "result": ({"message"}, {"ruleId", "ruleIndex", "level", "locations"}),
}


def require_junit(element: ET.Element) -> None:
    must, may, inside = JUNIT[element.tag]
    assert must <= set(element.keys()) <= must | may, element.tag
    if element.tag == "testsuite":
        for count, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error")):
            assert int(element.attrib[count]) == len(list(element.iter(tag)))
    for child in element:
        assert child.tag in inside
        require_junit(child)


def require_sarif(log: dict[str, Any]) -> None:
    def held(kind: str, value: dict[str, Any]) -> dict[str, Any]:
        must, may = SARIF[kind]
        assert must <= value.keys() and value.keys() <= must | may, kind
        return value

    assert held("log", log)["version"] == "2.1.0"
    for run in log["runs"]:
        driver = held("driver", held("tool", held("run", run)["tool"])["driver"])
        rules = [held("rule", rule)["id"] for rule in driver["rules"]]
        assert len(set(rules)) == len(rules)
        for invocation in run["invocations"]:
            for told in held("invocation", invocation).get("toolExecutionNotifications", []):
                assert held("notification", told)["level"] in ("none", "note", "warning", "error")
        for result in run["results"]:
            assert held("result", result)["level"] in ("none", "note", "warning", "error")
            assert rules[result["ruleIndex"]] == result["ruleId"]
            assert isinstance(result["message"]["text"], str)
            for place in result["locations"]:
                uri = place["physicalLocation"]["artifactLocation"]["uri"]
                assert uri.isascii() and " " not in uri


@pytest.fixture
def strict_bundle(own_bundle: Path) -> Path:
    models.seal(own_bundle, models.manifest(Budget(min_snr_db=300.0)))
    return own_bundle


def told(folder: Path, *args: object) -> tuple[int, ET.Element, dict[str, Any], str]:
    """Run a command with every file asked for; its status and the files, held against their schemas."""
    files = [folder / name for name in ("x.xml", "x.sarif", "x.md")]
    status = call(*args, "--junit", files[0], f"--sarif={files[1]}", "--markdown", files[2])
    suite, log = ET.parse(files[0]).getroot(), json.loads(files[1].read_text())
    require_junit(suite)
    require_sarif(log)
    return status, suite, log, files[2].read_text()


def test_met_not_met_and_could_not_run_are_each_told_in_every_form(
    bundle_folder: Path, strict_bundle: Path, tmp_path: Path
) -> None:
    status, suite, log, page = told(tmp_path, "check", bundle_folder)
    assert (status, suite.get("failures"), suite.get("errors")) == (0, "0", "0")
    assert [each["level"] for each in log["runs"][0]["results"]] == ["warning"]  # a manifest without a verdict
    assert log["runs"][0]["invocations"][0]["executionSuccessful"] and page.startswith("## `tiny`: met\n")
    status, suite, log, page = told(tmp_path, "check", strict_bundle)
    assert (status, suite.get("failures"), suite.get("errors")) == (1, "1", "0")
    first = log["runs"][0]["results"][0]
    assert (first["ruleId"], first["level"]) == ("snr_db", "error") and page.startswith("## `tiny`: not met\n")
    assert first["locations"][0]["logicalLocations"] == [{"name": "logits"}]
    (strict_bundle / "probe.npz").write_bytes(b"nothing")
    status, suite, log, page = told(tmp_path, "check", strict_bundle)
    assert (status, suite.get("failures"), suite.get("errors")) == (2, "0", "1")
    (error,) = suite.iter("error")
    assert "probe.npz" in str(error.get("message"))
    assert not log["runs"][0]["invocations"][0]["executionSuccessful"]
    assert ": could not run" in page.splitlines()[0]


@pytest.mark.parametrize(
    "args",
    [
        ("check", "no-such-folder"),
        ("check", "no-such-folder", "--threads", "many"),
        ("check", "no-such-folder", "--no-such-option"),
        ("compare", "no-such-folder", "nor-this"),
        ("eval", "no-such-folder", "x.npz"),
        ("eval",),
    ],
)
def test_whatever_keeps_a_command_from_running_is_an_error_in_its_files(args: tuple[str, ...], tmp_path: Path) -> None:
    status, suite, _, _ = told(tmp_path, *args)
    assert (status, suite.get("tests"), suite.get("errors")) == (2, "1", "1")


def test_compare_and_eval_are_told_in_every_form(bundle_folder: Path, strict_bundle: Path, tmp_path: Path) -> None:
    models.np.savez(tmp_path / "rows.npz", **next(models.images(5, 1, 30)))
    status, suite, _, page = told(tmp_path, "compare", bundle_folder, strict_bundle, "--rounds", 0)
    assert status == 0 and [case.get("name") for case in suite.iter("testcase")] == ["size_bytes", "integer_macs"]
    assert page.startswith("## `tiny` against `tiny`: `nothing is worse beyond noise`")
    status, suite, log, _ = told(tmp_path, "eval", strict_bundle, tmp_path / "rows.npz")
    assert status == 1 and log["runs"][0]["results"][0]["ruleId"] == "snr_db"


def test_fail_on_warning_makes_a_note_a_failure(bundle_folder: Path, tmp_path: Path) -> None:
    assert told(tmp_path, "check", bundle_folder)[0] == 0
    status, suite, _, _ = told(tmp_path, "check", bundle_folder, "--fail-on", "warning")
    assert (status, suite.get("failures")) == (1, "1")
    assert call("check", bundle_folder, "--fail-on", "nothing") == 2


def test_annotations_come_with_github_alone_and_a_name_begins_no_other(
    strict_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert call("check", strict_bundle, "--json") == 1
    assert "::error" not in capsys.readouterr().err
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert call("check", strict_bundle, "--json") == 1
    printed = capsys.readouterr()
    json.loads(printed.out)
    assert printed.err.splitlines()[0].startswith(
        "::error title=packlight check tiny%3A snr_db logits::snr_db logits: 35."
    )
    case = Case(what="a,b: c\n::error::x", level=outcome.FAILURE, said="50 %\r\n::set-output name=x::y")
    lines = outcome.annotated(Outcome(command="check", about="n", path="", cases=(case,), page="")).splitlines()
    assert lines == ["::error title=packlight check n%3A a%2Cb%3A c %3A%3Aerror%3A%3Ax::50 %25 ::set-output name=x::y"]


def test_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(PacklightError, match="--sarif .*: found a folder"):
        ci.wanted(sarif=tmp_path)
