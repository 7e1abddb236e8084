"""The FP32 graph is the model: held against transformers on the same weights, in five ways.

1. logits of every token, at two prompt lengths; 2. a prompt and then token by token is one pass over all of them; 3. greedy
tokens; 4. a batch of two lengths, padded on the left there and on the right here; 5. in the form that ships, which gives the
last token's logits alone. A model whose weights do not fit twice into memory is proved by its first layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter import proof
from exporter.batches import Array
from exporter.causal.architecture import Decoder
from exporter.causal.feed import UNPACKED, logits
from exporter.errors import TraceError
from exporter.quiet import quiet
from runtime.decode import Decode
from runtime.session import open_session

LENGTHS = (7, 33)
STEPS = 32
SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Proved:
    """At which prompt lengths, over how many greedy steps and layers the graph is the model."""

    lengths: tuple[int, ...]
    greedy_steps: int
    layers: int


def reference(folder: Path, layers: int | None = None) -> Any:
    """transformers' model of a folder, float32; of its first `layers` alone where that is asked.

    Raises:
        TraceError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    shorter = {} if layers is None else {"num_hidden_layers": layers}
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32, local_files_only=True, attn_implementation="eager", **shorter
            )
    except Exception as error:  # the library raises what it likes
        raise TraceError(str(folder), found=str(error)[:200], expected="a model that transformers loads") from error
    model.requires_grad_(False).train(False)
    return model


def prove(model: Any, decoder: Decoder, every: Path, last: Path) -> Proved:
    """Hold both forms of the FP32 graph against the model.

    Raises:
        TraceError: one of the five differs, and how.
    """
    rng = np.random.default_rng(SEED)
    limit = max(8, min(decoder.context, 128))
    lengths = tuple(min(each, limit // 2) for each in LENGTHS)
    whole = open_session(every, entries=UNPACKED)
    ids = rng.integers(0, decoder.vocabulary, (1, lengths[1]))
    for length in lengths:
        got = logits(whole, decoder, ids[:, :length])
        _require_equal(_run(model, ids[:, :length]), got, f"logits of {length} tokens")
    del whole  # one session at a time: each holds the model
    session = open_session(last, entries=UNPACKED)
    decode = Decode(session, limit, 1)
    one_pass = _run(model, ids)[0]
    decode.step(ids[:, : lengths[0]])
    for at in range(lengths[0], lengths[1]):
        got = decode.step(ids[:, at : at + 1])
        _require_equal(one_pass[at], got[0], f"logits of token {at}, from the cache")
    steps = min(STEPS, limit - lengths[0])
    _greedy(model, decode, ids[:, : lengths[0]], steps)
    _batch(model, Decode(session, limit, 2), ids[0], lengths)
    return Proved(lengths=lengths, greedy_steps=steps, layers=decoder.layers)


def _run(model: Any, ids: Array, mask: Array | None = None) -> Array:
    given = {"input_ids": torch.from_numpy(ids)}
    if mask is not None:
        given["attention_mask"] = torch.from_numpy(mask)
        given["position_ids"] = torch.from_numpy(np.maximum(np.cumsum(mask, axis=1) - 1, 0))
    with torch.no_grad():
        return np.asarray(model(**given, use_cache=False).logits.float().numpy())


def _greedy(model: Any, decode: Decode, ids: Array, steps: int) -> None:
    """The tokens of largest logit, one after the other. Two logits as near as rounding leave no order: there it ends."""
    decode.reset()
    got, new, past = decode.step(ids), ids, None
    for step in range(steps):
        with torch.no_grad():
            said = model(input_ids=torch.from_numpy(new), past_key_values=past, use_cache=True)
        past, wanted = said.past_key_values, said.logits[0, -1].float().numpy()
        _require_equal(wanted, got[0], f"logits of greedy step {step}")
        best = np.sort(wanted)[-2:]
        token = int(wanted.argmax())
        if int(got[0].argmax()) != token:
            if best[1] - best[0] < 1e-3 * max(1.0, float(np.abs(wanted).max())):
                return
            raise TraceError(
                "graph is not the model",
                found=f"token {int(got[0].argmax())} in greedy step {step}",
                expected=str(token),
            )
        new = np.array([[token]])
        if step + 1 < steps:
            got = decode.step(new)


def _batch(model: Any, decode: Decode, ids: Array, lengths: tuple[int, ...]) -> None:
    """Two rows of two lengths: the prompt, and one token more."""
    short, long = lengths
    right = np.zeros((2, long), np.int64)
    right[0], right[1, :short] = ids[:long], ids[:short]
    got = np.array(decode.step(right, [long, short]))
    more = got.argmax(axis=1)
    after = decode.step(more[:, None])
    for name, found, rows in (
        ("a prompt", got, (ids[:long], ids[:short])),
        ("the token after it", after, (np.append(ids[:long], more[0]), np.append(ids[:short], more[1]))),
    ):
        width = max(map(len, rows))
        left = np.stack([np.pad(row, (width - len(row), 0)) for row in rows])
        mask = np.stack([np.arange(width) >= width - len(row) for row in rows]).astype(np.int64)
        wanted = _run(model, left, mask)[:, -1]
        for row in range(2):
            _require_equal(wanted[row], found[row], f"logits of {name} in row {row} of a batch")


def _require_equal(wanted: Array, got: Array, what: str) -> None:
    differs = proof.difference({what: wanted.reshape(got.shape)}, {what: got})
    if differs:
        raise TraceError("graph is not the model", found=differs, expected="the same logits as transformers gives")
