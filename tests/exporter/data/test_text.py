from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from runtime.manifest import Tensor
from tests.exporter.data.made import IDS, MASK, TYPES, WORDS, asked, read, refusal, tokenizer

PAD, CLS, SEP = 0, 2, 3


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "lines.txt").write_text("a cat\n\n  the cat sat on the mat  \r\na dog\n", encoding="utf-8")
    return tmp_path / "lines.txt"


def ids(given: Path, *tensors: Tensor, **table: Any) -> list[Any]:
    table = {"tokenizer": "tokenizer.json"} | table
    found = read(given, asked(given.parent, text=table), *(tensors or (IDS,)))
    return [batch["input_ids"].tolist() for batch in found]


def says(given: Path, *tensors: Tensor, **table: Any) -> str:
    return refusal(given, asked(given.parent, text={"tokenizer": "tokenizer.json"} | table), *(tensors or (IDS,)))


def test_a_line_is_a_sample_and_blank_lines_are_none(lines: Path) -> None:
    assert ids(lines) == [[[CLS, 4, 5, SEP]], [[CLS, 8, 5, 6, 7, 8, 9, SEP]], [[CLS, 4, 1, SEP]]]


def test_lines_of_a_batch_are_padded_to_the_longest_and_the_mask_says_where(lines: Path) -> None:
    table = {"tokenizer": "tokenizer.json", "batch": 2}
    first, last = read(lines, asked(lines.parent, text=table), IDS, MASK, TYPES)
    assert first["input_ids"].tolist() == [[CLS, 4, 5, SEP, PAD, PAD, PAD, PAD], [CLS, 8, 5, 6, 7, 8, 9, SEP]]
    assert first["attention_mask"].tolist() == [[1] * 4 + [0] * 4, [1] * 8]
    assert first["token_type_ids"].tolist() == [[0] * 8] * 2
    assert last["input_ids"].shape == (1, 4)
    assert all(array.dtype == np.int64 for array in first.values())


def test_max_length_cuts_and_pads_where_it_is_asked_for(lines: Path) -> None:
    assert ids(lines, max_length=4)[1] == [[CLS, 8, 5, SEP]]
    assert {len(batch[0]) for batch in ids(lines, max_length=6, padding="max_length")} == {6}
    assert "missing key 'max_length'" in says(lines, padding="max_length")


def test_fixed_length_of_the_graph_is_kept_to(lines: Path) -> None:
    fixed = Tensor(name="input_ids", dtype="int32", shape=(1, 6))
    (found,) = {np.shape(batch) for batch in ids(lines, fixed)}
    assert found == (1, 6)
    assert "found shape [1, 4], expected shape [1, 6]" in says(lines, fixed, padding="longest")


def test_without_padding_lines_of_one_batch_must_be_equally_long(lines: Path) -> None:
    assert [len(batch[0]) for batch in ids(lines, padding="none")] == [4, 8, 4]
    assert "found 4 and 8 tokens in one batch" in says(lines, padding="none", batch=2)


def test_padding_token_is_that_of_the_file_or_the_one_that_is_named(lines: Path) -> None:
    tokenizer(lines.parent / "tokenizer.json", ("cat", "sat", "[CLS]", "[SEP]", "[UNK]"))
    assert len(ids(lines)) == 3  # alone in its batch a line needs no padding
    assert "pad: found no padding token in tokenizer.json" in says(lines, batch=2)
    assert "pad: found no token '<none>'" in says(lines, batch=2, pad="<none>")
    assert ids(lines, batch=2, pad="sat")[0][0] == [2, 4, 0, 3, 1, 1, 1, 1]


def test_inputs_of_other_names_are_named_in_the_table(lines: Path) -> None:
    tokens = Tensor(name="tokens", dtype="int64", shape=("batch", "length"))
    seen = Tensor(name="seen", dtype="int32", shape=("batch", "length"))
    table = {"tokenizer": "tokenizer.json", "ids": "tokens", "attention_mask": "seen"}
    first = read(lines, asked(lines.parent, text=table), tokens, seen)[0]
    assert first["seen"].dtype == np.int32 and first["tokens"].tolist() == [[CLS, 4, 5, SEP]]
    only = {"tokenizer": "tokenizer.json"}
    assert read(lines, asked(lines.parent, text=only), tokens)[0]["tokens"].shape == (1, 4)
    assert "[text]: missing key 'ids': found a model with inputs tokens, seen" in says(lines, tokens, seen)
    assert (
        "no input 'token'" in (refused := says(lines, tokens, seen, ids="token"))
        and "did you mean 'tokens'?" in refused
    )
    assert "[text]: input 'seen': found values for tokens only" in says(lines, tokens, seen, ids="tokens")


def test_input_that_takes_no_integers_is_refused(lines: Path) -> None:
    real = Tensor(name="x", dtype="float32", shape=("batch", 3))
    assert "[text]: ids: found input 'x' of dtype float32" in says(lines, real)


def test_folder_of_text_is_read_in_the_order_of_its_files(lines: Path) -> None:
    (lines.parent / "sub").mkdir()
    (lines.parent / "sub" / "more.txt").write_text("mat")
    (lines.parent / "a.txt").write_text("\ufeffsat", encoding="utf-8")
    found = read(lines.parent, asked(lines.parent, text={"tokenizer": "tokenizer.json"}), IDS)
    assert [batch["input_ids"][0, 1] for batch in found] == [6, 4, 8, 4, 9]


def test_file_that_is_no_tokenizer_is_refused(lines: Path) -> None:
    (lines.parent / "tokenizer.json").write_text('{"model": 1}')
    assert "[text]: tokenizer 'tokenizer.json': found " in says(lines)
    assert "expected a tokenizer.json of the tokenizers library" in says(lines)
    (lines.parent / "tokenizer.json").write_bytes(b"\xff\xfe")
    assert "expected a tokenizer.json of the tokenizers library" in says(lines)
    assert "none.json: found " in says(lines, tokenizer="none.json")


def test_line_that_is_not_utf8_is_named(lines: Path) -> None:
    with open(lines, "ab") as file:
        file.write(b"caf\xe9\n")
    assert "lines.txt: line 5: found 'utf-8' codec can't decode byte 0xe9" in says(lines)


def test_absolute_tokenizer_ignores_the_padding_it_was_saved_with(lines: Path) -> None:
    path = lines.parent / "tokenizer.json"
    saved = Tokenizer.from_file(str(path))
    saved.enable_padding(length=128)
    saved.save(str(path))
    assert len(saved.encode("a cat").ids) == 128
    found = read(lines, asked(text={"tokenizer": str(path)}), IDS, MASK, TYPES)
    assert [batch["input_ids"][0].tolist() for batch in found] == [
        [CLS, 4, 5, SEP], [CLS, 8, 5, 6, 7, 8, 9, SEP], [CLS, 4, 1, SEP],
    ]  # fmt: skip


def test_words_of_the_tests_are_numbered_as_the_tests_say() -> None:
    assert (WORDS.index("[PAD]"), WORDS.index("[CLS]"), WORDS.index("[SEP]")) == (PAD, CLS, SEP)
