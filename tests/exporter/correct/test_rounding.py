"""The pair rule: what it promises about vpmaddubsw, by arithmetic and on an emulated CPU without VNNI."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import exporter
from exporter.correct import rounding

ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 33)), elements=st.floats(-4, 4, width=32))


def saturating_sums(activations: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """u8 [K] by s8 [channels, K] as vpmaddubsw and vpmaddwd sum: products of neighbours meet in int16 and saturate."""
    products = activations.astype(np.int64) * codes.astype(np.int64)
    products = np.pad(products, ((0, 0), (0, products.shape[1] % 2)))
    return np.clip(products[:, 0::2] + products[:, 1::2], -(2**15), 2**15 - 1).sum(axis=1)


@given(ROWS, st.integers(0, 2**32 - 1))
def test_sums_of_fitted_codes_never_saturate(rows: np.ndarray, seed: int) -> None:
    codes, _ = rounding.fit(rows)
    generator = np.random.default_rng(seed)
    for activations in (np.full(rows.shape[1], 255), generator.integers(0, 256, rows.shape[1])):
        np.testing.assert_array_equal(saturating_sums(activations, codes), codes.astype(np.int64) @ activations)


def test_sums_of_full_range_codes_do_saturate_without_the_rule() -> None:
    codes = np.array([[127, 127, -127, -127]])
    assert saturating_sums(np.array([255, 255, 255, 0]), codes) != codes @ np.array([255, 255, 255, 0])
    assert rounding.keep_pair_rule(codes).tolist() == [[64, 64, -64, -64]]


def test_the_rule_changes_offending_pairs_alone() -> None:
    codes = np.array(
        [[127, 1, 127, -127, 100, 29, 0, 127, 127]]
    )  # pairs (127, 1), (127, -127), (100, 29), (0, 127), 127
    assert rounding.keep_pair_rule(codes).tolist() == [[127, 1, 127, -127, 99, 29, 0, 127, 127]]


def test_every_pair_of_codes_keeps_the_rule_and_moves_no_further_than_its_excess() -> None:
    codes = np.array(list(itertools.product(range(-127, 128, 9), repeat=2)))
    kept = rounding.keep_pair_rule(codes)
    same_sign = codes[:, 0] * codes[:, 1] > 0
    assert (np.abs(kept[same_sign]).sum(axis=1) <= 128).all()
    assert (kept[~same_sign] == codes[~same_sign]).all()
    excess = np.maximum(np.abs(codes).sum(axis=1) - 128, 0) * same_sign
    assert (np.abs(codes - kept).sum(axis=1) == excess).all()


@settings(max_examples=50)
@given(ROWS)
def test_fitted_codes_lose_no_more_than_seven_bits_would(rows: np.ndarray) -> None:
    codes, scale = rounding.fit(rows)
    error = ((rows - codes * scale[:, None]) ** 2).sum(axis=1)
    largest = np.abs(rows).max(axis=1)
    unit = np.where(largest > rounding.NOTHING, largest / 63.5, 1).astype(np.float32)  # the last of SCALES: 7 bits
    seven = ((rows - np.rint(rows / unit[:, None]) * unit[:, None]) ** 2).sum(axis=1)
    assert (error <= seven * (1 + 1e-4) + 1e-9).all()


# Runs in the emulated CPU: numpy and onnxruntime alone.
CHECK = """
import json, sys
import numpy as np, runtime
bundle = runtime.load(sys.argv[1], threads=1)
probe = bundle.probes()[0]
outputs = bundle.run(probe.inputs)
print(json.dumps([bool(np.array_equal(outputs[name], probe.int8[name])) for name in outputs]))
"""


def _on_haswell(bundle: Path) -> list[bool]:
    """Whether each int8 output on an emulated Haswell (AVX2, no VNNI) has the bits recorded at export."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("no qemu-x86_64: apt-get install qemu-user")
    root = Path(__file__).resolve().parents[3]
    packages = Path(onnxruntime.__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{packages}"}
    command = [emulator, "-cpu", "Haswell", os.path.realpath(sys.executable), "-c", CHECK, str(bundle)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout))


def _one_signed() -> exporter.Source:
    """Conv layers whose weights have one sign, as far from cancelling as can be: full-range codes saturate at once."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(1152, 5))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return exporter.from_module(network, {"x": np.ones((1, 3, 16, 16), np.float32)}, ["y"])


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "exact"), [("portable", True), ("x86-vnni", False)])
def test_on_an_emulated_haswell_portable_has_the_same_bits_and_full_range_has_not(
    recipe: str, exact: bool, tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    seen = [{"x": generator.uniform(0, 1, (1, 3, 16, 16)).astype(np.float32)} for _ in range(8)]
    exporter.export(_one_signed(), exporter.load_recipe(recipe), calibration=seen, out=tmp_path / "b")
    assert _on_haswell(tmp_path / "b") == [exact]
