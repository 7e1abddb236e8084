from __future__ import annotations

import numpy as np
import pytest
import torch

from exporter.causal import architecture, checkpoint, heard, proof, weights
from exporter.causal.blocks import Blocks, nearest
from exporter.causal.checkpoint import LINEARS
from exporter.causal.heard import Heard
from exporter.causal.scheme import SCHEMES, Scheme
from tests.exporter.causal import tiny

FINE, COARSE, WIDE = Blocks(bits=4, size=32), Blocks(bits=4, size=64), Blocks(bits=8, size=64, symmetric=True)
WINDOWS = np.random.default_rng(1).integers(0, 131, (48, 24))


def kl(model: torch.nn.Module, wanted: torch.Tensor) -> float:
    with torch.no_grad():
        got = model(input_ids=torch.from_numpy(WINDOWS)).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


@tiny.needs_transformers
@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_what_is_said_of_a_layer_is_what_its_codes_alone_add_to_the_kl(name: str) -> None:
    folder = tiny.saved(name)
    opened = checkpoint.open_folder(folder, architecture.decoder(architecture.read(folder)))
    model = proof.reference(folder)
    found = heard.measure(model, opened, WINDOWS, [FINE, WIDE])
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(WINDOWS)).logits.log_softmax(-1)
    said, real = [], []
    for linear in weights.linears(opened.decoder):
        layer, role = linear.split(".")[1:]
        module = model.get_submodule(f"model.layers.{layer}.{LINEARS[role]}")
        kept = module.weight.data
        module.weight.data = torch.from_numpy(nearest(kept.numpy(), FINE).weight())
        real.append(kl(model, wanted))
        module.weight.data = kept
        said.append(found.losses[linear][FINE])
        assert (
            found.losses[linear][Blocks(bits=8, size=min(64, kept.shape[1] & -kept.shape[1]), symmetric=True)]
            < said[-1]
        )
    ratio = np.array(said) / np.array(real)
    assert np.all((ratio > 1 / 2.5) & (ratio < 2.5))
    assert np.corrcoef(np.log(said), np.log(real))[0, 1] > 0.85


@tiny.needs_transformers
def test_packed_matrices_are_heard_by_their_parts() -> None:
    folder = tiny.saved("phi3")
    opened = checkpoint.open_folder(folder, architecture.decoder(architecture.read(folder)))
    found = heard.measure(proof.reference(folder), opened, WINDOWS[:8], [FINE])
    assert list(found.losses) == list(weights.linears(opened.decoder))
    assert found.shapes["layers.1.k"] == (32, 64) and found.shapes["layers.1.up"] == (96, 64)


def values() -> Heard:
    """Four layers of one size; the second is heard ten times as much as the others, the last not at all."""
    share = {"layers.0.q": 1.0, "layers.0.v": 10.0, "layers.0.o": 1.5, "layers.0.up": 0.0}
    losses = {name: {COARSE: each, FINE: each / 2, WIDE: each / 100} for name, each in share.items()}
    return Heard(losses=losses, shapes=dict.fromkeys(share, (64, 64)))


def chosen(most_bytes: int) -> Scheme:
    return heard.choose(values(), SCHEMES["mixed"], [COARSE, FINE, WIDE], most_bytes)


def test_bytes_go_where_they_take_the_most_loss_off() -> None:
    least, fine, wide = (form.bytes(64, 64) for form in (COARSE, FINE, WIDE))
    assert chosen(4 * least).exceptions == ()
    step = fine - least
    assert chosen(4 * least + step).exceptions == (("layers.0.v", FINE),)
    assert chosen(4 * least + 2 * step).exceptions == (("layers.0.v", FINE), ("layers.0.o", FINE))
    assert chosen(4 * least + 2 * step + wide - least).exceptions == (
        ("layers.0.q", FINE), ("layers.0.v", WIDE), ("layers.0.o", FINE),
    )  # fmt: skip
    everything = chosen(10**6)
    assert dict(everything.exceptions) == dict.fromkeys(("layers.0.q", "layers.0.v", "layers.0.o"), WIDE)
    assert everything.body == COARSE and everything.head == SCHEMES["mixed"].head


@pytest.mark.parametrize("extra", range(0, 6000, 700))
def test_body_is_never_larger_than_it_may_be(extra: int) -> None:
    most = 4 * COARSE.bytes(64, 64) + extra
    scheme = chosen(most)
    assert sum(scheme.of(name).bytes(64, 64) for name in values().losses) <= most  # type: ignore[union-attr]
