"""A bundle that is open: arrays in, arrays out. What it reads later is held against its manifest, too."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime import manifest as manifests
from runtime import trusted, verified
from runtime.errors import BundleError, InputError, PacklightError
from runtime.manifest import Manifest, Tensor
from runtime.session import ORT_ERRORS, Held, open_session
from runtime.trusted import refuse

if TYPE_CHECKING:
    from pathlib import Path

    from runtime.drift import Array
    from runtime.probe import Probe

# ONNX Runtime's type names -> numpy's.
DTYPE_OF = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    **{f"tensor({name})": name for name in ("bool", "int8", "int16", "int32", "int64")},
    **{f"tensor({name})": name for name in ("uint8", "uint16", "uint32", "uint64")},
}


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    *,
    ort: bool | None = None,
    strict: bool = False,
) -> Bundle:
    """Verify a bundle and open its int8 model. Warns where this CPU's kernels saturate on its weights (see risk()).

    Args:
        path: the bundle's folder.
        threads: of one operator; None is ONNX Runtime's choice.
        providers: execution providers, first choice first; None is the CPU alone.
        ort: open model.int8.ort, the phone's file, or model.int8.onnx; None opens the latter where both are there.
        strict: refuse where it would only warn.

    Raises:
        BundleError: see verify(); or ONNX Runtime refuses the model, or the model is not the one the manifest describes.
    """
    bundle = opened(path, threads, providers, ort=ort)
    if said := told(bundle, strict):
        warnings.warn(said, RuntimeWarning, stacklevel=2)
    return bundle


def opened(
    path: str | os.PathLike[str],
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    *,
    ort: bool | None = None,
) -> Bundle:
    """load() without its warning."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise BundleError(
            "load", found=repr(path)[:80] if not path else type(path).__name__, expected="the path of a bundle's folder"
        )
    folder = verified.folder_of(path)
    listed = verified.read_manifest(folder)
    with ExitStack() as stack:
        held = verified.hold(folder, listed, stack, verified.form_of(folder, ort))
        return Bundle(folder, listed, threads, providers, ort=ort, held=held)


def told(bundle: Bundle, strict: bool) -> str:
    """What whoever opens the bundle here must be told (see risk()); empty when nothing.

    Raises:
        BundleError: there is something, and `strict`.
    """
    if bundle.manifest.pair_rule:
        return ""
    from runtime.cpu import pairs_in_int16  # here: `import runtime` need not load it

    said = risk(bundle.manifest, pairs_in_int16())
    if said and strict:
        refuse(bundle.path, found=said, expected="a CPU with VNNI", do="export with --target portable")
    return said and f"{bundle.path}: {said}"


def risk(manifest: Manifest, pairs_in_int16: bool) -> str:
    """What a CPU that adds pairs of u8·s8 products in int16 does to this bundle, in words; empty when nothing."""
    if manifest.pair_rule or not pairs_in_int16:
        return ""
    return (
        f"made for {manifest.target}, whose weights are not held to the pair rule, and this CPU adds pairs of u8·s8 products "
        "in int16: layers may saturate, without an error"
    )


