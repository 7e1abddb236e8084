"""Language models: our bundles beside FP32 and llama.cpp's files, engines in turn in one process.

    python -m benchmarks.llm FOLDER --schemes fp32,w8,mixed,auto --distill 3 --gguf model-q4_k_m.gguf --text lines.txt

FOLDER is a causal model's, as save_pretrained writes it. Each scheme is exported (kept in --work, and not made again), each
file of llama.cpp opened by llama-cpp-python where that is installed. A row has the bytes of the weights, tokens a second of the
prompt (128 tokens) and of decoding behind it by CPU seconds of one thread (medians of rounds in which the engines take turns),
the memory that a process of its own takes at most, and what is lost against the FP32 bundle on windows of the text's last
quarter: rise of the perplexity, KL in nats a token, same top-1. Without --text it is the text that the export was fitted to,
of which the same windows are held out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

import runtime
from exporter.causal import architecture, loss, pipeline, text
from exporter.causal.pipeline import Asked
from exporter.causal.text import Sizes
from runtime.language import LanguageModel
from runtime.session import open_session

PROMPT, STEPS, ROUNDS = 128, 32, 5
Array = NDArray[Any]


class Engine(Protocol):
    """Something that decodes."""

    def reset(self) -> None: ...

    def step(self, ids: list[int]) -> None:
        """Take tokens behind those before."""

    def logits(self, ids: Array) -> Array:
        """Of every token, float32 [1, tokens, vocabulary], with nothing before them."""
        ...


class Ours:
    """A bundle, one thread."""

    def __init__(self, folder: Path) -> None:
        model = runtime.load(folder, threads=1)
        assert isinstance(model, LanguageModel)
        self.decode, self.folder, self.every = model.decode(PROMPT + STEPS + 1), folder, None

    def reset(self) -> None:
        self.decode.reset()

    def step(self, ids: list[int]) -> None:
        self.decode.step(np.array([ids], np.int64))

    def logits(self, ids: Array) -> Array:
        """By the same graph without its choice of the last token: what is behind `norm` is computed for all of them."""
        if self.every is None:
            self.every = open_session(every_token(self.folder), threads=2)
        nothing = {
            each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
            for each in self.every.get_inputs()
            if len(each.shape) == 4
        }
        return np.asarray(
            self.every.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **nothing})[0]
        )


def every_token(folder: Path) -> Path:
    """The bundle's graph with logits of every token, beside it: GatherElements of the last row becomes Identity."""
    made = folder.with_name(f"{folder.name}.every")
    made.mkdir(exist_ok=True)
    (data := made / "model.onnx.data").unlink(missing_ok=True)
    data.hardlink_to(folder / "model.onnx.data")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GatherElements":
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, made / "model.onnx")
    return made / "model.onnx"


