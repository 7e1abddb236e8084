"""The one place that makes an InferenceSession: graph level ALL, no log, the CPU provider, and the target's entries."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_native

from runtime.errors import BundleError, PacklightError

if TYPE_CHECKING:
    import mmap
    from pathlib import Path

PROVIDERS = ("CPUExecutionProvider",)
NO_ENTRIES: Mapping[str, str] = MappingProxyType({})
# ONNX Runtime's errors share no base but Exception; its settings raise RuntimeError, its Python layer ValueError.
ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(each for each in vars(ort_native).values() if isinstance(each, type) and issubclass(each, Exception)),
)
LISTED = "optimization.disable_specified_optimizers"  # ONNX Runtime's entry; names separated by ";"
WEIGHTS = "session.model_external_initializers_file_folder_path"  # of a model that is given as bytes
FATAL_ONLY = (
    4  # ONNX Runtime's severity: 3 is error, which comes as an exception and would print names of the file as they are
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A model that was held against what it should be. name: for messages. content: its bytes, or its descriptor's own path.

    beside: {name: content} of the files in which its weights may lie. ONNX Runtime copies what it takes of them.
    """

    name: str
    content: bytes | str
    beside: Mapping[str, bytes | mmap.mmap]


def without(entries: Mapping[str, str], optimizer: str) -> dict[str, str]:
    """The entries with one more optimizer switched off."""
    return {**entries, LISTED: ";".join(filter(None, (entries.get(LISTED, ""), optimizer)))}


def read_weights_from(folder: Path) -> None:
    """Where the external data lie that models given as bytes refer to, in this process."""
    _WEIGHTS_FOLDER[:] = [str(folder)]


_WEIGHTS_FOLDER: list[str] = []


def open_session(
    model: Path | bytes | Held,
    *,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    entries: Mapping[str, str] = NO_ENTRIES,
    profile: str | Path | None = None,
    optimized: str | Path | None = None,
    optimize: bool = True,
) -> ort.InferenceSession:
    """Open a model in ONNX Runtime, with every optimization if not told otherwise.

    Args:
        model: an ONNX file, its bytes, or what was read and held: for that ONNX Runtime opens no file.
        threads: of one operator; None is ONNX Runtime's choice (one a physical core).
        providers: execution providers, first choice first; None is the CPU alone.
        entries: session config entries, passed on as they are, also those this module has never heard of.
        profile: profile every run; the prefix of the JSON file that `end_profiling()` writes and names.
        optimized: where to write the model as it is after optimization; ONNX Runtime's entry `session.save_model_format`
            says in which format.
        optimize: False runs the graph node by node as it is written.

    Raises:
        PacklightError: threads that are no number from 1 on, or a provider this build of ONNX Runtime does not have.
        BundleError: ONNX Runtime refuses the model; its own words, shortened.
    """
    if threads is not None and (isinstance(threads, bool) or not hasattr(threads, "__index__") or threads < 1):
        raise PacklightError("threads", found=repr(threads), expected="1 or more, as an int")
    if isinstance(providers, str):
        raise PacklightError("providers", found=repr(providers), expected=f"a list: [{providers!r}]")
    wanted, known = list(providers or PROVIDERS), ort.get_available_providers()
    for provider in wanted:
        if provider not in known:
            raise PacklightError("provider", found=str(provider), expected=f"one of {', '.join(known)}")
    settings = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    settings.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    settings.log_severity_level = FATAL_ONLY
    if threads is not None:
        settings.intra_op_num_threads = int(threads)
    if profile is not None:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    if optimized is not None:
        settings.optimized_model_filepath = str(optimized)
    path = "" if isinstance(model, bytes) else model.name if isinstance(model, Held) else str(model)
    given = model.content if isinstance(model, Held) else model if isinstance(model, bytes) else path
    try:
        if isinstance(model, Held):
            settings.add_session_config_entry(WEIGHTS, os.devnull)  # below which there is no file
            names, contents = list(model.beside), list(model.beside.values())
            if names:
                settings.add_external_initializers_from_files_in_memory(names, contents, list(map(len, contents)))
        elif isinstance(model, bytes) and _WEIGHTS_FOLDER:
            settings.add_session_config_entry(WEIGHTS, _WEIGHTS_FOLDER[0])
        for key, value in entries.items():
            settings.add_session_config_entry(key, value)
        return ort.InferenceSession(given, settings, providers=wanted)
    except ORT_ERRORS as error:
        raise BundleError(
            f"{path or 'model'}: ONNX Runtime {ort.__version__} cannot open it",
            path=path,
            found=(str(error).replace(given, path) if isinstance(given, str) else str(error))[:300],
        ) from error
