"""The probe: held-out inputs with the outputs recorded for them, as probe.npz. Probes <-> file, the same bytes every time.

Keys are `0000/input/NAME`, `0000/fp32/NAME`, `0000/int8/NAME`: batch number, role, tensor's name (which may hold a slash).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime import npz, trusted
from runtime.errors import BundleError

if TYPE_CHECKING:
    from runtime.drift import Array

ROLES = ("input", "fp32", "int8")
MOST_BYTES = 1 << 30  # of probe.npz, which is read into memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One batch: inputs, and the outputs the FP32 and the int8 model gave where the bundle was made."""

    inputs: Mapping[str, Array]
    fp32: Mapping[str, Array]
    int8: Mapping[str, Array]


def write_probe(path: Path, probes: Iterable[Probe]) -> None:
    """Write probe.npz; equal probes give equal bytes, whatever the order of their names."""
    roles = ((probe.inputs, probe.fp32, probe.int8) for probe in probes)
    keyed = (
        (f"{number:04d}/{role}/{name}", named[name])
        for number, batch in enumerate(roles)
        for role, named in zip(ROLES, batch, strict=True)
        for name in sorted(named)
    )
    write_arrays(path, dict(keyed))


def read_probe(path: Path, content: bytes | None = None) -> tuple[Probe, ...]:
    """Read probe.npz, one Probe a batch, in order.

    Args:
        path: of the file.
        content: its bytes, where they are read already; `path` is then for messages.

    Raises:
        BundleError: not such a file, compressed members (a few bytes could fill the memory), other things than numbers, a key
            that is not ours, a batch number left out, no batch at all.
    """
    batches: dict[int, dict[str, dict[str, Array]]] = {}
    whole = trusted.read(path, MOST_BYTES) if content is None else content
    for key, array in read_arrays(path, whole, stored=True).items():
        number, role, name = _split(key, path)
        batches.setdefault(number, {each: {} for each in ROLES})[role][name] = array
    if not batches or sorted(batches) != list(range(len(batches))):
        found = f"batches {sorted(batches)}"
        raise BundleError(str(path), path=str(path), found=found, expected="0000, 0001, ... without a gap")
    return tuple(
        Probe(inputs=batch["input"], fp32=batch["fp32"], int8=batch["int8"]) for _, batch in sorted(batches.items())
    )


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write named arrays as .npz: stored, in C order, without times; the same arrays give the same bytes.

    Raises:
        BundleError: an array of Python objects, which would be pickled.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, value in arrays.items():
            array = np.asarray(value, order="C")
            if array.dtype.hasobject:
                raise BundleError(f"{path}:{key}", path=str(path), found="Python objects", expected="numbers")
            member = zipfile.ZipInfo(f"{key}.npy")  # its time is 1980-01-01, always
            member.create_system = 3  # Unix, on every system
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def read_arrays(path: Path, content: bytes | None = None, *, stored: bool = False) -> dict[str, Array]:
    """Read named arrays from .npz: numbers only, and never a pickle.

    Args:
        path: of the file.
        content: its bytes, where they are read already; `path` is then for messages.
        stored: refuse compressed members.

    Raises:
        BundleError: no such file, another format, other things than numbers, members that unfold to more than npz allows.
    """
    whole = trusted.read(path, npz.MOST_BYTES) if content is None else content
    try:
        return npz.arrays(whole, stored)
    except (ValueError, MemoryError) as error:
        found = str(error)[:200] or type(error).__name__
        raise BundleError(str(path), path=str(path), found=found, expected="an .npz file of plain arrays") from error


def _split(key: str, path: Path) -> tuple[int, str, str]:
    number, _, rest = key.partition("/")
    role, _, name = rest.partition("/")
    if not (number.isascii() and number.isdigit() and 4 <= len(number) <= 9 and role in ROLES and name):
        expected = f"NNNN/ROLE/NAME with a role of {', '.join(ROLES)}"
        raise BundleError(f"{path}:{key}", path=str(path), found="an unknown key", expected=expected)
    return int(number), role, name
