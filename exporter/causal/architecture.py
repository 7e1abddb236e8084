"""What a causal decoder computes, as a value: config.json -> Decoder. One line of ARCHITECTURES a family.

All of these are one computation, for a token's vector x of layer i:

    x = x + after(attention(norm(x)))      norm: RMS;  attention: grouped queries, rotary positions, maybe a window
    x = x + after(down(act(gate(n)) * up(n)))  with  n = norm(x)

and differ in what is normalized, which layers look back how far, and how positions turn. What a family does that is not here
is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exporter.errors import TraceError

Activation = Literal["silu", "gelu", "gelu_tanh"]
FULL = -1  # a window that holds every token before
# transformers' names of activations -> ours
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What all models of one `model_type` have in common.

    norm_offset: what is added to a stored norm weight (Gemma stores w - 1).
    after: whether what attention and MLP give is normalized before it is added.
    head_norm: whether queries and keys are normalized in each head.
    scaled_embedding: whether a token's vector is multiplied by sqrt(hidden).
    packed: whether q, k, v are one stored matrix, and gate and up another.
    """

    norm_offset: float = 0.0
    after: bool = False
    head_norm: bool = False
    scaled_embedding: bool = False
    packed: bool = False


GEMMA = Family(norm_offset=1.0, scaled_embedding=True)
ARCHITECTURES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(),
        "mistral": Family(),
        "qwen2": Family(),
        "qwen3": Family(head_norm=True),
        "phi3": Family(packed=True),
        "gemma": GEMMA,
        "gemma2": Family(norm_offset=1.0, scaled_embedding=True, after=True),
        "gemma3_text": Family(norm_offset=1.0, scaled_embedding=True, after=True, head_norm=True),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions: frequency of each pair of channels, float64 [rotated / 2], and what cos and sin are multiplied by."""

    frequencies: tuple[float, ...]
    factor: float = 1.0

    def tables(self, length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin of position times frequency, float32 [length, rotated / 2]."""
        # float32 as torch takes them: at position 30,000 the angle of float64 is another by 1e-3
        positions = np.arange(length, dtype=np.float32)
        angles = positions[:, None] * np.array(self.frequencies, np.float32)[None]
        return np.cos(angles) * np.float32(self.factor), np.sin(angles) * np.float32(self.factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A causal decoder without its weights.

    context: tokens, prompt and answer together, beyond which it was not made.
    scale: what q · k is multiplied by. attention_cap, logit_cap: c tanh(z / c) of scores and logits; 0 is none.
    windows: of each layer, how many tokens back it sees with its own; FULL is all of them.
    ropes: the kinds of rotary positions; rope_of: which of them each layer has.
    """

    model_type: str
    family: Family
    vocabulary: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    context: int
    epsilon: float
    activation: Activation
    scale: float
    attention_cap: float
    logit_cap: float
    windows: tuple[int, ...]
    ropes: tuple[Rope, ...]
    rope_of: tuple[int, ...]
    tied: bool

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def embedding_scale(self) -> float:
        return math.sqrt(self.hidden) if self.family.scaled_embedding else 1.0


def read(folder: Path) -> Any:
    """transformers' configuration of a folder, with the defaults of its class filled in.

    Raises:
        TraceError: no config.json, or one that transformers cannot read.
    """
    from transformers import AutoConfig  # here: seconds to import

    if not (folder / "config.json").is_file():
        raise TraceError(str(folder), found="no config.json", expected="a folder that save_pretrained wrote")
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises what its checks of a file raise
        raise TraceError(f"{folder}/config.json", found=str(error)[:200], expected="a configuration") from error


def decoder(config: Any) -> Decoder:
    """The decoder that a configuration describes.

    Raises:
        TraceError: an architecture, an activation or a kind of rotary positions that is not known here; experts.
    """
    kind = config.model_type
    if (family := ARCHITECTURES.get(kind)) is None:
        raise TraceError(
            f"architecture {kind!r}", found="a decoder that packlight cannot write",
            expected=f"one of {', '.join(ARCHITECTURES)}", op_types=(kind,),
            do="--task text-generation has optimum trace it, to arrays in and out",
        )  # fmt: skip
    if asked := getattr(config, "quantization_config", None):
        name = asked.get("quant_method", "codes") if isinstance(asked, dict) else type(asked).__name__
        raise TraceError(
            f"{kind}: weights",
            found=f"stored by {name}",
            expected="float weights",
            do="export the model it was made of",
        )
    activation = str(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None))
    if activation not in ACTIVATIONS:
        raise TraceError(f"{kind}: activation", found=repr(activation), expected=f"one of {', '.join(ACTIVATIONS)}")
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    ropes, rope_of, context = _ropes(config, size)
    divided = getattr(config, "query_pre_attn_scalar", None)
    return Decoder(
        model_type=kind,
        family=family,
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=size,
        context=context,
        epsilon=config.rms_norm_eps,
        activation=ACTIVATIONS[activation],
        scale=(divided or size) ** -0.5,
        attention_cap=getattr(config, "attn_logit_softcapping", None) or 0.0,
        logit_cap=getattr(config, "final_logit_softcapping", None) or 0.0,
        windows=_windows(config, layers),
        ropes=ropes,
        rope_of=rope_of,
        tied=bool(config.tie_word_embeddings),
    )


def _windows(config: Any, layers: int) -> tuple[int, ...]:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    if other := set(kinds) - {"sliding_attention", "full_attention"}:
        raise TraceError(
            f"{config.model_type}: layer_types", found=", ".join(sorted(other)), expected="full or sliding attention"
        )
    return tuple(int(window) if each == "sliding_attention" and window else FULL for each in kinds)


def _ropes(config: Any, size: int) -> tuple[tuple[Rope, ...], tuple[int, ...], int]:
    """(kinds, which one each layer has, context)."""
    rotated = int(size * getattr(config, "partial_rotary_factor", 1.0))
    if size % 8 or rotated % 16:  # onnxruntime 1.32, GroupQueryAttention: cos_cache's last axis must be a multiple of 8
        raise TraceError(
            f"{config.model_type}: heads of {size} channels, {rotated} of them rotated", found="no kernel for these",
            expected="a multiple of 8, of which a multiple of 16 is rotated",
        )  # fmt: skip
    context = config.max_position_embeddings
    scaling = getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    base = _frequencies(config.rope_theta, rotated)
    factor = 1.0
    if kind == "linear":
        base = base / scaling["factor"]
    elif kind == "llama3":
        base = _llama3(base, scaling)
    elif kind == "longrope":
        # positions up to the context that it was first trained for; beyond it every one would turn otherwise
        first = getattr(config, "original_max_position_embeddings", None) or context
        stretch = context / first
        factor = scaling.get("attention_factor") or (1 + math.log(stretch) / math.log(first)) ** 0.5
        base = base / np.array(scaling["short_factor"])
        context = first
    elif kind != "default":
        raise TraceError(
            f"{config.model_type}: rope_scaling", found=repr(kind), expected="default, linear, llama3 or longrope"
        )
    ropes = [Rope(frequencies=tuple(map(float, base)), factor=factor)]
    layers = config.num_hidden_layers
    local = getattr(config, "rope_local_base_freq", None)
    if local is None:
        return tuple(ropes), (0,) * layers, context
    ropes.append(Rope(frequencies=tuple(map(float, _frequencies(local, rotated)))))
    return tuple(ropes), tuple(int(each == "sliding_attention") for each in config.layer_types), context


def _frequencies(base: float, rotated: int) -> NDArray[np.float64]:
    """base^(-2 i / rotated), [rotated / 2]."""
    return np.asarray(1.0 / base ** (np.arange(0, rotated, 2, dtype=np.float64) / rotated))


def _llama3(base: NDArray[np.float64], scaling: Mapping[str, Any]) -> NDArray[np.float64]:
    """Long waves stretched by `factor`, short ones left, those between in proportion.

    Source: transformers 4.57, modeling_rope_utils.py, _compute_llama3_parameters.
    """
    old, low, high = (
        scaling[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    wave = 2 * math.pi / base
    part = np.clip((old / wave - low) / (high - low), 0, 1)
    return np.asarray((1 - part) * base / scaling["factor"] + part * base)
