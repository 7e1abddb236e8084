"""One bundle a session, which no test may change, and a copy for those that do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runtime import models


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def own_bundle(bundle_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_folder, tmp_path / "tiny"))
