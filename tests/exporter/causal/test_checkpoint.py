from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporter.causal import architecture, checkpoint
from exporter.causal.checkpoint import Checkpoint
from exporter.errors import TraceError
from tests.exporter.causal import tiny

pytestmark = tiny.needs_transformers


def opened(folder: Path) -> Checkpoint:
    return checkpoint.open_folder(folder, architecture.decoder(architecture.read(folder)))


def rewritten(folder: Path, **changed: object) -> None:
    """Tensors replaced, added, or left out where None is given."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, value in changed.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, file)


def test_packed_matrices_are_cut_into_their_parts() -> None:
    found = opened(tiny.saved("phi3"))
    whole = found.read("model.layers.1.self_attn.qkv_proj.weight")
    parts = [found.linear(1, role).weight for role in "qkv"]
    assert [len(each) for each in parts] == [64, 32, 32]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(found.linear(0, "up").weight, found.read("model.layers.0.mlp.gate_up_proj.weight")[96:])


def test_norms_of_gemma_are_stored_less_one() -> None:
    found = opened(tiny.saved("gemma2"))
    assert np.array_equal(found.norm(0, "input_layernorm"), found.read("model.layers.0.input_layernorm.weight") + 1)


def test_embedding_that_is_the_head_counts_once() -> None:
    assert opened(tiny.saved("qwen2")).parameters + 131 * 64 == opened(tiny.saved("llama")).parameters + 3 * 128


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    import torch

    folder = tiny.save(tmp_path, "llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    exact = torch.tensor(opened(folder).read(name)).to(torch.bfloat16)
    rewritten(folder, **{name: exact})
    assert np.array_equal(opened(folder).read(name), exact.float().numpy())


@pytest.mark.parametrize("case", ["missing", "extra", "cut", "none"])
def test_weights_that_are_not_the_architectures_are_refused(case: str, tmp_path: Path) -> None:
    import torch

    folder = tiny.save(tmp_path, "llama")
    name, file = "model.layers.1.mlp.up_proj.weight", folder / "model.safetensors"
    if case == "missing":
        rewritten(folder, **{name: None})
    elif case == "extra":
        rewritten(folder, **{"model.layers.1.mlp.up_proj.lora_A.weight": torch.zeros(2, 2)})
    elif case == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    said = {
        "missing": f"no tensor {name}", "extra": "lora_A", "cut": "whole safetensors file", "none": "no safetensors file",
    }  # fmt: skip
    with pytest.raises(TraceError) as error:
        opened(folder)
    assert said[case] in str(error.value)


def test_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    import torch

    folder, name = tiny.save(tmp_path, "llama"), "model.layers.1.mlp.up_proj.weight"
    rewritten(folder, **{name: torch.full((96, 64), float("nan"))})
    with pytest.raises(TraceError, match="up_proj.weight: found NaN"):
        opened(folder).linear(1, "up")
