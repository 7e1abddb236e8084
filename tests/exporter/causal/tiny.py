"""Tiny random language models of every architecture, saved as transformers saves them; at most 200 kB each."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="needs packlight[llm]")
SIZES = {
    "vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOW = {"sliding_window": 8}
# name -> (transformers' configuration, what differs from SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}}),
    "llama-tied-bias": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", WINDOW),
    "qwen2": ("Qwen2Config", {**WINDOW, "tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {**WINDOW, "head_dim": 16, "query_pre_attn_scalar": 24}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **WINDOW, "head_dim": 32, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 8}),
    "phi3-long": (
        "Phi3Config",
        {
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 8, "long_factor": [4.0] * 8},
        },
    ),
}  # fmt: skip


def save(folder: Path, name: str, **changed: Any) -> Path:
    """Save a model of MODELS with random weights: large enough that layers matter, norms about 1."""
    import torch
    import transformers

    kind, differs = MODELS[name]
    config = getattr(transformers, kind)(**{**SIZES, **differs, **changed})
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            offset = 1.0 if "norm" in key and not name.startswith("gemma") else 0.0
            weight.copy_(drawn * (0.15 if weight.ndim > 1 else 0.3) + offset)
    model.save_pretrained(folder)
    return folder


@cache
def saved(name: str) -> Path:
    """A folder of the model, one a session; nobody changes it."""
    return save(Path(tempfile.mkdtemp(prefix="packlight-tiny-")) / name, name)


def edit(folder: Path, **changed: Any) -> None:
    """Change keys of a saved config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def with_words(folder: Path, name: str = "llama", **changed: Any) -> Path:
    """A model with a tokenizer of 320 byte-level tokens, learnt from the default text, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    from exporter.causal import text

    save(folder, name, vocab_size=320, **changed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(text._default()[:60], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


TEMPLATE = """{{ bos_token }}{% for message in messages %}
[{{ message['role'] }}] {{ message['content'] | trim }}
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
