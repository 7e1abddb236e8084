from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exporter import batches
from exporter.errors import CalibrationError
from exporter.split import Split
from runtime.manifest import Tensor
from tests.exporter.test_batches import IDS, IMAGE, Endless, fills, image, of_sizes, refusal


def test_no_data_one_dict_and_an_empty_iterable_say_what_to_do() -> None:
    assert "calibration: no data" in str(refusal(None))
    assert "found one dict, expected an iterable of dicts; wrap it: [batch]" in str(refusal(image(1)))
    with pytest.raises(CalibrationError, match="no batches: found an empty iterable"):
        Split([], None, (IMAGE,))


def test_iterable_is_read_once_and_only_as_far_as_asked() -> None:
    pulled: list[int] = []

    def stream() -> Iterator[dict[str, NDArray[np.float32]]]:
        for number in range(100):
            pulled.append(number)
            yield image(float(number))

    reader = batches.read(stream(), (IMAGE,), "calibration")
    assert (next(reader)["image"][0, 0], next(reader)["image"][0, 0]) == (0.0, 1.0)
    assert pulled == [0, 1]
    split = Split(stream(), [image(-1)], (IMAGE,))
    assert fills(split.calibration()) == [*map(float, range(100))]
    assert pulled == [0, 1, *range(100)]
    assert len(split.kept) == split.KEPT_MOST


def test_every_fourth_batch_is_kept_apart_where_there_is_no_heldout() -> None:
    split = Split([image(float(number)) for number in range(10)], None, (IMAGE,))
    assert (split.total, split.total_heldout) == (8, 2)
    assert fills(split.calibration()) == [0, 1, 2, 4, 5, 6, 8, 9]
    assert fills(split.heldout()) == [3, 7]
    assert (split.repeated, split.overlapping, split.random) == (0, False, False)


def test_heldout_batch_that_calibration_saw_is_left_out_and_counted() -> None:
    split = Split([image(1), image(2)], [image(2), image(3), image(1), image(4)], (IMAGE,))
    list(split.calibration())
    assert fills(split.heldout()) == [3, 4]
    assert (split.repeated, split.overlapping) == (2, False)


def test_heldout_that_is_all_calibration_is_used_and_said_to_overlap() -> None:
    split = Split([image(1), image(2)], [image(2), image(1)], (IMAGE,))
    list(split.calibration())
    assert fills(split.heldout()) == [2, 1]
    assert (split.repeated, split.overlapping) == (2, True)


def test_repeated_batch_cannot_be_kept_apart_from_itself() -> None:
    split = Split([image(1)] * 8, None, (IMAGE,))
    assert len(list(split.calibration())) == 6
    assert fills(split.heldout()) == [1, 1]
    assert split.overlapping


@pytest.mark.parametrize(
    ("calibration", "heldout", "why"),
    [
        ([1] * 8, None, "every sample is the same"),
        ([1] * 8, [1], "every sample is the same"),
        ([1] * 8, [2], ""),  # drift is measured on other data than those calibrated
        (range(8), None, "every sample is one number"),
    ],
)
def test_data_in_which_nothing_varies_are_told(calibration: list[int], heldout: list[int] | None, why: str) -> None:
    wide = Tensor(name="image", dtype="float32", shape=("n", 64))
    split = Split(
        [{"image": np.full((2, 64), number, np.float32)} for number in calibration],
        None if heldout is None else [{"image": np.full((2, 64), number, np.float32)} for number in heldout],
        (wide,),
    )
    assert list(split.calibration()) and list(split.heldout())
    assert split.alike == why


def test_samples_of_one_batch_and_a_scalar_for_each_sample_do_vary() -> None:
    rows = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    many = Split([{"image": rows}] * 8, None, (Tensor(name="image", dtype="float32", shape=("n", 64)),))
    scalars = Split([{"image": np.full((1, 1), n, np.float32)} for n in range(8)], None,
        (Tensor(name="image", dtype="float32", shape=("n", 1)),))  # fmt: skip
    for split in (many, scalars):
        assert list(split.calibration()) and list(split.heldout())
        assert split.alike == ""


def test_random_data_is_made_only_when_it_is_named() -> None:
    split = Split("random", "random", (IMAGE, IDS))
    seen, unseen = list(split.calibration()), list(split.heldout())
    assert split.random and (len(seen), len(unseen)) == (8, 8)
    assert seen[0]["image"].dtype == np.float32 and seen[0]["image"].shape == (1, 3)
    assert seen[0]["ids"].dtype == np.int64 and set(np.unique([batch["ids"] for batch in seen])) <= {0, 1}
    assert not {batches.digest(b) for b in seen} & {batches.digest(b) for b in unseen}
    again = list(Split("random", "random", (IMAGE, IDS)).calibration())
    assert [batches.digest(b) for b in again] == [batches.digest(b) for b in seen]


