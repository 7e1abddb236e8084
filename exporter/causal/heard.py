"""Which layers a model hears most: bits where they take the most loss off for a byte.

Layer y = W x in a coarser format gives y + e x, e = Ŵ - W. To second order the KL of the model's next-token distribution is

    KL ≈ 1/2 E[(g' e x)²]        g: gradient of ln p(t) by y,  t drawn from the model's own distribution

(its Fisher information, taken token by token). One pass forth and back gives x and g of every layer, and each format of each
layer then costs one product. A body of 4 bits is given 8 bits where that buys the most, within so many bytes.

Source: Martens 2020 (arXiv 1412.1193) for the Fisher information as second order of the KL; the greedy order by gain for a byte
is that of the fractional knapsack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from exporter.batches import Array
from exporter.causal.architecture import Decoder
from exporter.causal.blocks import Blocks, nearest
from exporter.causal.checkpoint import Checkpoint, modules
from exporter.causal.scheme import Format, Scheme
from exporter.causal.weights import fitting, linears

LOGITS = 128 << 20  # numbers of logits at once: with a large vocabulary fewer tokens are looked at
TOKENS = 2048  # that are looked at, at most
SEED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """{layer: {format: what its error adds to the KL, in nats a token}}, and {layer: its shape}."""

    losses: Mapping[str, Mapping[Blocks, float]]
    shapes: Mapping[str, tuple[int, int]]


def measure(model: Any, checkpoint: Checkpoint, windows: Array, formats: Sequence[Blocks]) -> Heard:
    """What each format costs each linear layer of the body, the weights rounded to nearest.

    Args:
        model: transformers' model of the checkpoint.
        windows: int64 [windows, tokens]; the first that fit TOKENS and LOGITS.
    """
    decoder = checkpoint.decoder
    count = max(1, min(TOKENS, LOGITS // decoder.vocabulary) // windows.shape[1])
    losses: dict[str, dict[Blocks, float]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    hooks, seen = [], dict[str, torch.Tensor]()

    def watch(path: str, layer: int, roles: Sequence[str]) -> None:
        module = model.get_submodule(path)

        def forth(_: Any, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
            seen[path] = given[0].detach().flatten(0, -2)
            made.register_hook(back)  # type: ignore[no-untyped-call]

        def back(gradient: torch.Tensor) -> None:
            g, x = gradient.flatten(0, -2), seen.pop(path)
            first = 0
            for role in roles:
                linear = checkpoint.linear(layer, role)
                rows = slice(first, first + len(linear.weight))
                first = rows.stop
                shapes[linear.name] = linear.weight.shape[0], linear.weight.shape[1]
                losses[linear.name] = {
                    each: _loss(torch.from_numpy(nearest(linear.weight, each).weight() - linear.weight), g[:, rows], x)
                    for each in _fitting(formats, linear.weight.shape[1])
                }

        hooks.append(module.register_forward_hook(forth))

    for layer in range(decoder.layers):
        for stored, roles in modules(decoder).items():
            watch(f"model.layers.{layer}.{stored}", layer, roles)
    model.requires_grad_(False)
    # what is embedded is where the way back ends: no weight needs a gradient
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda _, __, made: made.requires_grad_(True)))
    try:
        ids = torch.from_numpy(windows[:count])
        logits = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(SEED))
        torch.nn.functional.cross_entropy(logits, drawn[:, 0], reduction="sum").backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    return Heard(losses={name: losses[name] for name in linears(decoder)}, shapes=shapes)


def _loss(error: torch.Tensor, gradient: torch.Tensor, x: torch.Tensor) -> float:
    """Mean over tokens of (g' e x)² / 2."""
    return float(((gradient @ error) * x).sum(1).double().square().mean() / 2)


def _fitting(formats: Sequence[Blocks], columns: int) -> list[Blocks]:
    return [found for each in formats if (found := fitting(each, columns)) is not None]


def choose(heard: Heard, scheme: Scheme, formats: Sequence[Blocks], most_bytes: int) -> Scheme:
    """The scheme with the body's formats chosen anew: each layer the first of `formats`, better ones by gain for a byte.

    Args:
        scheme: whose head stays.
        formats: from few bits to many.
        most_bytes: of the body's weights.
    """
    chosen: dict[str, int] = dict.fromkeys(heard.losses, 0)
    size = sum(_bytes(heard, name, formats[0]) for name in chosen)
    full: set[str] = set()
    while gains := {name: _gain(heard, name, formats, at) for name, at in chosen.items() if name not in full}:
        name = max(gains, key=lambda each: gains[each][0])
        gain, step = gains[name]
        more = 0 if step is None else _bytes(heard, name, formats[step]) - _bytes(heard, name, formats[chosen[name]])
        if step is None or gain <= 0 or size + more > most_bytes:
            full.add(name)
            continue
        chosen[name], size = step, size + more
    exceptions = tuple((name, formats[at]) for name, at in chosen.items() if at)
    return replace(scheme, body=formats[0], exceptions=exceptions)


def _gain(heard: Heard, name: str, formats: Sequence[Blocks], at: int) -> tuple[float, int | None]:
    """(loss taken off for a byte by the best of the better formats, which one that is)."""
    now, size = _of(heard, name, formats[at]), _bytes(heard, name, formats[at])
    steps = [
        ((now - _of(heard, name, formats[step])) / (_bytes(heard, name, formats[step]) - size), step)
        for step in range(at + 1, len(formats))
        if _bytes(heard, name, formats[step]) > size
    ]
    return max(steps, default=(0.0, None))


def _of(heard: Heard, name: str, form: Blocks) -> float:
    return heard.losses[name][_as_stored(heard, name, form)]


def _bytes(heard: Heard, name: str, form: Blocks) -> int:
    return _as_stored(heard, name, form).bytes(*heard.shapes[name])


def _as_stored(heard: Heard, name: str, form: Blocks) -> Blocks:
    found: Format = fitting(form, heard.shapes[name][1])
    assert found is not None
    return found


def body_bytes(decoder: Decoder, scheme: Scheme, shapes: Mapping[str, tuple[int, int]]) -> int:
    """What the linear layers of a scheme take, the head left out."""
    found = 0
    for name in linears(decoder):
        form = fitting(scheme.of(name), shapes[name][1])
        found += 4 * int(np.prod(shapes[name])) if form is None else form.bytes(*shapes[name])
    return found
