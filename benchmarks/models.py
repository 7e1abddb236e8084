"""Seven networks with seeded weights, and data that fits them: nothing is downloaded.

Widths, depths and operators are the published ones, so kernels and times are too; what they compute means nothing. Weights
are drawn so that activations neither die nor explode, and batch norms have the statistics of the data: an SNR is of the order
that a trained network has, no more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)  # fmt: skip

import exporter

SIDE, TOKENS, WORDS = 224, 128, 30_522
SHORTEST = 64  # tokens of the shortest text; the rest of its 128 is padding
GRIDS = (4, 14, 56, 224)  # cells a side of the noise that an image is made of, coarse to fine, each half as strong
SETTLE = 4  # batches of 4 images that batch norms take their statistics from

Batch = dict[str, NDArray[np.generic]]


class Logits(nn.Module):
    """A classifier of transformers, image -> logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=image).logits
        return logits


class States(nn.Module):
    """BERT without its pooling layer: tokens -> last hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states


class SqueezeExcite(nn.Module):
    """x * hardsigmoid(W2 relu(W1 mean(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(8, (width // 4 + 4) // 8 * 8)  # a multiple of 8, as published
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, inner, 1), nn.ReLU(), nn.Conv2d(inner, width, 1), nn.Hardsigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`repeat` inverted residual blocks of MobileNet; the first has the stride. wide: hidden channels over the input's."""

    kernel: int = 3
    wide: float
    out: int
    repeat: int = 1
    stride: int = 1
    squeeze: bool = False
    act: Callable[[], nn.Module] = nn.ReLU6


class Inverted(nn.Module):
    """1x1 to `hidden`, depthwise, 1x1 to `out`; added to the input where shapes agree."""

    def __init__(self, width: int, row: Row, stride: int) -> None:
        super().__init__()
        hidden = round(width * row.wide)
        expand = _conv(width, hidden, 1, 1, row.act) if hidden != width else []
        middle = _conv(hidden, hidden, row.kernel, stride, row.act, groups=hidden)
        gate = [SqueezeExcite(hidden)] if row.squeeze else []
        self.body = nn.Sequential(*expand, *middle, *gate, *_conv(hidden, row.out, 1, 1, None))
        self.added = stride == 1 and width == row.out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.added else y


def _conv(
    width: int, out: int, kernel: int, stride: int, act: Callable[[], nn.Module] | None, groups: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(width, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
    norm = nn.BatchNorm2d(out)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, std=0.2)
    return [conv, norm, *([act()] if act else [])]


def _mobile(rows: Sequence[Row], stem: int, last: Sequence[nn.Module], first: Callable[[], nn.Module]) -> nn.Module:
    width, blocks = stem, list[nn.Module]()
    for row in rows:
        for number in range(row.repeat):
            blocks.append(Inverted(width, row, row.stride if number == 0 else 1))
            width = row.out
    return nn.Sequential(*_conv(3, stem, 3, 2, first), *blocks, *last)


def _head(width: int) -> list[nn.Module]:
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return [*_conv(width, 1280, 1, 1, nn.ReLU6), *pooled, nn.Linear(1280, 1000)]


def mobilenet_v2() -> nn.Module:
    """Table 2 of Sandler et al. 2018, width 1."""
    rows = [
        Row(wide=1, out=16),
        Row(wide=6, out=24, repeat=2, stride=2),
        Row(wide=6, out=32, repeat=3, stride=2),
        Row(wide=6, out=64, repeat=4, stride=2),
        Row(wide=6, out=96, repeat=3),
        Row(wide=6, out=160, repeat=3, stride=2),
        Row(wide=6, out=320),
    ]
    return _mobile(rows, 32, _head(320), nn.ReLU6)


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-B0's table without squeeze-and-excite, ReLU6 for swish, as published for Lite0."""
    rows = [
        Row(wide=1, out=16),
        Row(wide=6, out=24, repeat=2, stride=2),
        Row(kernel=5, wide=6, out=40, repeat=2, stride=2),
        Row(wide=6, out=80, repeat=3, stride=2),
        Row(kernel=5, wide=6, out=112, repeat=3),
        Row(kernel=5, wide=6, out=192, repeat=4, stride=2),
        Row(wide=6, out=320),
    ]
    return _mobile(rows, 32, _head(320), nn.ReLU6)


def mobilenet_v3_large() -> nn.Module:
    """Table 1 of Howard et al. 2019, width 1."""
    relu, hard = nn.ReLU, nn.Hardswish
    rows = [
        Row(wide=1, out=16, act=relu),
        Row(wide=4, out=24, stride=2, act=relu),
        Row(wide=3, out=24, act=relu),
        Row(kernel=5, wide=3, out=40, stride=2, squeeze=True, act=relu),
        Row(kernel=5, wide=3, out=40, repeat=2, squeeze=True, act=relu),
        Row(wide=6, out=80, stride=2, act=hard),
        Row(wide=2.5, out=80, act=hard),
        Row(wide=2.3, out=80, repeat=2, act=hard),
        Row(wide=6, out=112, repeat=2, squeeze=True, act=hard),
        Row(kernel=5, wide=6, out=160, stride=2, squeeze=True, act=hard),
        Row(kernel=5, wide=6, out=160, repeat=2, squeeze=True, act=hard),
    ]
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    last = [*_conv(160, 960, 1, 1, hard), *pooled, nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, 1000)]
    return _mobile(rows, 16, last, hard)


def resnet50() -> nn.Module:
    """He et al. 2015, stride in the 3x3."""
    return Logits(ResNetForImageClassification(ResNetConfig(num_labels=1000)))


def convnext_nano() -> nn.Module:
    """timm's nano: depths 2, 2, 8, 2; widths 80 to 640. The layer scale is 1: at its first value, 1e-6, no block does anything."""
    config = ConvNextConfig(
        depths=[2, 2, 8, 2], hidden_sizes=[80, 160, 320, 640], layer_scale_init_value=1.0, num_labels=1000
    )
    return Logits(ConvNextForImageClassification(config))


def vit_s() -> nn.Module:
    """ViT-S/16: 12 layers x 384, 6 heads, 197 tokens."""
    config = ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, initializer_range=384**-0.5, num_labels=1000,
        attn_implementation="eager",
    )  # fmt: skip
    return Logits(ViTForImageClassification(config))


def minilm() -> nn.Module:
    """The shape of all-MiniLM-L6: 6 layers x 384, 12 heads, 128 tokens."""
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        initializer_range=384**-0.5, attn_implementation="eager",
    )  # fmt: skip
    return States(BertModel(config, add_pooling_layer=False))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit_s": vit_s,
    "minilm": minilm,
    "mobilenet_v3_large": mobilenet_v3_large,
    "mobilenet_v2": mobilenet_v2,
    "efficientnet_lite0": efficientnet_lite0,
    "resnet50": resnet50,
    "convnext_nano": convnext_nano,
}
TRANSFORMERS = frozenset({"vit_s", "minilm"})  # what a tool is told where it asks


def source(name: str) -> exporter.Source:
    """The network in eval mode, called with one example of fixed shape."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = MODELS[name]()
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    if norms:
        _settle(module, norms)
    output = "states" if name == "minilm" else "logits"
    return exporter.from_module(module.eval(), inputs=batches(name, 0, 1)[0], outputs=[output], name=name)


def _settle(module: nn.Module, norms: Sequence[nn.BatchNorm2d]) -> None:
    """Give the batch norms the mean and variance of the data, each the plain average over the batches."""
    for norm in norms:
        norm.momentum = None
    module.train()
    rng = np.random.default_rng(9)
    with torch.no_grad():
        for _ in range(SETTLE):
            module(torch.from_numpy(np.concatenate([_image(rng) for _ in range(4)])))


def batches(name: str, seed: int, count: int) -> list[Batch]:
    """`count` batches of one image or one text; another seed gives others."""
    rng = np.random.default_rng([seed, *name.encode()])
    return [_tokens(rng) if name == "minilm" else {"image": _image(rng)} for _ in range(count)]


def _image(rng: np.random.Generator) -> NDArray[np.float32]:
    """Large patches with finer and weaker ones on them, the three colours akin; contrast and brightness vary: [1, 3, 224, 224]."""
    image = np.zeros((3, SIDE, SIDE))
    for octave, cells in enumerate(GRIDS):
        grey, colour = rng.normal(size=(1, cells, cells)), rng.normal(size=(3, cells, cells))
        image += np.kron(grey + colour / 2, np.ones((SIDE // cells, SIDE // cells))) / 2**octave
    scaled = image / image.std() * rng.uniform(0.5, 1.3) + rng.normal(scale=0.4)
    return scaled[None].clip(-2.2, 2.7).astype(np.float32)  # about what ImageNet's normalisation leaves of 0..255


def _tokens(rng: np.random.Generator) -> Batch:
    real = rng.integers(SHORTEST, TOKENS + 1)
    mask = (np.arange(TOKENS) < real).astype(np.int64)[None]
    return {"input_ids": rng.integers(1, WORDS, (1, TOKENS)) * mask, "attention_mask": mask}
