from pathlib import Path

import numpy as np
import pytest

from matryoshka import indexing, synthetic
from matryoshka.synthetic import Spectrum


def vectors_of(spectrum: Spectrum, num_queries: int) -> tuple[np.ndarray, np.ndarray]:
    documents, queries = zip(*synthetic.blocks(spectrum, num_queries), strict=True)
    return np.concatenate(documents).astype(np.float32), np.concatenate(queries)


def test_directions_vary_as_the_power_law_says():
    spectrum = Spectrum(8_000, 64, exponent=0.7, num_clusters=4_000)
    documents, _ = vectors_of(spectrum, 1)
    found = (documents**2).mean(axis=0)
    slope = np.polyfit(np.log(np.arange(1, 65)), np.log(found), 1)[0]
    # Bringing vectors to unit length takes a little off the strongest directions.
    assert slope == pytest.approx(-0.7, abs=0.05)
    assert found.sum() == pytest.approx(1, abs=1e-3)


def test_documents_are_clustered_as_stated():
    spectrum = Spectrum(2_000, 256, exponent=0.0, num_clusters=2, cluster_share=0.5)
    documents, _ = vectors_of(spectrum, 1)
    products = (documents @ documents.T)[np.triu_indices(len(documents), 1)]
    # Two of one cluster share half of their variance, two of different clusters nothing.
    assert np.abs(products[:, None] - np.array([0.5, 0.0])).min(axis=1).mean() < 0.1


def test_queries_are_near_documents_at_even_distances():
    spectrum = Spectrum(6_000, 128, noise_share=0.1)
    documents, queries = vectors_of(spectrum, 7)
    wanted = np.linspace(0, 5_999, 7).astype(int)
    assert (queries @ documents.T).argmax(axis=1).tolist() == wanted.tolist()
    assert np.linalg.norm(queries, axis=1) == pytest.approx(np.ones(7), abs=1e-6)


def test_the_first_documents_are_the_same_for_every_number_of_them():
    few, _ = vectors_of(Spectrum(10, 8), 1)
    many, _ = vectors_of(Spectrum(5_000, 8), 1)
    assert np.array_equal(few, many[:10])
    assert not np.array_equal(few, vectors_of(Spectrum(10, 8, seed=1), 1)[0])


def test_the_store_holds_every_document_once_and_can_be_cut_into_shards(tmp_path: Path):
    store, queries = synthetic.make_store(tmp_path, Spectrum(300, 8), 5)
    ids = [name for names, _ in store.blocks() for name in names.to_pylist()]
    stored = np.concatenate([block for _, block in store.blocks()])
    assert ids == [f"{number:09d}" for number in range(300)]
    assert np.array_equal(stored.astype(np.float32), vectors_of(Spectrum(300, 8), 5)[0])
    assert queries.shape == (5, 8)
    assert len(indexing.plan_shards(store, 16, {})[1]) == 16


@pytest.mark.parametrize("text", ["1000", "0:8", "8:0", "a:8", "1:2:3", "-1:8"])
def test_a_text_that_is_not_documents_and_dims_is_refused(text: str):
    with pytest.raises(ValueError, match=r"--synthetic .*: is not documents:dims\. Write for example"):
        Spectrum.parse(text)


def test_documents_and_dims_are_read():
    assert Spectrum.parse("250000:1024") == Spectrum(250_000, 1024)
