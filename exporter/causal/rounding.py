"""GPTQ in blocks: a linear layer's codes that make up for each other's errors on calibration text.

The error of y = W x over the text is  e' H e  a row,  H = E[x x'],  e = w - ŵ. Columns are rounded in turn to the nearest
plane (exporter/numerics/plane.py), and a block gets its scale and zero point when its first column is due, from the weights as
the columns before it have left them, the squared error of each column weighed by H's diagonal.

H is summed from the FP32 graph, of as many layers at once as HELD_BYTES hold;
the graph runs as far as the last of them.

Source: Frantar et al. 2022, arXiv 2210.17323.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from exporter.batches import Array
from exporter.causal import graph
from exporter.causal.architecture import Decoder
from exporter.causal.blocks import Blocked, Blocks, fit, in_blocks, nearest
from exporter.causal.checkpoint import Linear
from exporter.causal.feed import UNPACKED, feed
from exporter.causal.scheme import Scheme
from exporter.causal.weights import Round, Written, linears
from exporter.numerics import plane
from exporter.progress import Progress, Silent
from runtime.session import open_session

HELD_BYTES = 1 << 30  # of H at once
ROWS = 4096  # of a weight that are solved at once

Hessians = Callable[
    [str], Array | None
]  # name of a linear layer -> H, float64 [K, K], in the order in which layers run


def to_codes(linear: Linear, blocks: Blocks, second: Array) -> Blocked:
    """Codes by GPTQ; those of rounding to nearest where H says that they are better, row by row.

    Args:
        linear: weight float32 [N, K].
        blocks: the format.
        second: H, [K, K].
    """
    diagonal = np.maximum(np.diag(second), 0)
    importance = (diagonal / max(float(diagonal.mean()), 1e-30) + 1e-3).astype(np.float32)
    plain = nearest(linear.weight, blocks, importance)
    padded = plain.codes.shape[1]
    factor = plane.factor(np.pad(second, (0, padded - len(second)))[None])
    whole = np.pad(linear.weight, ((0, 0), (0, padded - linear.weight.shape[1])))
    columns = np.pad(importance, (0, padded - len(importance)), constant_values=1)
    parts = [_solve(whole[at : at + ROWS], factor, blocks, columns) for at in range(0, len(whole), ROWS)]
    codes, scale, zero = (np.concatenate(each) for each in zip(*parts, strict=True))
    found = replace(plain, codes=codes, scale=scale, zero=zero)
    better = _error(linear.weight, found, factor[0]) <= _error(linear.weight, plain, factor[0])
    return replace(
        plain,
        codes=np.where(better[:, None], found.codes, plain.codes),
        scale=np.where(better[:, None], found.scale, plain.scale),
        zero=np.where(better[:, None], found.zero, plain.zero),
    )


def _solve(weight: Array, factor: Array, blocks: Blocks, importance: Array) -> tuple[Array, Array, Array]:
    """codes [N, K], scale and zero [N, blocks]."""
    rows, columns = weight.shape
    codes = np.empty((columns, rows), np.uint8)
    scale = np.empty((columns // blocks.size, rows), np.float32)
    zero = np.empty(scale.shape, np.uint8)
    weighed = in_blocks(importance[None], blocks)

    def real(j: int, wanted: Array) -> Array:
        block = j // blocks.size
        if j % blocks.size == 0:
            part = wanted[0, j : j + blocks.size].T.astype(np.float32)[:, None]
            found = fit(part, blocks, weighed[:, block : block + 1])
            scale[block], zero[block] = (each[:, 0] for each in found)
        step, at = scale[block].astype(np.float64), zero[block].astype(np.float64)
        code = np.clip(np.rint(wanted[0, j] / step) + at, 0, blocks.levels - 1)
        codes[j] = code.astype(np.uint8)
        return np.asarray(((code - at) * step)[None])

    plane.nearest(weight.astype(np.float64)[None], factor, real)
    return codes.T, scale.T, zero.T


def _error(weight: Array, found: Blocked, factor: Array) -> Array:
    """e' A' A e of each row."""
    error = (weight - found.weight()).astype(np.float64)
    return np.asarray(np.square(error @ factor[: error.shape[1], : error.shape[1]].T).sum(axis=1))


def by_gptq(hessians: Hessians) -> Round:
    """How `weights.write` gets codes; a layer without H is rounded to nearest."""

    def rounded(linear: Linear, blocks: Blocks) -> Blocked:
        second = hessians(linear.name)
        return nearest(linear.weight, blocks) if second is None else to_codes(linear, blocks, second)

    return rounded


def hessians(
    decoder: Decoder,
    written: Written,
    folder: Path,
    windows: Array,
    names: Collection[str],
    progress: Progress | None = None,
) -> Hessians:
    """H of linear layers of the body, by running the FP32 graph on windows of text.

    Args:
        written: the FP32 weights, which lie in `folder`.
        windows: int64 [windows, tokens].
        names: the layers that are going to be asked for.

    Returns:
        a function that is asked in the order in which layers run; layers that were passed are forgotten.
    """
    held: dict[str, Array] = {}
    parts = iter(_parts(decoder, names))

    def second(name: str) -> Array | None:
        if name not in names:
            return None
        reads = graph.input_of(name)
        while reads not in held:
            if (part := next(parts, None)) is None:
                return None
            held.clear()
            held.update(_sums(decoder, written, folder, part, windows, progress or Silent()))
        return held[reads]

    return second


def needed(decoder: Decoder, scheme: Scheme) -> tuple[str, ...]:
    """Layers of 4 bits: 8 bits lose nothing that is worth the time."""
    return tuple(name for name in linears(decoder) if (form := scheme.of(name)) is not None and form.bits == 4)


def _parts(decoder: Decoder, names: Collection[str]) -> Iterator[list[str]]:
    """What is read by layers, in the order in which they run: as much as HELD_BYTES hold."""
    widths = {
        "q": decoder.hidden,
        "o": decoder.heads * decoder.head_size,
        "gate": decoder.hidden,
        "down": decoder.intermediate,
    }
    sizes: dict[str, int] = {}
    for name in linears(decoder):
        if name in names:
            role = name.rpartition(".")[2]
            like = {"k": "q", "v": "q", "up": "gate"}.get(role, role)
            sizes[graph.input_of(name)] = 8 * widths[like] ** 2
    part: list[str] = []
    for reads, size in sizes.items():
        if part and sum(sizes[each] for each in part) + size > HELD_BYTES:
            yield part
            part = []
        part.append(reads)
    if part:
        yield part


def _sums(
    decoder: Decoder, written: Written, folder: Path, names: Sequence[str], windows: Array, progress: Progress
) -> dict[str, Array]:
    """{tensor: H}, float64, of what layers read."""
    end = int(names[-1].split(".")[1]) + 1
    short = replace(decoder, windows=decoder.windows[:end], rope_of=decoder.rope_of[:end])
    model = graph.build(short, written, context=windows.shape[1], also=names)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".onnx") as file:
        onnx.save(model, file.name)
        session = open_session(Path(file.name), entries=UNPACKED)
    sums: dict[str, Array] = {}
    what = f"inputs of layers {int(names[0].split('.')[1]) + 1} to {end}"
    for window in progress.each(windows, what, len(windows)):
        for name, value in zip(names, session.run(names, feed(short, window[None])), strict=True):
            x = value.reshape(-1, value.shape[-1])
            sums[name] = sums.get(name, 0) + (x.T @ x).astype(np.float64)
    return {name: each / windows.size for name, each in sums.items()}
