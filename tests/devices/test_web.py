"""samples/web in headless Chromium, from `python -m http.server`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime import manifest
from runtime.manifest import Budget
from tests.devices import web
from tests.runtime import models

PHONE = 390


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page; bundle/ is met, tampered/ has a bit turned over, hopeless/ asks for more than int8 can give."""
    temp = tmp_path_factory.mktemp("web")
    out = web.set_up(models.write_bundle(temp / "good", Budget(min_snr_db=10, min_integer_macs=1)), temp / "out")
    shutil.copytree(models.write_bundle(temp / "hopeless", Budget(min_snr_db=90)), out / "hopeless")
    model = Path(shutil.copytree(out / "bundle", out / "tampered")) / manifest.INT8
    data = bytearray(model.read_bytes())
    data[-9] ^= 1
    model.write_bytes(data)
    return out


@pytest.fixture(scope="module")
def page() -> Iterator[web.Page]:
    with web.browser() as opened:
        yield opened


def without_times(verdict: dict[str, Any]) -> dict[str, Any]:
    kernels = [{key: value for key, value in each.items() if key != "ms"} for each in verdict["kernels"]]
    return {**verdict, "kernels": kernels, "timing": {}}


def test_page_shows_the_verdict_that_node_gives_and_asks_no_other_server(page: web.Page, folder: Path) -> None:
    page.requests.clear()
    with web.served(folder) as url:
        page.open(f"{url}/")
        verdict = page.verdict()
    status, in_node = web.check_in_node(folder, folder / "bundle")
    assert (status, verdict["verdict"]) == (0, "met")
    assert without_times(verdict) == without_times(in_node)  # the same bits in both
    shown = page.evaluate("document.body.innerText")
    assert "Met\n\nEvery limit holds; 100.0 % of MACs in integer kernels" in shown
    assert f"{verdict['drift']['outputs'][0]['snr_db']:.2f}" in shown
    assert len(page.requests) > 10 and all(each.startswith(url) for each in page.requests)
    assert page.logged == []  # nothing that the page's policy had to stop


def test_page_runs_again_when_the_server_is_gone(page: web.Page, folder: Path) -> None:
    with web.served(folder) as url:
        page.open(f"{url}/?again")
        first = page.verdict()
    page.requests.clear()
    page.evaluate("document.getElementById('again').click()")
    second = page.verdict()
    assert second["verdict"] == "met" and without_times(second) == without_times(first)
    assert page.requests == []


def test_tampered_bundle_is_refused_in_words(page: web.Page, folder: Path) -> None:
    with web.served(folder) as url:
        page.open(f"{url}/?bundle=tampered")
        verdict = page.verdict()
    assert (verdict["verdict"], verdict["met"]) == ("could not run", False)
    shown = page.evaluate("document.body.innerText")
    listed = json.loads((folder / "tampered" / manifest.MANIFEST).read_text())["files"][manifest.INT8]
    for words in ("Could not run", manifest.digest(folder / "tampered" / manifest.INT8).sha256, listed["sha256"]):
        assert words in shown
    assert "copy the bundle again" in shown and "verified" not in shown


def test_missing_bundle_and_foreign_origin_are_refused_in_words(page: web.Page, folder: Path) -> None:
    with web.served(folder) as url:
        page.open(f"{url}/?bundle=nowhere")
        assert page.verdict()["error"]["found"] == f"404 for {url}/nowhere/manifest.json"
        page.open(f"{url}/?bundle=https://example.com/lite0")
        assert page.verdict()["error"]["found"] == "https://example.com"


def test_bundle_that_cannot_be_verified_is_not_run(page: web.Page, folder: Path) -> None:
    with web.served(folder) as url:
        page.open(url.replace("127.0.0.1", web.INSECURE) + "/")
        verdict = page.verdict()
    assert (verdict["verdict"], verdict["error"]["found"]) == ("could not run", "a page without crypto.subtle")
    assert "the bundle is not verified and so not run" in page.evaluate("document.body.innerText")


def test_limit_that_is_not_met_is_named(page: web.Page, folder: Path) -> None:
    with web.served(folder) as url:
        page.open(f"{url}/?bundle=hopeless/")
        verdict = page.verdict()
    assert verdict["verdict"] == "not met"
    assert [line["what"] for line in verdict["lines"] if not line["met"]] == ["snr_db logits"]
    assert "1 of 2 limits not met; 100.0 % of MACs in integer kernels" in page.evaluate("document.body.innerText")


@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_a_phone_and_reads_in_the_dark(dark: bool, page: web.Page, folder: Path) -> None:
    page.show(width=PHONE, dark=dark)
    with web.served(folder) as url:
        page.open(f"{url}/?dark={dark}")
        assert page.verdict()["met"]
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE
    # law 5 on a small screen, too: drift and coverage are in sight at once
    labels = page.evaluate(
        "[...document.querySelectorAll('.label')].filter((e) => e.offsetParent).map((e) => e.innerText.trim())"
    )
    assert labels[:6] == ["SNR dB", "varying dB", "cosine", "max abs", "same top-1", "integer MACs"]
    colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
    ground, ink = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
    assert (ground < ink) is dark and abs(ground - ink) > 400
    assert page.picture().startswith(b"\x89PNG")
