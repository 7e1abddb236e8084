"""Block scales and norms trained so that the coded model says what the FP32 one says: label-free, codes stay as they are.

    minimize  KL = mean over tokens of Σ_v p(v) (ln p(v) - ln q(v))        p: FP32, q: codes under scales s, norms g

over s = s0 (1 + a) of every block and g = g0 (1 + b) of every norm, by Adam on windows of calibration text, within a given time.
The head's and the embedding's scales are left as they are. What was learnt is kept if it lowers the KL, in onnxruntime, on
windows that it was not trained on; else the file is as it was.

The gradient of a scale is that of its weights times their codes:  ∂L/∂s = Σ_{k in block} (∂L/∂W)_k (code_k - zero).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exporter.batches import Array
from exporter.causal.architecture import Decoder
from exporter.causal.blocks import Blocks
from exporter.causal.checkpoint import modules
from exporter.causal.scheme import EMBEDDING, HEAD
from exporter.causal.weights import Written, norms
from exporter.progress import Progress

TOKENS = 1024  # a step learns from so many
RATE, SLOWEST = 2e-3, 0.1  # Adam's rate, and what share of it is left at the end
WARM = 5  # steps in which the rate rises
CLIP = 1.0  # norm of the gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """KL on windows that nothing was trained on, before and after; steps of TOKENS tokens; whether it was kept."""

    before: float
    after: float
    steps: int
    kept: bool


Judge = Callable[[], float]  # KL of the file as it is now, on windows of its own
Teacher = Callable[[Array], Array]  # int64 [batch, tokens] -> logits float32 [batch, tokens, vocabulary]


def improve(
    model: torch.nn.Module,
    decoder: Decoder,
    place: tuple[Path, Written],
    text: tuple[Array, float],
    ends: tuple[Teacher, Judge],
    progress: Progress,
) -> Distilled:
    """Train for some time, and write scales and norms into the weights' file where that helped.

    Args:
        model: transformers' model, which becomes the coded one.
        place: the weights' file, and what lies where in it.
        text: (windows int64 [windows, tokens], seconds).
        ends: what FP32 says; how far the file is from it.
    """
    (file, written), (windows, seconds) = place, text
    teacher, judge = ends
    before = judge()
    learnt = _coded(model, decoder, file, written)
    steps = _train(model, [each.change for each in learnt.values()], windows, teacher, (seconds, progress))
    old = {name: _read(file, written, name) for name in learnt}
    for name, each in learnt.items():
        _write(file, written, name, each.value().numpy())
    after = judge()
    kept = after < before
    if not kept:
        for name, array in old.items():
            _write(file, written, name, array)
    return Distilled(before=before, after=after, steps=steps, kept=kept)


class Learnt(torch.nn.Module):
    """A tensor that is trained as what it was times 1 + change."""

    def __init__(self, start: Array) -> None:
        super().__init__()
        self.start = torch.from_numpy(start)
        self.change = torch.nn.Parameter(torch.zeros_like(self.start))

    def now(self) -> torch.Tensor:
        return self.start * (1 + self.change)

    def value(self) -> torch.Tensor:
        return self.now().detach()


class _Product(torch.autograd.Function):
    """y = x W', W = (code - zero) scale in blocks; W is made again for the way back and never kept."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(x, scale, codes)
        return _times(x, _weight(codes, scale, x.shape[-1]).T)

    @staticmethod
    def backward(context: Any, *given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (gradient,) = given
        x, scale, codes = context.saved_tensors
        columns = x.shape[-1]
        back = _times(gradient, _weight(codes, scale, columns))
        of_weight = _times(gradient.reshape(-1, gradient.shape[-1]).T, x.reshape(-1, columns))
        padded = torch.nn.functional.pad(of_weight, (0, codes.shape[1] * codes.shape[2] - columns))
        return back, (padded.reshape(codes.shape) * codes).sum(dim=2), None


def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, by way of bfloat16 where this CPU is faster so: its error is below that of the int8 activations of the kernels."""
    if a.dtype != torch.float32 or not _halves_are_faster():
        return a @ b
    return (a.bfloat16() @ b.bfloat16()).float()


@cache
def _halves_are_faster() -> bool:
    """Whether a product in bfloat16 takes less than half of the time, as with AMX; without such units it takes longer."""
    a = torch.ones(512, 512)
    seconds = []
    for each in (a, a.bfloat16()):
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            each @ each
            times.append(time.perf_counter() - begin)
        seconds.append(min(times))
    return seconds[1] < seconds[0] / 2


def _weight(codes: torch.Tensor, scale: torch.Tensor, columns: int) -> torch.Tensor:
    """codes int8 [N, blocks, size], less their zero points; float32 [N, columns]."""
    return (codes * scale[:, :, None]).flatten(1)[:, :columns]


class _Linear(torch.nn.Module):
    """Some coded matrices, one below the other, with one input."""

    def __init__(self, parts: list[tuple[torch.Tensor, Learnt]], bias: torch.Tensor | None) -> None:
        super().__init__()
        self.codes, self.scales, self.bias = [codes for codes, _ in parts], [scale for _, scale in parts], bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = zip(self.codes, self.scales, strict=True)
        made: list[torch.Tensor] = [_Product.apply(x, scale.now(), codes) for codes, scale in given]  # type: ignore[no-untyped-call]
        y = made[0] if len(made) == 1 else torch.cat(made, dim=-1)
        return y if self.bias is None else y + self.bias


class _Norm(torch.nn.Module):
    """RMS norm with learnt factors."""

    def __init__(self, factors: Learnt, epsilon: float) -> None:
        super().__init__()
        self.factors, self.epsilon = factors, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.factors.now()


def _coded(model: torch.nn.Module, decoder: Decoder, file: Path, written: Written) -> dict[str, Learnt]:
    """Put codes in the place of the model's weights; {tensor of the file: what is learnt of it}."""
    learnt: dict[str, Learnt] = {}
    model.requires_grad_(False)

    def norm(ours: str, theirs: str) -> None:
        learnt[ours] = Learnt(_read(file, written, ours))
        model.set_submodule(f"model.{theirs}", _Norm(learnt[ours], decoder.epsilon))

    for layer in range(decoder.layers):
        for name, stored in norms(decoder).items():
            norm(f"layers.{layer}.{name}", f"layers.{layer}.{stored}")
        for theirs, roles in modules(decoder).items():
            names = [f"layers.{layer}.{role}" for role in roles]
            if any(written.formats[name] is None for name in names):
                continue  # a float matrix is what it was
            for name in names:
                learnt[f"{name}.scale"] = Learnt(_read(file, written, f"{name}.scale"))
            path = f"model.layers.{layer}.{theirs}"
            parts = [(_codes(file, written, name), learnt[f"{name}.scale"]) for name in names]
            bias = model.get_submodule(path).bias
            model.set_submodule(path, _Linear(parts, bias if isinstance(bias, torch.Tensor) else None))
    norm("norm", "norm")
    for name, theirs in ((EMBEDDING, model.get_input_embeddings()), (HEAD, model.get_output_embeddings())):  # type: ignore[operator]
        if written.formats[name] is not None:
            codes, scale = _codes(file, written, name), torch.from_numpy(_read(file, written, f"{name}.scale"))
            theirs.weight.data = _weight(codes, scale, decoder.hidden)
    return learnt


def _train(
    model: torch.nn.Module,
    changes: list[torch.nn.Parameter],
    windows: Array,
    teacher: Teacher,
    limit: tuple[float, Progress],
) -> int:
    """Steps that were taken within the seconds."""
    seconds, progress = limit
    optimizer = torch.optim.Adam(changes, lr=RATE, betas=(0.9, 0.98))
    begin = time.monotonic()

    def batches() -> Iterator[Array]:
        rng, size = np.random.default_rng(0), max(1, TOKENS // windows.shape[1])
        while True:
            order = rng.permutation(len(windows))
            for first in range(0, len(order), size):
                if time.monotonic() - begin >= seconds:
                    return
                yield windows[order[first : first + size]]

    steps = 0
    for batch in progress.each(batches(), "training block scales"):
        gone = min(1.0, (time.monotonic() - begin) / seconds)
        rate = RATE * (SLOWEST + (1 - SLOWEST) * 0.5 * (1 + math.cos(math.pi * gone)))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / WARM)
        optimizer.zero_grad()
        for window in batch:  # one at a time: the logits of a large vocabulary are what fills the memory
            wanted = torch.from_numpy(teacher(window[None])[0]).log_softmax(-1)
            got = model(input_ids=torch.from_numpy(window[None]), use_cache=False).logits[0].log_softmax(-1)
            loss = torch.nn.functional.kl_div(got, wanted, reduction="sum", log_target=True) / batch.size
            loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(changes, CLIP)
        optimizer.step()
        steps += 1
    return steps


def _codes(file: Path, written: Written, name: str) -> torch.Tensor:
    """code - zero, int16 [N, blocks, size]."""
    blocks = written.formats[name]
    assert isinstance(blocks, Blocks)
    packed = _read(file, written, f"{name}.weight")
    rows, count = packed.shape[:2]
    codes = _unpacked(packed.reshape(rows, -1), blocks).reshape(rows, count, -1).astype(np.int16)
    if f"{name}.zero" in written.tensors:
        zero = _unpacked(_read(file, written, f"{name}.zero"), blocks)[:, :count].astype(np.int16)
        return torch.from_numpy(codes - zero[:, :, None])
    return torch.from_numpy(codes - np.int16(blocks.middle))


def _unpacked(packed: Array, blocks: Blocks) -> Array:
    """uint8 [N, bytes] -> [N, codes]."""
    if blocks.bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), -1)


def _read(file: Path, written: Written, name: str) -> Array:
    place = written.tensors[name]
    count = int(np.prod(place.shape))
    return np.fromfile(file, place.dtype, count, offset=place.offset).reshape(place.shape)


def _write(file: Path, written: Written, name: str, array: Array) -> None:
    place = written.tensors[name]
    with open(file, "r+b") as opened:
        opened.seek(place.offset)
        opened.write(np.ascontiguousarray(array, place.dtype).tobytes())
