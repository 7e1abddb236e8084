"""A causal model's folder -> a bundle that generates: the stages in their order.

folder ─> architecture, checkpoint, words ─> FP32 graph ─> proof against transformers
text ───> moments of every layer's inputs ─> codes ─> loss on text that nothing was fitted to ─> probe ─> bundle
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from exporter import bundle as bundles
from exporter import optional, staged
from exporter.batches import Array
from exporter.causal import (
    architecture,
    checkpoint,
    distill,
    folder,
    graph,
    heard,
    loss,
    proof,
    rounding,
    text,
    weights,
)
from exporter.causal.architecture import Decoder
from exporter.causal.blocks import Blocks
from exporter.causal.checkpoint import Checkpoint
from exporter.causal.distill import Distilled
from exporter.causal.feed import UNPACKED, logits
from exporter.causal.folder import Words
from exporter.causal.proof import Proved
from exporter.causal.report import LanguageReport
from exporter.causal.scheme import AUTO, FLOAT, SCHEMES, WIDE, Scheme
from exporter.causal.store import Store
from exporter.causal.text import Sizes, Text
from exporter.causal.weights import Written
from exporter.errors import RecipeError
from exporter.progress import Progress, Silent
from exporter.report.make import versions
from runtime import cpu, language_check, language_probe
from runtime import files as places
from runtime import language_manifest as manifests
from runtime.decode import Decode
from runtime.errors import BundleError
from runtime.language import LanguageModel, greedy, verify
from runtime.language_manifest import LanguageManifest, Limits, Loss
from runtime.language_probe import Said
from runtime.manifest import Machine, digest, is_language
from runtime.session import open_session

CONTEXT = 8192  # tokens that a bundle has rotary positions for, or the model's own context if that is less
SESSION = {"session.intra_op.allow_spinning": "0"}  # two threads that wait by spinning take half of the speed
PROMPTS, PROMPT_TOKENS, STEPS = 4, 24, 24
TOP, SPREAD = 64, 1024  # logits that the probe records: the largest, and as many spread over the vocabulary
SMALL_FILES = 1 << 19  # the graph, the probe and the manifest take less
# what a layer of AUTO may have, from few bits to many
FORMATS = (Blocks(bits=4, size=64), Blocks(bits=4, size=32), WIDE)
PROOF_SHARE = 0.4  # of the free memory that transformers' model may take; beyond it the first layers are proved
PROOF_LAYERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a user may say of an export.

    scheme: a name of SCHEMES, or a Scheme; AUTO is bits where the model hears them.
    calibration: a UTF-8 text file; None is the default text.
    distill_minutes: for training block scales and norms.
    """

    scheme: str | Scheme = AUTO
    calibration: str | Path | None = None
    limits: Limits = field(default_factory=Limits)
    sizes: Sizes = field(default_factory=Sizes)
    context: int = CONTEXT
    distill_minutes: float = 0.0


