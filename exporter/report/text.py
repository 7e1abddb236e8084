"""The report for a terminal of 80 columns. Drift stands beside the integer share, always."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from exporter.search import minutes

if TYPE_CHECKING:
    from exporter.mobile import Usability
    from exporter.report.value import Report
    from exporter.search import Point
    from exporter.shrink import Stored
    from runtime.drift import OutputDrift

WIDTH = 80
LABEL = 10
RANDOM = "RANDOM data: ranges and drift mean nothing"
OVERLAPS = "ALL of them were calibrated on too: drift is optimistic"
BAR = 40  # characters of the longest bar
NEAR_DB = 3.0  # what varies has an SNR of its own where it is lower by that
WORST = 5  # tensors that are named; all of them are in report.json
NEARLY_ALL = 1e-4  # a smaller share of values outside is not named, unless clipping it costs noticeably


def summary(report: Report, place: str) -> str:
    """What people want to know first, in three rows: the verdict, what int8 is beside FP32, where the bundle is.

    place: a row that is not cut, as a path in it is copied.
    """
    warned = [RANDOM] if report.random_data else [f"held-out batches: {OVERLAPS}"] if report.overlapping else []
    first, last = (
        (("verdict", verdict(report)), ("int8", _beside(report))),
        [("note", n) for n in (*warned, *report.notes)],
    )
    before, behind = ([line for label, words in rows for line in _row(label, words)] for rows in (first, last))
    return "\n".join([*before, f"{'bundle':<{LABEL}}{place}", *behind])


def picture(report: Report) -> str:
    """FP32 and int8 beside each other as bars: size, and time where it was taken."""
    pairs: list[tuple[str, float, float, Callable[[Any], str]]] = [
        ("size", report.fp32_bytes, report.int8_bytes, _bytes)
    ]
    if report.timing is not None and report.timing.fp32_ms is not None:
        pairs.append(("time", report.timing.fp32_ms, report.timing.int8_ms, lambda ms: f"{ms:.3g} ms"))
    rows = []
    for label, fp32, int8, say in pairs:
        longest = max(fp32, int8) or 1
        for name, value in ((f"{label:<{LABEL}}FP32", fp32), (f"{'':<{LABEL}}int8", int8)):
            rows.append(f"{name}  {'█' * max(1, round(BAR * value / longest)):<{BAR}}  {say(value)}")
    return "\n".join(rows)


def _beside(report: Report) -> str:
    """Size, speed, agreement and coverage of int8 in one sentence."""
    parts = [f"{_bytes(report.fp32_bytes)} -> {_bytes(report.int8_bytes)}"]
    if report.timing is not None and report.timing.ratio is not None:
        parts.append(f"{report.timing.ratio:.2f}x as fast as FP32 here")
    parts += [f"{metric} {fp32:.4f} -> {int8:.4f}" for metric, (fp32, int8) in report.scores.items()]
    hardest = min(report.drift.outputs, key=_judged_db, default=None)
    if hardest is not None:
        parts.append(f"{hardest.name}: {_drift(hardest)}")
    return f"{', '.join(parts)}; {_percent(report.integer_macs)} of MACs in integers"


def _judged_db(output: OutputDrift) -> float:
    return output.varying_db if output.by == "reals" else math.inf


def render(report: Report) -> str:
    """Asked, decided, measured: at most WIDTH columns."""
    lines = [
        *_row("asked", f"{report.name} for {report.target} (recipe {report.recipe})"),
        *(_row("note", "; ".join(report.notes)) if report.notes else []),
        *_row("traced", _traced(report)),
        *_row("decided", _decided(report)),
        *(_row("", f"kept from the file: {report.kept}") if report.kept else []),
        *(line for layers in (*_float_layers(report), *_dynamic_lstm(report)) for line in _row("", layers)),
        *(line for correction in _corrections(report) for line in _row("", correction)),
        *(line for step, why in report.untried.items() for line in _row("", f"{step} not tried, because {why}")),
        *_row("search", search(report)),
        *_row("data", _data(report)),
        *(line for covered in _coverage(report) for line in _row("", covered)),
        *_row("integers", f"{_percent(report.integer_macs)} of {_millions(report.macs)} MACs ({_kernels(report)})"),
    ]
    for output in report.drift.outputs:
        lines += _row("drift", f"{output.name}: {_drift(output)}")
    phone = "" if report.ort_bytes is None else f"; model.int8.ort {_bytes(report.ort_bytes)}"
    memory = "" if report.ram_bytes is None else f"; {_bytes(report.ram_bytes)} of memory to run it"
    lines += _row("size", f"{_bytes(report.fp32_bytes)} -> {_bytes(report.int8_bytes)}{phone}{memory}")
    lines += [line for weights in _stored(report) for line in _row("", weights)]
    if report.ort_integer_macs is not None:
        share = f"{_percent(report.ort_integer_macs)} of MACs in integer kernels"
        lines += _row(
            "phone", f"model.int8.ort: {share}, outputs equal the .onnx file's on {report.ort_batches} batches"
        )
    for file, judged in report.mobile.items():
        lines += _row("phone", f"{file}: " + ", ".join(map(_usable, judged)))
    if report.timing is not None and report.timing.ratio is not None:
        threads = f"{report.timing.threads} thread{'s' if report.timing.threads != 1 else ''}"
        slower = ": SLOWER" if report.timing.ratio < 1 else ""
        lines += _row(
            "speed", f"int8 is {report.timing.ratio:.2f}x as fast as FP32 here{slower} ({threads}, medians in turn)"
        )
    for metric, (fp32, int8) in report.scores.items():
        lines += _row("score", f"{metric}: FP32 {fp32:.4f}, int8 {int8:.4f}")
    lines += _row("budget", "; ".join(map(str, report.lines)) or "none asked for")
    lines += _row("verdict", verdict(report))
    return "\n".join(lines)


def verdict(report: Report) -> str:
    """Met or not, and by what; a model that is slower than FP32, or has nothing in integers, says so here."""
    said = "met" if report.met else "NOT MET: " + "; ".join(str(line) for line in report.lines if not line.met)
    if not (report.int8_nodes or report.dynamic_nodes or report.integer_macs):
        largest = max(report.float_layers, key=lambda layer: layer.macs, default=None)
        return f"{said}, but NOTHING RUNS IN INTEGERS: {largest.reason if largest else 'no layers'}"
    ratio = None if report.timing is None or "speedup" in said else report.timing.ratio
    return said if ratio is None or ratio >= 1 else f"{said}, but SLOWER than FP32 here ({ratio:.2f}x)"


def _drift(output: OutputDrift) -> str:
    """How far one output is from FP32's, by its kind; what varies by itself where that says something else."""
    if output.by == "equal":
        return f"{_percent(output.equal or 0.0)} of integers equal"
    if output.by == "set":
        return f"{_percent(output.matched or 0.0)} of its items have a partner"
    top1 = "" if output.same_top1 is None else f", same top-1 {_percent(output.same_top1)}"
    worst, varying = output.worst, ""
    if worst is not None and worst.judged_db < output.snr_db - NEAR_DB:
        where = f" in {worst.where}" if worst.where else ""
        varying = f", {worst.judged_db:.1f} dB of what varies{where}"
    constant = ", constant" if output.constant else ""
    numbers = f"cosine {output.cosine:.5f}, max abs {output.max_abs:.3g}"
    return f"SNR {output.snr_db:.1f} dB{varying}{constant}, {numbers}{top1}"


