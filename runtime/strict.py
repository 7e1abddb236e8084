"""JSON that somebody else may have written: read strictly, and with a limit for each thing that could grow."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

from runtime.errors import BundleError

if TYPE_CHECKING:
    from runtime.preprocess import Place

DIGITS = 19  # of a whole number: more than any size in bytes has
DEPTH = 32  # of objects and lists within each other


def parse(text: str, where: str) -> object:
    """The value of a JSON text.

    Args:
        text: whose length was limited when it was read.
        where: the file's name, for messages.

    Raises:
        BundleError: not JSON, NaN or Infinity, a key twice in one object, a whole number of more than DIGITS digits, a number
            that float64 does not hold, more than DEPTH objects within each other, half of a character.
    """
    import json  # here and not above: `import runtime` need not load it

    try:
        root = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_not_json, parse_int=_integer, parse_float=_finite
        )
        _require_sound(root)
    except (ValueError, RecursionError) as error:
        found = "too many objects within each other" if isinstance(error, RecursionError) else str(error)[:120]
        raise BundleError(f"{where}: not strict JSON", path=where, found=found, do="export the bundle again") from error
    return root


def table(value: object, at: Place, kind: type) -> dict[str, Any]:
    """The value as an object with exactly the keys of dataclass `kind`, or the place's refusal."""
    names = [field.name for field in dataclasses.fields(kind)]
    if not isinstance(value, dict) or set(value) != set(names):
        found = ", ".join(map(str, value)) if isinstance(value, dict) else str(value)
        at.refuse(found=found[:40] or "nothing", expected=f"an object with {', '.join(names)}")
    return value


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice in one object")
    return found


def _not_json(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    found = float(digits)
    if math.isinf(found):
        raise ValueError(f"a number beyond float64: {digits[:40]}")
    return found


def _require_sound(root: object) -> None:
    """Look at every value, without recursion: its depth, and that its texts can be written as UTF-8."""
    level: list[object] = [root]
    for _ in range(DEPTH):
        below: list[object] = []
        for value in level:
            if isinstance(value, str):
                value.encode("utf-8")  # UnicodeEncodeError is a ValueError
            elif isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
        if not below:
            return
        level = below
    raise ValueError(f"more than {DEPTH} objects within each other")
