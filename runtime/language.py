"""A language model's bundle on the device: text in, text out, as it comes.

    model = runtime.load("build/smollm")
    for piece in model.generate("The lighthouse keeper", max_new_tokens=40):
        print(piece, end="", flush=True)

Needs numpy, onnxruntime and, for text, `tokenizers` (extra `[text]`); messages need jinja2 as well (extra `[chat]`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime import language_manifest as manifests
from runtime import trusted
from runtime.decode import Decode
from runtime.errors import BundleError, InputError, install
from runtime.language_manifest import LanguageManifest
from runtime.manifest import MANIFEST_BYTES
from runtime.sampling import Sampling
from runtime.session import open_session
from runtime.verified import hold_files

if TYPE_CHECKING:
    from runtime.drift import Array

Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message]
TEXT_BYTES = 64 << 20  # of a tokenizer or a template
LARGE = (manifests.MODEL, f"{manifests.MODEL}.data")  # held while the session opens them
GROWTH = 256  # a cache is made for a multiple of so many tokens
UNFINISHED = "�"  # what a tokenizer gives for bytes that are no character yet


def verify(path: str | os.PathLike[str]) -> LanguageManifest:
    """Read a bundle's manifest and hold every file of the folder against it.

    Raises:
        BundleError: a bad manifest; a file that is missing, not listed, no plain file, or of another size or hash.
    """
    folder, file = Path(path), Path(path) / manifests.MANIFEST
    try:
        text = trusted.read(file, MANIFEST_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(str(file), path=str(file), found="bytes that are not UTF-8", expected="JSON") from error
    found = manifests.loads(text, str(file))
    hold_files(folder, found.files, later=LARGE)
    return found


class LanguageModel:
    """A verified bundle with its decoder open. One conversation at a time keeps its cache; see `generate`."""

    def __init__(
        self, path: Path, manifest: LanguageManifest, threads: int | None = None, providers: Sequence[str] | None = None
    ) -> None:
        self.path, self.manifest, self.threads = path, manifest, threads
        with ExitStack() as stack:
            for name in LARGE:
                if name in manifest.files:
                    stack.enter_context(trusted.steady(path / name, manifest.files[name]))
            self._session = open_session(
                path / manifests.MODEL, threads=threads, providers=providers, entries=manifest.session
            )
        wide = self._session.get_outputs()[0].shape[-1]
        if wide != manifest.vocabulary:
            raise BundleError(str(path), path=str(path), found=f"{wide} logits", expected=f"{manifest.vocabulary}")
        self._idle: tuple[Decode, list[int]] | None = None

    def __repr__(self) -> str:
        return f"LanguageModel({str(self.path)!r}, name={self.manifest.name!r}, scheme={self.manifest.scheme!r})"

    def text(self, name: str) -> str:
        """A text of the bundle, read now and held against the manifest.

        Raises:
            BundleError: it is not as it was when the bundle was verified, more than 64 MiB, or not UTF-8.
        """
        file = self.path / name
        try:
            return trusted.held(file, self.manifest.files[name], TEXT_BYTES).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BundleError(str(file), path=str(file), found="bytes that are not UTF-8", expected="text") from error

    def decode(self, capacity: int, rows: int = 1) -> Decode:
        """The decoder with an empty cache of its own, to be driven by hand."""
        return Decode(self._session, capacity, rows)

    def cache_bytes(self, tokens: int) -> int:
        """Of the keys and values of so many tokens."""
        shapes = (each.shape for each in self._session.get_inputs() if len(each.shape) == 4)
        return sum(4 * heads * size * tokens for _, heads, _, size in shapes)

    @cached_property
    def tokenizer(self) -> Any:
        """The bundle's tokenizer, of the library tokenizers.

        Raises:
            BundleError: the library is not installed, or refuses the file.
        """
        file = self.path / manifests.TOKENIZER
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise BundleError(str(file), path=str(file), found="no package tokenizers", do=install("text")) from error
        try:
            found = Tokenizer.from_str(self.text(manifests.TOKENIZER))
        except BundleError:
            raise
        except BaseException as error:  # the library raises Exception itself, and its panics are none
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise BundleError(str(file), path=str(file), found=str(error)[:120], expected="a tokenizer.json") from error
        found.no_padding()
        found.no_truncation()
        return found

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with those that begin one."""
        found = list(self.tokenizer.encode(text).ids)
        begin = list(self.manifest.begin)
        return found if found[: len(begin)] == begin else begin + found

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a conversation in the model's own form, up to where its answer begins.

        Args:
            messages: [{"role": "user", "content": "..."}, ...]

        Raises:
            BundleError: the bundle has no chat template, or jinja2 is not installed.
            InputError: no messages, or the template refuses them.
        """
        from runtime.chat import render  # here: it needs jinja2

        return list(self.tokenizer.encode(render(self, messages), add_special_tokens=False).ids)

    def tokens(self, ids: Sequence[int], max_new_tokens: int = 256, sampling: Sampling | None = None) -> Iterator[int]:
        """The tokens of an answer, one by one; it ends before the first of `manifest.end`.

        What the last conversation has in common with this prompt is not computed again.

        Raises:
            InputError: an empty prompt, a token outside the vocabulary, or more tokens than the context has places.
        """
        prompt = [int(token) for token in ids]
        self._require_room(prompt, max_new_tokens)
        return self._tokens(prompt, max_new_tokens, sampling or Sampling())

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """The answer's text, piece by piece.

        Args:
            prompt: a text, tokens, or messages [{"role": ..., "content": ...}, ...].
            temperature, top_k, top_p, seed: see sampling.Sampling; greedy by default, which is the same every time.
            stop: texts before which the answer ends.

        Raises:
            InputError: see `tokens` and `chat`; a setting outside its range.
        """
        ids = self._ids(prompt)
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        ends = [stop] if isinstance(stop, str) else list(stop)
        pieces = self._pieces(self.tokens(ids, max_new_tokens, sampling), list(ids)[-8:])
        return until(pieces, [end for end in ends if end])

    def batch(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 256, sampling: Sampling | None = None
    ) -> list[str]:
        """The answers to several prompts of any lengths, computed together.

        Raises:
            InputError: no prompt; of each, see `tokens` and `chat`.
        """
        if not prompts:
            raise InputError("prompts", found="none", expected="at least one")
        ids = [[int(token) for token in self._ids(prompt)] for prompt in prompts]
        for row in ids:
            self._require_room(row, max_new_tokens)
        how = sampling or Sampling()
        counts, generator = [len(row) for row in ids], how.generator()
        steps = min(max_new_tokens, self.manifest.context - max(counts))
        decode = self.decode(max(counts) + steps, len(ids))
        logits = decode.step(np.array([row + [0] * (max(counts) - len(row)) for row in ids], np.int64), counts)
        answers: list[list[int]] = [[] for _ in ids]
        open_rows = set(range(len(ids)))
        for step in range(steps):
            drawn = [how.choose(each, generator) for each in logits]
            open_rows -= {at for at in open_rows if drawn[at] in self.manifest.end}
            for at in open_rows:
                answers[at].append(drawn[at])
            if not open_rows or step + 1 == steps:
                break
            logits = decode.step(np.array(drawn, np.int64)[:, None])
        before = [row[-8:] for row in ids]
        return ["".join(self._pieces(iter(answer), row)) for answer, row in zip(answers, before, strict=True)]

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        """Tokens of a text, of messages, or what are tokens already."""
        if isinstance(prompt, str):
            return self.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            return self.chat(prompt)  # type: ignore[arg-type]
        return prompt  # type: ignore[return-value]

    def _require_room(self, prompt: list[int], more: int) -> None:
        if not prompt:
            raise InputError("prompt", found="no token", expected="at least one", do="give a text that is not empty")
        if more < 1:
            raise InputError("max_new_tokens", found=str(more), expected="1 or more")
        if len(prompt) >= self.manifest.context:
            raise InputError(
                "prompt", found=f"{len(prompt)} tokens", expected=f"fewer than the context of {self.manifest.context}",
                do="shorten it",
            )  # fmt: skip
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.manifest.vocabulary:
            found = str(low if low < 0 else high)
            raise InputError("prompt: a token", found=found, expected=f"0 to {self.manifest.vocabulary - 1}")

    def _tokens(self, prompt: list[int], more: int, sampling: Sampling) -> Iterator[int]:
        most = min(self.manifest.context, len(prompt) + more)
        decode, seen = self._cache(most, prompt)
        generator = sampling.generator()
        try:
            logits = decode.step(np.array([prompt[len(seen) :]], np.int64))
            seen = list(prompt)
            for step in range(most - len(prompt)):
                token = sampling.choose(logits[0], generator)
                if token in self.manifest.end:
                    return
                yield token
                if step + 1 < most - len(prompt):
                    logits = decode.step(np.array([[token]], np.int64))
                    seen.append(token)
        finally:
            self._idle = (decode, seen)

    def _cache(self, capacity: int, prompt: list[int]) -> tuple[Decode, list[int]]:
        """A cache with room, and the first tokens of the prompt that it holds already. Nobody else has it meanwhile."""
        held, self._idle = self._idle, None
        if held is None or held[0].capacity < capacity:
            room = min(self.manifest.context, -(-capacity // GROWTH) * GROWTH)
            return self.decode(room), []
        decode, seen = held
        same = 0
        for ours, theirs in zip(
            seen, prompt[:-1], strict=False
        ):  # the last token is always computed: its logits are wanted
            if ours != theirs:
                break
            same += 1
        decode.rewind(same)
        return decode, prompt[:same]

    def _pieces(self, tokens: Iterator[int], before: list[int]) -> Iterator[str]:
        """Text as it becomes certain. A tokenizer may join a token with the one before: both are decoded, and the text
        that was there before is cut off."""
        held, start, end = list(before), 0, len(before)
        for token in tokens:
            held.append(token)
            old, new = self.tokenizer.decode(held[start:end]), self.tokenizer.decode(held[start:])
            if len(new) > len(old) and not new.endswith(UNFINISHED):
                yield new[len(old) :]
                start, end = end, len(held)
        old, new = self.tokenizer.decode(held[start:end]), self.tokenizer.decode(held[start:])
        if len(new) > len(old):
            yield new[len(old) :]


def until(pieces: Iterator[str], ends: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first of `ends`; what may be the beginning of one is held back until it is known."""
    if not ends:
        yield from pieces
        return
    pattern, held = re.compile("|".join(map(re.escape, ends))), ""
    longest = max(map(len, ends))
    for piece in pieces:
        held += piece
        if found := pattern.search(held):
            if found.start():
                yield held[: found.start()]
            return
        safe = len(held)
        for size in range(min(longest - 1, len(held)), 0, -1):
            if any(end.startswith(held[-size:]) for end in ends):
                safe = len(held) - size
                break
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def greedy(decode: Decode, ids: Array, steps: int) -> tuple[list[int], Array, list[float]]:
    """(tokens of largest logit, logits behind the prompt, by how much the best of each step is ahead of the second)."""
    decode.reset()
    logits = decode.step(ids)
    first, tokens, ahead = logits[0].copy(), [], []
    for step in range(steps):
        second, best = np.partition(logits[0], -2)[-2:]
        tokens.append(int(logits[0].argmax()))
        ahead.append(float(best - second))
        if step + 1 < steps:
            logits = decode.step(np.array([[tokens[-1]]], np.int64))
    return tokens, first, ahead
