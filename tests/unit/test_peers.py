import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import model, peers
from matryoshka.model import ModelInfo
from matryoshka.peers import PeerEncoder, Setup, spread_batches

TEXTS = [
    "A funnel searches coarse to fine.",
    "The weather in the mountains changes quickly, so take a warm coat and enough to drink.",
    "short",
    "How do I read a Parquet file without loading all of it into memory?",
    "word " * 400,  # longer than the window of 256 tokens
    "Two\nlines\tand a tab.",
    "She had not slept for two days, and still she laughed.",
    "Sort the list in place, then return the first ten elements.",
]
INT8 = ("onnx_int8", "openvino_int8")


@pytest.fixture(scope="module")
def reference(minilm: ModelInfo) -> np.ndarray:
    """Vectors of the texts, each computed by itself in float32."""
    loaded = model.load(minilm.folder, "cpu")
    return np.stack([loaded.encode(text, normalize_embeddings=True) for text in TEXTS])


@pytest.fixture
def largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the last batch size without measuring any."""
    monkeypatch.setattr(peers, "_best_batch_size", lambda _encoder, _texts, sizes: sizes[-1])


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


# float32 keeps 24 bits, bf16 8 bits of each value.
@pytest.mark.parametrize(("precision", "least"), [("float32", 0.999999), ("bf16", 0.9995)])
@pytest.mark.parametrize("batch_size", [3, 32])
def test_any_precision_and_batch_size_give_the_same_vectors(
    minilm: ModelInfo, reference: np.ndarray, precision: str, least: float, batch_size: int
):
    encoder = PeerEncoder(Setup("tuned", minilm.folder, "cpu", precision, batch_size))
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert (cosines(vectors, reference) > least).all()


def test_the_default_peer_is_as_it_comes(minilm: ModelInfo, tmp_path: Path):
    assert peers.prepare("default", minilm.folder, "cpu", TEXTS, tmp_path) == Setup(
        "default", minilm.folder, "cpu", "float32", 32
    )


@pytest.mark.usefixtures("largest_batch")
def test_the_tuned_peer_takes_the_precision_and_the_batch_size_that_were_measured(
    minilm: ModelInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(peers.rates, "best_precision", lambda _device: "bf16")
    setup = peers.prepare("tuned", minilm.folder, "cpu", TEXTS, tmp_path)
    assert setup == Setup("tuned", minilm.folder, "cpu", "bf16", 256)


def test_a_batch_size_that_does_not_fit_into_memory_is_not_chosen():
    class Small:
        def encode(self, _texts: Sequence[str], batch_size: int) -> None:
            if batch_size > 2:
                raise torch.OutOfMemoryError

    assert peers._best_batch_size(Small(), TEXTS, (8, 2, 4)) == 2


@pytest.mark.usefixtures("largest_batch")
@pytest.mark.parametrize("name", INT8)
def test_an_int8_network_gives_nearly_the_vectors_of_the_model(
    minilm: ModelInfo, reference: np.ndarray, tmp_path: Path, name: str
):
    reason = peers.why_not(name, "cpu")
    if reason:
        pytest.skip(reason)
    setup = peers.prepare(name, minilm.folder, "cpu", TEXTS, tmp_path)
    assert setup.precision == "int8"
    found = cosines(PeerEncoder(setup).encode(TEXTS), reference)
    # Activations are quantised as well: measured 0.986 to 0.998.
    assert (found > 0.98).all(), found
    assert (found < 0.99999).any()  # so it is not the float32 network


@pytest.mark.parametrize("name", INT8)
def test_a_peer_that_is_not_installed_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert peers.why_not(name, "cpu").startswith(f"not installed: {', '.join(peers.PEERS[name].packages)}. Run pip install")
    assert peers.why_not("tuned", "cpu") == ""


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 400))
def test_spread_batches_are_whole_apart_and_over_all_lengths(num_texts: int, batch_size: int, num_documents: int):
    ordered = [str(number) for number in range(num_texts)]
    places = [int(text) for text in spread_batches(ordered, batch_size, num_documents)]
    assert places == sorted(set(places))
    count = max(min(num_texts, num_documents) // batch_size, 1)
    assert len(places) == min(count * batch_size, num_texts)
    firsts = places[::batch_size]
    assert all(places[i * batch_size : (i + 1) * batch_size][-1] - first < batch_size for i, first in enumerate(firsts))
    # Each batch lies in the middle of its own part of the texts.
    assert all(num_texts * i // count <= first <= num_texts * (i + 1) // count for i, first in enumerate(firsts))
