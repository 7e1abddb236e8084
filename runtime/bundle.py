"""Open a bundle: folder -> Bundle. Nothing is opened before its name, size and hash are what the manifest says."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from runtime import manifest as manifests
from runtime.errors import BundleError, InputError, PacklightError
from runtime.manifest import Manifest, Tensor
from runtime.session import ORT_ERRORS, open_session

if TYPE_CHECKING:
    from pathlib import Path

    from runtime.drift import Array
    from runtime.probe import Probe

MANIFEST_BYTES = 16 << 20  # a manifest is a few kB; this bounds what is read before anything is trusted
# Operators with the channel block of one CPU baked in: on another CPU the outputs are wrong, and nothing says so.
NOT_PORTABLE = b"com.microsoft.nchwc"
# ONNX Runtime's type names -> numpy's.
DTYPE_OF = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    **{f"tensor({name})": name for name in ("bool", "int8", "int16", "int32", "int64")},
    **{f"tensor({name})": name for name in ("uint8", "uint16", "uint32", "uint64")},
}


def verify(path: str | os.PathLike[str]) -> Manifest:
    """Read a bundle's manifest and hold every file of the folder against it.

    Raises:
        BundleError: no such folder; a bad manifest (see manifest.loads); a file that is missing and may not be, not listed,
            not a plain file of this folder, or of another size or hash; a model that only one
            kind of CPU computes correctly.
    """
    folder = _folder(path)
    listed = _read_manifest(folder)
    present = sorted(entry.name for entry in folder.iterdir() if entry.name != manifests.MANIFEST)
    for name in present:
        if name not in listed.files:
            _refuse(folder / name, found="a file the manifest does not list", do="remove it, or export again")
    for name, expected in listed.files.items():
        file = folder / name
        if name not in present and _may_be_left_off(name, present):
            continue
        _plain_file(file)
        if (size := file.stat().st_size) != expected.size_bytes:
            _refuse(file, found=f"{size} bytes", expected=f"{expected.size_bytes}", do="copy the bundle again")
        if (found := manifests.digest(file)) != expected:
            _refuse(file, found=f"SHA-256 {found.sha256}", expected=expected.sha256, do="copy the bundle again")
        if name in (manifests.INT8, manifests.FP32):
            _portable(file)
    return listed


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
    bundle = Bundle(_folder(path), verify(path), threads, providers, ort=ort)
    if not bundle.manifest.pair_rule:
        from runtime.cpu import pairs_in_int16  # here: `import runtime` need not load it

        if said := risk(bundle.manifest, pairs_in_int16()):
            if strict:
                _refuse(bundle.path, found=said, expected="a CPU with VNNI", do="export with --target portable")
            warnings.warn(f"{bundle.path}: {said}", RuntimeWarning, stacklevel=2)
    return bundle


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

    __slots__ = ("_fitting", "_inputs", "_outputs", "_session", "manifest", "model", "path", "providers", "threads")

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        *,
        ort: bool | None = None,
    ) -> None:
        self.path, self.manifest, self.threads = path, manifest, threads
        self.model = model = int8_model(path, manifest, ort)
        try:
            self._session = open_session(model, threads=threads, providers=providers, entries=manifest.session)
        except BundleError as error:
            if model.name != manifests.ORT:
                raise
            from runtime.ort_format import refusal  # here: `import runtime` need not load it

            raise refusal(model, error.found, manifest.versions.get("onnxruntime", "")) from error
        self.providers = tuple(self._session.get_providers())
        _agree(model, "input", self._session.get_inputs(), manifest.inputs)
        _agree(model, "output", self._session.get_outputs(), manifest.outputs)
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
            inputs: {name: array}, each of the dtype and shape in `manifest.inputs`; nothing is converted silently.

        Raises:
            InputError: a name that is missing or unknown, another dtype or shape, one named dimension with two sizes.
            PacklightError: ONNX Runtime failed while running.
        """
        feed: dict[str, Array] = {}
        for name, dtype, tensor in self._inputs:
            try:
                array = inputs[name]
            except KeyError:
                raise InputError("input is missing", name=name, found=", ".join(inputs), expected=name) from None
            if type(array) is not np.ndarray:
                array = np.asarray(array)
            if array.dtype != dtype:
                raise InputError(
                    f"input {name}",
                    name=name,
                    found=str(array.dtype),
                    expected=tensor.dtype,
                    do="convert it with astype",
                )
            feed[name] = array
        if len(inputs) != len(feed):
            unknown = next(name for name in inputs if name not in feed)
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

    def probes(self) -> tuple[Probe, ...]:
        """The recorded batches, their tensors in the manifest's order.

        Raises:
            BundleError: not a probe (see read_probe), or its tensors are not the manifest's.
        """
        from runtime.probe import Probe, read_probe  # here: `import runtime` need not load zipfile

        file, inputs = self.path / manifests.PROBE, [name for name, _, _ in self._inputs]
        return tuple(
            Probe(
                inputs=_in_order(probe.inputs, inputs, file),
                fp32=_in_order(probe.fp32, self._outputs, file),
                int8=_in_order(probe.int8, self._outputs, file),
            )
            for probe in read_probe(file)
        )


