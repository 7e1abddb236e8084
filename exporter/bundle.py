"""Record the probe and write the folder; nothing is written until everything is known.

The folder is written beside its place under a hidden name and moved there at the end: an interrupted or failed export
leaves the old bundle or none, never half of one.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.batches import Array, Batch
from exporter.errors import CalibrationError
from exporter.recipe import Probe as ProbeLimits
from runtime import drift
from runtime import manifest as manifests
from runtime.drift import Drift
from runtime.errors import BundleError
from runtime.kernels import Kernels, trace
from runtime.manifest import Manifest
from runtime.probe import Probe, write_probe
from runtime.session import open_session

# One thread: the sums of float nodes have one order, so the recorded outputs have one value
THREADS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Held-out drift of the int8 graph, the batches that travel as the probe, and the kernels that ran."""

    probes: tuple[Probe, ...]
    drift: Drift
    kernels: Kernels


def record(
    fp32: bytes, int8: bytes, heldout: Iterable[Batch], session: Mapping[str, str], limits: ProbeLimits
) -> Recorded:
    """Run both models on held-out batches.

    Drift is over all of them; the probe is the first `limits.batches` that fit `limits.max_bytes`, and one in any case.

    Raises:
        CalibrationError: no held-out batch, or the FP32 model gives NaN or infinity on one.
    """
    probes: list[Probe] = []
    size = 0
    reference, candidate = open_session(fp32, threads=THREADS), open_session(int8, threads=THREADS, entries=session)
    names = [output.name for output in reference.get_outputs()]

    def outputs() -> Iterator[tuple[Batch, Batch]]:
        nonlocal size
        for number, batch in enumerate(heldout):
            wanted = dict(zip(names, reference.run(names, dict(batch)), strict=True))
            _check_finite(wanted, number)
            got = dict(zip(names, candidate.run(names, dict(batch)), strict=True))
            bytes_here = sum(array.nbytes for arrays in (batch, wanted, got) for array in arrays.values())
            if not probes or (len(probes) < limits.batches and size + bytes_here <= limits.max_bytes):
                probes.append(Probe(inputs=batch, fp32=wanted, int8=got))
                size += bytes_here
            yield wanted, got

    pairs = outputs()
    first = next(pairs, None)
    if first is None:
        raise CalibrationError(
            "held-out data: no batches that calibration has not seen",
            expected="at least one",
            do="give held-out batches of their own, or more calibration batches to split",
        )
    measured = drift.measure(_chain(first, pairs))
    return Recorded(probes=tuple(probes), drift=measured, kernels=_kernels(int8, probes[0].inputs, session))


def require_place(out: Path) -> None:
    """Refuse an output folder that holds something other than a bundle.

    Raises:
        BundleError: `out` is a file, or a folder with files and no manifest.json.
    """
    if out.is_dir() and (not any(out.iterdir()) or (out / manifests.MANIFEST).is_file()):
        return
    if out.exists() or out.is_symlink():
        raise BundleError(
            str(out),
            path=str(out),
            found="a folder that is not a bundle" if out.is_dir() else "a file",
            expected="a new folder, an empty one, or a bundle to replace",
            do="choose another --out",
        )


def write(out: Path, manifest: Manifest, probes: Iterable[Probe], files: Mapping[str, bytes]) -> Manifest:
    """Write a bundle: every file, then the manifest that lists them, then the move into place.

    Args:
        out: the bundle's folder; a bundle that is there is replaced.
        manifest: all but `files`, which is filled in here.
        probes: what goes into probe.npz.
        files: {name: content} of the others.

    Raises:
        BundleError: the disk is full or not writable; nothing is left behind.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _staging(out) as folder:
            write_probe(folder / manifests.PROBE, probes)
            for name, content in files.items():
                (folder / name).write_bytes(content)
            listed = {name: manifests.digest(folder / name) for name in sorted([*files, manifests.PROBE])}
            complete = replace(manifest, files=listed)
            (folder / manifests.MANIFEST).write_text(manifests.dumps(complete), encoding="utf-8")
            _move(folder, out)
            return complete
    except OSError as error:
        raise BundleError(
            str(out), path=str(out), found=error.strerror or str(error), expected="a folder that can be written",
            do="free some space, or choose another --out",
        ) from error  # fmt: skip


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, gone at the end whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, out: Path) -> None:
    """Put `folder` in the place of `out`; the old one is moved aside first and comes back if that fails."""
    if not out.exists():
        folder.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)) / "old"
    out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        old.rename(out)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def _kernels(int8: bytes, inputs: Batch, session: Mapping[str, str]) -> Kernels:
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        model = Path(folder) / manifests.INT8
        model.write_bytes(int8)
        return trace(model, inputs, threads=THREADS, entries=session)


def _check_finite(outputs: Mapping[str, Array], number: int) -> None:
    for name, value in outputs.items():
        if (
            value.dtype.kind == "f"
            and value.size
            and not (abs(value.min()) < float("inf") and abs(value.max()) < float("inf"))
        ):
            raise CalibrationError(
                f"held-out batch {number}: output {name!r} of the FP32 model",
                found="NaN or infinity",
                expected="finite numbers",
                tensor=name,
                batch=number,
            )


def _chain(first: tuple[Batch, Batch], rest: Iterator[tuple[Batch, Batch]]) -> Iterator[tuple[Batch, Batch]]:
    yield first
    yield from rest
