"""What the numbers mean: drift + coverage + budget -> Verdict, and its views for machines. Drift never stands without coverage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import onnxruntime as ort

from runtime import drift as drifts
from runtime import manifest as manifests
from runtime.bundle import Bundle, require_opened, risk
from runtime.drift import Drift, OutputDrift, PartDrift
from runtime.errors import DriftExceeded, PacklightError
from runtime.exported import Exported, Line, is_ceiling, number
from runtime.judged import Judged
from runtime.kernels import kernels
from runtime.manifest import Budget, Machine, canonical
from runtime.printable import code
from runtime.session import PROVIDERS, open_session

if TYPE_CHECKING:
    from runtime.cpu import Cpu
    from runtime.drift import Array
    from runtime.outcome import Outcome
    from runtime.probe import Probe

# A device error of 0.7 quantization errors: healthy CPUs had at most 0.68, ones that saturate 5.4 in the median
Q_LIMIT = 0.7
# Of integers and sets, the share that a device has as it was recorded at least: a rounding that turns over flips few comparisons
SAME_LIMIT, SAME_OF_SET = 0.9, 0.5
# Below it what varies is lost: two values in the place of many are at 6 dB at best (those of a uniform distribution)
LOST_DB = 6.0
# Two orders of summation in float32 agree to more than this (exporter/proof.py holds graphs to less)
FLOAT_NOISE_DB = 100.0
# Two CPUs that run one float graph agree to more (exporter/proof.py holds two exports of a model to it)
SAME_MODEL_DB = 60.0
OTHER_MODEL = "the probe's FP32 outputs are not those of model.fp32.onnx"
# The same file with the integer kernels left out: what is between DequantizeLinear and QuantizeLinear runs in float
IN_FLOAT = {"session.disable_quant_qdq": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a bundle meets its budget here, and every number behind it.

    model: which file of the bundle ran. recorded_on: the CPU that device is compared with.
    integer_macs: share, 0..1, of the MACs in integer kernels here.
    drift: int8 here against the recorded FP32: what a user of this device gets. It is made of three errors:
    quantization: int8 as recorded at export against FP32: what rounding costs.
    kernel: int8 here against model.int8.onnx here with Q/DQ computed in float: what this CPU's integer kernels make of it.
        None where that file is not in the bundle.
    device: int8 here against int8 as recorded at export: what another CPU, or another ONNX Runtime, changes.
    q: {output: rms(here - recorded) / rms(recorded - FP32)}: the device error in units of the quantization error.
    exact: the int8 outputs equal the recorded ones, element by element.
    notes: what a reader should know and no limit holds.
    """

    met: bool
    model: str
    lines: tuple[Line, ...]
    integer_macs: float
    drift: Drift
    quantization: Drift
    kernel: Drift | None
    device: Drift
    q: Mapping[str, float]
    exact: bool
    cpu: Cpu
    recorded_on: Machine
    onnxruntime: str
    notes: tuple[str, ...]

    def require(self) -> None:
        """Raise DriftExceeded, naming each limit that is not met."""
        if not self.met:
            unmet = "; ".join(str(line) for line in self.lines if not line.met)
            do = "; ".join(self.notes)
            raise DriftExceeded(f"budget not met, with {coverage(self.integer_macs)}", verdict=self, found=unmet, do=do)

    def to_json(self) -> str:
        """Canonical JSON of all fields; ±inf as in manifest.canonical."""
        return canonical(self)


