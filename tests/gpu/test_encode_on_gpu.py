"""The CPU is the oracle of the GPU: same texts, same vectors, as far as the dtype allows."""

from pathlib import Path

import numpy as np
import pytest
import texts
import tiny_model
import torch

from matryoshka import calibration, model
from matryoshka.calibration import Choice
from matryoshka.encode import Encoder
from matryoshka.model import ModelInfo
from matryoshka.rates import Precision
from matryoshka.tokens import Long

TEXTS = ["one", "", *(" ".join(texts.WORDS[: 1 + number % len(texts.WORDS)]) for number in range(300)), "word " * 2_000]


@pytest.fixture(scope="module")
def minilm() -> ModelInfo:
    return model.describe("minilm")


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    left, right = left.astype(np.float64), right.astype(np.float64)
    return (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


# float32 products on a GPU may round to TF32's 11 bits; bf16 keeps 8 bits over six layers.
@pytest.mark.parametrize(("precision", "least"), [("float32", 0.9999), ("bf16", 0.999)])
@pytest.mark.parametrize("long", ["truncate", "mean"])
def test_vectors_are_those_of_the_cpu(minilm: ModelInfo, precision: Precision, least: float, long: Long):
    encoder = Encoder(minilm.folder, "cuda", precision, long=long)
    assert encoder.notice == "", "the model must run packed"
    reference = Encoder(minilm.folder, "cpu", "float32", long=long).encode(TEXTS, "document")
    found = encoder.encode(TEXTS, "document")
    assert cosines(found.vectors, reference.vectors).min() >= least
    assert found.num_tokens == reference.num_tokens
    assert encoder.peak_bytes() >= torch.cuda.max_memory_allocated() > 0
    if precision == "bf16":  # the variable-length kernel needs no filling at all
        assert found.num_padded_tokens == found.num_tokens


def test_the_variable_length_kernel_is_used_in_half_precision(minilm: ModelInfo, monkeypatch: pytest.MonkeyPatch):
    from torch.nn.attention import varlen

    calls, kernel = [], varlen.varlen_attn

    def count(*arguments: object, **named: object) -> object:
        calls.append(1)
        return kernel(*arguments, **named)

    monkeypatch.setattr(varlen, "varlen_attn", count)
    Encoder(minilm.folder, "cuda", "bf16").encode(TEXTS, "document")
    assert calls


def test_a_compiled_model_has_the_vectors_of_the_cpu(minilm: ModelInfo):
    encoder = Encoder(minilm.folder, "cuda", "bf16", is_compiled=True)
    assert (encoder.notice, encoder.is_compiled) == ("", True)
    reference = Encoder(minilm.folder, "cpu", "float32").encode(TEXTS, "document")
    assert cosines(encoder.encode(TEXTS, "document").vectors, reference.vectors).min() >= 0.999


def test_a_repeated_call_gives_the_same_vectors(minilm: ModelInfo):
    encoder = Encoder(minilm.folder, "cuda", "bf16")
    first, again = (encoder.encode(TEXTS, "document").vectors for _ in range(2))
    assert cosines(first, again).min() >= 0.99999  # pooling adds up in any order, so that a last bit may differ


def test_tokenising_processes_hand_over_the_same_tokens(minilm: ModelInfo):
    alone, helped = (Encoder(minilm.folder, "cuda", "bf16", num_tokenisers=count) for count in (0, 2))
    try:
        np.testing.assert_array_equal(helped.tokenise(TEXTS, "document").ids, alone.tokenise(TEXTS, "document").ids)
    finally:
        helped.close()


def test_a_step_that_does_not_fit_is_halved(minilm: ModelInfo):
    documents = ["word " * 200] * 4_000
    reference = Encoder(minilm.folder, "cuda", "bf16", 16_384).encode(documents, "document").vectors
    encoder = Encoder(minilm.folder, "cuda", "bf16", 1_000_000)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(torch.cuda.memory_reserved() + 2**30, free) / total)
    try:
        found = encoder.encode(documents, "document")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert found.tokens_per_step < 1_000_000
    assert cosines(found.vectors, reference).min() >= 0.9999  # other shapes of products, the same dtype


def test_calibration_keeps_what_is_given_and_measures_the_rest(minilm: ModelInfo):
    best = calibration.calibrate(minilm.folder, "cuda", Choice(), TEXTS * 10, num_documents=1)
    assert best.precision == "bf16"
    assert best.tokens_per_step in (16_384, 32_768, 65_536)
    assert best.flops_per_second > 1e12


def test_a_random_model_packs_as_well(tmp_path: Path):
    folder = tiny_model.save(tmp_path / "tiny", seed=3)
    documents = ["alpha beta", "gamma", "", "delta " * 30]
    reference = Encoder(folder, "cpu", "float32").encode(documents, "document").vectors
    assert cosines(Encoder(folder, "cuda", "float32").encode(documents, "document").vectors, reference).min() >= 0.9999
