import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka import metrics

DOCUMENTS = [f"d{number}" for number in range(15)]
judgements = st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(0, 3), min_size=1, max_size=12)
qrels_of_three = st.fixed_dictionaries({"q1": judgements, "q2": judgements, "q3": judgements})
rankings = st.lists(
    st.permutations(DOCUMENTS).flatmap(lambda order: st.integers(0, 15).map(lambda k: order[:k])), min_size=3, max_size=3
)


def gain(grades: list[int]) -> float:
    return sum(grade / math.log2(position + 2) for position, grade in enumerate(grades[:10]))


def by_hand(judged: dict[str, int], ranking: list[str]) -> dict[str, float]:
    """The definitions of trec_eval, which ir-measures follows: linear gain, relevant from grade 1."""
    grades = [judged.get(document, 0) for document in ranking[:10]]
    num_relevant = sum(grade > 0 for grade in judged.values())
    first = next((position for position, grade in enumerate(grades, start=1) if grade), None)
    return {
        "nDCG@10": gain(grades) / gain(sorted(judged.values(), reverse=True)) if num_relevant else 0.0,
        "Recall@10": sum(grade > 0 for grade in grades) / num_relevant if num_relevant else 0.0,
        "MRR@10": 1 / first if first else 0.0,
        "P@1": float(first == 1),
    }


@given(qrels_of_three, rankings)
@settings(max_examples=50, deadline=None)
def test_measures_are_what_their_definitions_give(qrels: dict[str, dict[str, int]], ranked: list[list[str]]):
    found = metrics.measure(qrels, list(qrels), ranked)
    single = [by_hand(judged, ranking) for judged, ranking in zip(qrels.values(), ranked, strict=True)]
    expected = {name: sum(figures[name] for figures in single) / 3 for name in metrics.MEASURES}
    # trec_eval sums in double, in another order.
    assert found == pytest.approx(expected, abs=1e-9)


def test_a_judged_query_without_results_counts_as_nothing_found():
    qrels = {"q1": {"a": 1}, "q2": {"b": 1}}
    expected = dict.fromkeys(metrics.MEASURES, 0.5)
    assert metrics.measure(qrels, ["q1"], [["a"]]) == expected
    assert metrics.measure(qrels, ["q1", "q2"], [["a"], []]) == expected
    assert metrics.measure(qrels, ["q1", "q2"], [["a"], ["", ""]]) == expected


def test_a_query_without_judgements_does_not_count():
    assert metrics.measure({"q1": {"a": 1}}, ["q1", "q9"], [["a"], ["b"]]) == dict.fromkeys(metrics.MEASURES, 1.0)


def test_the_given_order_counts_whatever_the_ids_are():
    assert metrics.measure({"q": {"z": 1}}, ["q"], [["z", "a"]])["MRR@10"] == 1
    assert metrics.measure({"q": {"a": 1}}, ["q"], [["z", "a"]])["MRR@10"] == 0.5


def test_judgements_are_grouped_by_query_and_the_last_one_counts():
    assert metrics.group_qrels([("q", "a", 1), ("r", "a", 2), ("q", "b", 0), ("q", "a", 3)]) == {
        "q": {"a": 3, "b": 0},
        "r": {"a": 2},
    }


def test_the_first_document_alone_decides_precision_at_one():
    qrels = {"q1": {"a": 1, "b": 1}, "q2": {"a": 1}, "q3": {"c": 0}}
    assert metrics.measure(qrels, list(qrels), [["b", "x"], ["x", "a"], ["c"]])["P@1"] == pytest.approx(1 / 3)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3)), min_size=3, max_size=30))
@settings(max_examples=50, deadline=None)
def test_spearman_is_pearsons_correlation_of_ranks_and_ties_share_theirs(pairs: list[tuple[int, int]]):
    left, right = np.array(pairs, dtype=float).T

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < value).sum() + ((values == value).sum() + 1) / 2 for value in values])

    found = metrics.spearman(left, right)
    if min(len(set(left)), len(set(right))) < 2:
        assert found == 0
    else:
        assert found == pytest.approx(np.corrcoef(ranks(left), ranks(right))[0, 1])
