"""Training on a GPU is held against the CPU: the same vectors, gradients and losses, as far as the dtype allows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import texts
import tiny_model
import torch

from matryoshka import model, training
from matryoshka.forward import TrainingForward, features_of
from matryoshka.model import ModelInfo
from matryoshka.rates import Precision

TEXTS = [" ".join(texts.WORDS[: 1 + number % 200]) for number in range(48)]


@pytest.fixture(scope="module")
def minilm() -> ModelInfo:
    return model.describe("minilm")


def gradients(folder: Path, device: str, precision: Precision) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors of some texts, and the gradient of all weights together for a loss that depends on each number."""
    network: Any = model.load(folder, device, dropout=0.0).train()
    TrainingForward(network, precision)
    tokens = training.make_tokeniser(network, None)(TEXTS, "document")
    found = features_of(tokens.ids, tokens.lengths)
    features = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in found.items()}
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        vectors = torch.nn.functional.normalize(network(features)["sentence_embedding"].float(), dim=-1)
    directions = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(5)).to(device)
    (vectors * directions).sum().backward()
    parts = [own.grad.float().ravel().cpu() for own in network.parameters() if own.grad is not None]
    return vectors.detach().cpu().numpy(), torch.cat(parts).numpy()


# float32 products on a GPU may round to TF32's 11 bits; bf16 keeps 8 bits over six layers, forwards and backwards.
@pytest.mark.parametrize(("precision", "most"), [("float32", 0.01), ("bf16", 0.1)])
def test_packed_gradients_are_those_of_the_cpu(minilm: ModelInfo, precision: Precision, most: float):
    vectors, found = gradients(minilm.folder, "cuda", precision)
    wanted_vectors, wanted = gradients(minilm.folder, "cpu", "float32")
    assert (vectors * wanted_vectors).sum(axis=1).min() >= 0.999
    assert np.linalg.norm(found - wanted) <= most * np.linalg.norm(wanted)


def test_the_variable_length_kernel_is_trained_through_in_half_precision(minilm: ModelInfo, monkeypatch: pytest.MonkeyPatch):
    from torch.nn.attention import varlen

    calls, kernel = [], varlen.varlen_attn

    def count(*arguments: object, **named: object) -> object:
        calls.append(1)
        return kernel(*arguments, **named)

    monkeypatch.setattr(varlen, "varlen_attn", count)
    gradients(minilm.folder, "cuda", "bf16")
    assert calls


@pytest.mark.parametrize("mini_batch_tokens", [None, 60])
def test_losses_are_those_of_the_cpu(tmp_path: Path, tiny: str, mini_batch_tokens: int | None):
    job = small_runs.again(small_runs.make_job(tmp_path / "job", tiny), "cpu", mini_batch_tokens=mini_batch_tokens)
    on_cpu = small_runs.train(job).entries
    on_gpu = small_runs.train(replace(small_runs.again(job, "cuda"), device="cuda")).entries
    assert [entry["loss"] for entry in on_gpu] == pytest.approx([entry["loss"] for entry in on_cpu], rel=0.01)


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, tiny: str):
    job = small_runs.make_job(tmp_path / "job", tiny, device="cuda")
    undisturbed = small_runs.train(small_runs.again(job, "undisturbed", num_steps=6, checkpoint_steps=2))
    disturbed = small_runs.again(job, "disturbed", num_steps=6, checkpoint_steps=2)
    with pytest.raises(small_runs.KilledError):
        small_runs.train(disturbed, dies_at=5)
    small_runs.train(disturbed)
    kept = [entry["loss"] for entry in small_runs.log(disturbed)["entries"]]
    assert kept == pytest.approx([entry["loss"] for entry in undisturbed.entries], rel=1e-3)  # sums run in any order


# Qwen3 turns queries and keys in float32, which autocast leaves alone; MPNet's relative positions need grouped attention.
@pytest.mark.parametrize("family", ["bert", "qwen3", "mpnet"])
def test_a_run_in_half_precision_learns_packed(tmp_path: Path, family: str):
    pooling = "lasttoken" if family == "qwen3" else "mean"
    base = tiny_model.save(tmp_path / family, seed=3, family=family, pooling=pooling)
    job = small_runs.make_job(tmp_path / "job", base, device="cuda", precision="bf16")
    entries = small_runs.train(job).entries
    assert small_runs.log(job)["summary"]["notices"] == []
    assert np.isfinite([entry["loss"] for entry in entries]).all()
