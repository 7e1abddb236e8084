from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Statistics that a developer's exports left in the cache would be found by tests that count runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACKLIGHT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
