import tempfile
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

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


def documents_by_brute_force(chunks: list[str], scores: np.ndarray, k: int) -> list[list[str]]:
    """Every document by its best chunk, then by its id."""
    rankings = []
    for row in scores:
        best: dict[str, float] = {}
        for chunk, score in zip(chunks, row, strict=True):
            document = chunk.rpartition("#")[0]
            best[document] = max(best.get(document, -2.0), round(float(score), 9))
        rankings.append(sorted(best, key=lambda name, best=best: (-best[name], name))[:k])
    return rankings


def chunks_of(counts: list[int], rng: np.random.Generator) -> list[str]:
    """Ids of so many chunks of each document, in any order: a document may be spread over units."""
    made = [f"d{document}#{start}-{start + 9}" for document, count in enumerate(counts) for start in range(count)]
    return [made[number] for number in rng.permutation(len(made))]


chunked = given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=14),
    num_units=st.integers(1, 4),
    dim=st.integers(1, 8),
    k=st.integers(1, 12),
    seed=st.integers(0, 99),
)


@chunked
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_with_chunks_the_best_documents_are_those_of_brute_force_whatever_number_of_chunks_they_have(
    make_store: MakeStore, random_vectors: Make, counts: list[int], num_units: int, dim: int, k: int, seed: int
):
    rng = np.random.default_rng(seed)
    chunks, pool = chunks_of(counts, rng), random_vectors(9, 8, seed)
    full = pool[rng.integers(0, 9, len(chunks))]
    parts = np.array_split(np.arange(len(chunks)), num_units)
    store = make_store({f"{n}:0": ([chunks[row] for row in rows], full[rows]) for n, rows in enumerate(parts)})
    queries = random_vectors(3, 8, seed + 100)
    prefixes = full[:, :dim].astype(np.float64)
    scores = queries[:, :dim].astype(np.float64) @ (prefixes / np.linalg.norm(prefixes, axis=1, keepdims=True)).T
    expected = documents_by_brute_force(chunks, scores, k)
    assert evaluation.exact_rankings(store, queries, dim, k, is_chunked=True) == expected


def test_ten_documents_are_found_behind_a_document_of_a_thousand_better_chunks(make_store: MakeStore, random_vectors: Make):
    query = random_vectors(1, 8)
    near = np.repeat(query, 1000, axis=0)
    names = [f"long#{start}-{start + 1}" for start in range(1000)] + [f"d{number}#0-5" for number in range(12)]
    store = make_store({"a:0": (names, np.concatenate([near, random_vectors(12, 8, 5)]))})
    found = evaluation.exact_rankings(store, query, 8, 10, is_chunked=True)[0]
    assert len(set(found)) == 10
    assert found[0] == "long"


def test_queries_in_parts_are_ranked_as_all_at_once(
    store: EmbeddingStore, make_store: MakeStore, random_vectors: Make, monkeypatch: pytest.MonkeyPatch
):
    rng = np.random.default_rng(3)
    names = chunks_of([30, 1, 1, 5, 1, 2, 40], rng)
    store = make_store({"a:0": (names, random_vectors(len(names), 8))}, "chunks")
    queries = random_vectors(7, 8, 4)
    whole = evaluation.exact_rankings(store, queries, 4, 5, is_chunked=True)
    monkeypatch.setattr(evaluation, "_MOST_SCORES", 20)
    assert evaluation.exact_rankings(store, queries, 4, 5, is_chunked=True) == whole


@chunked
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_funnel_that_keeps_all_chunks_finds_the_best_documents(
    make_store: MakeStore,
    make_index: Callable[..., IndexStore],
    random_vectors: Make,
    counts: list[int],
    num_units: int,
    dim: int,
    k: int,
    seed: int,
):
    del dim  # the index's own
    rng = np.random.default_rng(seed)
    chunks = chunks_of(counts, rng)
    full = random_vectors(len(chunks), 8, seed)
    parts = [rows for rows in np.array_split(np.arange(len(chunks)), num_units) if len(rows)]
    store = make_store({f"{n}:0": ([chunks[row] for row in rows], full[rows]) for n, rows in enumerate(parts)})
    plan = FunnelPlan.parse([f"4:{len(chunks)}", f"8:{len(chunks)}"])
    queries = random_vectors(3, 8, seed + 100)
    vectors = full.astype(np.float64)
    scores = queries.astype(np.float64) @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    with tempfile.TemporaryDirectory() as name:
        searcher = make_index(store, 2, name).searcher(plan)
        found = evaluation.funnel_rankings(searcher, queries, k, is_chunked=True)
    assert found == documents_by_brute_force(chunks, scores, k)


