from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from exporter import batches
from exporter.errors import CalibrationError
from runtime.manifest import Tensor

IMAGE = Tensor(name="image", dtype="float32", shape=("batch", 3))
IDS = Tensor(name="ids", dtype="int64", shape=("batch", "length"))


def image(fill: float, size: int = 2) -> dict[str, NDArray[np.float32]]:
    return {"image": np.full((size, 3), fill, np.float32)}


def fills(read: Iterator[batches.Batch]) -> list[float]:
    return [float(batch["image"][0, 0]) for batch in read]


def refusal(given: object, *tensors: Tensor) -> CalibrationError:
    with pytest.raises(CalibrationError) as error:
        list(batches.read(given, tensors or (IMAGE,), "calibration"))
    return error.value


def test_dicts_tuples_lists_arrays_and_tensors_give_the_same_batch() -> None:
    array = np.ones((2, 3), np.float32)
    given = [
        {"image": array},
        (array,),
        [array],
        array,
        torch.ones(2, 3),
        {"image": torch.ones(2, 3, requires_grad=True)},
    ]
    for batch in batches.read(given, (IMAGE,), "calibration"):
        np.testing.assert_array_equal(batch["image"], array, strict=True)


def test_data_loader_with_labels_gives_the_inputs() -> None:
    dataset = torch.utils.data.TensorDataset(torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 0, 1]))
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    assert fills(batches.read(loader, (IMAGE,), "calibration")) == [0.0, 6.0]


def test_inputs_that_the_model_does_not_have_are_left_out() -> None:
    batch = next(batches.read([image(1) | {"label": np.zeros(2)}], (IMAGE,), "calibration"))
    assert [*batch] == ["image"]


def test_no_data_one_dict_and_an_empty_iterable_say_what_to_do() -> None:
    assert "calibration: no data" in str(refusal(None))
    assert "found one dict, expected an iterable of dicts; wrap it: [batch]" in str(refusal(image(1)))
    with pytest.raises(CalibrationError, match="no batches: found an empty iterable"):
        batches.split([], None, (IMAGE,))


def test_wrong_name_dtype_rank_and_size_name_batch_and_input() -> None:
    wrong: list[tuple[dict[str, object], str]] = [
        ({"picture": image(1)["image"]}, "found inputs picture, expected inputs image; rename 'picture'"),
        ({"image": np.ones((2, 3))}, "found dtype float64, expected float32; convert it with .astype('float32')"),
        ({"image": np.ones(3, np.float32)}, "found shape [3], expected shape ['batch', 3]"),
        ({"image": np.ones((2, 4), np.float32)}, "found shape [2, 4], expected shape ['batch', 3]"),
        ({"image": np.array([["a", "b", "c"]])}, "expected numbers"),
    ]
    for raw, says in wrong:
        error = refusal([image(1), raw])
        assert says in str(error)
        assert error.tensor == "image"
        assert error.batch == 1


def test_too_few_arrays_in_a_tuple_are_refused() -> None:
    assert "found 1 arrays, expected 2: image, ids" in str(refusal([(image(1)["image"],)], IMAGE, IDS))


