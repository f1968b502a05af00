"""Searching on a GPU is held against the CPU: the same documents, as far as rounding goes."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from matryoshka import funnel
from matryoshka.funnel import Searcher, Shard
from matryoshka.index import CoarseIndex
from matryoshka.lists import CoarseLists, ListedVectors
from matryoshka.nested import FunnelPlan, shrink
from matryoshka.products import CoarseVectors, StoredVectors
from matryoshka.spaces import Space

NUM_DOCUMENTS, WIDTH, DIM = 50_000, 64, 32


@pytest.fixture(scope="module")
def full() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, WIDTH))
    return shrink(centres[rng.integers(0, 200, NUM_DOCUMENTS)] + rng.standard_normal((NUM_DOCUMENTS, WIDTH)), WIDTH)


@pytest.fixture(scope="module")
def queries(full: np.ndarray) -> np.ndarray:
    return shrink(full[::500] + 0.1 * np.random.default_rng(1).standard_normal((100, WIDTH)), WIDTH)


def found(
    coarse: CoarseIndex | ListedVectors | StoredVectors | None, full: np.ndarray, queries: np.ndarray, device: str, *plan: str
) -> list[set]:
    shard = Shard(full.astype(np.float16), coarse, device=device)
    ids = [pa.array(map(str, range(NUM_DOCUMENTS)))]
    searcher = Searcher(funnel.call_locally([shard]), ids, FunnelPlan.parse(plan), Space("prefix", DIM) if coarse else None)
    return [set(row) for row in searcher.search(queries, 10).documents.tolist()]


def share_found(some: list[set], others: list[set]) -> float:
    return float(np.mean([len(own & other) / len(other) for own, other in zip(some, others, strict=True)]))


def test_exact_search_finds_what_brute_force_finds(full: np.ndarray, queries: np.ndarray):
    stored = shrink(full.astype(np.float16), WIDTH)
    best = np.argsort(-(queries.astype(np.float64) @ stored.T.astype(np.float64)), axis=1)[:, :10]
    assert share_found(found(None, full, queries, "cuda", f"{WIDTH}:10"), [set(row) for row in best.tolist()]) > 0.999


def test_dense_coarse_vectors_find_what_they_find_on_the_cpu(full: np.ndarray, queries: np.ndarray, tmp_path: Path):
    collected = CoarseVectors()
    collected.add(shrink(full, DIM))
    collected.write(tmp_path / funnel.DENSE)
    stored = np.load(tmp_path / funnel.DENSE)
    plan = (f"{DIM}:100", f"{WIDTH}:10")
    own, other = (found(StoredVectors(stored, device), full, queries, device, *plan) for device in ("cuda", "cpu"))
    assert share_found(own, other) > 0.999


def test_of_coarse_vectors_in_lists_all_are_compared(full: np.ndarray, queries: np.ndarray, tmp_path: Path):
    paths = tmp_path / funnel.DENSE, tmp_path / funnel.LISTS
    collected = CoarseLists(shrink(full[:64], DIM))
    collected.add(shrink(full, DIM))
    collected.write(*paths)
    own = found(ListedVectors.open(*paths, "cuda"), full, queries, "cuda", f"{DIM}:100:nprobe=1", f"{WIDTH}:10")
    other = found(ListedVectors.open(*paths), full, queries, "cpu", f"{DIM}:100", f"{WIDTH}:10")
    assert share_found(own, other) > 0.999


@pytest.mark.parametrize(("factory", "parameters"), [("Flat", ""), ("IVF64,Flat", ":nprobe=16"), ("PQ16x4fs", "")])
def test_an_index_of_faiss_finds_what_it_finds_on_the_cpu(full: np.ndarray, queries: np.ndarray, factory: str, parameters: str):
    faiss = pytest.importorskip("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this FAISS knows no GPU")
    coarse = CoarseIndex.build(shrink(full, DIM), factory)
    plan = (f"{DIM}:100{parameters}", f"{WIDTH}:10")
    on_cpu = found(coarse, full, queries, "cpu", *plan)
    coarse.copy_to_gpu()
    assert share_found(found(coarse, full, queries, "cuda", *plan), on_cpu) > 0.99
