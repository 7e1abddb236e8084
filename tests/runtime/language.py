"""A language model's bundle without any of the exporter: the decoder of tests/runtime/decoder.py, whose tokens are letters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from runtime import cpu, language_probe
from runtime import language_manifest as manifests
from runtime.decode import Decode
from runtime.language import greedy
from runtime.language_manifest import LanguageManifest, Limits, Loss
from runtime.language_probe import Said
from runtime.manifest import Machine, digest
from runtime.session import open_session
from tests.runtime import decoder

LETTERS = "^$abcdefghi"  # ^ begins a text, $ ends an answer
TEMPLATE = "^{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    found = Tokenizer(models.WordLevel({letter: at for at, letter in enumerate(LETTERS)}, unk_token="a"))
    found.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    found.decoder = decoders.Fuse()
    return found


def write(folder: Path, *, template: str | None = TEMPLATE, context: int = 64, limits: Limits | None = None) -> Path:
    """Write the bundle, with two prompts recorded here."""
    folder.mkdir(parents=True)
    decoder.save(folder / manifests.MODEL)
    (folder / manifests.WEIGHTS).write_bytes(b"\0")
    tokenizer().save(str(folder / manifests.TOKENIZER))
    if template is not None:
        (folder / manifests.TEMPLATE).write_text(template)
    decode = Decode(open_session(folder / manifests.MODEL, threads=1), 32)
    language_probe.write(folder / manifests.PROBE, [said(decode, [0, 3, 4]), said(decode, [0, 7, 7, 2])])
    manifest = LanguageManifest(
        name="letters", architecture="mean", scheme="fp32", vocabulary=decoder.VOCABULARY, context=context, layers=1,
        begin=(0,), end=(1,), files={each.name: digest(each) for each in sorted(folder.iterdir())},
        formats={"float32": 352}, calibration="", limits=limits or Limits(),
        loss=Loss(text="letters", tokens=10, unknown=0, fp32_perplexity=5.0, perplexity=5.5, kl=0.02, same_top1=0.9),
        recorded_on=Machine(machine=cpu.machine(), flags=cpu.flags()),
    )  # fmt: skip
    (folder / manifests.MANIFEST).write_text(manifests.dumps(manifest))
    return folder


def said(decode: Decode, prompt: list[int]) -> Said:
    tokens, logits, ahead = greedy(decode, np.array([prompt]), 6)
    return Said(
        prompt=np.array(prompt), tokens=np.array(tokens), ahead=np.array(ahead, np.float32),
        at=np.arange(decoder.VOCABULARY), logits=logits, fp32=logits + np.float32(0.01),
    )  # fmt: skip


def followed(ids: list[int], steps: int) -> list[int]:
    """The greedy answer by hand, which ends before `$`."""
    answer: list[int] = []
    for _ in range(steps):
        token = int(decoder.expected([*ids, *answer]).argmax())
        if token == 1:
            break
        answer.append(token)
    return answer