def int8_model(folder: Path, manifest: Manifest, ort: bool | None = None) -> Path:
    """The int8 model of a verified bundle, in the form that is asked for, or that is there: the .onnx first.

    Raises:
        BundleError: the form that was asked for is not there.
    """
    if ort is None:
        ort = not (folder / manifests.INT8).exists()
    model = folder / (manifests.ORT if ort else manifests.INT8)
    if ort and manifests.ORT not in manifest.files:
        _refuse(model, found="nothing", expected="the phone's file", do="export with --ort")
    if not model.exists():
        _refuse(
            model, found="nothing", expected="the int8 model in this form", do="copy that file too, or use the other"
        )
    return model


def _may_be_left_off(name: str, present: Sequence[str]) -> bool:
    """Whether a device can do without this file: the reference, and of the two forms of the int8 model one."""
    return name in manifests.OPTIONAL or (name in manifests.FORMS and any(form in present for form in manifests.FORMS))


def _folder(path: str | os.PathLike[str]) -> Path:
    from pathlib import Path  # here: it would be a twentieth of the time of `import runtime`

    return Path(path)


def _read_manifest(folder: Path) -> Manifest:
    file = folder / manifests.MANIFEST
    if not folder.is_dir():
        _refuse(folder, found="no folder", expected="a bundle", do="give the folder that packlight export wrote")
    _plain_file(file)
    if (size := file.stat().st_size) > MANIFEST_BYTES:
        _refuse(file, found=f"{size} bytes", expected=f"at most {MANIFEST_BYTES}")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(str(file), path=str(file), found="bytes that are not UTF-8", expected="JSON") from error
    return manifests.loads(text, str(file))


def _plain_file(file: Path) -> None:
    if file.is_symlink() and file.resolve().parent != file.parent.resolve():
        _refuse(file, found="a link that leaves the bundle", expected="a file in its own folder")
    if not file.is_file():
        found = "something that is not a file" if file.exists() else "nothing"
        _refuse(file, found=found, expected="a file", do="copy the whole bundle, or export again")


def _portable(model: Path) -> None:
    """Refuse a model that names the domain NOT_PORTABLE anywhere; a domain stands in the file as plain text."""
    import mmap  # here and not above: `import runtime` need not load it

    if not model.stat().st_size:
        _refuse(model, found="an empty file", expected="an ONNX model")
    with open(model, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(NOT_PORTABLE) >= 0:
            do = "export again: the model was saved after ONNX Runtime had optimized it for one CPU"
            _refuse(model, found=f"operators of {NOT_PORTABLE.decode()}", expected="a model for every CPU", do=do)


def _refuse(path: Path, *, found: str, expected: str = "", do: str = "") -> NoReturn:
    raise BundleError(str(path), path=str(path), found=found, expected=expected, do=do)


def _agree(model: Path, role: str, actual: Sequence[Any], listed: Sequence[Tensor]) -> None:
    """Refuse a model whose inputs or outputs are not the manifest's: names, dtypes, ranks."""
    found = {each.name: (DTYPE_OF.get(each.type, each.type), len(each.shape)) for each in actual}
    expected = {tensor.name: (tensor.dtype, len(tensor.shape)) for tensor in listed}
    if found != expected:
        _refuse(
            model, found=f"{role}s {found}", expected=f"{expected} (dtype, rank) of the manifest", do="export again"
        )


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


def _in_order(arrays: Mapping[str, Array], names: Sequence[str], file: Path) -> dict[str, Array]:
    if arrays.keys() != set(names):
        _refuse(file, found=f"tensors {sorted(arrays)}", expected=f"{sorted(names)}", do="export again")
    return {name: arrays[name] for name in names}
