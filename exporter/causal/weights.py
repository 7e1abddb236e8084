"""A checkpoint's weights into the file beside a graph, one layer at a time: at no time is there more than one matrix in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from exporter.causal.architecture import Decoder
from exporter.causal.blocks import Blocked, Blocks, nearest
from exporter.causal.checkpoint import LINEARS, Checkpoint, Linear
from exporter.causal.scheme import EMBEDDING, HEAD, Format, Scheme
from exporter.causal.store import ALIGNED, Store, Stored
from exporter.progress import Progress, Silent

Round = Callable[[Linear, Blocks], Blocked]  # how a linear layer gets its codes
NORMS: Mapping[str, str] = {"first": "input_layernorm", "second": "post_attention_layernorm"}
# what Gemma 2 and 3 call the norms: the one after attention has the name that others give the one before the MLP
SANDWICH: Mapping[str, str] = {
    "first": "input_layernorm",
    "after_attention": "post_attention_layernorm",
    "second": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
HEADS: Mapping[str, str] = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """{tensor: where it lies}, and the format of each linear layer, of `head` and of `embedding`."""

    tensors: Mapping[str, Stored]
    formats: Mapping[str, Format]

    @property
    def bytes(self) -> int:
        """Of all tensors, each place once."""
        return sum({(each.location, each.offset): each.length for each in self.tensors.values()}.values())


def plain(linear: Linear, blocks: Blocks) -> Blocked:
    """Codes by rounding to nearest."""
    return nearest(linear.weight, blocks)


def write(
    checkpoint: Checkpoint, scheme: Scheme, store: Store, *, round_to: Round = plain, progress: Progress | None = None
) -> Written:
    """Write every weight in the format that the scheme gives it.

    Args:
        round_to: how codes are found, where a format has them.
    """
    decoder, tensors, formats = checkpoint.decoder, dict[str, Stored](), dict[str, Format]()

    def linear(each: Linear) -> None:
        formats[each.name] = wanted = fitting(scheme.of(each.name), each.weight.shape[1])
        if wanted is None:
            tensors[f"{each.name}.weight"] = store.add(each.weight if each.name == HEAD else each.weight.T)
        else:
            _add(tensors, store, each.name, round_to(each, wanted))
        if each.bias is not None:
            tensors[f"{each.name}.bias"] = store.add(each.bias)

    for layer in (progress or Silent()).each(range(decoder.layers), "writing layers", decoder.layers):
        for name, stored in norms(decoder).items():
            tensors[f"layers.{layer}.{name}"] = store.add(checkpoint.norm(layer, stored))
        for role in LINEARS:
            linear(checkpoint.linear(layer, role))
    tensors["norm"] = store.add(checkpoint.final_norm())
    linear(checkpoint.head())
    if decoder.tied:
        formats[EMBEDDING] = formats[HEAD]
        shared = {name: each for name, each in tensors.items() if name.startswith(f"{HEAD}.")}
        tensors.update({name.replace(HEAD, EMBEDDING, 1): each for name, each in shared.items()})
    else:
        formats[EMBEDDING] = wanted = fitting(scheme.of(EMBEDDING), decoder.hidden, padded=False)
        weight = checkpoint.embedding()
        if wanted is None:
            tensors[f"{EMBEDDING}.weight"] = store.add(weight)
        else:
            _add(tensors, store, EMBEDDING, nearest(weight, wanted))
    return Written(tensors=tensors, formats=formats)


def norms(decoder: Decoder) -> dict[str, str]:
    """{our name of a norm of a layer: its stored name}."""
    return {**(SANDWICH if decoder.family.after else NORMS), **(HEADS if decoder.family.head_norm else {})}


def linears(decoder: Decoder) -> Iterator[str]:
    """Names of all linear layers but the head, in the order in which they run."""
    return (f"layers.{layer}.{role}" for layer in range(decoder.layers) for role in LINEARS)


def rest_bytes(checkpoint: Checkpoint, scheme: Scheme) -> int:
    """Of what is no linear layer of the body: head, embedding, norms and biases."""
    decoder = checkpoint.decoder
    names = (HEAD,) if decoder.tied else (HEAD, EMBEDDING)
    found = 0
    for form in (fitting(scheme.of(name), decoder.hidden, padded=name == HEAD) for name in names):
        whole = (decoder.vocabulary, decoder.hidden)
        found += 4 * decoder.vocabulary * decoder.hidden if form is None else form.bytes(*whole)
    vectors = [shape for shape in checkpoint.shapes.values() if len(shape) == 1]
    return found + sum(4 * shape[0] + ALIGNED for shape in vectors)


def fitting(wanted: Format, columns: int, padded: bool = True) -> Format:
    """The format with a block that a row of so many columns fills; smaller ones where it would not, and float32 below 16."""
    if wanted is None or (columns % wanted.size == 0):
        return wanted
    size = columns & -columns  # the largest power of two that divides it
    if size >= 16:
        return Blocks(bits=wanted.bits, size=size, symmetric=wanted.symmetric)
    return wanted if padded else None


def _add(tensors: dict[str, Stored], store: Store, name: str, codes: Blocked) -> None:
    tensors[f"{name}.weight"] = store.add(codes.packed())
    tensors[f"{name}.scale"] = store.add(codes.scale.astype(np.float32))
    if (zero := codes.packed_zero()) is not None:
        tensors[f"{name}.zero"] = store.add(zero)
