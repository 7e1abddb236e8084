"""Small files of every kind, made here: pictures, a tokenizer.json, Parquet; the inputs they are for; refusals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from exporter import data
from exporter.batches import Batch
from runtime.errors import PacklightError
from runtime.manifest import Tensor

IMAGE = Tensor(name="image", dtype="float32", shape=("batch", 3, 8, 8))
X = Tensor(name="x", dtype="float32", shape=("batch", 3))
IDS = Tensor(name="input_ids", dtype="int64", shape=("batch", "length"))
MASK = Tensor(name="attention_mask", dtype="int64", shape=("batch", "length"))
TYPES = Tensor(name="token_type_ids", dtype="int64", shape=("batch", "length"))
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "sat", "on", "the", "mat")


def picture(path: Path, seed: int, height: int = 12, width: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    return path


def tokenizer(path: Path, words: tuple[str, ...] = WORDS) -> Path:
    """A tokenizer.json of whole words, [CLS] ... [SEP] around a line."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(path))
    return path


def asked(folder: Path = Path(), **tables: Mapping[str, Any]) -> data.Asked:
    kinds = {"images": data.Images, "text": data.Text, "columns": data.Columns}
    return data.Asked(folder=folder, **{name: kinds[name].model_validate(table) for name, table in tables.items()})


def read(given: Any, asked: data.Asked, *tensors: Tensor, skip_bad: bool = False) -> list[Batch]:
    return list(data.read(given, tensors, "calibration", asked, skip_bad=skip_bad))


def refusal(given: Any, asked: data.Asked, *tensors: Tensor, skip_bad: bool = False) -> str:
    with pytest.raises(PacklightError) as error:
        read(given, asked, *tensors, skip_bad=skip_bad)
    return str(error.value)
