"""manifest.json of a language model's bundle: read strictly, written as canonical JSON. docs/format.md is the normative text.

It says `"kind": "causal-lm"`, which a manifest of any other bundle does not have.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from runtime import strict
from runtime.errors import BundleError
from runtime.manifest import HEX, LANGUAGE, File, Machine, canonical, entry_fault, name_fault

FORMAT = 1
MANIFEST, MODEL, WEIGHTS = "manifest.json", "model.onnx", "model.onnx.data"
TOKENIZER, TEMPLATE, PROBE = "tokenizer.json", "chat_template.jinja", "probe.npz"
REQUIRED = (MODEL, WEIGHTS, TOKENIZER, PROBE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What the bundle's model loses against FP32 on `text`, over `tokens` tokens; docs/llm.md has the formulas.

    kl: nats a token. same_top1: a share, 0..1. unknown: tokens of the text that the tokenizer does not know.
    """

    text: str
    tokens: int
    unknown: int
    fp32_perplexity: float
    perplexity: float
    kl: float
    same_top1: float

    @property
    def rise(self) -> float:
        """Of the perplexity, as a share of FP32's."""
        return self.perplexity / self.fp32_perplexity - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the bundle must meet; None is no limit. max_rise: of the perplexity, as a share of FP32's."""

    max_kl: float | None = None
    max_rise: float | None = None
    min_same_top1: float | None = None
    max_size_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageManifest:
    """What was made: `files` are all but manifest.json.

    context: tokens, prompt and answer together, that the model has positions for.
    begin: the tokens put before a text. end: those that end an answer.
    formats: {format: how many of the weights' numbers have it}.
    calibration: the text that rounding was fitted to; empty where none was.
    """

    kind: str = LANGUAGE
    format: int = FORMAT
    name: str
    architecture: str
    scheme: str
    vocabulary: int
    context: int
    layers: int
    begin: tuple[int, ...]
    end: tuple[int, ...]
    files: Mapping[str, File]
    formats: Mapping[str, int]
    calibration: str
    loss: Loss
    limits: Limits = field(default_factory=Limits)
    recorded_on: Machine
    session: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    versions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def dumps(manifest: LanguageManifest) -> str:
    return canonical(manifest)


def loads(text: str, where: str) -> LanguageManifest:
    """Read a manifest, refusing whatever docs/format.md does not allow.

    Raises:
        BundleError: not strict JSON, a newer format, an unknown or missing key, a wrong type or value; names the place.
    """
    root = strict.parse(text, where)
    if isinstance(root, dict) and isinstance(root.get("format"), int) and root["format"] > FORMAT:
        _no(f"{where}:format", str(root["format"]), f"{FORMAT} or less", "made by a newer packlight; upgrade it here")
    found: LanguageManifest = _read(LanguageManifest, root, where)
    _check(found, where)
    return found


def _check(found: LanguageManifest, where: str) -> None:
    if (found.kind, found.format) != (LANGUAGE, FORMAT):
        _no(f"{where}:kind", f"{found.kind} {found.format}", f"{LANGUAGE} {FORMAT}")
    for name, file in found.files.items():
        if fault := name_fault(name, found.files):
            _no(f"{where}:files.{name}", fault, "a plain file name in the bundle's own folder")
        if not re.fullmatch(HEX, file.sha256) or file.size_bytes < 0:
            _no(f"{where}:files.{name}", "no SHA-256 and size", "64 lower-case hexadecimal digits, 0 or more bytes")
    for name in REQUIRED:
        if name not in found.files:
            _no(f"{where}:files.{name}", "nothing", "this file")
    for key, value in found.session.items():
        if fault := entry_fault(key, value):
            _no(f"{where}:session.{key}", fault, "one of those in docs/format.md")
    for name in ("vocabulary", "context", "layers"):
        if getattr(found, name) < 1:
            _no(f"{where}:{name}", str(getattr(found, name)), "1 or more")
    for token in (*found.begin, *found.end):
        if not 0 <= token < found.vocabulary:
            _no(f"{where}:begin, end", str(token), f"tokens 0 to {found.vocabulary - 1}")


def _read(kind: Any, value: object, where: str) -> Any:
    """A JSON value as the type that a dataclass's field says."""
    if dataclasses.is_dataclass(kind):
        names = [each.name for each in dataclasses.fields(kind)]
        if not isinstance(value, dict) or set(value) != set(names):
            odd = sorted(set(value) ^ set(names))[0] if isinstance(value, dict) else type(value).__name__
            _no(
                f"{where}",
                f"{odd!r}" + (" missing or unknown" if isinstance(value, dict) else ""),
                f"{', '.join(names)}",
            )
        types_of = get_type_hints(kind)
        return kind(**{name: _read(types_of[name], value[name], f"{where}:{name}") for name in names})  # type: ignore[operator]
    origin, given = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(given[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            _no(where, type(value).__name__, "a list")
        return tuple(_read(given[0], each, f"{where}[{at}]") for at, each in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            _no(where, type(value).__name__, "an object")
        return MappingProxyType({key: _read(given[1], each, f"{where}.{key}") for key, each in value.items()})
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        _no(where, f"{value!r}"[:60], f"a value of type {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        _no(where, str(value), "a finite number")
    return value


def _no(where: str, found: str, expected: str, do: str = "") -> NoReturn:
    raise BundleError(where, path=where.partition(":")[0], found=found, expected=expected, do=do)