def search(report: Report) -> str:
    """What the search did, and what stands in the way where it did not get there."""
    found = report.search
    first, chosen = found.first, found.chosen
    said = f"{_effort(report)} on calibration data, costs {found.costs}"
    if chosen.float_layers or chosen.dynamic_layers or chosen.opened:
        time = f"{100 * (chosen.ms / first.ms - 1):+.1f} % {'time' if chosen.timed else 'predicted time'}"
        done = f"{turned(chosen)}: {first.snr_db:.1f} -> {chosen.snr_db:.1f} dB, {time}"
    else:
        done = f"the static plan stays, {first.snr_db:.1f} dB"
    return "; ".join(filter(None, (done, _beside_fp32(report), _short(report), said)))


def _effort(report: Report) -> str:
    """How many evaluations there were, and how long they took; what was announced beside both, where many were."""
    found, took = report.search, report.search_took
    told = f"{found.evaluations} evaluation{'s' if found.evaluations != 1 else ''}"
    if found.announced == found.evaluations:
        return told if took is None else f"{told} in {minutes(took.seconds)}"
    if took is None:
        return f"{told} ({found.announced} announced)"
    return f"{told} in {minutes(took.seconds)} (announced: {found.announced} in {minutes(took.announced_seconds)})"


def _beside_fp32(report: Report) -> str:
    """How fast the plan is beside FP32, as the search timed them; plainly where it is slower. Empty where FP32 was not timed."""
    found = report.search
    if found.fp32_ms is None or not found.chosen.ms:  # of nodes that a plan can choose for, and there are none
        return ""
    how = "when it was timed" if found.chosen.timed or found.chosen == found.first else "as predicted"
    speed = f"{found.fp32_ms / found.chosen.ms:.2f}x as fast as FP32 {how}"
    if found.chosen.ms <= found.fp32_ms:
        return speed
    if min(point.ms for point in found.points) > found.fp32_ms:
        return f"{speed}: NO PLAN WITH AN INT8 LAYER IS FASTER"
    return f"{speed}: a faster plan is not accurate enough"


