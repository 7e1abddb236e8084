"""Small seeded torch modules, one per pattern that a real network has, each a Source with data that fits it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporter.source import Source, from_module

Array = NDArray[Any]
FLOAT32_LOWEST = -3.4e38  # what a mask adds where attention may not look


def linear() -> nn.Module:
    return nn.Linear(16, 4)


def conv_bn_relu() -> nn.Module:
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(8)]
    for norm in norms:  # statistics as training leaves them: none is 0 or 1
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.copy_(torch.randn(8) / 4)
        norm.running_var.copy_(torch.rand(8) + 0.5)
    convs = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False)]
    layers = [layer for conv, norm in zip(convs, norms, strict=True) for layer in (conv, norm, nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


class Residual(nn.Module):
    """Conv, and a second Conv added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.stem(image))
        return self.head(torch.relu(x + self.branch(x))).mean((2, 3))


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(), nn.Conv2d(16, 4, 1)
    )


class TwoInput(nn.Module):
    """Token numbers (int64) and features (float32): two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(20, 8), nn.Linear(16, 4)

    def forward(self, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.table(ids).mean(1)
        return self.mix(torch.cat([embedding, features], 1)), embedding


def dynamic_batch() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


class Lstm(nn.Module):
    """One LSTM layer and a head on its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, steps: Tensor) -> Tensor:
        return self.head(self.lstm(steps)[0][:, -1])


class SharedWeight(nn.Module):
    """One Linear applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.once = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.relu(self.once(x))
        return x


class Transformer(nn.Module):
    """One block: masked attention, LayerNorm, GELU feed-forward. The mask adds float32's lowest."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)])
        self.wide, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.transpose(1, 2) / 32**0.5 + (1 - mask)[:, None, :] * FLOAT32_LOWEST
        x = self.norms[0](x + self.out(scores.softmax(-1) @ v))
        return self.norms[1](x + self.narrow(nn.functional.gelu(self.wide(x))))


def hard_swish() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Hardswish(), nn.Conv2d(16, 4, 1), nn.Hardsigmoid())


def upsampler() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2))


IMAGE = {"image": ("image", (2, 3, 8, 8))}
VECTOR = {"x": ("normal", (2, 16))}
BATCH = {0: "batch"}
# name: (module, {input: (kind, shape)}, outputs, dynamic)
MODELS: Mapping[str, tuple[Callable[[], nn.Module], Any, list[str], Any]] = {
    "linear": (linear, VECTOR, ["logits"], None),
    "conv_bn_relu": (conv_bn_relu, IMAGE, ["logits"], {"image": BATCH}),
    "residual": (Residual, IMAGE, ["logits"], {"image": BATCH}),
    "depthwise": (depthwise, IMAGE, ["map"], {"image": BATCH | {2: "height", 3: "width"}}),
    "two_input": (
        TwoInput,
        {"ids": ("ids", (2, 5)), "features": ("normal", (2, 8))},
        ["logits", "embedding"],
        {"ids": BATCH, "features": BATCH},
    ),
    "dynamic_batch": (dynamic_batch, VECTOR, ["logits"], {"x": BATCH}),
    "lstm": (Lstm, {"steps": ("normal", (2, 5, 8))}, ["logits"], None),
    "shared_weight": (SharedWeight, VECTOR, ["y"], {"x": BATCH}),
    "transformer": (
        Transformer,
        {"x": ("normal", (2, 6, 32)), "mask": ("mask", (2, 6))},
        ["y"],
        {"x": BATCH | {1: "length"}, "mask": BATCH | {1: "length"}},
    ),
    "hard_swish": (hard_swish, IMAGE, ["map"], {"image": BATCH}),
    "upsampler": (upsampler, IMAGE, ["map"], {"image": BATCH}),
}


def module(name: str) -> nn.Module:
    """The seeded module, in training mode as torch makes it."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        return MODELS[name][0]()


def source(name: str) -> Source:
    _, _, outputs, dynamic = MODELS[name]
    return from_module(module(name), inputs=next(batches(name, 0, 1)), outputs=outputs, dynamic=dynamic, name=name)


def batches(name: str, seed: int, count: int) -> Iterator[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {key: values(rng, kind, shape) for key, (kind, shape) in MODELS[name][1].items()}


def values(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> Array:
    if kind == "ids":
        return rng.integers(0, 20, shape)
    if kind == "mask":
        lengths = rng.integers(2, shape[1] + 1, shape[0])
        return (np.arange(shape[1]) < lengths[:, None]).astype(np.float32)
    found = rng.random(shape) if kind == "image" else rng.standard_normal(shape)
    return found.astype(np.float32)
