import numpy as np
import pytest
from scipy import stats

from matryoshka import evaluation
from matryoshka.evaluation import Row
from matryoshka.runs import Series


def series(system: str, dim: int | None, values: list[float], metric: str = "nDCG@10") -> Series:
    return Series(system, dim, {metric: np.array(values)}, [[]] * len(values))


def test_figures_are_means_between_the_ends_of_their_intervals():
    rng = np.random.default_rng(0)
    values = {("bm25", None): rng.random(60), ("base", 64): rng.random(60), ("base", 32): np.full(60, 0.5)}
    rows = evaluation.figures([series(*name, own.tolist()) for name, own in values.items()])
    assert [(row.system, row.dim, row.metric) for row in rows] == [(*name, "nDCG@10") for name in values]
    for row, own in zip(rows, values.values(), strict=True):
        assert row.value == pytest.approx(own.mean())
        assert row.low <= row.value <= row.high
    assert (rows[2].low, rows[2].high) == (0.5, 0.5)
    # Six standard errors hold any interval of a mean; one is too narrow for 95%.
    error = values["base", 64].std() / np.sqrt(60)
    assert 2 * error < rows[1].high - rows[1].low < 6 * error
    assert evaluation.figures([]) == []


def test_each_system_has_the_measures_that_it_was_measured_by():
    both = [series("base", 64, [1.0]), Series("base+funnel", 64, {"MRR@10": np.ones(1)}, [[]])]
    assert [(row.system, row.metric) for row in evaluation.figures(both)] == [("base", "nDCG@10"), ("base+funnel", "MRR@10")]


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


def test_words_and_other_ways_to_search_a_model_are_not_ranked():
    rows = [*figures(a={64: 0.4}, b={64: 0.3}), Row("bm25", None, "nDCG@10", 0.9), Row("b+int8", 64, "nDCG@10", 0.8)]
    assert list(evaluation.rank_systems(rows).means) == ["a", "b"]


def test_similarity_ranks_models_where_there_is_no_retrieval():
    rows = [Row("a", 64, "Spearman", 0.7), Row("b", 64, "Spearman", 0.8)]
    assert (evaluation.rank_systems(rows).best, evaluation.rank_systems(rows).metric) == ("b", "Spearman")


def test_models_without_a_common_dim_are_not_ranked():
    with pytest.raises(ValueError, match="no dim that all of a, b have"):
        evaluation.rank_systems(figures(a={64: 0.1}, b={32: 0.2}))
