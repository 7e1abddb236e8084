from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from exporter.causal import architecture, checkpoint, graph, proof, weights
from exporter.causal.architecture import Decoder
from exporter.causal.scheme import FLOAT
from exporter.causal.store import Store
from exporter.errors import TraceError
from tests.exporter.causal import tiny

pytestmark = tiny.needs_transformers


def written(folder: Path, decoder: Decoder, out: Path) -> tuple[Path, Path]:
    """Both forms of the FP32 graph."""
    with Store(out / "weights.data") as store:
        found = weights.write(checkpoint.open_folder(folder, decoder), FLOAT, store)
    every, last = out / "every.onnx", out / "last.onnx"
    onnx.save(graph.build(decoder, found, context=decoder.context, every=True), every)
    onnx.save(graph.build(decoder, found, context=decoder.context), last)
    return every, last


@pytest.mark.parametrize("name", tiny.MODELS)
def test_graph_is_the_model_of_every_architecture(name: str, tmp_path: Path) -> None:
    folder = tiny.saved(name)
    decoder = architecture.decoder(architecture.read(folder))
    found = proof.prove(proof.reference(folder), decoder, *written(folder, decoder, tmp_path))
    assert found == proof.Proved(lengths=(7, 32 if decoder.context < 66 else 33), greedy_steps=32, layers=3)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama", "epsilon", 0.1),
        ("qwen2", "windows", (-1, -1, -1)),
        ("gemma2", "attention_cap", 0.0),
        ("gemma2", "logit_cap", 0.0),
        ("gemma3", "rope_of", (0, 0, 0)),
        ("gemma3", "scale", 1.0),
    ],
)
def test_graph_that_computes_something_else_is_refused(name: str, key: str, value: object, tmp_path: Path) -> None:
    from dataclasses import replace

    folder = tiny.saved(name)
    decoder = architecture.decoder(architecture.read(folder))
    wrong = replace(decoder, **{key: value})
    with pytest.raises(TraceError, match="graph is not the model"):
        proof.prove(proof.reference(folder), decoder, *written(folder, wrong, tmp_path))


def test_first_layers_of_a_model_are_proved_alone(tmp_path: Path) -> None:
    from dataclasses import replace

    folder = tiny.saved("qwen3")
    whole = architecture.decoder(architecture.read(folder))
    short = replace(whole, windows=whole.windows[:2], rope_of=whole.rope_of[:2])
    with Store(tmp_path / "weights.data") as store:
        found = weights.write(replace(checkpoint.open_folder(folder, whole), decoder=short), FLOAT, store)
    every, last = tmp_path / "every.onnx", tmp_path / "last.onnx"
    onnx.save(graph.build(short, found, context=64, every=True), every)
    onnx.save(graph.build(short, found, context=64), last)
    assert proof.prove(proof.reference(folder, 2), short, every, last).layers == 2
