from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from exporter.causal import architecture, blocks, checkpoint, graph, rounding, weights
from exporter.causal.blocks import Blocks
from exporter.causal.checkpoint import Linear
from exporter.causal.scheme import FLOAT, SCHEMES
from exporter.causal.store import Store
from tests.exporter.causal import tiny
from tests.exporter.graphs import noise

FORM = Blocks(bits=4, size=32)


def layer(rows: int, columns: int) -> Linear:
    return Linear(name="layers.0.q", weight=noise(1, rows, columns), bias=None)


def moments(columns: int, alike: float) -> np.ndarray:
    """H of inputs that are mixtures of a few, and noise."""
    x = noise(2, 4000, 8) @ noise(3, 8, columns) * alike + noise(4, 4000, columns)
    return np.asarray(x.T @ x / len(x), np.float64)


def error(linear: Linear, found: blocks.Blocked, second: np.ndarray) -> float:
    e = linear.weight - found.weight()
    return float(np.einsum("nk,kl,nl->", e, second, e))


@pytest.mark.parametrize(
    "form", [FORM, Blocks(bits=4, size=16, symmetric=True), Blocks(bits=4, size=128), Blocks(bits=8, size=32)]
)
def test_errors_make_up_for_each_other_where_inputs_go_together(form: Blocks) -> None:
    linear, second = layer(24, 256), moments(256, 2.0)
    plain, found = blocks.nearest(linear.weight, form), rounding.to_codes(linear, form, second)
    assert error(linear, found, second) < 0.5 * error(linear, plain, second)
    assert np.square(found.weight() - linear.weight).sum() > np.square(plain.weight() - linear.weight).sum()


def test_no_row_is_worse_than_rounded_to_nearest_and_columns_need_not_fill_a_block() -> None:
    linear, second = layer(16, 72), moments(72, 0.0)
    found = rounding.to_codes(linear, FORM, second)
    plain = blocks.nearest(linear.weight, FORM)
    assert found.weight().shape == (16, 72) and found.codes.shape == plain.codes.shape
    for row in range(16):
        one = replace(linear, weight=linear.weight[row : row + 1])
        e = [one.weight[0] - each.weight()[row] for each in (found, plain)]
        damped = second + 0.03 * np.trace(np.pad(second, (0, 24))) / 96 * np.eye(72)
        weighed = rounding.to_codes(one, FORM, second)
        assert e[0] @ damped @ e[0] <= 1.02 * (e[1] @ damped @ e[1]) and np.array_equal(
            weighed.codes[0], found.codes[row]
        )


def test_layer_that_saw_nothing_is_rounded_to_nearest() -> None:
    linear = layer(8, 64)
    found = rounding.by_gptq(lambda name: None)(linear, FORM)
    assert np.array_equal(found.codes, blocks.nearest(linear.weight, FORM).codes)
    found = rounding.to_codes(linear, FORM, np.zeros((64, 64)))
    assert np.abs(found.weight() - linear.weight).max() < 0.5


@tiny.needs_transformers
@pytest.mark.parametrize("held", [1, 1 << 30])
def test_moments_are_those_of_what_each_layer_reads(held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from exporter.causal.proof import reference

    monkeypatch.setattr(rounding, "HELD_BYTES", held)
    folder = tiny.saved("gemma3")
    decoder = architecture.decoder(architecture.read(folder))
    with Store(tmp_path / "fp32.data") as store:
        written = weights.write(checkpoint.open_folder(folder, decoder), FLOAT, store)
    windows = np.random.default_rng(1).integers(0, 131, (3, 20))
    names = [name for name in weights.linears(decoder) if not name.endswith("k")]
    second = rounding.hessians(decoder, written, tmp_path, windows, names)
    model = reference(folder)
    seen: dict[str, list[torch.Tensor]] = {}
    for layer_, role in itertools.product(range(3), checkpoint.LINEARS):
        module = model.get_submodule(f"model.layers.{layer_}.{checkpoint.LINEARS[role]}")
        name = f"layers.{layer_}.{role}"
        module.register_forward_hook(lambda _, given, __, name=name: seen.setdefault(name, []).append(given[0]))
    with torch.no_grad():
        model(torch.from_numpy(windows))
    for name in names:
        x = seen[name][0].reshape(60, -1).double().numpy()
        got = second(name)
        assert got is not None
        np.testing.assert_allclose(got, x.T @ x / 60, rtol=1e-3, atol=1e-4)
    assert second(graph.HEAD) is None and second("layers.0.k") is None
    assert not list(tmp_path.glob("*.onnx"))


@tiny.needs_transformers
def test_only_layers_of_4_bits_are_fitted() -> None:
    decoder = architecture.decoder(architecture.read(tiny.saved("llama")))
    assert rounding.needed(decoder, SCHEMES["w8"]) == rounding.needed(decoder, FLOAT) == ()
    assert rounding.needed(decoder, SCHEMES["mixed"])[:6] == (
        "layers.0.q", "layers.0.k", "layers.0.o", "layers.0.gate", "layers.0.up", "layers.1.q",
    )  # fmt: skip