@pytest.mark.parametrize(("bad", "kind"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_nan_and_infinity_in_batch_17_are_named(bad: float, kind: str) -> None:
    given = [image(float(number)) for number in range(20)]
    given[17]["image"][1, 2] = bad
    error = refusal(given)
    assert (error.batch, error.tensor) == (17, "image")
    assert str(error).startswith(f"calibration batch 17: input 'image': found {kind}, expected finite numbers")


def test_iterable_is_read_once_and_only_as_far_as_asked() -> None:
    pulled: list[int] = []

    def stream() -> Iterator[dict[str, NDArray[np.float32]]]:
        for number in range(100):
            pulled.append(number)
            yield image(float(number))

    reader = batches.read(stream(), (IMAGE,), "calibration")
    assert (next(reader)["image"][0, 0], next(reader)["image"][0, 0]) == (0.0, 1.0)
    assert pulled == [0, 1]
    split = batches.split(stream(), [image(-1)], (IMAGE,))
    assert fills(split.calibration()) == [*map(float, range(100))]
    assert pulled == [0, 1, *range(100)]
    assert len(split.kept) == split.KEPT_MOST


def test_every_fourth_batch_is_kept_apart_where_there_is_no_heldout() -> None:
    split = batches.split([image(float(number)) for number in range(10)], None, (IMAGE,))
    assert (split.total, split.total_heldout) == (8, 2)
    assert fills(split.calibration()) == [0, 1, 2, 4, 5, 6, 8, 9]
    assert fills(split.heldout()) == [3, 7]
    assert (split.repeated, split.overlapping, split.random) == (0, False, False)


def test_heldout_batch_that_calibration_saw_is_left_out_and_counted() -> None:
    split = batches.split([image(1), image(2)], [image(2), image(3), image(1), image(4)], (IMAGE,))
    list(split.calibration())
    assert fills(split.heldout()) == [3, 4]
    assert (split.repeated, split.overlapping) == (2, False)


def test_heldout_that_is_all_calibration_is_used_and_said_to_overlap() -> None:
    split = batches.split([image(1), image(2)], [image(2), image(1)], (IMAGE,))
    list(split.calibration())
    assert fills(split.heldout()) == [2, 1]
    assert (split.repeated, split.overlapping) == (2, True)


def test_repeated_batch_cannot_be_kept_apart_from_itself() -> None:
    split = batches.split([image(1)] * 8, None, (IMAGE,))
    assert len(list(split.calibration())) == 6
    assert fills(split.heldout()) == [1, 1]
    assert split.overlapping


def test_random_data_is_made_only_when_it_is_named() -> None:
    split = batches.split("random", "random", (IMAGE, IDS))
    seen, unseen = list(split.calibration()), list(split.heldout())
    assert split.random and (len(seen), len(unseen)) == (8, 8)
    assert seen[0]["image"].dtype == np.float32 and seen[0]["image"].shape == (1, 3)
    assert seen[0]["ids"].dtype == np.int64 and set(np.unique([batch["ids"] for batch in seen])) <= {0, 1}
    assert not {batches.digest(b) for b in seen} & {batches.digest(b) for b in unseen}
    again = list(batches.split("random", "random", (IMAGE, IDS)).calibration())
    assert [batches.digest(b) for b in again] == [batches.digest(b) for b in seen]


@given(st.lists(st.integers(-3, 3), min_size=6, max_size=6), st.integers(0, 5), st.sampled_from(["<f4", "<i4", "<f8"]))
def test_digest_tells_every_change_of_value_shape_dtype_and_name(values: list[int], at: int, dtype: str) -> None:
    array = np.array(values, dtype)
    changed = array.copy()
    changed[at] += 1
    other = {"<f4": "<i4", "<i4": "<f4", "<f8": "<f4"}[dtype]
    variants = [{"x": array}, {"x": changed}, {"x": array.reshape(2, 3)}, {"x": array.astype(other)}, {"y": array}]
    assert len({batches.digest(batch) for batch in variants}) == len(variants)
    assert batches.digest({"x": array, "y": changed}) == batches.digest({"y": changed.copy(), "x": array.copy()})


def test_tensors_and_lists_that_numpy_has_no_form_of_are_refused_by_name() -> None:
    conjugate = torch.ones(2, 3, dtype=torch.complex64).conj()
    for value in (torch.ones(2, 3).to_sparse(), conjugate, [[1.0], [1.0, 2.0]]):
        error = refusal([image(1), {"image": value}])
        assert (error.tensor, error.batch) == ("image", 1)
        assert str(error).startswith("calibration batch 1: input 'image': found ")


def test_one_name_of_a_dimension_is_one_size_over_all_inputs() -> None:
    error = refusal([image(1, 2) | {"ids": np.zeros((3, 5), np.int64)}], IMAGE, IDS)
    assert "batch 0: input 'ids': found batch = 3, expected batch = 2, as in 'image'" in str(error)
    assert (error.tensor, error.batch) == ("ids", 0)


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
        batches.split([image(1)], heldout, (IMAGE,))


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_batches_to_keep_one_apart_are_found_at_once(count: int) -> None:
    with pytest.raises(
        CalibrationError, match=f"heldout: no data.*: found {count}, expected at least 4; give held-out"
    ):
        batches.split([image(1)] * count, None, (IMAGE,))
    assert fills(batches.split([image(1)] * count, [image(2)], (IMAGE,)).heldout()) == [2]


class Endless(torch.utils.data.IterableDataset[torch.Tensor]):
    """Four rows that do not say how many they are."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.ones(4, 3))


def test_how_many_batches_there_are_is_told_where_it_is_known() -> None:
    given = [image(float(number)) for number in range(5)]
    assert batches.split(given, given, (IMAGE,)).total == 5
    assert batches.split(iter(given), given, (IMAGE,)).total == 5  # a list's iterator knows what is left
    assert batches.split(given, given[:2], (IMAGE,)).total_heldout == 2
    unknown = batches.split((batch for batch in given), (batch for batch in given), (IMAGE,))
    assert (unknown.total, unknown.total_heldout) == (None, None)
    many = batches.split(given * 100, None, (IMAGE,))
    assert (many.total, many.total_heldout) == (500 - many.MOST_APART, many.MOST_APART)
    loader = torch.utils.data.DataLoader(Endless(), batch_size=2)
    assert batches.split(loader, given, (IMAGE,)).total is None


def test_samples_are_counted_along_the_first_dimension_that_is_free() -> None:
    fixed = replace(IMAGE, shape=(4, 3))
    text = replace(IMAGE, name="text", shape=("rows", 3))
    assert batches.samples(image(1, 4), (IMAGE,)) == 4
    assert batches.samples(image(1, 4), (fixed,)) == 1
    assert batches.samples({**image(1, 4), "text": np.ones((7, 3), np.float32)}, (fixed, text)) == 7


def test_batches_of_no_samples_are_batches() -> None:
    read = list(batches.read([image(1, 0), image(2)], (IMAGE,), "calibration"))
    assert [batch["image"].shape for batch in read] == [(0, 3), (2, 3)]


def test_empty_batches_are_calibrated_on_and_never_compared_on() -> None:
    tensors = (Tensor(name="x", dtype="float32", shape=("N", 3)),)
    some = [{"x": np.full((rows, 3), number, np.float32)} for number, rows in enumerate((0, 2, 0, 2))]
    split = batches.split(some, [{"x": np.full((2, 3), 9, np.float32)}], tensors)
    assert split.first["x"].tolist() == some[1]["x"].tolist()
    assert len(list(split.calibration())) == 4
    assert [batch["x"][0, 0] for batch in split.kept] == [1, 3]


def of_sizes(*sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"x": np.ones(size, np.float32)} for size in sizes]


@pytest.mark.parametrize("label", ["None", "?", "-1", "unk__7", "N"])
def test_one_name_for_all_axes_of_a_file_is_not_one_size(label: str) -> None:
    tensors = [Tensor(name="x", dtype="float32", shape=(label, 3, label))]
    split = batches.split(of_sizes((2, 3, 2), (1, 3, 5)), of_sizes((4, 3, 4)), tensors, loose=True)
    assert split.tensors[0].shape == ("x_0", 3, "x_2")
    assert [batch["x"].shape for batch in split.calibration()] == [(2, 3, 2), (1, 3, 5)]


def test_name_of_a_file_that_the_first_batches_contradict_goes_and_one_they_agree_to_stays() -> None:
    tensors = [Tensor(name=name, dtype="float32", shape=("N", "M")) for name in "ab"]
    given = [{"a": np.ones((2, 3), np.float32), "b": np.ones((2, 4), np.float32)}]
    split = batches.split(given, given, tensors, loose=True)
    assert [tensor.shape for tensor in split.tensors] == [("N", "a_1"), ("N", "b_1")]
    with pytest.raises(CalibrationError, match="found M = 4, expected M = 3"):
        batches.split(given, given, tensors)


def test_input_with_a_default_is_taken_where_a_batch_has_it_and_filled_in_where_not() -> None:
    x, t = (Tensor(name=name, dtype="float32", shape=()) for name in "xt")
    given = [{"x": np.float32(1), "t": np.float32(5)}, {"x": np.float32(2)}]
    split = batches.split(given, [{"x": np.float32(3)}], [x], [t])
    assert split.given == {"t"}
    split.fill({"t": np.asarray(np.float32(7))})
    assert [float(batch["t"]) for batch in (*split.calibration(), *split.heldout())] == [5, 7, 7]
