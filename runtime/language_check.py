"""Whether a language model's bundle is what it was, here: its limits as measured at export, its words and logits as recorded.

device_q   rms(here - recorded) / rms(recorded - FP32), over the logits behind every prompt: what another CPU changes, in
           units of what quantization did; at most Q_LIMIT, or nothing where the difference is below FLOAT_NOISE_DB
tokens     the share of prompts that are followed by the recorded greedy tokens, up to a step that was undecided: one whose
           best logit was ahead of the second by less than twice the largest error of a logit here; at least 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort

from runtime import cpu, language_probe, trusted
from runtime import language_manifest as manifests
from runtime.errors import DriftExceeded
from runtime.exported import Line, number
from runtime.gate import FLOAT_NOISE_DB, Q_LIMIT
from runtime.language import greedy
from runtime.language_manifest import Limits, Loss
from runtime.manifest import Machine, canonical
from runtime.outcome import Outcome, of_lines
from runtime.printable import printable
from runtime.probe import MOST_BYTES

if TYPE_CHECKING:
    from runtime.cpu import Cpu
    from runtime.drift import Array
    from runtime.language import LanguageModel
    from runtime.language_probe import Said


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageVerdict:
    """Whether the bundle meets its limits and says here what it said there, and every number behind it.

    q: see the module. same_tokens: tokens that are the recorded ones; undecided: prompts that went another way where that is
    allowed. exact: every logit that was recorded is equal bit for bit.
    """

    met: bool
    lines: tuple[Line, ...]
    loss: Loss
    q: float
    snr_db: float
    prompts: int
    same_tokens: int
    tokens: int
    undecided: int
    exact: bool
    cpu: Cpu
    recorded_on: Machine
    onnxruntime: str

    def require(self) -> None:
        """Raise DriftExceeded, naming each limit that is not met."""
        if not self.met:
            unmet = "; ".join(str(line) for line in self.lines if not line.met)
            raise DriftExceeded("budget not met", verdict=self, found=unmet)  # type: ignore[arg-type]

    def to_json(self) -> str:
        return canonical(self)


def check(model: LanguageModel) -> LanguageVerdict:
    """Run the bundle's prompts here and hold them against what was recorded."""
    about = model.manifest
    file = model.path / manifests.PROBE
    said = language_probe.read(file, about.vocabulary, trusted.held(file, about.files[file.name], MOST_BYTES))
    decode = model.decode(max(len(each.prompt) + len(each.tokens) for each in said))
    heard = [greedy(decode, each.prompt[None], len(each.tokens)) for each in said]
    errors = np.concatenate([logits[each.at] - each.logits for each, (_, logits, _) in zip(said, heard, strict=True)])
    quantization = np.concatenate([each.logits - each.fp32 for each in said])
    size = _rms(np.concatenate([each.logits for each in said]))
    snr_db = float(20 * np.log10(size / max(_rms(errors), 1e-30)))
    q = 0.0 if snr_db >= FLOAT_NOISE_DB else _rms(errors) / max(_rms(quantization), 1e-30)
    least = 2 * float(np.abs(errors).max())
    same = [_same(each, tokens) for each, (tokens, _, _) in zip(said, heard, strict=True)]
    whole = [count == len(each.tokens) for each, count in zip(said, same, strict=True)]
    undecided = [not all_ and each.ahead[n] <= least for each, n, all_ in zip(said, same, whole, strict=True)]
    share = sum(a or b for a, b in zip(whole, undecided, strict=True)) / len(said)
    lines = (
        *judge(about.loss, about.limits, sum(file.size_bytes for file in about.files.values())),
        Line(what="device_q logits", found=q, limit=Q_LIMIT, met=q <= Q_LIMIT),
        Line(what="tokens as recorded", found=share, limit=1.0, met=share >= 1),
    )
    return LanguageVerdict(
        met=all(line.met for line in lines),
        lines=lines,
        loss=about.loss,
        q=q,
        snr_db=min(snr_db, 999.0),
        prompts=len(said),
        same_tokens=sum(same),
        tokens=sum(len(each.tokens) for each in said),
        undecided=sum(undecided),
        exact=not errors.any(),
        cpu=cpu.read(),
        recorded_on=about.recorded_on,
        onnxruntime=ort.__version__,
    )


def judge(loss: Loss, limits: Limits, size_bytes: int) -> tuple[Line, ...]:
    """The limits that were asked for, held against what was measured at export."""
    found = {
        "max_kl": loss.kl,
        "max_rise": loss.rise,
        "min_same_top1": loss.same_top1,
        "max_size_bytes": float(size_bytes),
    }
    asked = ((name, getattr(limits, name), value) for name, value in found.items())
    return tuple(
        Line(what=name, found=value, limit=limit, met=value <= limit if name.startswith("max") else value >= limit)
        for name, limit, value in asked
        if limit is not None
    )


def _same(said: Said, tokens: list[int]) -> int:
    """How many of the recorded tokens came before the first other one."""
    return next((n for n, (a, b) in enumerate(zip(said.tokens, tokens, strict=True)) if a != b), len(tokens))


def _rms(values: Array) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


def outcome(verdict: LanguageVerdict, name: str, path: str = "") -> Outcome:
    """For CI: one case a limit."""
    return Outcome(command="check", about=name, path=path, cases=of_lines(verdict.lines), page=markdown(verdict, name))


def markdown(verdict: LanguageVerdict, name: str) -> str:
    """The verdict, its limits, what was lost at export, what this device says."""
    loss = verdict.loss
    undecided = f", {verdict.undecided} of the prompts undecided from there" if verdict.undecided else ""
    same = "bit for bit" if verdict.exact else f"at {verdict.snr_db:.1f} dB"
    return "\n".join(
        [
            f"## {printable(name)}: {'met' if verdict.met else 'not met'}",
            "",
            "| limit | found | limit is | met |",
            "|---|---|---|---|",
            *(
                f"| {x.what} | {number(x.found)} | {number(x.limit)} | {'yes' if x.met else 'NO'} |"
                for x in verdict.lines
            ),
            "",
            f"At export: perplexity {loss.fp32_perplexity:.2f} -> {loss.perplexity:.2f} ({100 * loss.rise:+.1f} %), KL "
            f"{loss.kl:.4f}, same top-1 {100 * loss.same_top1:.1f} %, over {loss.tokens} tokens of {printable(loss.text)}.",
            f"Here: logits as recorded {same}, {verdict.same_tokens} of {verdict.tokens} greedy tokens the same{undecided};",
            f"{printable(verdict.cpu.name)}, onnxruntime {verdict.onnxruntime}.",
            "",
        ]
    )
