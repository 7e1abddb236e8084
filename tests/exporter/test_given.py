from __future__ import annotations

import pytest

from exporter import given
from exporter.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6MB", 6_000_000),
        ("6 mb", 6_000_000),
        ("1.5KB", 1500),
        ("2GB", 2_000_000_000),
        ("40MiB", 41_943_040),
        ("1KiB", 1024),
        ("0.5 GiB", 536_870_912),
        ("123", 123),
        ("123B", 123),
        (" 7 ", 7),
    ],
)
def test_size_is_a_number_of_bytes_in_its_unit(text: str, size: int) -> None:
    assert given.size_bytes(text, "--max-size") == size


def test_size_that_is_not_given_is_none() -> None:
    assert given.size_bytes(None, "--max-size") is None


@pytest.mark.parametrize(
    "text", ["", "MB", "6 apples", "-6MB", "0", "0.0MB", "6,5MB", "1e6", "6M", "6MB8", "nan", "inf"]
)
def test_size_that_is_none_is_refused_with_the_units(text: str) -> None:
    with pytest.raises(RecipeError) as error:
        given.size_bytes(text, "--max-size")
    assert str(error.value) == (
        f"--max-size: found {text!r}, expected a number above 0 with B, KB, MB, GB, KiB, MiB or GiB"
    )
