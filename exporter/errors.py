"""Our errors at export time, under the runtime's root.

PacklightError             (runtime) everything raised on purpose
├─ RecipeError             unknown key, bad value, rule that matched nothing     .where
├─ TraceError              torch could not be exported, or torch != ONNX         .op_types
├─ CalibrationError        no batches, NaN or infinity, a tensor never seen      .tensor .batch
├─ QuantizeError           ONNX Runtime refused, or its graph breaks the plan    .node
└─ (runtime) BundleError, InputError, DriftExceeded
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.errors import PacklightError


class RecipeError(PacklightError):
    """A recipe that cannot be followed; `where` is `file:table:key`."""

    def __init__(self, what: str, *, found: str = "", expected: str = "", do: str = "", where: str = "") -> None:
        super().__init__(f"{where}: {what}" if where else what, found=found, expected=expected, do=do)
        self.where = where


class TraceError(PacklightError):
    """A source that does not become an equal ONNX graph; `op_types` are the operators at fault, where known."""

    def __init__(
        self, what: str, *, found: str = "", expected: str = "", do: str = "", op_types: Sequence[str] = ()
    ) -> None:
        super().__init__(what, found=found, expected=expected, do=do)
        self.op_types = tuple(op_types)


class CalibrationError(PacklightError):
    """Data that cannot give ranges; `batch` counts from 0, `tensor` is an input or an inner tensor."""

    def __init__(
        self,
        what: str,
        *,
        found: str = "",
        expected: str = "",
        do: str = "",
        tensor: str = "",
        batch: int | None = None,
    ) -> None:
        super().__init__(what, found=found, expected=expected, do=do)
        self.tensor = tensor
        self.batch = batch


class QuantizeError(PacklightError):
    """ONNX Runtime's quantizer refused, or its graph does not follow the plan; `node` is the first at fault."""

    def __init__(self, what: str, *, found: str = "", expected: str = "", do: str = "", node: str = "") -> None:
        super().__init__(what, found=found, expected=expected, do=do)
        self.node = node
