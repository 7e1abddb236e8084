"""A step that an export can do without: what it returned, or why there is nothing. Such a step never ends an export.

What passes through: KeyboardInterrupt; a RecipeError, for what was asked must be followed or refused; and what a function of the
caller's own raised (`callers`), for it is theirs to see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from exporter.errors import RecipeError
from runtime.errors import PacklightError

A = TypeVar("A")
T = TypeVar("T")
LONGEST = 200  # characters of a reason
MARK = "_raised_by_the_caller"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried(Generic[T]):
    """What a step returned, or what stands for it, and why the step was not taken, with the error; empty where it was."""

    value: T
    why: str = ""
    error: Exception | None = None


def attempt(step: Callable[[], T], otherwise: T) -> Tried[T]:
    """Run a step; `otherwise` is its value where it raises."""
    try:
        return Tried(value=step())
    except Exception as error:  # whatever it is, the export goes on without the step
        if isinstance(error, RecipeError) or getattr(error, MARK, False):
            raise
        return Tried(value=otherwise, why=reason(error), error=error)


def reason(error: BaseException) -> str:
    """An error on one line of LONGEST characters at most."""
    said = " ".join(str(error).split())
    name = "not enough memory" if isinstance(error, MemoryError) else type(error).__name__
    text = said if said and isinstance(error, PacklightError) else ": ".join(filter(None, (name, said)))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4].rstrip()} ..."


def callers(function: Callable[[A], T]) -> Callable[[A], T]:
    """A function of the caller's own, whose errors pass through every step; ours, of what it was given to call, do not."""

    def called(argument: A) -> T:
        try:
            return function(argument)
        except PacklightError:
            raise
        except Exception as error:
            with contextlib.suppress(AttributeError):  # of a class with __slots__
                setattr(error, MARK, True)
            raise

    return called