def turned(point: Point) -> str:
    """ "2 layers float, 24 dynamic, 20 gates open": what a plan has otherwise than the static one."""
    said: list[str] = []
    for name, count in (("float", len(point.float_layers)), ("dynamic", len(point.dynamic_layers))):
        if count:
            said.append(f"{count} {name}" if said else f"{count} layer{'s' if count != 1 else ''} {name}")
    if gates := len(point.opened):
        said.append(f"{gates} gate{'s' if gates != 1 else ''} open")
    return ", ".join(said)


def _decided(report: Report) -> str:
    dynamic = f", {report.dynamic_nodes} dynamic" if report.dynamic_nodes else ""
    return f"{report.int8_nodes} nodes int8{dynamic}, {report.float_nodes} float"


def _short(report: Report) -> str:
    """Why the plan is short of what was asked for; empty where it is not."""
    found = report.search
    if found.reached or "search" in report.untried:
        return ""
    worst = ", ".join("..".join(dict.fromkeys((group[0], group[-1]))) for group in found.worst)
    most = f"; most of the error arises in {worst}" if worst else ""
    if not found.accepted:
        return (
            f"NO PLAN MEETS THE BUDGET{', as far as the caps allow' if found.capped else ''}: this is the closest{most}"
        )
    if found.capped:
        return f"short of the aim of {found.aim_snr_db:g} dB, as far as the caps allow"
    return f"short of the aim of {found.aim_snr_db:g} dB: more float layers are not worth their time{most}"


def _stored(report: Report) -> Iterable[str]:
    """Large float weights, one line for those of one op_type that were stored in one way."""
    groups: dict[tuple[str, str], list[Stored]] = {}
    for weight in report.stored:
        groups.setdefault((weight.op_type, weight.why), []).append(weight)
    for (op_type, why), same in groups.items():
        if len(same) == 1:
            yield str(same[0])
            continue
        before, after = sum(each.before for each in same), sum(each.after for each in same)
        sizes = f"{_bytes(before)} -> {_bytes(after)}" if after < before else _bytes(before)
        yield f"{len(same)} weights of {op_type}: {sizes}, {why}"


def _traced(report: Report) -> str:
    if report.traced_by == "onnx":
        return "given as ONNX"
    return f"by {report.traced_by}; equals torch at {len(report.proved)} size{'s' if len(report.proved) != 1 else ''}"


