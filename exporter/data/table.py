"""What every table of a recipe is: frozen, strict, with every key known."""

from __future__ import annotations

from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Table(BaseModel):
    """One table of a recipe. TOML's arrays become tuples, since a recipe is frozen."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def refuse(expected: str) -> NoReturn:
    """Refuse a value within a validator, in the words that a recipe's errors are made of."""
    raise PydanticCustomError("value", "Input should be {expected}", {"expected": expected})


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
