"""Limits of a language model as people say them: "kl<=.05", "ppl rise<=3%", "same-top1>=90%" -> Limits."""

from __future__ import annotations

import re
from collections.abc import Iterable

from exporter.errors import RecipeError
from runtime.language_manifest import Limits

# what people say -> (the field of Limits, its side)
NAMES = {
    "kl": ("max_kl", "<="),
    "ppl rise": ("max_rise", "<="),
    "perplexity rise": ("max_rise", "<="),
    "same-top1": ("min_same_top1", ">="),
}
_SAID = re.compile(
    r"(?P<name>[a-z1-]+(?: rise)?)\s*(?P<sign><=|>=)\s*(?P<value>\d*\.?\d+(?:e-?\d+)?)\s*(?P<share>%)?", re.I
)


def parse(texts: Iterable[str], max_size_bytes: int | None = None) -> Limits:
    """The limits.

    Raises:
        RecipeError: a text that says no limit, an unknown name, the wrong side, two limits on one thing.
    """
    found: dict[str, float] = {}
    for text in texts:
        said = _SAID.fullmatch(text.strip())
        key, side = NAMES.get(" ".join(said["name"].lower().split()), ("", "")) if said else ("", "")
        if said is None or not key or said["sign"] != side or key in found:
            raise RecipeError(
                f"--budget {text!r}", found="a second limit on it" if key in found else "no limit of a language model",
                expected='"kl<=.05", "ppl rise<=3%" or "same-top1>=90%"',
            )  # fmt: skip
        found[key] = float(said["value"]) / (100 if said["share"] else 1)
    return Limits(max_size_bytes=max_size_bytes, **found)
