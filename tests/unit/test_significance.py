"""The statistics, held to what they promise by simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from matryoshka import significance

RUNS = 1_000


def no_difference(num_queries: int, seed: int = 0) -> np.ndarray:
    """Differences of two systems of one quality: mostly ties, else large, as those of nDCG@10 are."""
    rng = np.random.default_rng(seed)
    first, second = (rng.beta(0.4, 0.4, (num_queries, RUNS)).round(1) for _ in range(2))
    return np.where(rng.random((num_queries, RUNS)) < 0.5, 0.0, first - second)


@pytest.mark.parametrize("num_queries", [25, 100])
def test_five_percent_of_a_thousand_runs_without_a_true_difference_are_significant(num_queries: int):
    share = float((significance.p_values(no_difference(num_queries)) < significance.SIGNIFICANT).mean())
    assert share == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize("num_queries", [25, 100])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_intervals_cover_the_truth_at_their_stated_rate(num_queries: int, confidence: float):
    rng = np.random.default_rng(1)
    values = rng.beta(0.8, 0.5, (num_queries, RUNS))
    low, high = significance.interval(significance.resampled_means(values), num_queries, confidence)
    truth = 0.8 / 1.3
    # Of 1,000 runs, 1.5% is more than two standard errors.
    assert float(((low <= truth) & (truth <= high)).mean()) == pytest.approx(confidence, abs=0.025)


def test_the_gain_that_is_called_detectable_is_found_in_four_of_five_runs():
    rng = np.random.default_rng(2)
    spread = rng.normal(0, 0.3, (200, RUNS))
    gain = np.mean([significance.detectable(own) for own in spread.T[:100]])
    found = significance.p_values(spread + gain) < significance.SIGNIFICANT
    assert float(found.mean()) == pytest.approx(significance.POWER, abs=0.04)


def test_queries_that_all_differ_alike_do_not_say_which_gain_they_would_show():
    assert significance.detectable(np.zeros(60)) is None
    assert significance.detectable(np.full(60, 0.2)) is None


def test_a_clear_difference_is_significant_and_its_interval_keeps_away_from_nothing():
    differences = np.random.default_rng(3).normal(0.1, 0.2, (200, 1))
    low, high = significance.interval(significance.resampled_means(differences), 200)
    assert 0 < float(low[0]) < 0.1 < float(high[0]) < 0.16
    assert float(significance.p_values(differences)[0]) < 0.001


def test_systems_that_do_not_differ_have_a_p_value_of_one_and_an_empty_interval():
    assert significance.p_values(np.zeros((30, 2))).tolist() == [1.0, 1.0]
    low, high = significance.interval(significance.resampled_means(np.zeros((30, 1))), 30)
    assert low.tolist() == high.tolist() == [0.0]


def test_a_single_query_shows_nothing():
    assert significance.detectable(np.array([0.7])) is None
    assert significance.p_values(np.array([[0.7]])).tolist() == [1.0]


def test_the_same_values_give_the_same_interval_in_parts_or_at_once(monkeypatch: pytest.MonkeyPatch):
    values = np.random.default_rng(4).random((50, 3))
    whole, tests = significance.resampled_means(values), significance.p_values(values - 0.5)
    monkeypatch.setattr(significance, "_NUMBERS_AT_ONCE", 1_000)
    np.testing.assert_array_equal(significance.resampled_means(values), whole)
    np.testing.assert_array_equal(significance.p_values(values - 0.5), tests)


@pytest.mark.parametrize(("freedom", "tolerance"), [(5, 0.01), (24, 1e-3), (300, 1e-4)])
def test_students_quantiles_are_those_of_scipy(freedom: int, tolerance: float):
    assert significance._student(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=tolerance)


@given(st.lists(st.floats(0.0001, 1), min_size=1, max_size=20))
def test_corrected_p_values_are_larger_in_the_same_order_and_at_most_one(values: list[float]):
    given_values = np.array(values)
    corrected = significance.correct(given_values)
    assert (corrected >= given_values).all()
    assert corrected.max() <= 1
    order = np.argsort(given_values, kind="stable")
    assert (np.diff(corrected[order]) >= 0).all()
    assert corrected.min() == pytest.approx(min(1.0, len(values) * min(values)))


@given(st.lists(st.integers(-3, 3), max_size=30))
def test_every_query_is_a_win_a_tie_or_a_loss(values: list[int]):
    found = significance.count_outcomes(np.array(values, dtype=float) / 10)
    assert found == (sum(own > 0 for own in values), sum(own == 0 for own in values), sum(own < 0 for own in values))
