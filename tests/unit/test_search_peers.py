import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from matryoshka import search_peers
from matryoshka.search_peers import PEERS

INSTALLED = [name for name in PEERS if not search_peers.why_not(name, 16)]


@pytest.mark.parametrize("name", PEERS)
def test_a_thorough_search_finds_what_brute_force_finds(name: str, random_vectors: Callable[..., np.ndarray], tmp_path: Path):
    if name not in INSTALLED:
        pytest.skip(search_peers.why_not(name, 16))
    documents, queries = random_vectors(300, 16).astype(np.float32), random_vectors(40, 16, 1).astype(np.float32)
    best = np.argsort(-queries @ documents.T, axis=1)[:, :10]
    index, sweep = PEERS[name].make(300, 16, 1), PEERS[name].sweep(300)
    index.build(documents)
    shares = []
    for parameters in (sweep[0], sweep[-1]):
        rows = index.search(queries, 10, parameters)
        assert rows.shape == (40, 10)
        assert rows.dtype == np.int64
        shares.append(np.mean([len(set(own) & set(wanted)) / 10 for own, wanted in zip(rows, best, strict=True)]))
    assert shares[0] <= shares[1]
    assert shares[1] > 0.99
    index.write(tmp_path / "index")
    # A file has more than what is told from the width alone: lists, levels of a graph, code books.
    assert PEERS[name].bytes_per_document(16) * 300 / 2 < (tmp_path / "index").stat().st_size


def test_faiss_is_always_there():
    assert {"exact", "hnsw16", "hnsw32", "ivf_flat", "ivf_pq_refine"} <= set(INSTALLED)


@pytest.mark.parametrize("name", ["hnswlib", "usearch"])
def test_a_library_that_is_not_installed_is_named_with_what_installs_it(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert search_peers.why_not(name, 16).startswith(f"not installed: {name}. Run pip install")


def test_sweeps_go_from_quick_to_thorough_and_fit_small_corpora():
    assert PEERS["ivf_flat"].sweep(300)[-1] == {"nprobe": 64}
    assert PEERS["ivf_flat"].sweep(1) == [{"nprobe": 1}]
    assert PEERS["hnsw16"].sweep(300)[0] == {"efSearch": 10}
