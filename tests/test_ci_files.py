"""What a repository takes from here into its CI, run as CI runs it: the steps of the Action and of the GitLab job, the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runtime import models

ROOT = Path(__file__).parents[1]
ACTION: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
GITLAB: dict[str, Any] = yaml.safe_load((ROOT / "templates/packlight.gitlab-ci.yml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with a `packlight` on its PATH that runs this checkout, where the install step is left out."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "packlight"
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m runtime "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return tmp_path


def bash(script: str, folder: Path, **given: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GITHUB_", "PACKLIGHT_"))}
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], cwd=folder, env={**environment, "PATH": path, **given},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def action(name: str, **inputs: str) -> tuple[str, dict[str, str]]:
    """A step's script, and its environment with the inputs put in, as the runner does."""
    step = next(each for each in ACTION["runs"]["steps"] if each["name"] == name)
    chosen = {key: inputs.get(key, str(each.get("default", ""))) for key, each in ACTION["inputs"].items()}
    named = {f"${{{{ inputs.{key} }}}}": value for key, value in chosen.items()}
    return step["run"], {key: named.get(value, str(ROOT)) for key, value in step["env"].items()}


def test_steps_of_the_action_tell_a_job_in_its_own_files(bundle: Path, job: Path) -> None:
    script, given = action("check", bundle=str(bundle), against=str(bundle))
    ran = bash(script, job, GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(job / "summary.md"), **given)
    assert ran.returncode == 0, ran.stderr
    cases = {each.get("name") for each in ET.parse(job / "packlight.xml").getroot().iter("testcase")}
    assert {"device_q logits", "integer_macs"} <= cases and (job / "packlight.sarif").is_file()
    assert (job / "summary.md").read_text().startswith("## `tiny`: met\n")
    assert ran.stderr.startswith("::warning title=packlight check tiny")
    script, given = action("check", bundle="nothing", **{"fail-on": "warning"})
    assert bash(script, job, **given).returncode == 2
    assert ET.parse(job / "packlight.xml").getroot().get("errors") == "1"


def test_job_of_gitlab_leaves_the_report_that_it_names(bundle: Path, job: Path) -> None:
    install, check = GITLAB["packlight"]["script"]
    assert "pip install" in install
    variables = {**GITLAB["packlight"]["variables"], "PACKLIGHT_BUNDLE": str(bundle)}
    ran = bash(check, job, **variables)
    assert ran.returncode == 0, ran.stderr
    assert (job / GITLAB["packlight"]["artifacts"]["reports"]["junit"]).is_file()
    assert bash(check, job, **{**variables, "PACKLIGHT_FAIL_ON": "warning"}).returncode == 1


@pytest.mark.slow
def test_action_runs_in_a_clean_clone_and_an_empty_environment(bundle: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    (tmp_path / "bin").symlink_to(tmp_path / "venv" / "bin")
    for name in ("install", "check"):
        script, given = action(name, bundle=str(bundle))
        given = {key: str(clone) if value == str(ROOT) else value for key, value in given.items()}
        ran = bash(script, tmp_path, **given, PYTHONPATH="")
        assert ran.returncode == 0, ran.stderr
    assert ET.parse(tmp_path / "packlight.xml").getroot().get("failures") == "0"


TEST = "def test_bundle(packlight_bundle, assert_met):\n    assert_met(packlight_bundle)\n"


def pytested(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    named = [point.name for point in entry_points(group="pytest11")]
    plugin = [] if "packlight" in named else ["-p", "runtime.pytest_plugin"]
    (folder / "test_it.py").write_text(TEST, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugin, *args], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_plugin_gives_the_bundle_and_prints_the_table_where_it_fails(bundle: Path, tmp_path: Path) -> None:
    assert "1 skipped" in pytested(tmp_path).stdout
    met = pytested(tmp_path, "--packlight-bundle", str(bundle), "--packlight-against", str(bundle))
    assert met.returncode == 0, met.stdout
    strict = models.write_bundle(tmp_path / "strict", models.Budget(min_snr_db=300.0))
    ran = pytested(tmp_path, f"--packlight-bundle={strict}")
    assert ran.returncode == 1 and "| `snr_db logits` | 35." in ran.stdout and "**no**" in ran.stdout


def test_plugin_hook_and_image_name_what_there_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"packlight": "runtime.pytest_plugin"}
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert hook["entry"].split()[0] in project["scripts"] and not hook["pass_filenames"]
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert docker[-1] == 'ENTRYPOINT ["packlight"]' and "USER packlight" in docker
