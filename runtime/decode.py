"""An open decoder and the keys and values of the tokens it has seen: new tokens in, logits of the last one out, without a copy.

One buffer a layer is bound as past and as present, so that the cache is written where it is read. Rows of a batch stand from
the left, each with a length of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from runtime.errors import InputError, PacklightError
from runtime.session import ORT_ERRORS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.drift import Array

PAST, PRESENT = "past_key_values.", "present."


class Decode:
    """A decoder's session with a cache for `capacity` tokens of each of `rows` rows; `lengths` says how many each has."""

    __slots__ = ("_binding", "_cache", "_logits", "_ones", "_session", "capacity", "lengths", "rows", "vocabulary")

    def __init__(self, session: ort.InferenceSession, capacity: int, rows: int = 1) -> None:
        self._session, self.capacity, self.rows = session, capacity, rows
        self.lengths = np.zeros(rows, np.int64)
        self._binding = session.io_binding()
        self._cache: list[ort.OrtValue] = []
        for given in session.get_inputs():
            if given.name.startswith(PAST):
                _, heads, _, size = given.shape
                held = ort.OrtValue.ortvalue_from_numpy(np.zeros((rows, heads, capacity, size), np.float32))
                self._binding.bind_ortvalue_input(given.name, held)
                self._binding.bind_ortvalue_output(PRESENT + given.name.removeprefix(PAST), held)
                self._cache.append(held)
        self.vocabulary = int(session.get_outputs()[0].shape[2])
        self._logits = np.empty((rows, 1, self.vocabulary), np.float32)
        self._bind_output("logits", self._logits)
        self._ones = np.ones((1, capacity), np.int64)

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, for `capacity` tokens."""
        return sum(4 * int(np.prod(held.shape())) for held in self._cache)

    def reset(self) -> None:
        """Forget every token."""
        self.lengths[:] = 0

    def rewind(self, length: int) -> None:
        """Forget what is behind the first `length` tokens of every row."""
        self.lengths = np.minimum(self.lengths, length)

    def step(self, ids: Array, counts: Sequence[int] | None = None) -> Array:
        """Take new tokens and give the logits behind the last one.

        Args:
            ids: int64 [rows, new]; rows that are shorter are filled up on the right.
            counts: how many of them each row has; None is all. Rows may differ only while the cache is empty.

        Returns:
            float32 [rows, vocabulary], which the next step overwrites.

        Raises:
            InputError: no token, another number of rows, a token outside the vocabulary, or more tokens than the capacity.
            PacklightError: ONNX Runtime failed while running.
        """
        if ids.ndim != 2 or len(ids) != self.rows or not ids.shape[1]:
            raise InputError(
                "tokens", name="input_ids", found=f"shape {list(ids.shape)}", expected=f"[{self.rows}, 1..]"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocabulary:
            found = str(low if low < 0 else high)
            raise InputError("tokens", name="input_ids", found=found, expected=f"0 to {self.vocabulary - 1}")
        wanted = self.lengths + (ids.shape[1] if counts is None else np.array(counts, np.int64))
        if (most := int(wanted.max())) > self.capacity:
            raise InputError(
                "tokens", name="input_ids", found=f"{most} with those before", expected=f"at most {self.capacity}",
                do="shorten the prompt, or ask for fewer tokens",
            )  # fmt: skip
        mask = self._ones[:, :most] if self.rows == 1 else (np.arange(most) < wanted[:, None]).astype(np.int64)
        self._bind_input("input_ids", np.ascontiguousarray(ids, np.int64))
        self._bind_input("attention_mask", mask)
        try:
            self._session.run_with_iobinding(self._binding)
        except ORT_ERRORS as error:
            raise PacklightError("decoder: ONNX Runtime failed while running", found=str(error)[:300]) from error
        self.lengths = wanted
        return self._logits[:, 0]

    def _bind_input(self, name: str, array: Array) -> None:
        self._binding.bind_cpu_input(name, array)

    def _bind_output(self, name: str, array: Array) -> None:
        self._binding.bind_output(name, "cpu", 0, np.float32, list(array.shape), array.ctypes.data)