class Bundle:
    """A verified bundle with its int8 model open. Arrays in, arrays out."""

    __slots__ = (
        "_fitting",
        "_inputs",
        "_optional",
        "_outputs",
        "_session",
        "manifest",
        "model",
        "path",
        "providers",
        "threads",
    )

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        *,
        ort: bool | None = None,
        held: Held | None = None,
    ) -> None:
        """Open a verified bundle; `held` is the int8 model, where it was opened already."""
        self.path, self.manifest, self.threads = path, manifest, threads
        self.model = model = verified.int8_model(path, manifest, ort)
        try:
            with nullcontext(held) if held is not None else self.held(model.name) as opened:
                self._session = open_session(opened, threads=threads, providers=providers, entries=manifest.session)
        except BundleError as error:
            if model.name != manifests.ORT:
                raise
            from runtime.ort_format import refusal  # here: `import runtime` need not load it

            raise refusal(model, error.found, manifest.versions.get("onnxruntime", "")) from error
        self.providers = tuple(self._session.get_providers())
        _agree(model, "input", self._session.get_inputs(), manifest.inputs)
        _agree(model, "output", self._session.get_outputs(), manifest.outputs)
        # inputs with a default in the model, which a caller may give
        self._optional = {each.name: each for each in self._session.get_overridable_initializers()}
        self._inputs = [(tensor.name, np.dtype(tensor.dtype), tensor) for tensor in manifest.inputs]
        # shapes of the last inputs that fitted: the next ones mostly have the same
        self._fitting: list[tuple[int, ...]] = []
        self._outputs = [tensor.name for tensor in manifest.outputs]

    @property
    def form(self) -> str:
        """Which form of the int8 model is open: "onnx" or "ort"."""
        return self.model.suffix[1:]

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, name={self.manifest.name!r}, target={self.manifest.target!r})"

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the int8 model on one batch.

        Args:
            inputs: {name: array}, each of the dtype and shape in `manifest.inputs`; nothing is converted silently. An input
                with a default in the model is not among these and may be given too.

        Raises:
            InputError: a name that is missing or unknown, another dtype or shape, one named dimension with two sizes.
            PacklightError: ONNX Runtime failed while running.
        """
        feed: dict[str, Array] = {}
        for name, dtype, tensor in self._inputs:
            try:
                array = inputs[name]
            except (KeyError, TypeError, IndexError, ValueError):
                raise self._missing(inputs, name) from None
            if type(array) is not np.ndarray:
                array = _as_array(array, tensor)
            if array.dtype != dtype:
                raise _other_dtype(array, tensor)
            feed[name] = array
        if len(inputs) != len(feed) and isinstance(inputs, Mapping):
            for name in self._optional.keys() & inputs.keys():
                feed[name] = _fitting(np.asarray(inputs[name]), self._optional[name])
        if len(inputs) != len(feed):
            if not isinstance(inputs, Mapping):
                raise self._missing(inputs, next(iter(feed)))
            unknown = next(str(name) for name in inputs if name not in feed)
            raise InputError("input is unknown", name=unknown, found=unknown, expected=", ".join(feed))
        shapes = [array.shape for array in feed.values()]
        if shapes != self._fitting:
            sizes: dict[str, int] = {}
            for _, _, tensor in self._inputs:
                _match(feed[tensor.name], tensor, sizes)
            self._fitting = shapes
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))
        except ORT_ERRORS as error:
            raise PacklightError(f"{self.path}: ONNX Runtime failed while running", found=str(error)[:300]) from error

    def _missing(self, inputs: object, name: str) -> InputError:
        """What was given instead of {name: array}, or without one of the names."""
        if isinstance(inputs, Mapping):
            return InputError("input is missing", name=name, found=", ".join(map(str, inputs)) or "none", expected=name)
        line = ", ".join(f'"{known}": ...' for known, _, _ in self._inputs)
        return InputError(
            "inputs", name=name, found=type(inputs).__name__, expected="a dict {name: array}",
            do=f"call run({{{line}}}) with arrays",
        )  # fmt: skip

    def content(self, name: str, most: int = verified.MODEL_BYTES) -> bytes:
        """A file of the bundle, read now and held against the manifest.

        Raises:
            BundleError: it is not in the manifest, or not as it was when the bundle was verified; more than `most` bytes.
        """
        if name not in self.manifest.files:
            refuse(self.path / name, found="nothing", expected="a file that the manifest lists")
        return trusted.held(self.path / name, self.manifest.files[name], most)

    def held(self, name: str) -> AbstractContextManager[Held]:
        """One of the bundle's models, and the files of its weights, read now and held against the manifest.

        Raises:
            BundleError: the model or one of those files is not as it was when the bundle was verified.
        """
        return verified.held(self.path, self.manifest, name)

    def reference(self) -> Callable[[Mapping[str, Array]], dict[str, Array]] | None:
        """A function that runs the FP32 model, opened here; None where the bundle is without it.

        Raises:
            BundleError: ONNX Runtime refuses it, or its inputs and outputs are not the manifest's. The function: PacklightError,
                where ONNX Runtime fails.
        """
        model = self.path / manifests.FP32
        if not model.exists():
            return None
        with self.held(manifests.FP32) as held:
            session = open_session(held, threads=self.threads)
        _agree(model, "input", session.get_inputs(), self.manifest.inputs)
        _agree(model, "output", session.get_outputs(), self.manifest.outputs)

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            try:
                return dict(zip(self._outputs, session.run(self._outputs, dict(inputs)), strict=True))
            except ORT_ERRORS as error:
                raise PacklightError(f"{model}: ONNX Runtime failed while running", found=str(error)[:300]) from error

        return run

    def probes(self) -> tuple[Probe, ...]:
        """The recorded batches, their tensors in the manifest's order.

        Raises:
            BundleError: not a probe (see read_probe), or its tensors are not the manifest's.
        """
        from runtime.probe import MOST_BYTES, Probe, read_probe  # here: `import runtime` need not load zipfile

        file, inputs = self.path / manifests.PROBE, [name for name, _, _ in self._inputs]
        return tuple(
            Probe(
                inputs=_in_order(probe.inputs, inputs, file),
                fp32=_in_order(probe.fp32, self._outputs, file),
                int8=_in_order(probe.int8, self._outputs, file),
            )
            for probe in read_probe(file, self.content(manifests.PROBE, MOST_BYTES))
        )


def require_opened(given: object, what: str) -> None:
    """Refuse what is no Bundle, such as its path.

    Raises:
        BundleError: says the line that opens one.
    """
    if not isinstance(given, Bundle):
        do = f"open it: runtime.load({str(given)!r})" if isinstance(given, str | os.PathLike) else ""
        raise BundleError(what, found=type(given).__name__, expected="a Bundle, from runtime.load", do=do)


def _agree(model: Path, role: str, actual: Sequence[Any], listed: Sequence[Tensor]) -> None:
    """Refuse a model whose inputs or outputs are not the manifest's: names, dtypes, ranks."""
    found = {each.name: (DTYPE_OF.get(each.type, each.type), len(each.shape)) for each in actual}
    expected = {tensor.name: (tensor.dtype, len(tensor.shape)) for tensor in listed}
    if found != expected:
        refuse(model, found=f"{role}s {found}", expected=f"{expected} (dtype, rank) of the manifest", do="export again")