def _float_layers(report: Report) -> Iterable[str]:
    """Layers that hold MACs and are float, one line a reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for layer in report.float_layers:
        reason, *_ = layer.reason.split("; ")  # what later stages noted is in plan.txt
        reasons.setdefault((layer.op_type, reason), []).append(layer.node)
    for (op_type, reason), nodes in reasons.items():
        yield (
            f"float: {op_type} {nodes[0]}: {reason}" if len(nodes) == 1 else f"float: {len(nodes)} {op_type}: {reason}"
        )


def _dynamic_lstm(report: Report) -> Iterable[str]:
    """LSTM that run in integers: no search chose them."""
    found = [node for node in report.nodes if node.kernel == "DynamicQuantizeLSTM"]
    if found:
        yield f"dynamic: {len(found)} LSTM: {found[0].reason}"


def _corrections(report: Report) -> Iterable[str]:
    for tried in report.corrections:
        if tried.before_db is None or tried.after_db is None:
            yield f"{tried.name} correction not tried, because {tried.why}"
            continue
        verdict = "kept" if tried.kept else f"not kept, because {tried.why}" if tried.why else "not kept"
        yield f"{tried.name} correction {verdict}: {tried.before_db:.1f} -> {tried.after_db:.1f} dB, {tried.rounded} rounded"


def _data(report: Report) -> str:
    text = f"{report.calibration_batches} batches calibrated ({report.ranges_by}), {report.drift.batches} held out"
    if report.overlapping:
        text += f"; {OVERLAPS}"
    elif report.repeated_batches:
        text += f" ({report.repeated_batches} more left out: calibration had seen them)"
    text += f"; {report.enough}"
    if report.skipped:
        more = ", ..." if len(report.skipped) > 3 else ""
        text += f"; {len(report.skipped)} pictures skipped: {', '.join(report.skipped[:3])}{more}"
    return text + (f"; {RANDOM}" if report.random_data else "")


def _coverage(report: Report) -> Iterable[str]:
    """How many tensors held every held-out value in their range, how many nearly all, and the worst of the others."""
    outside, tensors = report.outside, len(report.coverage)
    if not tensors:
        return
    named = [each for each in outside if each.outside >= NEARLY_ALL or each.uncovered]
    batches = f"{report.coverage_batches} held-out batch{'es' if report.coverage_batches != 1 else ''}"
    nearly = f", {len(outside) - len(named)} nearly all" if len(outside) > len(named) else ""
    yield f"{tensors - len(outside)} of {tensors} ranges hold every value of {batches}{nearly}"
    for each in named[:WORST]:
        yield f"outside: {each.tensor}: {_share(each.outside)} of values, by up to {_share(each.beyond)} of the range"
    if len(named) > WORST:
        yield f"outside: {len(named) - WORST} more, less of each"


def _kernels(report: Report) -> str:
    with_macs = [count for count in report.kernels if count.macs]
    return ", ".join(f"{count.kernel} {count.types} {count.nodes}" for count in with_macs[:4])


def _usable(judged: Usability) -> str:
    as_is = "" if judged.verdict == judged.verdict_as_is else " with fixed sizes"
    return f"{judged.provider} {judged.verdict}{as_is} ({judged.taken} of {judged.nodes} nodes)"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"  # a space that does not break


def _share(share: float) -> str:
    """A percentage with the digits that count: shares of values are most often far below 1 %."""
    if 0 < share < 1e-5:
        return "under 0.001\u00a0%"
    return f"{100 * share:.{0 if share >= 0.1 else 1 if share >= 0.01 else 3}f}\u00a0%"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}\u00a0M" if count >= 1e5 else str(count)


def _bytes(size: int) -> str:
    return f"{size / 1e6:.2f}\u00a0MB" if size >= 1e4 else f"{size}\u00a0bytes"


def _row(label: str, value: str) -> list[str]:
    return textwrap.wrap(
        value, WIDTH, initial_indent=f"{label:<{LABEL}}", subsequent_indent=" " * LABEL, break_on_hyphens=False
    )
