import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka import topk
from matryoshka.topk import PADDING

# Few different scores make many ties; names of documents are ordered as text, so d10 comes before d9.
score = st.sampled_from([PADDING, -1.0, -0.0, 0.0, 0.25, 1.0])


@st.composite
def candidates(draw: st.DrawFn):
    num_queries, num_candidates = draw(st.integers(1, 4)), draw(st.integers(0, 14))
    scores = draw(st.lists(score, min_size=num_queries * num_candidates, max_size=num_queries * num_candidates))
    rows = [draw(st.permutations(range(num_candidates))) for _ in range(num_queries)]
    shape = (num_queries, num_candidates)
    return np.array(scores, dtype=np.float32).reshape(shape), np.array(rows, dtype=np.int64).reshape(shape)


def names(documents: np.ndarray):
    return np.array([f"d{document}" for document in documents], dtype=object)


def sorted_by_score_and_id(scores: np.ndarray, documents: np.ndarray, num_kept: int):
    pairs = [(float(s), f"d{d}") for s, d in zip(scores, documents, strict=True)]
    return sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:num_kept]


def without_padding(pairs: list[tuple[float, str]]):
    return [pair for pair in pairs if pair[0] != PADDING]


@given(candidates(), st.integers(1, 16))
def test_rank_is_a_sort_by_score_then_id_with_padding_last(case: tuple[np.ndarray, np.ndarray], num_kept: int):
    scores, documents = case
    columns = topk.rank(scores, documents, num_kept, names)
    assert columns.shape == (len(scores), min(num_kept, scores.shape[1]))
    for query, kept in enumerate(columns):
        ranked = [(float(scores[query, column]), f"d{documents[query, column]}") for column in kept]
        expected = sorted_by_score_and_id(scores[query], documents[query], num_kept)
        assert without_padding(ranked) == without_padding(expected)
        assert len(set(kept.tolist())) == len(kept)


@given(candidates(), st.integers(1, 16), st.integers(0, 14))
def test_ranking_two_parts_and_then_both_equals_ranking_all(case: tuple[np.ndarray, np.ndarray], num_kept: int, cut: int):
    scores, documents = case
    parts = [(scores[:, :cut], documents[:, :cut]), (scores[:, cut:], documents[:, cut:])]
    kept = [topk.rank(*part, num_kept, names) for part in parts]
    merged_scores, merged_documents = (
        np.concatenate([np.take_along_axis(part[which], best, axis=1) for part, best in zip(parts, kept, strict=True)], axis=1)
        for which in (0, 1)
    )
    merged = topk.rank(merged_scores, merged_documents, num_kept, names)
    whole = topk.rank(scores, documents, num_kept, names)
    for query in range(len(scores)):
        found = [(float(merged_scores[query, c]), int(merged_documents[query, c])) for c in merged[query]]
        expected = [(float(scores[query, c]), int(documents[query, c])) for c in whole[query]]
        assert without_padding(found) == without_padding(expected)


def test_a_ranking_without_ties_looks_up_no_id():
    scores = np.array([[0.1, 0.9, PADDING, PADDING, 0.5]], dtype=np.float32)
    columns = topk.rank(scores, np.arange(5)[None], 5, lambda documents: pytest.fail(f"looked up {documents}"))
    assert columns[0, :3].tolist() == [1, 4, 0]


def test_a_tie_that_begins_inside_the_kept_part_and_ends_outside_is_cut_by_id():
    scores = np.array([[1.0, 0.5, 0.5, 0.5]], dtype=np.float32)
    assert topk.rank(scores, np.array([[4, 3, 2, 1]]), 2, names).tolist() == [[0, 3]]


@given(candidates(), st.integers(1, 5))
def test_each_document_keeps_its_best_score_once_and_nothing_else(given_candidates, num_documents: int):
    scores, rows = given_candidates
    documents = rows % num_documents
    kept = topk.once_per_document(scores, documents)
    for own, before, after in zip(documents, scores, kept, strict=True):
        for document in set(own.tolist()):
            left = sorted(after[own == document], reverse=True)
            assert left[0] == max(before[own == document])
            assert all(score == PADDING for score in left[1:])
    assert ((kept == scores) | (kept == PADDING)).all()
