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


class Endless(torch.utils.data.IterableDataset[torch.Tensor]):
    """Four rows that do not say how many they are."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.ones(4, 3))


def test_samples_are_counted_along_the_first_dimension_that_is_free() -> None:
    fixed = replace(IMAGE, shape=(4, 3))
    text = replace(IMAGE, name="text", shape=("rows", 3))
    assert batches.samples(image(1, 4), (IMAGE,)) == 4
    assert batches.samples(image(1, 4), (fixed,)) == 1
    assert batches.samples({**image(1, 4), "text": np.ones((7, 3), np.float32)}, (fixed, text)) == 7


def test_batches_of_no_samples_are_batches() -> None:
    read = list(batches.read([image(1, 0), image(2)], (IMAGE,), "calibration"))
    assert [batch["image"].shape for batch in read] == [(0, 3), (2, 3)]


def of_sizes(*sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    return [{"x": np.ones(size, np.float32)} for size in sizes]
