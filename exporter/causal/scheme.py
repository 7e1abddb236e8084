"""Which format each weight of a decoder has, as a value: Scheme, and those that have a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from exporter.causal.blocks import Blocks

HEAD, EMBEDDING = "head", "embedding"
AUTO = "auto"  # the body's formats are chosen by what the model hears: causal.heard
Format = Blocks | None  # None is float32
INT8 = Blocks(bits=8, size=32, symmetric=True)
# 8 bits in blocks of 128: a byte in 32 less, and the fastest kernel, for a loss that is small beside that of 4 bits
WIDE = Blocks(bits=8, size=128, symmetric=True)
INT4 = Blocks(bits=4, size=32, symmetric=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """The format of every weight.

    body: of linear layers. head: of the matrix that gives the logits, and of the embedding.
    exceptions: (a layer's name, as layers.3.v, or a role, as v; its format); the first that fits counts.
    """

    name: str
    body: Format
    head: Format
    exceptions: tuple[tuple[str, Format], ...] = ()

    def of(self, name: str) -> Format:
        """The format of a linear layer by its name, of `head` or of `embedding`."""
        if name in (HEAD, EMBEDDING):
            return self.head
        role = name.rpartition(".")[2]
        return next((each for said, each in self.exceptions if said in (name, role)), self.body)


FLOAT = Scheme(name="fp32", body=None, head=None)
SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        each.name: each
        for each in (
            Scheme(name=AUTO, body=Blocks(bits=4, size=64), head=WIDE),
            FLOAT,
            Scheme(name="w8", body=INT8, head=INT8),
            Scheme(name="w4", body=INT4, head=WIDE),
            Scheme(
                name="mixed",
                body=Blocks(bits=4, size=32),
                head=WIDE,
                exceptions=(("v", WIDE), ("down", WIDE)),  # where 4 bits are heard most
            ),
        )
    }
)
