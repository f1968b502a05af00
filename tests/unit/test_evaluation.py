from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matryoshka import evaluation, metrics
from matryoshka.evaluation import Row
from matryoshka.indexing import IndexStore
from matryoshka.nested import FunnelPlan
from matryoshka.vectors import EmbeddingStore

Make = Callable[..., np.ndarray]
MakeStore = Callable[..., EmbeddingStore]


def brute_force(store: EmbeddingStore, queries: np.ndarray, dim: int, k: int) -> list[list[str]]:
    ids = [name for names, _ in store.blocks() for name in names.to_pylist()]
    prefixes = np.concatenate([block for _, block in store.blocks()])[:, :dim].astype(np.float64)
    scores = queries[:, :dim].astype(np.float64) @ (prefixes / np.linalg.norm(prefixes, axis=1, keepdims=True)).T
    # Equal vectors score equally but for rounding in double; different ones differ by far more than 1e-9.
    return [sorted(ids, key=lambda name, row=row: (-round(row[ids.index(name)], 9), name))[:k] for row in scores]


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    dim=st.integers(1, 8),
    k=st.integers(1, 30),
    seed=st.integers(0, 99),
)
# The store is written anew for each example.
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_exact_rankings_are_those_of_brute_force_for_any_cut_into_units(
    make_store: MakeStore, random_vectors: Make, sizes: list[int], dim: int, k: int, seed: int
):
    pool, rng = random_vectors(6, 8, seed), np.random.default_rng(seed)
    names = [f"d{number}" for number in rng.permutation(sum(sizes))]
    store = make_store(
        {f"{number}:0": ([names.pop() for _ in range(size)], pool[rng.integers(0, 6, size)]) for number, size in enumerate(sizes)}
    )
    queries = random_vectors(3, 8, seed + 100)
    assert evaluation.exact_rankings(store, queries, dim, k) == brute_force(store, queries, dim, k)


@pytest.fixture
def store(make_store: MakeStore, random_vectors: Make) -> EmbeddingStore:
    return make_store({"a:0": ([f"a{n}" for n in range(30)], random_vectors(30, 8)), "b:0": (["b"], random_vectors(1, 8, 1))})


def test_every_measure_is_given_at_every_dim(store: EmbeddingStore, random_vectors: Make):
    qrels = {"q": {"a3": 1, "b": 2}}
    queries = random_vectors(1, 8, 2)
    rows = evaluation.evaluate_dims("base", store, queries, ["q"], qrels, (8, 4))
    assert [(row.system, row.dim, row.metric) for row in rows] == [
        ("base", dim, name) for dim in (8, 4) for name in metrics.MEASURES
    ]
    for dim in (8, 4):
        expected = metrics.measure(qrels, ["q"], evaluation.exact_rankings(store, queries, dim, metrics.DEPTH))
        assert {row.metric: row.value for row in rows if row.dim == dim} == expected


def test_a_query_that_is_a_document_finds_it_at_every_dim(store: EmbeddingStore, random_vectors: Make):
    rows = evaluation.evaluate_dims("base", store, random_vectors(30, 8)[7:8], ["q"], {"q": {"a7": 1}}, (8, 5, 2))
    assert {row.value for row in rows} == {1.0}


def test_a_funnel_that_keeps_all_is_worth_what_exact_search_is(
    store: EmbeddingStore, make_index: Callable[..., IndexStore], random_vectors: Make
):
    plan = FunnelPlan.parse(["4:31", "8:31"])
    queries, qrels = random_vectors(4, 8, 3), {f"q{n}": {f"a{n}": 1, "b": 1} for n in range(4)}
    found = evaluation.evaluate_funnel("base", make_index(store).searcher(plan), 4, queries, list(qrels), qrels)
    exact = evaluation.evaluate_dims("base", store, queries, list(qrels), qrels, [8])
    assert [Row(row.system, 4, row.metric, row.value) for row in exact] == found
