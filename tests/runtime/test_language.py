from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import runtime
from runtime.errors import BundleError, InputError, PacklightError
from runtime.language import LanguageModel, until
from tests.runtime import language
from tests.runtime.language import LETTERS

IDS = [0, 3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language.write(tmp_path_factory.mktemp("language") / "letters")


@pytest.fixture
def model(folder: Path) -> LanguageModel:
    found = runtime.load(folder, threads=1)
    assert isinstance(found, LanguageModel)
    return found


def test_greedy_tokens_are_those_of_the_model(model: LanguageModel) -> None:
    for ids in (IDS, [0, 7], [0, 2, 9, 5, 5]):
        assert list(model.tokens(ids, 20)) == language.followed(ids, 20)


def test_text_begins_with_the_token_that_begins_one(model: LanguageModel) -> None:
    assert model.encode("bc") == [0, *(LETTERS.index(each) for each in "bc")]
    assert model.encode("^bc") == model.encode("bc")
    wanted = "".join(LETTERS[token] for token in language.followed(model.encode("bc"), 9))
    assert "".join(model.generate("bc", 9)) == wanted
    assert "".join(model.generate(model.encode("bc"), 9)) == wanted


def test_messages_go_through_the_bundles_own_template(model: LanguageModel) -> None:
    assert model.chat([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]) == [0, 2, 3, 4]
    assert list(model.generate([{"role": "user", "content": "ab"}], 5)) == list(model.generate("ab", 5))


def test_what_a_prompt_has_in_common_with_the_last_one_is_not_computed_again(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.decode import Decode

    seen: list[int] = []
    step = Decode.step
    monkeypatch.setattr(
        Decode, "step", lambda self, ids, counts=None: seen.append(ids.shape[1]) or step(self, ids, counts)
    )
    first = list(model.tokens([0, 3, 4, 5, 6, 7], 3))
    assert seen[0] == 6
    seen.clear()
    assert list(model.tokens([0, 3, 4, 5, 6, 7], 3)) == first and seen[0] == 1
    seen.clear()
    assert list(model.tokens([0, 3, 9], 3)) == language.followed([0, 3, 9], 3) and seen[0] == 1
    seen.clear()
    assert list(model.tokens([0, 3, 9, 9, 9], 3)) == language.followed([0, 3, 9, 9, 9], 3)


def test_two_answers_at_once_do_not_disturb_each_other(model: LanguageModel) -> None:
    one, other = model.tokens([0, 3], 8), model.tokens([0, 7, 5], 8)
    mixed = list(zip(one, other, strict=False))
    assert [a for a, _ in mixed] == language.followed([0, 3], 8)[: len(mixed)]
    assert [b for _, b in mixed] == language.followed([0, 7, 5], 8)[: len(mixed)]


def test_equal_seeds_draw_equal_texts_and_others_others(model: LanguageModel) -> None:
    drawn = {seed: "".join(model.generate("bc", 30, temperature=3.0, seed=seed)) for seed in (1, 2, 3)}
    assert drawn[1] == "".join(model.generate("bc", 30, temperature=3.0, seed=1))
    assert len(set(drawn.values())) > 1


def test_answer_ends_at_the_context(tmp_path: Path) -> None:
    model = runtime.load(language.write(tmp_path / "short", context=8))
    assert isinstance(model, LanguageModel)
    assert len(list(model.tokens(IDS, 100))) <= 5


@pytest.mark.parametrize(
    ("ids", "more", "said"),
    [
        ([], 5, "prompt: found no token"),
        ([0] * 64, 5, "found 64 tokens, expected fewer than the context of 64"),
        ([0, 11], 5, "found 11, expected 0 to 10"),
        ([0], 0, "max_new_tokens: found 0"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_before_the_first_token(
    ids: list[int], more: int, said: str, model: LanguageModel
) -> None:
    with pytest.raises(InputError) as error:
        model.tokens(ids, more)
    assert said in str(error.value)


def test_prompts_of_a_batch_are_answered_as_each_alone(model: LanguageModel) -> None:
    prompts = ["bc", "g", [0, 9, 3, 3, 7, 2], [{"role": "user", "content": "hiab"}]]
    assert model.batch(prompts, 12) == ["".join(model.generate(each, 12)) for each in prompts]
    with pytest.raises(InputError, match="prompts: found none"):
        model.batch([])
    with pytest.raises(InputError, match="found no token"):
        model.batch(["bc", []])


@pytest.mark.parametrize("setting", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_outside_their_range_are_refused(setting: dict[str, float], model: LanguageModel) -> None:
    with pytest.raises(InputError, match=next(iter(setting))):
        model.generate("b", 3, **setting)  # type: ignore[arg-type]


def test_memory_of_a_context_is_known_before_it_is_taken(model: LanguageModel) -> None:
    assert model.cache_bytes(100) == model.decode(100).cache_bytes == 2 * 4 * 100 * 16


@pytest.mark.parametrize(
    ("pieces", "ends", "text"),
    [
        (["one ", "two ", "three"], ["two"], "one "),
        (["one t", "w", "o three"], ["two", "x"], "one "),
        (["one t", "wi", "ce"], ["two"], "one twice"),
        (["ab"], ["ab"], ""),
        (["a", "a", "b"], ["aab"], ""),
        (["x", "aa", "ab", "y"], ["aab"], "xa"),
    ],
)
def test_answer_ends_before_a_stop_text_wherever_pieces_are_cut(pieces: list[str], ends: list[str], text: str) -> None:
    assert "".join(until(iter(pieces), ends)) == text


def test_pieces_come_as_soon_as_they_cannot_be_a_stop_text() -> None:
    came: list[str] = []

    def source() -> Iterator[str]:
        for piece in ("one ", "t", "ime ", "more"):
            came.append(piece)
            yield piece

    found = until(source(), ["two"])
    assert next(found) == "one " and came == ["one "]
    assert next(found) == "time " and came == ["one ", "t", "ime "]


def test_character_of_several_tokens_comes_when_it_is_whole(model: LanguageModel) -> None:
    from tokenizers import Tokenizer, decoders, models

    names = [f"<0x{byte:02X}>" for byte in "é€".encode()]
    tokens = Tokenizer(models.BPE({name: at for at, name in enumerate([*names, "a"])}, [], byte_fallback=True))
    tokens.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    model.__dict__["tokenizer"] = tokens
    assert list(model._pieces(iter([5, 0, 1, 5, 2, 3, 4]), [])) == ["a", "é", "a", "€"]
    assert list(model._pieces(iter([5, 2]), [])) == ["a", "�"]


def test_bundle_is_refused_where_it_is_another_kind_or_damaged(folder: Path, tmp_path: Path) -> None:
    import shutil

    with pytest.raises(BundleError, match="a language model"):
        runtime.bundle.load(folder)
    with pytest.raises(PacklightError, match="a language model"):
        runtime.load(folder, ort=True)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match=r"tokenizer.json: found 2 bytes"):
        runtime.load(copy)
