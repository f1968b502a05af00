"""Vectors and hidden states of tiny models, beside those that sentence-transformers and transformers give one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
import tiny_model
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding

from matryoshka import hidden, model
from matryoshka.anatomy import Sample

pytestmark = pytest.mark.usefixtures("one_thread")

DOCUMENTS = tuple(text[: 8 + 5 * number] for number, text in enumerate(texts.documents(0, 9)["text"]))


def one_by_one(network: Any, text: str) -> list[np.ndarray]:
    """Returns the mean states of one text, with nothing beside it that would have to be padded."""
    features = network.preprocess([text])
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        output = network[0].auto_model(**{name: features[name] for name in names}, output_hidden_states=True)
    return [states[0].mean(dim=0).numpy() for states in output.hidden_states]


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "mpnet", "qwen3", "roberta"])
def test_states_are_those_of_each_text_by_itself(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hidden, "_TOKENS_PER_STEP", 60)  # several steps
    folder = tiny_model.save(tmp_path / family, seed=4, family=family, tail=[Dense(64, 16)])
    found = hidden.read_states(folder, "cpu", DOCUMENTS, 64)
    network = model.load(folder, "cpu").eval()
    wanted = zip(*(one_by_one(network, text) for text in DOCUMENTS), strict=True)
    assert list(found) == ["embeddings", "layer 0", "layer 1", "head"]
    for name, own in zip(found, wanted, strict=False):
        np.testing.assert_allclose(found[name], np.stack(own), atol=1e-5)
    np.testing.assert_allclose(found["head"], network.encode(list(DOCUMENTS)), atol=1e-5)


def test_longer_texts_are_cut(tiny: str):
    whole, cut = (hidden.read_states(Path(tiny), "cpu", DOCUMENTS[-2:], length) for length in (64, 8))
    again = hidden.read_states(Path(tiny), "cpu", [DOCUMENTS[-1]], 8)
    assert np.abs(whole["head"] - cut["head"]).max() > 1e-3
    np.testing.assert_allclose(cut["head"][1], again["head"][0], atol=1e-5)


def test_a_model_is_studied_with_vectors_for_every_text_and_states_for_some(tiny: str):
    queries, positives = ("da", "ba"), (DOCUMENTS[3], "elsewhere")
    sample = Sample(tuple("abcdefghi"), DOCUMENTS, None, queries, positives)
    vectors, states = hidden.study(Path(tiny), "cpu", "float32", sample, 4, 64)
    network = model.load(Path(tiny), "cpu")
    for found, own in ((vectors.documents, DOCUMENTS), (vectors.queries, queries), (vectors.positives, positives)):
        wanted = network.encode(list(own), normalize_embeddings=True)
        np.testing.assert_allclose(found.astype(np.float32), wanted, atol=2e-3)  # float16
    assert {len(own) for own in states.values()} == {4}
    bare, nothing = hidden.study(Path(tiny), "cpu", "float32", Sample(tuple("abc"), DOCUMENTS[:3], None), 0, 64)
    assert (bare.queries.shape, bare.positives.shape, nothing) == ((0, 64), (0, 64), {})


def test_a_model_without_a_transformer_is_refused(tmp_path: Path, tiny: str):
    words = StaticEmbedding(model.rust_tokenizer(model.load(Path(tiny), "cpu")), embedding_dim=8)
    SentenceTransformer(modules=[words], device="cpu").save_pretrained(str(tmp_path / "static"), create_model_card=False)
    with pytest.raises(ValueError, match=r"static: has no transformer, so no layers to look at\. Pass --layer-documents 0\.$"):
        hidden.read_states(tmp_path / "static", "cpu", DOCUMENTS, 64)
