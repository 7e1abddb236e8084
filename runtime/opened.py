"""The one call that opens any bundle: arrays in and out, or a language model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtime import bundle
from runtime import manifest as manifests
from runtime.bundle import Bundle
from runtime.errors import PacklightError

if TYPE_CHECKING:
    from runtime.language import LanguageModel


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    *,
    ort: bool | None = None,
    strict: bool = False,
) -> Bundle | LanguageModel:
    """Verify a bundle and open its model: see bundle.load, and language.LanguageModel for a language model's.

    Raises:
        BundleError: the bundle is missing, damaged or not to be trusted, or ONNX Runtime refuses its model.
        PacklightError: `ort` of a language model, which has one form.
    """
    if isinstance(path, str | os.PathLike) and os.fspath(path) and manifests.is_language(path):
        return language(path, threads, providers, ort=ort)
    opened = bundle.opened(path, threads, providers, ort=ort)
    if said := bundle.told(opened, strict):
        warnings.warn(said, RuntimeWarning, stacklevel=2)
    return opened


def language(
    path: str | os.PathLike[str],
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    *,
    ort: bool | None = None,
) -> LanguageModel:
    """The same for a bundle that is a language model's."""
    from pathlib import Path  # here, as what follows: `import runtime` need not load it

    from runtime.language import LanguageModel, verify

    if ort:
        raise PacklightError("--ort", found="a language model", expected="a bundle with model.int8.ort")
    return LanguageModel(Path(path), verify(path), threads, providers)
