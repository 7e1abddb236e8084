"""A decoder's graph on windows of tokens with nothing before them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from exporter.batches import Array
from exporter.causal.architecture import Decoder
from runtime.decode import PAST

# float weights stay where the file is mapped; packed for the kernels they would be in memory a second time
UNPACKED: Mapping[str, str] = MappingProxyType({"session.disable_prepacking": "1"})


def logits(session: Any, decoder: Decoder, ids: Array) -> Array:
    """Logits of every token, float32 [batch, sequence, vocabulary], by a graph with `every`."""
    return np.asarray(session.run(["logits"], feed(decoder, ids))[0])


def feed(decoder: Decoder, ids: Array) -> dict[str, Array]:
    """The inputs of a graph for tokens with nothing before them."""
    nothing = np.zeros((len(ids), decoder.kv_heads, 0, decoder.head_size), np.float32)
    past = {f"{PAST}{layer}.{side}": nothing for layer in range(decoder.layers) for side in ("key", "value")}
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), **past}
