"""One bundle a session, which no test may change, and a copy for those that do."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from runtime import cpu
from runtime.manifest import Budget
from tests.runtime import models


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def ort_bundle(own_bundle: Path) -> Path:
    """A bundle with the phone's file in it."""
    return models.add_ort(own_bundle, models.manifest(Budget()))


@pytest.fixture
def for_vnni(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that does not keep the pair rule, on a CPU that adds pairs in int16."""
    models.seal(own_bundle, replace(models.manifest(Budget()), pair_rule=False))
    monkeypatch.setattr(cpu, "pairs_in_int16", lambda: True)
    return own_bundle


@pytest.fixture
def own_bundle(bundle_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_folder, tmp_path / "tiny"))