def export(
    source: str | Path, out: str | Path, asked: Asked | None = None, progress: Progress | None = None
) -> LanguageReport:
    """Write a bundle of a folder that save_pretrained wrote.

    Raises:
        TraceError: a folder, an architecture or weights that cannot be written, or a graph that is not the model.
        CalibrationError: a text that cannot be read, or is too little.
        RecipeError: no such scheme. BundleError: see bundle.require_place; not enough room on the disk.
    """
    asked, told, path = asked or Asked(), progress or Silent(), Path(source)
    scheme = _scheme(asked.scheme)
    place = require_place(out)
    told.stage(f"reading {path.name}")
    config = architecture.read(path)
    decoder = architecture.decoder(config)
    opened = checkpoint.open_folder(path, decoder)
    words = folder.words(path, config, decoder)
    context = min(decoder.context, asked.context)
    _require_room(opened, place)
    sizes = replace(asked.sizes, tokens=min(asked.sizes.tokens, context))
    told.stage("reading text")
    given = text.read(asked.calibration, words.tokenizer, words.begin, sizes)
    with _staging(place) as staging:
        told.stage("writing the FP32 graph")
        fp32 = _fp32(opened, decoder, staging, context, told)
        told.stage("proving that it is the model")
        proved = _prove(opened, decoder, staging, context)
        chosen = optional.attempt(lambda: _by_ear(opened, scheme, given, (asked.limits, words), told), SCHEMES["mixed"])
        scheme = chosen.value
        told.stage(f"rounding to {scheme.name}")
        tried = optional.attempt(lambda: _codes(opened, scheme, fp32, staging, given, told), None)
        written = tried.value or _plain(opened, scheme, staging, told)
        bundle = staging / "bundle"
        onnx.save(graph.build(decoder, written, context=context), bundle / manifests.MODEL)
        onnx.save(graph.build(decoder, written, context=context, every=True), bundle / "every.onnx")
        learnt = optional.attempt(
            lambda: _distilled(opened, written, staging, given, (asked.distill_minutes, told)), None
        )
        told.stage("measuring the loss")
        lost = _loss(decoder, staging, given, told)
        said = _said(decoder, staging, given)
        (bundle / "every.onnx").unlink()
        language_probe.write(bundle / manifests.PROBE, said)
        _write_words(bundle, words)
        manifest = LanguageManifest(
            name=path.resolve().name,
            architecture=decoder.model_type,
            scheme=scheme.name,
            vocabulary=decoder.vocabulary,
            context=context,
            layers=decoder.layers,
            begin=words.begin,
            end=words.end,
            files={each.name: digest(each) for each in sorted(bundle.iterdir())},
            formats=_formats(opened, written),
            calibration="" if tried.value is None and learnt.value is None else given.name,
            loss=lost,
            limits=asked.limits,
            recorded_on=Machine(machine=cpu.machine(), flags=cpu.flags()),
            session=SESSION,
            versions=versions(),
        )
        told.stage("writing the bundle")
        (bundle / manifests.MANIFEST).write_text(manifests.dumps(manifest), encoding="utf-8")
        LanguageModel(bundle, verify(bundle), threads=1)
        require_place(place)
        staged.move(bundle, place)
    lines = language_check.judge(lost, asked.limits, sum(each.size_bytes for each in manifest.files.values()))
    return LanguageReport(
        name=manifest.name,
        architecture=decoder.model_type,
        scheme=scheme.name,
        parameters=opened.parameters,
        layers=decoder.layers,
        context=context,
        proved=proved,
        formats=manifest.formats,
        calibration=manifest.calibration,
        loss=lost,
        lines=lines,
        met=all(line.met for line in lines),
        fp32_bytes=fp32.bytes,
        bytes=written.bytes,
        distilled=learnt.value,
        notes=_notes(
            tried.why, "; ".join(filter(None, (chosen.why, learnt.why))), given, (decoder.context, context), asked
        ),
    )


def require_place(out: str | Path) -> Path:
    """The output folder: free, empty, or a bundle of either kind, which is replaced.

    Raises:
        BundleError, PacklightError: see bundle.require_place.
    """
    place = Path(out)
    if place.name:
        staged.sweep(place)
    if is_language(place):
        listed = manifests.loads((place / manifests.MANIFEST).read_text(encoding="utf-8"), str(place)).files
        if {each.name for each in place.iterdir()} <= {manifests.MANIFEST, *listed}:
            return places.require_writable(out, "out")
    return bundles.require_place(out)


def _scheme(asked: str | Scheme) -> Scheme:
    if isinstance(asked, Scheme):
        return asked
    if asked not in SCHEMES:
        raise RecipeError("--scheme", found=repr(asked), expected=f"one of {', '.join(SCHEMES)}")
    return SCHEMES[asked]


def _require_room(opened: Checkpoint, place: Path) -> None:
    """Room for the FP32 weights and as many bytes as the largest bundle, before anything is written."""
    need = 8 * opened.parameters + (64 << 20)
    above = next(each for each in place.resolve().parents if each.is_dir())
    free = shutil.disk_usage(above).free
    if free < need:
        raise BundleError(
            str(place), path=str(place), found=f"{free / 1e9:.1f} GB free on its disk",
            expected=f"{need / 1e9:.1f} GB: the weights in float32 for a while, and the bundle",
            do="free some, or choose another --out",
        )  # fmt: skip


