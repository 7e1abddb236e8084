"""The bundle's format: what a manifest says, read strictly and written as canonical JSON; the vocabulary both packages share.

A bundle is a flat folder. manifest.json is trusted first, names every other file with size and SHA-256, and is itself not
listed. Every listed file must be there, except model.fp32.onnx and, of model.int8.onnx and model.int8.ort, one.
docs/format.md is the normative text.
"""

from __future__ import annotations

import copyreg
import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast

from runtime import strict
from runtime.errors import BundleError
from runtime.exported import Exported
from runtime.exported import read as _exported
from runtime.judged import Judged
from runtime.judged import read as _judged
from runtime.preprocess import Preprocessing
from runtime.preprocess import read as _preprocessing

if TYPE_CHECKING:
    from pathlib import Path


def _read_only(items: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(items)


# Values of ours hold read-only mappings, which pickle does not know by itself
copyreg.pickle(MappingProxyType, lambda mapping: (_read_only, (dict(mapping),)))

FORMAT = 2
READABLE = (1, FORMAT)  # 1 says nothing of the export's verdict
MANIFEST, INT8, FP32, PROBE = "manifest.json", "model.int8.onnx", "model.fp32.onnx", "probe.npz"
ORT, OPERATORS = "model.int8.ort", "required_operators_and_types.config"
MANIFEST_BYTES = 16 << 20  # a manifest is a few kB; this bounds what is read before anything is trusted
DATA = ".data"  # behind a model's name: the file with its large weights, which protobuf could not hold
OPTIONAL = frozenset({FP32})
LANGUAGE = "causal-lm"  # the kind that a language model's manifest says it is: runtime/language_manifest.py
FORMS = (INT8, ORT)  # of the int8 model; where the manifest lists both, a device needs one

# The tensor types that both numpy and ONNX have.
DTYPES = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"}
)
PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}"  # no folder, not hidden, the same on every file system
RESERVED = r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)"  # devices on Windows, with any suffix
HEX = r"[0-9a-f]{64}"
LONGEST_VALUE = 1024  # of a session entry
# Session entries that change how a model computes, and neither read nor write files (ONNX Runtime 1.31 has some that do).
ENTRIES = {"optimization.disable_specified_optimizers"} | {
    f"session.{name}"
    for name in (
        *("qdqisint8allowed", "x64quantprecision", "disable_quant_qdq", "disable_double_qdq_remover"),
        *("enable_quant_qdq_cleanup", "disable_qdq_constant_folding", "enable_dq_matmulnbits_fusion"),
        *("qdq_matmulnbits_accuracy_level", "qdq_matmulnbits_block_size", "graph_optimizations_loop_level"),
        *("disable_prepacking", "set_denormal_as_zero", "use_deterministic_compute", "dynamic_block_base"),
        *("intra_op.allow_spinning", "intra_op.spin_duration_us", "intra_op.spin_backoff_max"),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of the bundle as it was written."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """An input or output: `dtype` is numpy's name; in `shape` an int is fixed, a str is a named dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The limits asked for; None is no limit. One on drift holds for every output, in units of docs/drift.md; shares in 0..1.

    max_size_bytes: of the model that runs. max_ram_bytes: what opening and running it once adds to the memory of a process.
    """

    min_snr_db: float | None = None
    min_cosine: float | None = None
    max_abs: float | None = None
    min_same_top1: float | None = None
    min_integer_macs: float | None = None
    max_size_bytes: int | None = None
    max_ram_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The CPU on which the int8 outputs of the probe were recorded: its family, and its flags that decide int8 kernels."""

    machine: str
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What was made: `files` are all but manifest.json, `session` the ONNX Runtime config entries the target wants.

    pair_rule: the int8 weights keep the pair rule, under which no x86 kernel since AVX2 saturates.
    exact_on: machines on which the int8 outputs are those of the probe bit for bit.
    judged: {output: how it is compared}; one that is not listed is compared by its kind of number, as a whole.
    verdict: what the export measured and judged; None where it is not known.
    """

    format: int = FORMAT
    name: str
    target: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    files: Mapping[str, File]
    pair_rule: bool
    exact_on: tuple[str, ...]
    recorded_on: Machine
    session: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    budget: Budget = field(default_factory=Budget)
    judged: Mapping[str, Judged] = field(default_factory=lambda: MappingProxyType({}))
    preprocessing: Preprocessing | None = None
    verdict: Exported | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def digest(path: Path) -> File:
    """Size and SHA-256 of a file, read in blocks."""
    import hashlib  # here: `import runtime` need not load OpenSSL

    seen, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            seen.update(block)
            size += len(block)
    return File(sha256=seen.hexdigest(), size_bytes=size)


def canonical(value: object) -> str:
    """Canonical JSON of any of packlight's values: sorted keys, indent 1, UTF-8 as is, one newline at the end.

    Strict JSON has no infinity, so ±inf are the strings "inf" and "-inf", which Python's float() reads back.

    Raises:
        ValueError: NaN anywhere; no value of ours may hold one.
    """
    import json  # here and not above: `import runtime` need not load it

    return json.dumps(_plain(value), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def is_language(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder's manifest says that it is a language model's; of one that cannot be read it does not."""
    from pathlib import Path  # here, as trusted: of these `import runtime` need not load the first

    from runtime import trusted

    try:
        text = trusted.read(Path(folder, MANIFEST), MANIFEST_BYTES).decode("utf-8")
    except (BundleError, UnicodeDecodeError):
        return False
    return re.search(rf'^ "kind": "{LANGUAGE}",?$', text, re.MULTILINE) is not None


def dumps(manifest: Manifest) -> str:
    """The bytes of manifest.json, as text. loads(dumps(m)) == m, and equal manifests give equal text."""
    return canonical(manifest)


def loads(text: str, where: str) -> Manifest:
    """Read a manifest, refusing whatever docs/format.md does not allow.

    Args:
        text: the content of manifest.json.
        where: the file's name, for messages.

    Raises:
        BundleError: not strict JSON, a format newer than FORMAT, an unknown or missing key, a wrong type or value; the
            message names the place, as in `manifest.json:inputs[0].dtype`.
    """
    return _manifest(strict.parse(text, where), _Place(where))


class _Place(NamedTuple):
    """Where in the manifest a reader stands: `file:inputs[0].dtype`."""

    file: str
    path: str = ""

    def key(self, name: str) -> _Place:
        return _Place(self.file, f"{self.path}.{name}" if self.path else name)

    def item(self, number: int) -> _Place:
        return _Place(self.file, f"{self.path}[{number}]")

    def refuse(self, *, found: str, expected: str, do: str = "") -> NoReturn:
        where = f"{self.file}:{self.path}" if self.path else self.file
        raise BundleError(where, path=self.file, found=found[:120], expected=expected, do=do)


T = TypeVar("T")


def _manifest(value: object, at: _Place) -> Manifest:
    if isinstance(value, dict) and strict.is_int(value.get("format")) and value["format"] > FORMAT:
        at.key("format").refuse(
            found=str(value["format"]),
            expected=f"{FORMAT} or less",
            do="made by a newer packlight; upgrade packlight on this machine",
        )
    if isinstance(value, dict) and value.get("format") == 1:
        value = {"verdict": None, **value}
    table = _table(value, at, Manifest)
    found = Manifest(
        format=_format(table["format"], at.key("format")),
        name=_text(table["name"], at.key("name")),
        target=_text(table["target"], at.key("target")),
        inputs=_tensors(table["inputs"], at.key("inputs")),
        outputs=_tensors(table["outputs"], at.key("outputs")),
        files=_files(table["files"], at.key("files")),
        pair_rule=_boolean(table["pair_rule"], at.key("pair_rule")),
        exact_on=_texts(table["exact_on"], at.key("exact_on")),
        recorded_on=_machine(table["recorded_on"], at.key("recorded_on")),
        session=_session(table["session"], at.key("session")),
        budget=_budget(table["budget"], at.key("budget")),
        judged=_mapping(table["judged"], at.key("judged"), _judged),
        preprocessing=_preprocessing(table["preprocessing"], at.key("preprocessing")),
        verdict=_exported(table["verdict"], at.key("verdict")),
        versions=_mapping(table["versions"], at.key("versions"), _text),
    )
    for name in found.judged.keys() - {tensor.name for tensor in found.outputs}:
        at.key("judged").key(name).refuse(found="no output", expected="the name of an output")
    wanted = found.preprocessing
    if wanted is not None and (wanted.input, wanted.dtype) not in {(each.name, each.dtype) for each in found.inputs}:
        at.key("preprocessing").refuse(
            found=f"{wanted.dtype} for {wanted.input!r}", expected="one of the inputs, and its dtype"
        )
    return found


def _table(value: object, at: _Place, kind: type) -> dict[str, object]:
    """The value as an object with exactly the keys of dataclass `kind`."""
    if not isinstance(value, dict):
        at.refuse(found=_kind(value), expected="an object")
    names = [f.name for f in dataclasses.fields(kind)]
    for key in value:
        if key not in names:
            at.key(key).refuse(found="an unknown key", expected=f"one of {', '.join(names)}")
    for name in names:
        if name not in value:
            at.key(name).refuse(found="nothing", expected="this key")
    return cast("dict[str, object]", value)


def _mapping(value: object, at: _Place, read: Callable[[object, _Place], T]) -> Mapping[str, T]:
    if not isinstance(value, dict):
        at.refuse(found=_kind(value), expected="an object")
    return MappingProxyType({key: read(each, at.key(key)) for key, each in value.items()})


def _format(value: object, at: _Place) -> int:
    if not strict.is_int(value) or value not in READABLE:
        at.refuse(found=str(value), expected=" or ".join(map(str, READABLE)))
    return value


def _text(value: object, at: _Place) -> str:
    if not isinstance(value, str) or not value:
        at.refuse(found=_kind(value), expected="a string that is not empty")
    return value


def _texts(value: object, at: _Place) -> tuple[str, ...]:
    if not isinstance(value, list):
        at.refuse(found=_kind(value), expected="a list")
    texts = tuple(_text(each, at.item(number)) for number, each in enumerate(value))
    if len(set(texts)) != len(texts):
        at.refuse(found="one text twice", expected="each once")
    return texts


def _boolean(value: object, at: _Place) -> bool:
    if not isinstance(value, bool):
        at.refuse(found=_kind(value), expected="true or false")
    return value


def _machine(value: object, at: _Place) -> Machine:
    table = _table(value, at, Machine)
    return Machine(machine=_text(table["machine"], at.key("machine")), flags=_texts(table["flags"], at.key("flags")))


def _tensors(value: object, at: _Place) -> tuple[Tensor, ...]:
    if not isinstance(value, list) or not value:
        at.refuse(found=_kind(value), expected="a list that is not empty")
    tensors = tuple(_tensor(each, at.item(number)) for number, each in enumerate(value))
    if len({tensor.name for tensor in tensors}) != len(tensors):
        at.refuse(found="two tensors of one name", expected="each name once")
    return tensors


def _tensor(value: object, at: _Place) -> Tensor:
    table = _table(value, at, Tensor)
    if (dtype := _text(table["dtype"], at.key("dtype"))) not in DTYPES:
        at.key("dtype").refuse(found=dtype, expected=f"one of {', '.join(sorted(DTYPES))}")
    if not isinstance(sizes := table["shape"], list):
        at.key("shape").refuse(found=_kind(sizes), expected="a list")
    shape = tuple(_dimension(size, at.key("shape").item(axis)) for axis, size in enumerate(sizes))
    return Tensor(name=_text(table["name"], at.key("name")), dtype=dtype, shape=shape)


def _dimension(value: object, at: _Place) -> int | str:
    if (strict.is_int(value) and 0 <= value < 2**63) or (isinstance(value, str) and value):
        return value
    import json

    at.refuse(found=json.dumps(value)[:40], expected="a size >= 0 or a dimension's name")


def _files(value: object, at: _Place) -> Mapping[str, File]:
    files = _mapping(value, at, _file)
    for name in files:
        if fault := name_fault(name, files):
            at.key(name).refuse(found=fault, expected="a plain file name in the bundle's own folder")
    for name in (INT8, PROBE):
        if name not in files:
            at.key(name).refuse(found="nothing", expected="this file")
    return files


def name_fault(name: str, names: Collection[str]) -> str:
    """Why a file of a bundle may not be called so, beside the others; empty where it may."""
    if not re.fullmatch(PLAIN_NAME, name) or name == MANIFEST or ".." in name:
        return "a name that is not allowed"
    if re.match(RESERVED, name, re.IGNORECASE) or name.endswith("."):
        return "a name that is not a file's on every system"
    if sum(name.lower() == other.lower() for other in names) > 1:
        return "two names that differ in case alone"
    return ""


def entry_fault(key: str, value: str) -> str:
    """Why a bundle may not set this entry of ONNX Runtime; empty where it may."""
    if key not in ENTRIES:
        return "an entry no bundle may set"
    setting = len(value) <= LONGEST_VALUE and value.isascii() and value.isprintable()
    return "" if setting else f"a value that is no setting of at most {LONGEST_VALUE} characters"


def _file(value: object, at: _Place) -> File:
    table = _table(value, at, File)
    sha256, size = table["sha256"], table["size_bytes"]
    if not isinstance(sha256, str) or not re.fullmatch(HEX, sha256):
        at.key("sha256").refuse(found=_kind(sha256), expected="64 lower-case hexadecimal digits")
    if not strict.is_int(size) or size < 0:
        at.key("size_bytes").refuse(found=_kind(size), expected="an integer >= 0")
    return File(sha256=sha256, size_bytes=size)


def _session(value: object, at: _Place) -> Mapping[str, str]:
    entries = _mapping(value, at, _text)
    for key in entries:
        if fault := entry_fault(key, entries[key]):
            at.key(key).refuse(found=fault, expected="one of those in docs/format.md")
    return entries


def _budget(value: object, at: _Place) -> Budget:
    table = _table(value, at, Budget)
    limits: dict[str, Any] = {
        name: (_bytes if name.endswith("_bytes") else _limit)(limit, at.key(name)) for name, limit in table.items()
    }
    for name in ("min_same_top1", "min_integer_macs"):
        if (share := limits[name]) is not None and not 0 <= share <= 1:
            at.key(name).refuse(found=str(share), expected="a share in 0..1")
    return Budget(**limits)


def _limit(value: object, at: _Place) -> float | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    at.refuse(found=_kind(value), expected="a finite number or null")


def _bytes(value: object, at: _Place) -> int | None:
    if value is None or (strict.is_int(value) and 1 <= value < 2**63):
        return value
    at.refuse(found=_kind(value), expected="a whole number of bytes >= 1, or null")


def _kind(value: object) -> str:
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
    }
    name = kinds.get(type(value), "null")
    return f"an empty {name.split()[-1]}" if value in ("", [], {}) else name
