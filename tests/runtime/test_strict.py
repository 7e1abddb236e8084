from __future__ import annotations

import pytest

from runtime import strict
from runtime.errors import BundleError


def test_plain_json_is_its_value() -> None:
    assert strict.parse('{"a": [1, -2.5, null, true, "\\ud83d\\ude00"]}', "x") == {"a": [1, -2.5, None, True, "😀"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 33 + "]" * 33, "more than 32 objects within each other"),
        ("[" * 100_000, "too many objects within each other"),
        ("1" * 5000, "a whole number of 5000 digits"),
        ("1e999999999", "a number beyond float64"),
        ('"\\ud800"', "surrogates not allowed"),
        ('{"\\udfff": 1}', "surrogates not allowed"),
        ('{"a": 1, "a": 1}', "a key appears twice"),
        ("-Infinity", "-Infinity is not JSON"),
    ],
)
def test_what_could_grow_or_cannot_be_written_is_refused(text: str, says: str) -> None:
    with pytest.raises(BundleError, match=says):
        strict.parse(text, "x")
