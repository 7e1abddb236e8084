from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.decode import Decode
from runtime.errors import InputError
from runtime.session import open_session
from tests.runtime import decoder

IDS = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.save(tmp_path_factory.mktemp("decoder") / "model.onnx")


def opened(model: Path, capacity: int = 8, rows: int = 1) -> Decode:
    return Decode(open_session(model, threads=1), capacity, rows)


def test_token_by_token_gives_what_all_at_once_gives(model: Path) -> None:
    for first in range(1, len(IDS)):
        decode = opened(model)
        got = [decode.step(np.array([IDS[:first]])).copy()]
        got += [decode.step(np.array([[token]])).copy() for token in IDS[first:]]
        wanted = [decoder.expected(IDS[:end]) for end in range(first, len(IDS) + 1)]
        assert np.allclose(np.concatenate(got), wanted, atol=1e-5)


def test_more_tokens_follow_a_prompt_in_one_step(model: Path) -> None:
    decode = opened(model)
    decode.step(np.array([IDS[:3]]))
    assert np.allclose(decode.step(np.array([IDS[3:]]))[0], decoder.expected(IDS), atol=1e-5)


def test_rows_of_a_batch_have_lengths_of_their_own(model: Path) -> None:
    decode = opened(model, rows=2)
    rows = [IDS[:5], IDS[4:6]]
    ids = np.zeros((2, 5), np.int64)
    ids[0], ids[1, :2] = rows[0], rows[1]
    got = decode.step(ids, [5, 2]).copy()
    assert np.allclose(got, [decoder.expected(row) for row in rows], atol=1e-5)
    after = decode.step(np.array([[7], [8]]))
    assert np.allclose(after, [decoder.expected([*rows[0], 7]), decoder.expected([*rows[1], 8])], atol=1e-5)
    assert decode.lengths.tolist() == [6, 3]


def test_forgotten_tokens_leave_no_trace(model: Path) -> None:
    decode = opened(model)
    decode.step(np.array([IDS]))
    decode.rewind(2)
    assert np.allclose(decode.step(np.array([[7]]))[0], decoder.expected([*IDS[:2], 7]), atol=1e-5)
    decode.reset()
    assert np.allclose(decode.step(np.array([[7]]))[0], decoder.expected([7]), atol=1e-5)


def test_cache_is_two_sides_of_float32_for_every_token(model: Path) -> None:
    assert opened(model, capacity=100, rows=3).cache_bytes == 2 * 4 * 3 * 100 * decoder.WIDE


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[1] * 9], "9 with those before, expected at most 8"),
        ([[11]], "found 11, expected 0 to 10"),
        ([[-1]], "found -1"),
        ([[]], "shape [1, 0]"),
        ([[1], [2]], "shape [2, 1]"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_before_they_run(ids: list[list[int]], said: str, model: Path) -> None:
    decode = opened(model)
    with pytest.raises(InputError) as error:
        decode.step(np.array(ids, np.int64).reshape(len(ids), -1))
    assert said in str(error.value) and decode.lengths[0] == 0
