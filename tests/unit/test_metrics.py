import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import AP, RR, R, Success, nDCG

from matryoshka import metrics
from matryoshka.metrics import Judgements

DOCUMENTS = [f"d{number:03}" for number in range(120)]
QUERIES = [f"q{number}" for number in range(5)]
THEIRS = {
    "nDCG@10": nDCG @ 10, "Recall@10": R @ 10, "Recall@100": R @ 100, "MRR@10": RR @ 10, "MAP@100": AP @ 100,
    "Success@1": Success @ 1,
}  # fmt: skip

judgements = st.dictionaries(st.sampled_from([*DOCUMENTS, "gone", "also gone"]), st.integers(0, 3), min_size=1, max_size=30)
all_qrels = st.dictionaries(st.sampled_from(QUERIES), judgements, min_size=1)
# Some queries are asked and not judged, some judged and not asked, some find nothing.
runs = st.dictionaries(st.sampled_from([*QUERIES, "unjudged"]), st.permutations(DOCUMENTS).flatmap(
    lambda order: st.integers(0, 120).map(lambda count: order[:count])), min_size=1)  # fmt: skip


@given(all_qrels, runs)
@settings(max_examples=60)
def test_measures_are_those_of_ir_measures_query_by_query(qrels: dict[str, dict[str, int]], ranked: dict[str, list[str]]):
    run = {query: {name: float(-place) for place, name in enumerate(own)} for query, own in ranked.items()}
    expected = {(metric.query_id, str(metric.measure)): metric.value for metric in ir_measures.iter_calc(
        list(THEIRS.values()), qrels, run)}  # fmt: skip
    documents = np.full((len(ranked), max(map(len, ranked.values()))), -1)
    for row, own in enumerate(ranked.values()):
        documents[row, : len(own)] = [DOCUMENTS.index(name) for name in own]
    judged = Judgements.of(qrels, list(ranked), np.array(DOCUMENTS, dtype=object))
    found = judged.measure(documents)
    assert set(judged.query_ids) == set(qrels)
    for name, theirs in THEIRS.items():
        for query, value in zip(judged.query_ids, found[name], strict=True):
            # trec_eval sums in another order.
            assert value == pytest.approx(expected.get((query, str(theirs)), 0.0), abs=1e-9)
    means = metrics.measure(qrels, list(ranked), list(ranked.values()))
    theirs = ir_measures.calc_aggregate(list(THEIRS.values()), qrels, run)
    assert means == pytest.approx({name: float(theirs[measure]) for name, measure in THEIRS.items()}, abs=1e-9)


def test_grades_below_nothing_are_nothing():
    assert set(metrics.measure({"q": {"a": -1, "b": 1}}, ["q"], [["b", "a"]]).values()) == {1.0}


def test_queries_that_were_asked_come_first_in_their_order_and_the_others_after_them():
    judged = Judgements.of({"c": {"x": 1}, "a": {"x": 1}, "b": {"x": 1}}, ["z", "b", "a"], np.array(["x"], dtype=object))
    assert judged.query_ids == ("b", "a", "c")
    assert judged.asked.tolist() == [1, 2]


def test_a_judged_query_without_results_counts_as_nothing_found():
    qrels = {"q1": {"a": 1}, "q2": {"b": 1}}
    expected = dict.fromkeys(THEIRS, 0.5)
    assert metrics.measure(qrels, ["q1"], [["a"]]) == expected
    assert metrics.measure(qrels, ["q1", "q2"], [["a"], []]) == expected
    assert metrics.measure(qrels, ["q1", "q2"], [["a"], ["", ""]]) == expected


def test_a_query_without_judgements_does_not_count():
    assert metrics.measure({"q1": {"a": 1}}, ["q1", "q9"], [["a"], ["b"]]) == dict.fromkeys(THEIRS, 1.0)


def test_the_given_order_counts_whatever_the_ids_are():
    assert metrics.measure({"q": {"z": 1}}, ["q"], [["z", "a"]])["MRR@10"] == 1
    assert metrics.measure({"q": {"a": 1}}, ["q"], [["z", "a"]])["MRR@10"] == 0.5


def test_judgements_are_grouped_by_query_and_the_last_one_counts():
    assert metrics.group_qrels([("q", "a", 1), ("r", "a", 2), ("q", "b", 0), ("q", "a", 3)]) == {
        "q": {"a": 3, "b": 0},
        "r": {"a": 2},
    }


def test_the_first_document_alone_decides_success_at_one():
    qrels = {"q1": {"a": 1, "b": 1}, "q2": {"a": 1}, "q3": {"c": 0}}
    assert metrics.measure(qrels, list(qrels), [["b", "x"], ["x", "a"], ["c"]])["Success@1"] == pytest.approx(1 / 3)


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
