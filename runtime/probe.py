"""The probe: held-out inputs with the outputs recorded for them, as probe.npz. Probes <-> file, the same bytes every time.

Keys are `0000/input/NAME`, `0000/fp32/NAME`, `0000/int8/NAME`: batch number, role, tensor's name (which may hold a slash).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError

Array = NDArray[Any]
ROLES = ("input", "fp32", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One batch: inputs, and the outputs the FP32 and the int8 model gave where the bundle was made."""

    inputs: Mapping[str, Array]
    fp32: Mapping[str, Array]
    int8: Mapping[str, Array]


def write_probe(path: Path, probes: Iterable[Probe]) -> None:
    """Write probe.npz: stored, not compressed, without times, names sorted; equal probes give equal bytes.

    Raises:
        BundleError: an array of Python objects, which no bundle may hold.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number, probe in enumerate(probes):
            for role, named in zip(ROLES, (probe.inputs, probe.fp32, probe.int8), strict=True):
                for name in sorted(named):
                    _write(archive, f"{number:04d}/{role}/{name}", np.asarray(named[name], order="C"))


def _write(archive: zipfile.ZipFile, key: str, array: Array) -> None:
    if array.dtype.hasobject:
        raise BundleError(key, path=key, found="Python objects", expected="an array of numbers")
    member = zipfile.ZipInfo(f"{key}.npy")  # its time is 1980-01-01, always
    member.create_system = 3  # Unix, on every system
    with archive.open(member, "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)


def read_probe(path: Path) -> tuple[Probe, ...]:
    """Read probe.npz, one Probe a batch, in order.

    Raises:
        BundleError: not such a file, compressed members (a few bytes could fill the memory), pickled arrays, a key that
            is not ours, a batch number left out, no batch at all.
    """
    batches: dict[int, dict[str, dict[str, Array]]] = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.zip.infolist()):
                raise BundleError(str(path), path=str(path), found="compressed arrays", expected="stored ones")
            for key in archive.files:
                number, role, name = _split(key, path)
                batches.setdefault(number, {each: {} for each in ROLES})[role][name] = archive[key]
    except (OSError, ValueError, EOFError, KeyError, AttributeError, MemoryError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"{path}: not a probe", path=str(path), found=str(error)[:200], expected="plain arrays in an .npz file"
        ) from error
    if not batches or sorted(batches) != list(range(len(batches))):
        found = f"batches {sorted(batches)}"
        raise BundleError(str(path), path=str(path), found=found, expected="0000, 0001, ... without a gap")
    return tuple(
        Probe(inputs=batch["input"], fp32=batch["fp32"], int8=batch["int8"]) for _, batch in sorted(batches.items())
    )


def _split(key: str, path: Path) -> tuple[int, str, str]:
    number, _, rest = key.partition("/")
    role, _, name = rest.partition("/")
    if not (number.isascii() and number.isdigit() and len(number) >= 4 and role in ROLES and name):
        expected = f"NNNN/ROLE/NAME with a role of {', '.join(ROLES)}"
        raise BundleError(f"{path}:{key}", path=str(path), found="an unknown key", expected=expected)
    return int(number), role, name
