from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from matryoshka import evaluation, metrics
from matryoshka.evaluation import Row
from matryoshka.indexing import IndexStore
from matryoshka.nested import FunnelPlan
from matryoshka.vectors import EmbeddingStore

Make = Callable[..., np.ndarray]
MakeStore = Callable[..., EmbeddingStore]


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