@contextmanager
def _staging(place: Path) -> Iterator[Path]:
    """A hidden folder beside the bundle's, gone at the end whatever happens."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with staged.folder(place) as made:
            (made / "bundle").mkdir()
            yield made
    except OSError as error:
        raise BundleError(
            str(place), path=str(place), found=places.said(error), expected="a folder that can be written",
            do=places.remedy(error, "--out"),
        ) from error  # fmt: skip


def _fp32(opened: Checkpoint, decoder: Decoder, staging: Path, context: int, told: Progress) -> Written:
    """The FP32 weights and both graphs of them, in the staging folder."""
    with Store(staging / "fp32.data") as store:
        written = weights.write(opened, FLOAT, store, progress=told)
    onnx.save(graph.build(decoder, written, context=context, every=True), staging / "fp32.every.onnx")
    onnx.save(graph.build(decoder, written, context=context), staging / "fp32.last.onnx")
    return written


def _prove(opened: Checkpoint, decoder: Decoder, staging: Path, context: int) -> Proved:
    """The whole model, or where transformers' would not fit its first layers."""
    held = replace(decoder, context=context)
    if 4 * opened.parameters <= PROOF_SHARE * _free_memory():
        model = proof.reference(opened.folder)
        return proof.prove(model, held, staging / "fp32.every.onnx", staging / "fp32.last.onnx")
    count = max(PROOF_LAYERS, 1 + max(decoder.windows.index(each) for each in set(decoder.windows)))
    short = replace(held, windows=decoder.windows[:count], rope_of=decoder.rope_of[:count])
    part = staging / "part"
    part.mkdir()
    with Store(part / "part.data") as store:
        written = weights.write(replace(opened, decoder=short), FLOAT, store)
    onnx.save(graph.build(short, written, context=context, every=True), part / "every.onnx")
    onnx.save(graph.build(short, written, context=context), part / "last.onnx")
    found = proof.prove(proof.reference(opened.folder, count), short, part / "every.onnx", part / "last.onnx")
    shutil.rmtree(part)
    return found


def _free_memory() -> int:
    """Bytes that a new process could take; on other systems than Linux the pages that are free."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except OSError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _by_ear(opened: Checkpoint, scheme: Scheme, given: Text, within: tuple[Limits, Words], told: Progress) -> Scheme:
    """AUTO with bits where the model hears them: in the bytes of `mixed`, or in those that a limit leaves to the body."""
    if scheme.name != AUTO:
        return scheme
    told.stage("measuring which layers are heard")
    limits, words = within
    found = heard.measure(proof.reference(opened.folder), opened, given.seen, FORMATS)
    most = heard.body_bytes(opened.decoder, SCHEMES["mixed"], found.shapes)
    if limits.max_size_bytes is not None:
        rest = weights.rest_bytes(opened, scheme) + len(words.file) + len(words.template.encode()) + SMALL_FILES
        most = limits.max_size_bytes - rest
    return heard.choose(found, scheme, FORMATS, most)


def _codes(
    opened: Checkpoint, scheme: Scheme, fp32: Written, staging: Path, given: Text, told: Progress
) -> Written | None:
    """The weights in the scheme's formats, rounded by GPTQ."""
    names = rounding.needed(opened.decoder, scheme)
    if not names:
        return None
    second = rounding.hessians(opened.decoder, fp32, staging, given.seen, names, told)
    return _written(opened, scheme, staging, rounding.by_gptq(second), told)


def _plain(opened: Checkpoint, scheme: Scheme, staging: Path, told: Progress) -> Written:
    return _written(opened, scheme, staging, weights.plain, told)


def _written(opened: Checkpoint, scheme: Scheme, staging: Path, how: weights.Round, told: Progress) -> Written:
    with Store(staging / "bundle" / manifests.WEIGHTS) as store:
        return weights.write(opened, scheme, store, round_to=how, progress=told)


