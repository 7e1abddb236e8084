"""Hold a bundle's folder against its manifest: nothing is opened before its name, size and hash are what the manifest says."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from runtime import manifest as manifests
from runtime import trusted
from runtime.errors import BundleError
from runtime.manifest import File, Manifest
from runtime.session import Held
from runtime.trusted import refuse

if TYPE_CHECKING:
    from pathlib import Path

MODEL_BYTES = (1 << 31) - 1  # what protobuf and flatbuffers can hold; larger weights lie beside the model
# Operators with the channel block of one CPU baked in: on another CPU the outputs are wrong, and nothing says so.
NOT_PORTABLE = b"com.microsoft.nchwc"
MODELS = (manifests.INT8, manifests.FP32, manifests.ORT)
# Files of a bundle in which no model's weights lie
OURS = (manifests.MANIFEST, *MODELS, manifests.PROBE)


def verify(path: str | os.PathLike[str]) -> Manifest:
    """Read a bundle's manifest and hold every file of the folder against it.

    Raises:
        BundleError: no such folder; a bad manifest (see manifest.loads); a file that is missing and may not be, not listed,
            not a regular file of this folder, or of another size or hash; a model that only one kind of CPU computes
            correctly.
    """
    folder = folder_of(path)
    listed = read_manifest(folder)
    with ExitStack() as stack:
        hold(folder, listed, stack)
    return listed


def hold_files(
    folder: Path,
    files: Mapping[str, File],
    may_miss: Callable[[str, Collection[str]], bool] | None = None,
    later: Collection[str] = (),
) -> list[str]:
    """Hold every file of a folder against what a manifest lists; the names of those that are there.

    Args:
        may_miss: (name, all that are there) -> whether that one may be missing.
        later: those that are held when they are opened.

    Raises:
        BundleError: a file that is missing, not listed, not a regular file of this folder, or of another size or hash.
    """
    present = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name not in files and entry.name != manifests.MANIFEST:
                refuse(folder / entry.name, found="a file the manifest does not list", do="remove it, or export again")
            present.add(entry.name)
    there = [name for name in files if name in present or may_miss is None or not may_miss(name, present)]
    for name in there:
        if name not in later or name not in present:
            with trusted.hashed(folder / name, files[name]):
                pass
    return there


def hold(folder: Path, listed: Manifest, stack: ExitStack, wanted: str = "") -> Held | None:
    """Hold every file against the manifest; the model `wanted` stays open, by what was hashed, until the stack ends."""
    model = None
    for name in hold_files(folder, listed.files, _may_be_left_off, (*MODELS, f"{wanted}{manifests.DATA}")):
        if name == wanted:
            model = stack.enter_context(held(folder, listed, name))
        elif name in MODELS:
            with held(folder, listed, name):
                pass
    return model


@contextmanager
def held(folder: Path, listed: Manifest, name: str) -> Iterator[Held]:
    """One of a bundle's models, and the files of its weights, as the manifest vouches for them.

    Raises:
        BundleError: one of these files is not what the manifest says, or the model is for one kind of CPU.
    """
    from runtime import onnx_text  # here: `import runtime` need not load it

    file, expected = folder / name, listed.files[name]
    others = {each.encode(): each for each in listed.files if each not in OURS and each != name}
    with trusted.hashed(file, expected) as descriptor, ExitStack() as stack:
        if not expected.size_bytes:
            refuse(file, found="an empty file", expected="an ONNX model")
        content: bytes | str
        found: set[bytes] = set()
        if name == manifests.ORT:
            content = trusted.content(file, descriptor, expected.size_bytes, MODEL_BYTES)  # told by how it begins
        else:
            found = onnx_text.found(descriptor, expected.size_bytes, {NOT_PORTABLE, *others})
            content = trusted.whole(file, descriptor, expected.size_bytes, MODEL_BYTES)
        if NOT_PORTABLE in found:
            do = "export again: the model was saved after ONNX Runtime had optimized it for one CPU"
            refuse(file, found=f"operators of {NOT_PORTABLE.decode()}", expected="a model for every CPU", do=do)
        beside = {
            each: stack.enter_context(trusted.mapped(folder / each, listed.files[each]))
            for key, each in others.items()
            if key in found or each == name + manifests.DATA
        }
        yield Held(name=str(file), content=content, beside=beside)


def int8_model(folder: Path, manifest: Manifest, ort: bool | None = None) -> Path:
    """The int8 model of a verified bundle, in the form that is asked for, or that is there: the .onnx first.

    Raises:
        BundleError: the form that was asked for is not there.
    """
    model = folder / form_of(folder, ort)
    if model.name == manifests.ORT and manifests.ORT not in manifest.files:
        refuse(model, found="nothing", expected="the phone's file", do="export with --ort")
    if not model.exists():
        refuse(
            model, found="nothing", expected="the int8 model in this form", do="copy that file too, or use the other"
        )
    return model


def form_of(folder: Path, ort: bool | None) -> str:
    if ort is None:
        ort = not (folder / manifests.INT8).exists()
    return manifests.ORT if ort else manifests.INT8


def _may_be_left_off(name: str, present: Collection[str]) -> bool:
    """Whether a device can do without this file: the reference, and of the two forms of the int8 model one."""
    if name.endswith(manifests.DATA):  # with its model, and only with it
        name = name.removesuffix(manifests.DATA)
        return name not in present and _may_be_left_off(name, present)
    return name in manifests.OPTIONAL or (name in manifests.FORMS and any(form in present for form in manifests.FORMS))


def folder_of(path: str | os.PathLike[str]) -> Path:
    from pathlib import Path  # here: it would be a twentieth of the time of `import runtime`

    return Path(path)


def read_manifest(folder: Path) -> Manifest:
    file = folder / manifests.MANIFEST
    if not os.path.isdir(folder):  # which a name that is too long, or has a NUL, is not either
        found = "a file" if os.path.exists(folder) else "no folder"
        refuse(folder, found=found, expected="a bundle", do="give the folder that packlight export wrote")
    try:
        text = trusted.read(file, manifests.MANIFEST_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(str(file), path=str(file), found="bytes that are not UTF-8", expected="JSON") from error
    if manifests.is_language(folder):
        refuse(
            file, found="a language model", expected="a bundle of arrays in and out",
            do="packlight run BUNDLE --prompt TEXT, packlight chat and packlight check take it, and runtime.load",
        )  # fmt: skip
    return manifests.loads(text, str(file))