class LlamaCpp:
    """A GGUF file in llama.cpp, one thread."""

    def __init__(self, file: Path) -> None:
        from llama_cpp import Llama

        self.file, self.every = file, None
        self.model = Llama(str(file), n_ctx=PROMPT + STEPS + 1, n_threads=1, n_threads_batch=1, verbose=False)

    def reset(self) -> None:
        self.model.reset()

    def step(self, ids: list[int]) -> None:
        self.model.eval(ids)

    def logits(self, ids: Array) -> Array:
        from llama_cpp import Llama

        if self.every is None:
            self.every = Llama(str(self.file), n_ctx=ids.shape[1] + 1, n_threads=2, logits_all=True, verbose=False)
        self.every.reset()
        self.every.eval(ids[0].tolist())
        return np.asarray(self.every.scores[None, : ids.shape[1]], np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One engine: bytes of its weights, tokens a CPU second, MiB of its own process at most, and what it lost."""

    name: str
    megabytes: float
    prefill: float
    decode: float
    memory_mib: float
    lost: loss.Loss


def seconds(engine: Engine, ids: list[int]) -> tuple[float, float]:
    """CPU seconds of a prompt, and of each token behind it."""
    engine.reset()
    begin = time.process_time()
    engine.step(ids[:PROMPT])
    middle = time.process_time()
    for token in ids[PROMPT : PROMPT + STEPS]:
        engine.step([token])
    return middle - begin, (time.process_time() - middle) / STEPS


def peak_mib(name: str, place: Path) -> float:
    """What a process that opens this one and reads the prompt takes at most."""
    code = (
        f"from benchmarks import llm; from pathlib import Path; from runtime.peak import held; "
        f"before = held('VmRSS'); engine = llm.{name}(Path({str(place)!r})); engine.step([5] * llm.PROMPT); engine.step([5]); "
        f"print(held('VmHWM') - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 2**20


def engines(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, Path, Callable[[Path], Engine]]]:
    """(name, file or folder, what opens it): FP32 first."""
    for scheme in args.schemes.split(","):
        for minutes in (0.0, args.distill) if args.distill and scheme in ("mixed", "auto") else (0.0,):
            name = f"{scheme}-trained" if minutes else scheme
            out = args.work / name
            if not (out / "manifest.json").exists():
                begin = time.process_time(), time.monotonic()
                asked = Asked(scheme=scheme, calibration=args.text, distill_minutes=minutes)
                print(pipeline.export(folder, out, asked))
                print(
                    f"made in {time.process_time() - begin[0]:.0f} CPU s, {time.monotonic() - begin[1]:.0f} s\n",
                    flush=True,
                )
            yield f"ours, {name}", out, Ours
    if args.gguf and find_spec("llama_cpp"):
        for file in args.gguf:
            yield f"llama.cpp, {file.stem}", file, LlamaCpp


def main() -> None:
    """Measure, and print a table and its values as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--schemes", default="fp32,w8,w4,mixed,auto")
    parser.add_argument(
        "--distill", type=float, default=0.0, help="also mixed and auto with so many minutes of training"
    )
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    parser.add_argument("--text", type=Path, help="lines of text, fitted to and held out")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("build/llm"))
    args = parser.parse_args()
    found = list(engines(args.folder, args))
    opened = {name: make(place) for name, place, make in found}
    first = runtime.load(found[0][1])
    assert isinstance(first, LanguageModel)
    sizes = Sizes(unseen=args.windows, tokens=min(PROMPT, architecture.read(args.folder).max_position_embeddings))
    given = text.read(args.text, first.tokenizer, first.manifest.begin, sizes)
    ids = np.concatenate(list(given.unseen[:2]))[: PROMPT + STEPS].tolist()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in opened}
    for _ in range(ROUNDS):
        for name, engine in opened.items():
            times[name].append(seconds(engine, ids))
    reference = opened[found[0][0]]
    rows = []
    for name, place, make in found:
        size = place.stat().st_size if place.is_file() else (place / "model.onnx.data").stat().st_size
        prompt, token = (statistics.median(each) for each in zip(*times[name], strict=True))
        lost = loss.measure(reference.logits, opened[name].logits, given.unseen)
        rows.append(
            Row(
                name=name, megabytes=size / 1e6, prefill=PROMPT / prompt, decode=1 / token,
                memory_mib=peak_mib(make.__name__, place), lost=lost,
            )
        )  # fmt: skip
        print(row(rows[-1]), flush=True)
    print(f"\n{given.name}, {rows[0].lost.tokens} tokens; {' '.join(sys.argv[1:])}")
    print(json.dumps([runtime_json(each) for each in rows]))


def row(each: Row) -> str:
    lost = each.lost
    return (
        f"| {each.name} | {each.megabytes:.1f} | {each.prefill:.0f} | {each.decode:.1f} | {each.memory_mib:.0f} | "
        f"{lost.perplexity:.2f} ({100 * lost.rise:+.1f} %) | {lost.kl:.4f} | {100 * lost.same_top1:.1f} % |"
    )


def runtime_json(each: Row) -> Any:
    from runtime.manifest import canonical

    return json.loads(canonical(each))


if __name__ == "__main__":
    main()
