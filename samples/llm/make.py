"""A small Llama, trained here from a seed on Python's own documentation, saved as transformers saves a model.

python samples/llm/make.py build/tiny-llama        # about a minute, one thread
packlight export build/tiny-llama --out build/tiny
packlight run build/tiny --prompt "The function"
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from exporter.causal import text

VOCABULARY, TOKENS, ROWS, STEPS = 1024, 64, 16, 250
SIZES = text.Sizes(seen=100_000, unseen=8, tokens=TOKENS)


def tokenizer(lines: list[str]) -> Tokenizer:
    """Byte-level pieces, learnt from the text; <s> begins one."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def train(windows: np.ndarray) -> LlamaForCausalLM:
    """Two million weights, some of them in the embedding, which is the head as well."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        batch = torch.from_numpy(windows[rng.integers(0, len(windows), ROWS)])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return model.eval()


def main(folder: Path) -> None:
    """Train on three quarters of the text: those that an export fits to, so that what it holds out is new to the model too."""
    words = tokenizer(text._default())
    given = text.read(None, words, [0], SIZES)
    model = train(given.seen)
    model.save_pretrained(folder)
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
