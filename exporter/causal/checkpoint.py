"""A folder's weights, one tensor at a time: safetensors files, mapped and never read as a whole, by what a decoder calls them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from exporter.causal.architecture import Decoder
from exporter.errors import TraceError

Array = NDArray[np.float32]
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
# what a decoder calls its linear layers -> the stored name, in the order in which they run
LINEARS: Mapping[str, str] = MappingProxyType(
    {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
)
PACKED: Mapping[str, str] = MappingProxyType(
    {"q": "self_attn.qkv_proj", "k": "self_attn.qkv_proj", "v": "self_attn.qkv_proj"}
    | {"gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj"}
)
IGNORED = "rotary_emb.inv_freq"  # made from the configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """y = W x + b: `name` is layers.I.ROLE or head, weight [out, in] float32."""

    name: str
    weight: Array
    bias: Array | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Which file holds which tensor, and its shape; `read` gives one as float32."""

    folder: Path
    files: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    decoder: Decoder
    prefix: str = field(default="model.")

    @property
    def parameters(self) -> int:
        """Numbers that the decoder holds; an embedding that is the head as well counts once."""
        return sum(int(np.prod(self.shapes[name])) for name in self.shapes if self._is_ours(name))

    def read(self, name: str, rows: slice | None = None) -> Array:
        """A tensor, or some of its rows, as float32.

        Raises:
            TraceError: it is not there, or holds no number.
        """
        from safetensors import safe_open  # here: with the extra of language models

        with safe_open(self.folder / self.files[name], framework="pt") as opened:
            found = opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]
        array: Array = found.float().numpy()
        if not np.isfinite(array).all():
            raise TraceError(f"{self.files[name]}: {name}", found="NaN or infinity", expected="numbers")
        return array

    def linear(self, layer: int, role: str) -> Linear:
        """One linear layer of a decoder layer, by its role in LINEARS."""
        name = f"{self.prefix}layers.{layer}.{self._stored(role)}"
        rows = self._rows(role)
        bias = f"{name}.bias"
        return Linear(
            name=f"layers.{layer}.{role}",
            weight=self.read(f"{name}.weight", rows),
            bias=self.read(bias, rows) if bias in self.files else None,
        )

    def norm(self, layer: int, name: str) -> Array:
        """The factors of a norm, as they multiply, by its stored name."""
        return self.read(f"{self.prefix}layers.{layer}.{name}.weight") + np.float32(self.decoder.family.norm_offset)

    def final_norm(self) -> Array:
        return self.read(f"{self.prefix}norm.weight") + np.float32(self.decoder.family.norm_offset)

    def embedding(self, rows: slice | None = None) -> Array:
        return self.read(f"{self.prefix}embed_tokens.weight", rows)

    def head(self) -> Linear:
        """What gives the logits: the embedding, or a matrix of its own."""
        if self.decoder.tied:
            return Linear(name="head", weight=self.embedding(), bias=None)
        bias = self.read("lm_head.bias") if "lm_head.bias" in self.files else None
        return Linear(name="head", weight=self.read("lm_head.weight"), bias=bias)

    def names(self) -> Iterator[str]:
        """Every stored tensor that the decoder needs; biases of linear layers may be missing."""
        family = self.decoder.family
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if family.after else []
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if family.head_norm else []
        yield f"{self.prefix}embed_tokens.weight"
        for layer in range(self.decoder.layers):
            for each in dict.fromkeys([*norms, *(self._stored(role) for role in LINEARS)]):
                yield f"{self.prefix}layers.{layer}.{each}.weight"
        yield f"{self.prefix}norm.weight"
        if not self.decoder.tied:
            yield "lm_head.weight"

    def _stored(self, role: str) -> str:
        return PACKED.get(role, LINEARS[role]) if self.decoder.family.packed else LINEARS[role]

    def _rows(self, role: str) -> slice | None:
        """Where a packed matrix has this role's rows."""
        of, decoder = self.decoder.family, self.decoder
        if not of.packed or role not in PACKED:
            return None
        q, kv, wide = decoder.heads * decoder.head_size, decoder.kv_heads * decoder.head_size, decoder.intermediate
        ends = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv), "gate": (0, wide), "up": (wide, 2 * wide)}
        return slice(*ends[role])

    def _is_ours(self, name: str) -> bool:
        return not name.endswith(IGNORED) and not (self.decoder.tied and name == "lm_head.weight")


def modules(decoder: Decoder) -> dict[str, list[str]]:
    """{stored name of a matrix: the roles that are in it, in their order}."""
    found: dict[str, list[str]] = {}
    for role, name in LINEARS.items():
        found.setdefault(PACKED.get(role, name) if decoder.family.packed else name, []).append(role)
    return found


def open_folder(folder: Path, decoder: Decoder) -> Checkpoint:
    """Find every tensor of a folder and hold them against the decoder.

    Raises:
        TraceError: no safetensors file, one that is cut off, a tensor that is missing, of another shape, or that the decoder
            has no place for.
    """
    files, shapes = _listed(folder)
    prefix = "model." if any(name.startswith("model.") for name in files) else ""
    found = Checkpoint(folder=folder, files=files, shapes=shapes, decoder=decoder, prefix=prefix)
    wanted = set(found.names())
    if missing := sorted(wanted - files.keys()):
        raise TraceError(
            str(folder), found=f"no tensor {missing[0]}", expected=f"the weights of a {decoder.model_type}"
        )
    biases = {name.removesuffix("weight") + "bias" for name in wanted if "norm" not in name}
    if left := sorted(name for name in files.keys() - wanted - biases if found._is_ours(name)):
        raise TraceError(
            str(folder), found=f"tensor {left[0]}, which a {decoder.model_type} has no place for",
            expected="the tensors of its architecture alone", do="export the model without adapters and other heads",
        )  # fmt: skip
    rows = shapes[f"{prefix}embed_tokens.weight"]
    if rows != (decoder.vocabulary, decoder.hidden):
        raise TraceError(
            f"{folder}: embed_tokens", found=f"shape {list(rows)}", expected=f"{[decoder.vocabulary, decoder.hidden]}"
        )
    return found


def _listed(folder: Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    if (folder / INDEX).is_file():
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        parts = sorted(set(named.values()))
    elif (folder / ONE).is_file():
        parts = [ONE]
    else:
        raise TraceError(
            str(folder),
            found="no safetensors file",
            expected=ONE,
            do="save it with save_pretrained(safe_serialization=True)",
        )
    files: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        if Path(part).name != part or not (folder / part).is_file():
            raise TraceError(f"{folder}/{INDEX}", found=f"no file {part!r}", expected="its weights in the same folder")
        try:
            with safe_open(folder / part, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # no mapping: an object of the library's own
                    files[name] = part
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
        except SafetensorError as error:
            raise TraceError(f"{folder / part}", found=str(error)[:120], expected="a whole safetensors file") from error
    return files, shapes
