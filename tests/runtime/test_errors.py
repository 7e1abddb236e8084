from __future__ import annotations

from runtime.errors import BundleError, InputError, PacklightError


def test_message_is_one_line_of_what_found_expected_do() -> None:
    error = PacklightError("input image", found="int64", expected="float32", do="convert it")
    assert str(error) == "input image: found int64, expected float32; convert it"


def test_empty_parts_are_left_out_of_the_message() -> None:
    assert str(PacklightError("no batches")) == "no batches"
    assert str(PacklightError("no batches", do="give one")) == "no batches; give one"
    assert str(PacklightError("rounds", expected="1 or more")) == "rounds: expected 1 or more"


def test_message_stays_one_line_whatever_a_library_said() -> None:
    assert str(PacklightError("model", found="Load failed:\n\n  bad\tfile")) == "model: found Load failed: bad file"


def test_errors_carry_their_fields() -> None:
    bundle = BundleError("a/b.json", path="a/b.json", found="nothing", expected="a file")
    assert (bundle.what, bundle.path, bundle.found, bundle.expected, bundle.do) == (
        "a/b.json",
        "a/b.json",
        "nothing",
        "a file",
        "",
    )
    assert InputError("input is missing", name="image").name == "image"