def test_a_short_funnel_gives_the_documents_of_its_own_chunks_and_grows_only_where_they_are_too_few(
    make_store: MakeStore, make_index: Callable[..., IndexStore], random_vectors: Make
):
    query = random_vectors(1, 8)
    names = [f"long#{start}-{start + 1}" for start in range(50)] + [f"d{number}#0-5" for number in range(30)]
    store = make_store({"a:0": (names, np.concatenate([np.repeat(query, 50, axis=0), random_vectors(30, 8, 5)]))})
    searcher = make_index(store).searcher(FunnelPlan.parse(["4:5", "8:3"]))
    found = evaluation.funnel_rankings(searcher, query, 10, is_chunked=True)[0]
    assert len(set(found)) == 10
    assert found[0] == "long"


def test_a_corpus_id_that_is_not_a_chunks_is_named(make_store: MakeStore, random_vectors: Make):
    store = make_store({"a:0": (["plain"], random_vectors(1, 8))})
    with pytest.raises(ValueError, match="'plain': not the id of a chunk"):
        evaluation.exact_rankings(store, random_vectors(1, 8), 8, 1, is_chunked=True)


def test_similarity_is_the_rank_correlation_of_scores_with_cosines_of_prefixes():
    rng = np.random.default_rng(0)
    firsts, seconds, scores = rng.standard_normal((40, 8)), rng.standard_normal((40, 8)), rng.integers(0, 6, 40) / 2
    rows = evaluation.evaluate_similarity("base", firsts, seconds, scores.tolist(), (8, 3))
    for row in rows:
        left, right = firsts[:, : row.dim], seconds[:, : row.dim]
        cosines = (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
        # float32 cosines: one might change its rank, which moves the figure by far less than this.
        assert row.value == pytest.approx(stats.spearmanr(scores, cosines).statistic, abs=1e-3)
    assert [(row.system, row.dim, row.metric) for row in rows] == [("base", 8, "Spearman"), ("base", 3, "Spearman")]


def figures(**systems: dict[int, float]) -> list[Row]:
    return [Row(system, dim, "nDCG@10", value) for system, own in systems.items() for dim, value in own.items()]


def test_models_are_ranked_by_their_mean_over_the_dims_that_all_have():
    """Over its own dims the wide model would lead, by a dim that the others lack."""
    rows = figures(wide={768: 0.9, 64: 0.3, 32: 0.2}, small={64: 0.35, 32: 0.25}, tiny={64: 0.2, 32: 0.3})
    ranking = evaluation.rank_systems([*rows, Row("tiny", 64, "MRR@10", 1.0)])
    assert ranking.means == pytest.approx({"small": 0.3, "wide": 0.25, "tiny": 0.25})
    assert list(ranking.means) == ["small", "wide", "tiny"]  # of equals, the one given first
    assert (ranking.best, ranking.metric, ranking.dims) == ("small", "nDCG@10", (64, 32))
    assert ranking.best_per_dim == {768: "wide", 64: "small", 32: "tiny"}


def test_similarity_ranks_models_where_there_is_no_retrieval():
    rows = [Row("a", 64, "Spearman", 0.7), Row("b", 64, "Spearman", 0.8)]
    assert (evaluation.rank_systems(rows).best, evaluation.rank_systems(rows).metric) == ("b", "Spearman")


def test_models_without_a_common_dim_are_not_ranked():
    with pytest.raises(ValueError, match="no dim that all of a, b have"):
        evaluation.rank_systems(figures(a={64: 0.1}, b={32: 0.2}))
