from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from runtime.errors import BundleError, InputError, PacklightError, install


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


def test_what_no_terminal_should_get_is_written_out() -> None:
    error = PacklightError("a\x1b[2Jb.onnx", found="\udcff\x07 café\u202e")
    assert str(error) == "a\\x1b[2Jb.onnx: found \\udcff\\x07 café\\u202e"


def test_extra_is_named_so_that_pip_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Indexed:
        def read_text(self, name: str) -> str | None:
            return None

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Indexed())
    assert install("hf") == "pip install 'packlight[hf]'"
    monkeypatch.setattr(Indexed, "read_text", lambda self, name: '{"dir_info": {}, "url": "file:///checkout"}')
    assert install("hf") == "pip install '.[hf]' in a checkout of packlight"

    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    assert install("export,dask") == "pip install '.[export,dask]' in a checkout of packlight"
