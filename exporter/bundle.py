"""Record the probe and write the folder; nothing is written until everything is known.

The folder is written beside its place under a hidden name and moved there at the end: an interrupted or failed export
leaves the old bundle or none, never half of one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exporter import heldout, mobile, ops, optional, ort_format, staged, weights
from exporter.batches import Batch
from exporter.errors import CalibrationError
from exporter.heldout import THREADS
from exporter.mobile import Usability
from exporter.ort_format import OrtModel, Proof
from exporter.recipe import Probe as ProbeLimits
from exporter.target import Target
from runtime import drift, trusted
from runtime import files as places
from runtime import manifest as manifests
from runtime.bundle import Bundle
from runtime.drift import NO_BATCH, NOTHING_KNOWN, Drift, Ground, Totals, Worst
from runtime.errors import BundleError, PacklightError
from runtime.kernels import Kernels, trace
from runtime.manifest import Manifest
from runtime.probe import Probe, write_probe
from runtime.verified import verify

Finish = Callable[[Path, Manifest], tuple[Manifest, Mapping[str, bytes]]]


def same_bits(kernel: str, integer: bool) -> bool:
    """Whether the kernel gives the same bits on every CPU of a family; one in integers without a row does."""
    return ops.of(kernel).bits == "anywhere" or (integer and kernel not in ops.OPERATORS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Held-out drift of the int8 graph, the batches that travel as the probe, and the kernels that ran.

    numbers: which of the held-out batches the probes are; hardest: the one with the smallest SNR (`drift.batch_snr_db`).
    promised_db: the worst SNR on calibration batches, as `Drift.worst_snr_db`; inf where none was given.
    """

    probes: tuple[Probe, ...]
    numbers: tuple[int, ...]
    hardest: int
    drift: Drift
    promised_db: float
    kernels: Kernels

    @property
    def exact(self) -> bool:
        """Whether every node ran in integers, moved values or is one rounding: nothing that depends on an order of sums."""
        return all(same_bits(each.kernel, each.integer) for each in self.kernels.kernels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What ships: the models' bytes; for phones, where they were asked for, the .ort file, its proof, {file: who would take it}.

    unjudged: why nobody knows who would take it; else empty.
    """

    fp32: bytes
    int8: bytes
    phone: OrtModel | None
    proof: Proof | None
    mobile: Mapping[str, tuple[Usability, ...]]
    unjudged: str = ""


def models(fp32: bytes, int8: bytes, probes: Sequence[Probe], target: Target, *, ort: bool) -> Models:
    """The models, and with `ort` the phone's file, proved to run as the .onnx file does on the probe.

    Raises:
        QuantizeError: see ort_format.prove.
    """
    if not ort:
        return Models(fp32=fp32, int8=int8, phone=None, proof=None, mobile={})
    phone = ort_format.convert(int8, target.session, target.name)
    proof = ort_format.prove(phone, int8, [probe.inputs for probe in probes], target.session, target.name)
    nobody: Mapping[str, tuple[Usability, ...]] = {}
    usable = optional.attempt(lambda: {manifests.INT8: mobile.judge(int8), manifests.FP32: mobile.judge(fp32)}, nobody)
    return Models(fp32=fp32, int8=int8, phone=phone, proof=proof, mobile=usable.value, unjudged=usable.why)


def record(
    fp32: bytes,
    int8: bytes,
    batches: Iterable[Batch],
    session: Mapping[str, str],
    limits: ProbeLimits,
    elsewhere: Callable[[Iterable[Batch], int], Totals] | None = None,
    against: Mapping[str, Ground] = NOTHING_KNOWN,
    read: tuple[bytes, bytes] | None = None,
    calibrated: Sequence[Batch] = (),
) -> Recorded:
    """Run both models on held-out batches.

    Drift is over all of them; the probe is the first that fit `limits`, the last of them replaced by the batch with the smallest
    SNR of all where that is not among them, and one in any case. A batch whose outputs hold no element does not go into the probe:
    it would prove nothing, there or on a device.
    `elsewhere` takes the batches behind the probe, and the number of the first; the drift is the same. `against` is what each
    output is held against. `read` are both models with what selecting nodes read among the outputs; None where none selects.
    On `calibrated`, calibration batches, the same drift is what these promised.

    Raises:
        CalibrationError: no held-out batch, none with an element in its outputs, one that ONNX Runtime refuses, or one on
            which the FP32 model gives NaN or infinity.
    """
    first: dict[int, Probe] = {}
    worst, hardest, room = NO_BATCH, None, True
    stream = enumerate(batches)
    run = heldout.runner(fp32, int8, session)
    look = run if read is None else heldout.runner(*read, session)

    def outputs() -> Iterator[tuple[Batch, Batch]]:
        nonlocal worst, hardest, room
        for number, batch in stream:
            probe = _probe(batch, number)
            shown = (probe.fp32, probe.int8) if read is None else look(batch, number)
            room = room and _fit([*first.values(), probe], limits)
            if room and not _is_empty(probe):
                first[number] = probe
            if (found := Worst(drift.batch_snr_db(*shown), number)).place() < worst.place():
                worst, hardest = found, probe
            yield shown
            if elsewhere is not None and not room:
                return

    def _probe(batch: Batch, number: int) -> Probe:
        wanted, got = run(batch, number)
        return Probe(inputs=batch, fp32=wanted, int8=got)

    totals = drift.total(outputs(), against=against)
    if elsewhere is not None and totals.batches:
        totals = drift.merge(totals, elsewhere((batch for _, batch in stream), totals.batches))
    if not totals.batches:
        raise CalibrationError(
            "held-out data: no batches that calibration has not seen",
            expected="at least one",
            do="give held-out batches of their own, or more calibration batches to split",
        )
    if totals.worst.place() < worst.place() and (inputs := totals.worst.inputs) is not None:
        worst = totals.worst
        hardest = _probe(inputs, worst.number)
    probes = _with(worst.number, hardest, first, limits)
    measured = totals.drift()
    if not probes:
        raise CalibrationError(
            "held-out data: outputs",
            found=f"no element in any of {measured.batches} batches",
            expected="at least one batch that is not empty",
        )
    promised = drift.total((look(batch, number) for number, batch in enumerate(calibrated)), against=against)
    return Recorded(
        probes=tuple(probes.values()),
        numbers=tuple(probes),
        hardest=worst.number,
        drift=measured,
        promised_db=promised.drift().worst_snr_db,
        kernels=_kernels(int8, next(iter(probes.values())).inputs, session),
    )


def _is_empty(probe: Probe) -> bool:
    return not any(array.size for array in probe.fp32.values())


def _fit(probes: Sequence[Probe], limits: ProbeLimits) -> bool:
    """Whether they may travel together: one always may."""
    return len(probes) <= 1 or (len(probes) <= limits.batches and _bytes(probes) <= limits.max_bytes)


def _bytes(probes: Sequence[Probe]) -> int:
    arrays = (array for probe in probes for named in (probe.inputs, probe.fp32, probe.int8) for array in named.values())
    return sum(array.nbytes for array in arrays)


def _with(number: int, hardest: Probe | None, first: Mapping[int, Probe], limits: ProbeLimits) -> dict[int, Probe]:
    """The first probes, and the hardest in the place of as many of the last as its bytes need; not one that is too large alone."""
    kept = dict(first)
    if hardest is None or number in first or _is_empty(hardest) or (first and _bytes([hardest]) > limits.max_bytes):
        return kept
    while kept and not _fit([*kept.values(), hardest], limits):
        kept.popitem()
    return {**kept, number: hardest}


def require_place(given: str | Path) -> Path:
    """The output folder, and beside it nothing that a killed export left (see staged.sweep).

    Refused if it holds something other than a bundle: what is there is going to be deleted.

    Raises:
        BundleError: it is a file, or a folder with files that no bundle's manifest lists.
        PacklightError: it cannot be made: see runtime.files.require_writable.
    """
    places.require_writable(given, "out")
    out = Path(given)
    if out.name in ("", ".."):  # "." and "..": the folder itself is replaced, and may be where somebody stands
        raise BundleError("out", path=str(out), found=repr(str(given)), expected="a folder's name", do="choose another")
    staged.sweep(out)
    if out.is_dir() and (not any(out.iterdir()) or _holds_a_bundle(out)):
        return out
    if out.exists() or out.is_symlink():
        raise BundleError(
            str(out),
            path=str(out),
            found="a folder that is not a bundle" if out.is_dir() else "a file",
            expected="a new folder, an empty one, or a bundle to replace",
            do="choose another --out",
        )
    return out


def _holds_a_bundle(folder: Path) -> bool:
    """Whether nothing is there but a manifest of ours and files that it lists."""
    file = folder / manifests.MANIFEST
    try:
        text = trusted.read(file, manifests.MANIFEST_BYTES).decode("utf-8")
        listed = manifests.loads(text, str(file)).files
    except (BundleError, UnicodeDecodeError):
        return False
    return {entry.name for entry in folder.iterdir()} <= {manifests.MANIFEST, *listed}


def write(
    out: Path, manifest: Manifest, probes: Iterable[Probe], files: Mapping[str, bytes], finish: Finish | None = None
) -> Manifest:
    """Write a bundle: every file, then the manifest that lists them; load it as a device would; move it into place.

    Args:
        out: the bundle's folder; a bundle that is there is replaced.
        manifest: all but `files`, which is filled in here.
        probes: what goes into probe.npz.
        files: {name: content} of the others.
        finish: asked what the bundle that lies in a folder is worth, before it is put in place: the manifest as it shall be, and
            files that say so, too.

    Raises:
        BundleError: the disk is full or not writable, or the runtime cannot load what was made, or read its probe and run it;
            nothing is left behind, and an old bundle stays. So it is where `finish` raises.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with staged.folder(out) as folder:
            write_probe(folder / manifests.PROBE, probes)
            complete = _listed(folder, manifest, files)
            _require_runs(folder, out)
            if finish is not None:
                complete = _listed(folder, *finish(folder, complete))
            require_place(out)  # again: minutes have passed
            staged.move(folder, out)
            return complete
    except OSError as error:
        raise BundleError(
            str(out), path=str(out), found=places.said(error), expected="a folder that can be written",
            do=places.remedy(error, "--out"),
        ) from error  # fmt: skip


def _listed(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """The manifest that lists what is in the folder and these files, written with them; what it listed is not hashed again."""
    for name, content in files.items():
        weights.write(content, folder / name)
    known = {name: file for name, file in manifest.files.items() if name not in files}
    found = sorted(each for each in folder.iterdir() if each.name != manifests.MANIFEST)
    complete = replace(manifest, files={each.name: known.get(each.name) or manifests.digest(each) for each in found})
    (folder / manifests.MANIFEST).write_text(manifests.dumps(complete), encoding="utf-8")
    return complete


def _require_runs(folder: Path, out: Path) -> None:
    """Refuse a bundle whose model or probe a device could not open, or whose model does not run on its own probe."""
    try:
        bundle = Bundle(
            folder, verify(folder), threads=THREADS
        )  # without load's warning, which would name this hidden folder
        bundle.run(bundle.probes()[0].inputs)
    except PacklightError as error:
        raise BundleError(
            f"{out}: not written, for the runtime could not load it",
            path=str(out),
            found=str(error).replace(f"{folder}/", ""),
        ) from error


def _kernels(int8: bytes, inputs: Batch, session: Mapping[str, str]) -> Kernels:
    with tempfile.TemporaryDirectory(prefix="packlight-") as folder:
        model = Path(folder) / manifests.INT8
        weights.place(int8, model)
        return trace(model, inputs, threads=THREADS, entries=session)