def _distilled(
    opened: Checkpoint, written: Written, staging: Path, given: Text, within: tuple[float, Progress]
) -> Distilled | None:
    """Train for some minutes on all but the last eighth of the windows, on which it is judged; None for no minutes."""
    minutes, told = within
    if not minutes or _is_float(written):
        return None
    told.stage(f"training block scales for {minutes:g} minutes")
    decoder, apart = opened.decoder, max(1, len(given.seen) // 8)
    fp32 = open_session(staging / "fp32.every.onnx", entries=UNPACKED)

    def judge() -> float:
        ours = open_session(staging / "bundle" / "every.onnx")
        windows = given.seen[-apart:]
        return loss.measure(lambda ids: logits(fp32, decoder, ids), lambda ids: logits(ours, decoder, ids), windows).kl

    return distill.improve(
        proof.reference(opened.folder), decoder, (staging / "bundle" / manifests.WEIGHTS, written),
        (given.seen[:-apart], 60 * minutes), (lambda ids: logits(fp32, decoder, ids), judge), told,
    )  # fmt: skip


def _loss(decoder: Decoder, staging: Path, given: Text, told: Progress) -> Loss:
    names = ("fp32.every.onnx", "bundle/every.onnx")
    both = [open_session(staging / name, entries=UNPACKED if name == names[0] else SESSION) for name in names]
    windows = told.each(given.unseen, "held-out windows", len(given.unseen))
    found = loss.measure(lambda ids: logits(both[0], decoder, ids), lambda ids: logits(both[1], decoder, ids), windows)
    return Loss(
        text=given.name,
        tokens=found.tokens,
        unknown=round(given.unknown * found.tokens),
        fp32_perplexity=found.fp32_perplexity,
        perplexity=found.perplexity,
        kl=found.kl,
        same_top1=found.same_top1,
    )


def _said(decoder: Decoder, staging: Path, given: Text) -> list[Said]:
    """What the model says to the beginnings of some held-out windows."""
    tokens = min(PROMPT_TOKENS, given.unseen.shape[1] - 1)
    steps = min(STEPS, decoder.context - tokens)
    fp32 = Decode(open_session(staging / "fp32.last.onnx", threads=1, entries=UNPACKED), tokens + steps)
    ours = Decode(open_session(staging / "bundle" / manifests.MODEL, threads=1), tokens + steps)
    found = []
    for window in given.unseen[:PROMPTS]:
        prompt = window[None, :tokens]
        fp32.reset()
        wanted = fp32.step(prompt)[0].copy()
        greedily, behind, ahead = greedy(ours, prompt, steps)
        found.append(_recorded(prompt[0], wanted, greedily, behind, ahead))
    return found


def _recorded(prompt: Array, fp32: Array, tokens: list[int], logits: Array, ahead: list[float]) -> Said:
    spread = np.linspace(0, len(logits) - 1, min(SPREAD, len(logits))).astype(np.int64)
    at = np.union1d(spread, np.argsort(-logits, kind="stable")[:TOP])
    return Said(
        prompt=prompt.astype(np.int64),
        tokens=np.array(tokens, np.int64),
        ahead=np.array(ahead, np.float32),
        at=at,
        logits=logits[at],
        fp32=fp32[at],
    )


def _write_words(bundle: Path, words: Words) -> None:
    (bundle / manifests.TOKENIZER).write_bytes(words.file)
    if words.template:
        (bundle / manifests.TEMPLATE).write_text(words.template, encoding="utf-8")


def _formats(opened: Checkpoint, written: Written) -> dict[str, int]:
    """{format: numbers that have it}, an embedding that is the head once."""
    decoder, counts = opened.decoder, dict[str, int]()
    wide, narrow = decoder.heads * decoder.head_size, decoder.kv_heads * decoder.head_size
    sizes = {
        **{"q": wide, "k": narrow, "v": narrow, "o": wide},
        **dict.fromkeys(("gate", "up", "down"), decoder.intermediate),
        **dict.fromkeys(("head", "embedding"), decoder.vocabulary),
    }
    for name, form in written.formats.items():
        if name == "embedding" and decoder.tied:
            continue
        said = "float32" if form is None else str(form)
        counts[said] = counts.get(said, 0) + decoder.hidden * sizes[name.rpartition(".")[2]]
    return counts


def _is_float(written: Written) -> bool:
    return all(each is None for each in written.formats.values())


def _notes(why: str, unlearnt: str, given: Text, contexts: tuple[int, int], asked: Asked) -> tuple[str, ...]:
    found = [f"rounded to nearest: GPTQ was not tried, because {why}"] if why else []
    found += [f"a step was not taken, because {unlearnt}"] if unlearnt else []
    if asked.calibration is None:
        found.append(f"no --calibration: fitted to and judged on {given.name}")
    if given.unknown > 0.01:
        found.append(
            f"{100 * given.unknown:.0f} % of the text's tokens are unknown to the tokenizer: is it the model's language?"
        )
    if contexts[1] < contexts[0]:
        found.append(f"context {contexts[1]} of the model's {contexts[0]}")
    return tuple(found)