@pytest.mark.parametrize(
    ("heldout", "says"),
    [
        (image(1), "heldout: found one dict"),
        ([], "heldout: no batches"),
        ([{"picture": image(1)["image"]}], "heldout batch 0: found inputs picture"),
        ("nowhere.npz", "heldout: found the path nowhere.npz, expected an iterable of batches"),
    ],
)
def test_mistakes_in_heldout_data_are_found_with_those_in_calibration_data(heldout: object, says: str) -> None:
    with pytest.raises(CalibrationError, match=says):
        Split([image(1)], heldout, (IMAGE,))


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_batches_to_keep_one_apart_are_found_at_once(count: int) -> None:
    with pytest.raises(
        CalibrationError, match=f"heldout: no data.*: found {count}, expected at least 4; give held-out"
    ):
        Split([image(1)] * count, None, (IMAGE,))
    assert fills(Split([image(1)] * count, [image(2)], (IMAGE,)).heldout()) == [2]


def test_how_many_batches_there_are_is_told_where_it_is_known() -> None:
    given = [image(float(number)) for number in range(5)]
    assert Split(given, given, (IMAGE,)).total == 5
    assert Split(iter(given), given, (IMAGE,)).total == 5  # a list's iterator knows what is left
    assert Split(given, given[:2], (IMAGE,)).total_heldout == 2
    unknown = Split((batch for batch in given), (batch for batch in given), (IMAGE,))
    assert (unknown.total, unknown.total_heldout) == (None, None)
    many = Split(given * 100, None, (IMAGE,))
    assert (many.total, many.total_heldout) == (500 - many.MOST_APART, many.MOST_APART)
    loader = torch.utils.data.DataLoader(Endless(), batch_size=2)
    assert Split(loader, given, (IMAGE,)).total is None


def test_empty_batches_are_calibrated_on_and_never_compared_on() -> None:
    tensors = (Tensor(name="x", dtype="float32", shape=("N", 3)),)
    some = [{"x": np.full((rows, 3), number, np.float32)} for number, rows in enumerate((0, 2, 0, 2))]
    split = Split(some, [{"x": np.full((2, 3), 9, np.float32)}], tensors)
    assert split.first["x"].tolist() == some[1]["x"].tolist()
    assert len(list(split.calibration())) == 4
    assert [batch["x"][0, 0] for batch in split.kept] == [1, 3]


@pytest.mark.parametrize("label", ["None", "?", "-1", "unk__7", "N"])
def test_one_name_for_all_axes_of_a_file_is_not_one_size(label: str) -> None:
    tensors = [Tensor(name="x", dtype="float32", shape=(label, 3, label))]
    split = Split(of_sizes((2, 3, 2), (1, 3, 5)), of_sizes((4, 3, 4)), tensors, loose=True)
    assert split.tensors[0].shape == ("x_0", 3, "x_2")
    assert [batch["x"].shape for batch in split.calibration()] == [(2, 3, 2), (1, 3, 5)]


def test_name_of_a_file_that_the_first_batches_contradict_goes_and_one_they_agree_to_stays() -> None:
    tensors = [Tensor(name=name, dtype="float32", shape=("N", "M")) for name in "ab"]
    given = [{"a": np.ones((2, 3), np.float32), "b": np.ones((2, 4), np.float32)}]
    split = Split(given, given, tensors, loose=True)
    assert [tensor.shape for tensor in split.tensors] == [("N", "a_1"), ("N", "b_1")]
    with pytest.raises(CalibrationError, match="found M = 4, expected M = 3"):
        Split(given, given, tensors)


def test_input_with_a_default_is_taken_where_a_batch_has_it_and_filled_in_where_not() -> None:
    x, t = (Tensor(name=name, dtype="float32", shape=()) for name in "xt")
    given = [{"x": np.float32(1), "t": np.float32(5)}, {"x": np.float32(2)}]
    split = Split(given, [{"x": np.float32(3)}], [x], [t])
    assert split.given == {"t"}
    split.fill({"t": np.asarray(np.float32(7))})
    assert [float(batch["t"]) for batch in (*split.calibration(), *split.heldout())] == [5, 7, 7]


def test_batches_without_values_are_left_out_on_both_sides_where_that_is_asked() -> None:
    given, held = [image(n, 0 if n == 1 else 2) for n in range(4)], [image(9, 0), image(10)]
    found = Split(given, held, (IMAGE,), filled=True)
    assert fills(found.calibration()) == [0, 2, 3] and fills(found.heldout()) == [10]
    assert found.notes == ("left out of batches: those without values, which recurrent layers cannot run (2 of them)",)
