from __future__ import annotations

import json
from typing import Any

import pytest

from runtime import language_manifest as manifests
from runtime.errors import BundleError
from runtime.manifest import is_language
from tests.runtime import language


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = language.write(tmp_path_factory.mktemp("manifest") / "letters")
    assert is_language(folder) and not is_language(folder.parent)
    return (folder / "manifest.json").read_text()


def test_manifest_that_was_written_reads_as_it_was(text: str) -> None:
    found = manifests.loads(text, "manifest.json")
    assert manifests.dumps(found) == text
    assert (found.vocabulary, found.begin, found.loss.rise) == (11, (0,), pytest.approx(0.1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 9}, "format: found 9, expected 1 or less; made by a newer packlight"),
        ({"kind": "other"}, "kind: found other 1"),
        ({"more": 1}, "'more' missing or unknown"),
        ({"vocabulary": "11"}, "vocabulary: found '11'"),
        ({"vocabulary": True}, "vocabulary: found True"),
        ({"vocabulary": 0}, "vocabulary: found 0"),
        ({"begin": 1}, "begin: found int, expected a list"),
        ({"end": [11]}, "found 11, expected tokens 0 to 10"),
        ({"session": {"session.save_model_format": "x"}}, "an entry no bundle may set"),
        ({"files": {}}, "files.model.onnx: found nothing"),
        ({"loss": {"kl": 1.0}}, "missing or unknown"),
    ],
)
def test_what_the_format_does_not_allow_is_refused_with_its_place(change: dict[str, Any], said: str, text: str) -> None:
    with pytest.raises(BundleError) as error:
        manifests.loads(json.dumps({**json.loads(text), **change}), "manifest.json")
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", ".hidden", "manifest.json"])
def test_files_outside_the_folder_are_refused(name: str, text: str) -> None:
    root = json.loads(text)
    root["files"][name] = {"sha256": "0" * 64, "size_bytes": 1}
    with pytest.raises(BundleError, match="a name that is not allowed"):
        manifests.loads(json.dumps(root), "manifest.json")


@pytest.mark.parametrize("broken", ["{", '{"kind": NaN}', "[]", "[" * 100_000])
def test_what_is_no_json_is_refused(broken: str) -> None:
    with pytest.raises(BundleError):
        manifests.loads(broken, "manifest.json")
