"""How a stage says what it is doing. The pipeline tells a Progress; the CLI draws it, a library caller sees nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """What a listener can be told."""

    def stage(self, text: str) -> None:
        """A stage begins; the one before it has ended."""

    def note(self, text: str) -> None:
        """Something that a person should know, and that stops nothing."""

    def each(
        self, items: Iterable[T], text: str, total: int | None = None, samples: Callable[[T], int] | None = None
    ) -> Iterator[T]:
        """Hand the items on, counting them; `total` where it is known, and `samples` of an item where it holds several."""
        ...


class Silent:
    """Says nothing."""

    def stage(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def each(
        self, items: Iterable[T], text: str, total: int | None = None, samples: Callable[[T], int] | None = None
    ) -> Iterator[T]:
        yield from items
