"""A bundle in a test suite: `pytest --packlight-bundle build/lite0` gives the fixture, `assert_met` the table where it fails.

def test_bundle_is_what_it_was(packlight_bundle, assert_met):
    assert_met(packlight_bundle)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from runtime.bundle import Bundle


def pytest_addoption(parser: pytest.Parser) -> None:
    """--packlight-bundle and --packlight-against, or the same names in the ini file."""
    group = parser.getgroup("packlight")
    for name, said in (("bundle", "The bundle of the fixture packlight_bundle."), ("against", "Its baseline.")):
        group.addoption(f"--packlight-{name}", metavar="FOLDER", help=said)
        parser.addini(f"packlight_{name}", said)


@pytest.fixture(scope="session")
def packlight_bundle(pytestconfig: pytest.Config) -> Bundle:
    """The bundle of --packlight-bundle, verified and open on one thread; the test fails where it does not open."""
    from runtime.bundle import load

    folder = _asked(pytestconfig, "bundle")
    if not folder:
        pytest.skip("no bundle: pytest --packlight-bundle FOLDER, or packlight_bundle in the ini file")
    return load(folder, 1)


@pytest.fixture(scope="session")
def assert_met(pytestconfig: pytest.Config) -> Callable[[Bundle], None]:
    """A function that checks a bundle, against --packlight-against too where that is given, and fails with the table."""

    def met(bundle: Bundle) -> None:
        __tracebackhide__ = True
        from runtime import compare, gate
        from runtime.bundle import load

        verdict = gate.check(bundle)
        if not verdict.met:
            pytest.fail(gate.markdown(verdict, bundle.manifest.name), pytrace=False)
        if against := _asked(pytestconfig, "against"):
            found = compare.compare(load(against, bundle.threads), bundle)
            if not found.met:
                pytest.fail(compare.markdown(found), pytrace=False)

    return met


def _asked(config: pytest.Config, name: str) -> str:
    return str(config.getoption(f"--packlight-{name}") or config.getini(f"packlight_{name}") or "")