def _as_array(value: object, tensor: Tensor) -> Array:
    """What numpy makes of a list, a number or another library's tensor."""
    try:
        array: Array = np.asarray(value)
    except Exception as error:  # a tensor that needs grad or lies on a GPU, a ragged list: each library has its own
        found = f"{type(value).__name__}: {error}"[:200]
        do = "for a torch tensor: x.detach().cpu().numpy()"
        raise InputError(f"input {tensor.name}", name=tensor.name, found=found, expected="an array", do=do) from error
    return array


def _other_dtype(array: Array, tensor: Tensor) -> InputError:
    do = f"convert it with astype: np.asarray(x).astype({tensor.dtype!r})"
    if array.dtype == np.uint8 and tensor.dtype.startswith("float"):
        do = "pixels 0..255 are scaled first as at export, by x / 255 or runtime.preprocess; then np.float32"
    return InputError(f"input {tensor.name}", name=tensor.name, found=str(array.dtype), expected=tensor.dtype, do=do)


def _match(array: Array, tensor: Tensor, sizes: dict[str, int]) -> None:
    """Hold a shape against one with named dimensions, whose sizes are kept in `sizes` over the inputs of one run."""
    fits = array.ndim == len(tensor.shape) and all(
        sizes.setdefault(expected, size) == size if isinstance(expected, str) else expected == size
        for expected, size in zip(tensor.shape, array.shape, strict=True)
    )
    if not fits:
        named = ", ".join(f"{name}={size}" for name, size in sizes.items() if name in tensor.shape)
        expected = f"{list(tensor.shape)}" + (f" with {named}" if named and array.ndim == len(tensor.shape) else "")
        raise InputError(
            f"input {tensor.name}", name=tensor.name, found=f"shape {list(array.shape)}", expected=expected
        )


def _fitting(array: Array, wanted: Any) -> Array:
    """What is given in the place of a default: of its dtype and number of axes."""
    dtype = DTYPE_OF.get(wanted.type, wanted.type)
    if (str(array.dtype), array.ndim) != (dtype, len(wanted.shape)):
        found, expected = f"{array.dtype}{list(array.shape)}", f"{dtype}{list(wanted.shape)}"
        raise InputError(f"input {wanted.name}", name=wanted.name, found=found, expected=expected)
    return array


def _in_order(arrays: Mapping[str, Array], names: Sequence[str], file: Path) -> dict[str, Array]:
    if arrays.keys() != set(names):
        refuse(file, found=f"tensors {sorted(arrays)}", expected=f"{sorted(names)}", do="export again")
    return {name: arrays[name] for name in names}