def check(bundle: Bundle, min_integer_macs: float | None = None) -> Verdict:
    """Run the bundle's own probe here and judge it: by its own budget, by what its target promises, and by its device error.

    Needs neither exporter nor FP32 model. The limits on the device error hold for every bundle:

        device_q NAME   at most Q_LIMIT: another CPU may round otherwise, but not by more than quantization did; float outputs
        device_same NAME  at least SAME_LIMIT of integers (SAME_OF_SET of a set) as recorded, or what quantization left the same
        exact NAME      1, on the machines that the manifest lists in exact_on (x86 from AVX2 up), by the same ONNX Runtime

    Args:
        bundle: as loaded.
        min_integer_macs: a share, 0..1, to ask for; the budget's where that is larger.
    """
    from runtime import cpu  # here: `import runtime` need not make its class

    require_opened(bundle, "check")
    if min_integer_macs is not None and not (_is_number(min_integer_macs) and 0 <= min_integer_macs <= 1):
        raise PacklightError("min_integer_macs", found=repr(min_integer_macs), expected="a share, 0..1")
    about, probes, here_cpu = bundle.manifest, bundle.probes(), cpu.read()
    here = [bundle.run(probe.inputs) for probe in probes]
    recorded, fp32 = [probe.int8 for probe in probes], [probe.fp32 for probe in probes]
    quantization, device, drift = (
        _between(reference, candidate, about.judged)
        for reference, candidate in ((fp32, recorded), (recorded, here), (fp32, here))
    )
    q = relative(device, quantization)
    integer_macs = kernels(bundle, probes[0].inputs, runs=1).integer_macs
    floats = {output.name for output in drift.outputs if output.by == "reals"}
    least = max(min_integer_macs or 0.0, about.budget.min_integer_macs or 0.0) or None
    asked = replace(about.budget, min_integer_macs=least)
    lines = (
        *_exported(about.verdict),
        *_reference(bundle, probes),
        *limits(asked, drift, integer_macs, _size(bundle), _ram(bundle)),
        *(line(f"device_q {name}", value, Q_LIMIT) for name, value in q.items() if name in floats),
        *(
            _same(*both)
            for both in zip(device.outputs, quantization.outputs, strict=True)
            if both[0].name not in floats
        ),
        *(
            line(f"exact {output.name}", float(output.equal == 1), 1.0)
            for output in device.outputs
            if _promised_exact(bundle, here_cpu)
        ),
    )
    return Verdict(
        met=all(each.met for each in lines),
        model=bundle.model.name,
        lines=lines,
        integer_macs=integer_macs,
        drift=drift,
        quantization=quantization,
        kernel=_kernel_error(bundle, probes, here),
        device=device,
        q=q,
        exact=all(output.equal == 1 for output in device.outputs),
        cpu=here_cpu,
        recorded_on=about.recorded_on,
        onnxruntime=ort.__version__,
        notes=tuple(_notes(bundle, here_cpu)),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def limits(budget: Budget, drift: Drift, integer_macs: float, size_bytes: int, ram_bytes: int | None) -> Iterator[Line]:
    """Hold what was found against a budget; each limit on a metric of drift is one line per output.

    min_same_top1 holds for the outputs that have one (see drift.measure). ram_bytes may be None where no limit is on it.

    Raises:
        PacklightError: min_same_top1 is asked for and no output looks like classes, so the limit would hold nothing.
    """
    whole = {"integer_macs": integer_macs, "max_size_bytes": size_bytes, "max_ram_bytes": ram_bytes}
    for name in (field.name for field in fields(budget)):
        limit: float | None = getattr(budget, name)
        metric = name.removeprefix("min_")
        if limit is None:
            continue
        if metric in whole:
            found = whole[metric]
            assert found is not None, "who asks for a limit measures it"
            yield line(metric, float(found), limit)
            continue
        found_lines = [line for output in drift.outputs for line in _of_output(output, metric, limit)]
        if not found_lines and metric == "same_top1":
            shape = "a float output of shape [rows, classes], or one of integers"
            raise PacklightError(f"budget {name}", found="no such output", expected=shape, do="drop the limit")
        yield from found_lines


def _of_output(output: OutputDrift, metric: str, limit: float) -> Iterator[Line]:
    """A limit on drift held against one output: real numbers; of integers the share that is equal, where top-1 is limited."""
    if output.by == "equal" and metric == "same_top1":
        yield line(f"equal {output.name}", output.equal or 0.0, limit)
    if output.by != "reals" or (value := getattr(output, metric)) is None:
        return
    yield line(f"{metric} {output.name}", value, limit)
    if metric == "snr_db" and (worst := output.worst) is not None:
        where = f" {worst.where}" if worst.where else ""
        yield line(f"varying_db {output.name}{where}", worst.judged_db, varying_limit(limit), _lost(worst))


def varying_limit(snr_db: float) -> float:
    """What a limit on SNR asks of what varies: HIDDEN_DB less, for an output may have a constant part, but no less than LOST_DB."""
    return min(snr_db, max(LOST_DB, snr_db - drifts.HIDDEN_DB))


def _lost(part: PartDrift) -> str:
    """What an unmet limit on what varies says: how much varies beside how large the error is."""
    varies = f"varies by {part.part.varying_rms:.3g}" if part.varying_db is not None else "is constant"
    return f"which {varies} (rms) beside an error of {part.rms:.3g}"


def coverage(integer_macs: float) -> str:
    """The share as every text says it beside drift."""
    return f"{100 * integer_macs:.1f} % of MACs in integer kernels"


def outcome(verdict: Verdict, name: str, path: str = "") -> Outcome:
    """For CI: one case a limit and a note, the measured numbers as properties."""
    from runtime.outcome import Outcome, of_lines, warnings  # here: `import runtime` need not load it

    return Outcome(
        command="check",
        about=name,
        path=path,
        cases=(*of_lines(verdict.lines, f", with {coverage(verdict.integer_macs)}"), *warnings(verdict.notes)),
        page=markdown(verdict, name),
        properties={
            "integer_macs": f"{verdict.integer_macs:.6g}",
            "worst_snr_db": f"{verdict.drift.worst_snr_db:.6g}",
            "exact": str(verdict.exact).lower(),
            "device_q": f"{max(verdict.q.values(), default=0.0):.6g}",
            "model": verdict.model,
            "cpu": here(verdict),
            "recorded_on": _machine(verdict.recorded_on),
        },
    )


def markdown(verdict: Verdict, name: str) -> str:
    """A page for a pull request or a job summary: the verdict, the limits, the drift of each output with its coverage."""
    limits = [
        f"| {code(line.what)} | {number(line.found)} | {number(line.limit)} | {_met(line)} |" for line in verdict.lines
    ]
    outputs = [
        f"| {code(o.name)} | {' | '.join(numbers(o))} | {100 * verdict.integer_macs:.1f} % |"
        for o in verdict.drift.outputs
    ]
    return "\n".join(
        [
            f"## {code(name)}: {'met' if verdict.met else 'not met'}",
            "",
            f"{coverage(verdict.integer_macs)}; {device_text(verdict)}.",
            "",
            *(
                ["| limit | found | limit is | met |", "|---|---|---|---|", *limits]
                if limits
                else ["No limit was asked for."]
            ),
            "",
            "| output | SNR dB | varying dB | cosine | max abs | same top-1 | integer MACs |",
            "|---|---|---|---|---|---|---|",
            *outputs,
            "",
            "| error | SNR dB | integer MACs | of what, against what |",
            "|---|---|---|---|",
            *(
                f"| {name} | {snr} | {100 * verdict.integer_macs:.1f} % | {meaning} |"
                for name, snr, meaning in errors(verdict)
            ),
            "",
            f"{code(verdict.model)} on {code(here(verdict))}",
            *(f"- {code(note)}" for note in verdict.notes),
            "",
        ]
    )


def numbers(output: OutputDrift) -> tuple[str, str, str, str, str]:
    """SNR, that of what varies, cosine, largest error, same top-1; of integers and sets only the share that is the same."""
    if output.by != "reals":
        share = output.equal if output.by == "equal" else output.matched
        return "", "", "", "", f"{100 * (share or 0.0):.2f} %"
    return (
        f"{output.snr_db:.2f}",
        "" if output.worst is None else f"{output.worst.judged_db:.2f}",
        f"{output.cosine:.6f}",
        f"{output.max_abs:.4g}",
        "" if output.same_top1 is None else f"{100 * output.same_top1:.2f} %",
    )


def errors(verdict: Verdict) -> tuple[tuple[str, str, str], ...]:
    """(error, SNR in dB of its worst output, of what against what): the three that drift is made of."""
    return tuple(
        (name, "not known" if drift is None else f"{drift.worst_snr_db:.2f}", meaning)
        for name, drift, meaning in (
            ("quantization", verdict.quantization, "int8 recorded at export, FP32"),
            ("kernel", verdict.kernel, "int8 here, its own Q/DQ in float here"),
            ("device", verdict.device, "int8 here, int8 recorded at export"),
        )
    )


def here(verdict: Verdict) -> str:
    """Where a verdict is from: the CPU, its flags that matter, the version of ONNX Runtime."""
    cpu = verdict.cpu
    return f"{cpu.name}, {' '.join([cpu.machine, *cpu.flags])}, onnxruntime {verdict.onnxruntime}"


def _machine(recorded_on: Machine) -> str:
    return " ".join([recorded_on.machine, *recorded_on.flags])


def device_text(verdict: Verdict) -> str:
    """How the int8 outputs here compare with those recorded at export, in words."""
    if verdict.exact:
        return "int8 outputs equal those recorded at export"
    worst = max(verdict.q.values(), default=0.0)
    return (
        f"int8 outputs differ from those recorded at export: SNR {verdict.device.worst_snr_db:.1f} dB between them, "
        f"q {worst:.2f} (at most {Q_LIMIT})"
    )


def line(what: str, found: float, limit: float, cause: str = "") -> Line:
    """One number against one limit: at most it for a `max_...` and a `device_q`, at least it for all others."""
    met = found <= limit if is_ceiling(what) else found >= limit
    return Line(what=what, found=found, limit=limit, met=met, cause=cause)


def _between(
    reference: Sequence[Mapping[str, Array]], candidate: Sequence[Mapping[str, Array]], judged: Mapping[str, Judged]
) -> Drift:
    return drifts.measure(zip(reference, candidate, strict=True), drifts.grounds(judged))


def _exported(verdict: Exported | None) -> Iterator[Line]:
    """One line: whether the export met its budget, and what it did not meet."""
    if verdict is not None:
        unmet = "; ".join(str(each) for each in verdict.lines if not each.met)
        yield line("exported", float(verdict.met), 1.0, unmet)


def _reference(bundle: Bundle, probes: Sequence[Probe]) -> Iterator[Line]:
    """Whether the FP32 model beside the int8 one is what the probe was recorded with; nothing where a device has left it off."""
    if (run := bundle.reference()) is None:
        return
    here = [run(probe.inputs) for probe in probes]
    for output in _between([probe.fp32 for probe in probes], here, bundle.manifest.judged).outputs:
        if output.by == "reals":
            yield line(f"reference {output.name}", output.snr_db, SAME_MODEL_DB, OTHER_MODEL)
        else:
            share = output.equal if output.by == "equal" else output.matched
            yield line(f"reference {output.name}", share or 0.0, SAME_LIMIT, OTHER_MODEL)


def _same(device: OutputDrift, quantization: OutputDrift) -> Line:
    """Integers and sets here against those recorded: one element may always be another."""
    if device.by == "set":
        least = min(quantization.matched or 0.0, SAME_OF_SET)
        return line(f"device_same {device.name}", 1.0 if device.matched is None else device.matched, least)
    least = min(quantization.equal or 0.0, SAME_LIMIT) - 1 / max(device.elements, 1)
    return line(f"device_same {device.name}", device.equal or 0.0, max(least, 0.0))


def relative(device: Drift, quantization: Drift) -> dict[str, float]:
    """{output: rms of the device error / rms of the quantization error}.

    An error below FLOAT_NOISE_DB is none: 0. A quantization error below it counts as that much, so that an output which was
    hardly quantized is not judged by float's own rounding. inf where the output is not finite, or only here not zero.
    """
    return {d.name: _ratio(d, q) for d, q in zip(device.outputs, quantization.outputs, strict=True)}


def _ratio(device: OutputDrift, quantization: OutputDrift) -> float:
    if device.snr_db >= FLOAT_NOISE_DB:
        return 0.0
    noise = device.rms * 10 ** ((device.snr_db - FLOAT_NOISE_DB) / 20)  # rms of what was recorded, FLOAT_NOISE_DB below
    unit = max(quantization.rms, noise if math.isfinite(noise) else 0.0)
    return device.rms / unit if 0 < unit < math.inf and math.isfinite(device.rms) else math.inf


def _promised_exact(bundle: Bundle, here: Cpu) -> bool:
    """Whether the outputs must have the recorded bits: on x86 from AVX2 up, for SSE's QLinearAdd rounds otherwise."""
    about = bundle.manifest
    same_kernels = bundle.providers == PROVIDERS and about.versions.get("onnxruntime", "") == ort.__version__
    has_avx2 = not here.flags or here.machine != "x86_64" or "avx2" in here.flags
    return here.machine in about.exact_on and same_kernels and has_avx2


def _kernel_error(bundle: Bundle, probes: Sequence[Probe], here: Sequence[Mapping[str, Array]]) -> Drift | None:
    model = bundle.path / manifests.INT8
    if not model.exists():
        return None
    with bundle.held(manifests.INT8) as held:
        session = open_session(held, threads=bundle.threads, entries={**bundle.manifest.session, **IN_FLOAT})
    names = [tensor.name for tensor in bundle.manifest.outputs]
    in_float = (dict(zip(names, session.run(names, dict(probe.inputs)), strict=True)) for probe in probes)
    return drifts.measure(zip(in_float, here, strict=True), drifts.grounds(bundle.manifest.judged))


def _size(bundle: Bundle) -> int:
    return bundle.model.stat().st_size


def _ram(bundle: Bundle) -> int | None:
    if bundle.manifest.budget.max_ram_bytes is None:
        return None
    from runtime.memory import peak_bytes  # here: `import runtime` need not load subprocess

    return peak_bytes(bundle)


def _notes(bundle: Bundle, here: Cpu) -> Iterator[str]:
    if bundle.manifest.verdict is None:
        yield "the manifest does not say whether the export met its budget: export again"
    if saturates := risk(bundle.manifest, here.pairs_in_int16):
        yield saturates
    made = bundle.manifest.versions.get("onnxruntime", "")
    if made and made != ort.__version__:
        yield f"exported with onnxruntime {made}, run here by {ort.__version__}"


def _met(line: Line) -> str:
    return "yes" if line.met else f"**no**{f', {code(line.cause)}' if line.cause else ''}"
