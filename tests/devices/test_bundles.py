"""Whole bundles on other CPUs: a portable one has the bits recorded at export on every x86, and is met on ARM."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import exporter
from exporter.source import from_file
from runtime import cpu
from runtime.gate import Q_LIMIT
from tests import devices
from tests.devices.guest import ROOT

WITHOUT_VNNI = ("avx512", "avx2")


def recorded_bits(device: str, bundle: Path) -> None:
    """Hold that the bundle's outputs there are those of its probe, out of integer kernels alone."""
    found = devices.check(device, bundle)
    assert (found["met"], found["exact"], found["integer_macs"]) == (True, True, 1.0), found["lines"]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="packlight-bundles-") as made:
        yield Path(made)
    one_signed.cache_clear()
    digits.cache_clear()


@functools.cache
def one_signed(folder: Path, recipe: str) -> Path:
    """Conv and Linear layers whose weights have one sign: at full range nothing cancels, and every pair saturates."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(1152, 5))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    source = exporter.from_module(network, {"x": np.ones((1, 3, 16, 16), np.float32)}, ["y"])
    random = np.random.default_rng(0)
    seen = [{"x": random.uniform(0, 1, (1, 3, 16, 16)).astype(np.float32)} for _ in range(8)]
    out = folder / f"one-signed-{recipe}"
    exporter.export(source, exporter.load_recipe(recipe), calibration=seen, out=out, max_evaluations=1)
    return out


@functools.cache
def digits(folder: Path, recipe: str) -> Path:
    """samples/digits: trained, residual."""
    sample = from_file(str(ROOT / "samples" / "digits"))
    assert sample.calibration is not None
    assert sample.heldout is not None
    exporter.export(
        sample.source(),
        exporter.load_recipe(recipe),
        calibration=sample.calibration(),
        heldout=sample.heldout(),
        out=folder / f"digits-{recipe}",
        max_evaluations=1,  # every layer in integers
    )
    return folder / f"digits-{recipe}"


@pytest.mark.parametrize("device", ["full", *WITHOUT_VNNI, "haswell"])
def test_portable_bundle_has_the_recorded_bits(device: str, folder: Path) -> None:
    recorded_bits(device, one_signed(folder, "portable"))


@pytest.mark.skipif(cpu.pairs_in_int16(), reason="this CPU has no VNNI: what it records has saturated already")
@pytest.mark.parametrize("device", WITHOUT_VNNI)
def test_bundle_for_vnni_that_saturates_is_far_from_the_recorded_outputs_and_not_met(device: str, folder: Path) -> None:
    found = devices.check(device, one_signed(folder, "x86-vnni"))
    assert not found["exact"]
    assert found["q"]["y"] > Q_LIMIT, found["q"]
    assert not found["met"]


@pytest.mark.slow
@pytest.mark.parametrize("device", devices.X86)
def test_trained_portable_bundle_has_the_recorded_bits(device: str, folder: Path) -> None:
    recorded_bits(device, digits(folder, "portable"))


@pytest.mark.slow
@pytest.mark.parametrize("device", devices.ARM)
def test_layers_without_an_add_have_the_recorded_bits_on_arm(device: str, folder: Path) -> None:
    recorded_bits(device, one_signed(folder, "portable"))


@pytest.mark.slow
@pytest.mark.parametrize("device", devices.ARM)
def test_trained_portable_bundle_is_met_on_arm(device: str, folder: Path) -> None:
    """QLinearAdd may differ by one code there, so bits may differ."""
    found = devices.check(device, digits(folder, "portable"))
    assert (found["met"], found["integer_macs"]) == (True, 1.0), found["lines"]
    assert found["q"]["logits"] < Q_LIMIT / 2, found["q"]
