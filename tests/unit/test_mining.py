import dataclasses
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka import mining, positives
from matryoshka.funnel import Ranking, Searcher, Shard, call_locally
from matryoshka.mining import Miner, Rules
from matryoshka.nested import FunnelPlan, shrink
from matryoshka.positives import Documents, Relation

WIDTH = 8
PLAN = FunnelPlan.parse([f"{WIDTH}:3"])


@dataclasses.dataclass
class Case:
    """A corpus of few different vectors, some with twins under other ids; pairs; and what is known, as plain Python."""

    ids: list[str]
    texts: list[str]
    full: np.ndarray
    rows: dict[str, list[Any]]
    queries: np.ndarray
    known: set[tuple[str, str]]
    labelled: set[tuple[str, str]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pool = shrink(rng.standard_normal((draw(st.integers(2, 30)), WIDTH)), WIDTH).astype(np.float16)
    chosen = rng.integers(0, len(pool), draw(st.integers(2, 50)))
    # A vector may stand for two texts (a tie), a text never for two vectors.
    texts = [f"text {number}{' ' * int(rng.integers(0, 2))} {rng.integers(0, 2)}" for number in chosen]
    ids = [f"d{number}" for number in rng.permutation(len(chosen))]
    num_pairs = draw(st.integers(1, 6))
    right, asked = rng.integers(0, len(ids), num_pairs), rng.integers(0, 3, num_pairs)
    rows = {
        "query": [f"query {number}" if number else texts[0] for number in asked],
        "document_id": [ids[row] for row in right],
        "positive": [texts[row] for row in right],
    }
    queries = rng.standard_normal((3, WIDTH)).astype(np.float16)[asked]
    known = {(query, fold(text)) for query, text in zip(rows["query"], rows["positive"], strict=True)}
    known |= {(query, fold(text)) for query in rows["query"] for text in texts if rng.random() < 0.2}
    labelled = set()
    if draw(st.booleans()):
        rows["label"] = [f"label {rng.integers(0, 2)}" for _ in right]
        labelled = {(label, fold(text)) for label in set(rows["label"]) for text in texts if rng.random() < 0.2}
    if draw(st.booleans()):
        brought = [rng.choice(len(ids), int(rng.integers(0, 3)), replace=False) for _ in right]
        rows["negatives"] = [[texts[row] for row in own] or None for own in brought]
        rows["negative_ids"] = [[ids[row] for row in own] or None for own in brought]
    return Case(ids, texts, pool[chosen], rows, queries, known, labelled)


@st.composite
def rules(draw: st.DrawFn, sampling: str = "top") -> Rules:
    first = draw(st.integers(0, 6))
    last = first + draw(st.integers(1, 12))
    return Rules(draw(st.integers(1, 4)), first, last, draw(st.sampled_from([0.0, 0.05, 0.3])), sampling)  # type: ignore[arg-type]


def fold(text: str) -> str:
    return " ".join(text.split())


def miner_of(case: Case, own: Rules, cuts: tuple[int, ...] = ()) -> Miner:
    edges = sorted({0, len(case.ids), *(cut for cut in cuts if cut < len(case.ids))})
    parts = list(pairwise(edges))
    shards = [Shard(case.full[a:b]) for a, b in parts]
    searcher = Searcher(call_locally(shards), [pa.array(case.ids[a:b]) for a, b in parts], PLAN)
    documents = Documents(positives.hash_ids(case.ids), positives.hash_texts(case.texts))
    known, labelled = (list(zip(*pairs, strict=True)) or [(), ()] for pairs in (case.known, case.labelled))
    relations = [
        Relation.of(positives.hash_queries(known[0]), positives.hash_texts(known[1])),
        Relation.of(positives.hash_labels(labelled[0]), positives.hash_texts(labelled[1])),
    ]
    return Miner(searcher, documents, Relation.union(relations), own)


def mined_ids(case: Case, own: Rules, cuts: tuple[int, ...] = ()) -> list[list[str]]:
    found = miner_of(case, own, cuts).mine(case.rows, case.queries).ids
    return [[name for name in names if name] for names in found]


def scores_of(case: Case, pair: int) -> dict[str, float]:
    """Cosines in float64; equal vectors are made equal by rounding."""
    full, query = case.full.astype(np.float64), case.queries[pair].astype(np.float64)
    cosines = full @ query / np.linalg.norm(full, axis=1) / np.linalg.norm(query)
    return dict(zip(case.ids, cosines.round(9).tolist(), strict=True))


def qualifying(case: Case, pair: int, own: Rules) -> list[str]:
    """Returns, best first, every document that the rules allow, found one document at a time."""
    text_of, scores = dict(zip(case.ids, case.texts, strict=True)), scores_of(case, pair)
    query, label = case.rows["query"][pair], case.rows.get("label", [""] * (pair + 1))[pair]
    barred = {fold(query), *map(fold, case.rows.get("negatives", [None] * (pair + 1))[pair] or ())}
    left: list[str] = []
    for name in sorted(case.ids, key=lambda name: (-scores[name], name)):
        text = fold(text_of[name])
        if (query, text) not in case.known and (label, text) not in case.labelled and text not in barred:
            left.append(name)
        barred.add(text)
    positive = scores[case.rows["document_id"][pair]]
    bar = positive - abs(positive) * own.relative_margin
    return [name for name in left[own.first : own.last] if scores[name] <= bar]


def num_wanted(case: Case, pair: int, own: Rules) -> int:
    return max(own.num_negatives - len(case.rows.get("negatives", [None] * (pair + 1))[pair] or ()), 0)


@given(cases(), rules(), st.tuples(st.integers(1, 49), st.integers(1, 49)))
@settings(deadline=None, max_examples=100)
def test_what_is_mined_over_any_shards_is_what_brute_force_allows(case: Case, own: Rules, cuts: tuple[int, ...]):
    expected = [qualifying(case, pair, own)[: num_wanted(case, pair, own)] for pair in range(len(case.queries))]
    assert mined_ids(case, own, cuts) == expected


@given(cases(), rules(sampling="random"), st.tuples(st.integers(1, 49)))
@settings(deadline=None, max_examples=30)
def test_random_choices_qualify_and_are_the_same_every_time_over_any_shards(case: Case, own: Rules, cuts: tuple[int, ...]):
    found = mined_ids(case, own)
    assert found == mined_ids(case, own, cuts)
    for pair, names in enumerate(found):
        allowed = qualifying(case, pair, own)
        assert set(names) <= set(allowed)
        assert len(set(names)) == len(names) == min(num_wanted(case, pair, own), len(allowed))


@given(cases(), rules(), st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_pairs_in_batches_get_what_they_get_together(case: Case, own: Rules, size: int):
    miner = miner_of(case, own)
    parts = [
        miner.mine({name: column[start : start + size] for name, column in case.rows.items()}, case.queries[start : start + size])
        for start in range(0, len(case.queries), size)
    ]
    whole = miner.mine(case.rows, case.queries)
    for field in dataclasses.fields(whole):
        together = np.concatenate([getattr(part, field.name) for part in parts])
        np.testing.assert_array_equal(together, getattr(whole, field.name))


@given(cases(), rules(), st.tuples(st.integers(1, 49), st.integers(1, 49)), st.sampled_from([1, 40, 100]))
@settings(deadline=None, max_examples=30)
def test_less_memory_for_the_candidates_of_all_shards_mines_the_same(case: Case, own: Rules, cuts: tuple[int, ...], most: int):
    expected, asked, search = mined_ids(case, own), [], Searcher.search

    def watch(self: Searcher, queries: np.ndarray, num_results: int) -> Ranking:
        asked.append((len(queries), self.count_candidates(num_results)))
        return search(self, queries, num_results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mining, "_MOST_CELLS", most)
        patch.setattr(Searcher, "search", watch)
        assert mined_ids(case, own, cuts) == expected
    assert all(num_queries == 1 or num_queries * num_candidates <= most for num_queries, num_candidates in asked)


@given(cases(), rules())
@settings(deadline=None, max_examples=30)
def test_scores_are_reported_as_they_are(case: Case, own: Rules):
    mined = miner_of(case, own).mine(case.rows, case.queries)
    for pair, names in enumerate(mined.ids):
        scores = scores_of(case, pair)
        assert mined.positive_scores[pair] == pytest.approx(scores[case.rows["document_id"][pair]], abs=1e-6)
        taken = [name for name in names if name]
        np.testing.assert_allclose(mined.scores[pair, : len(taken)], [scores[name] for name in taken], atol=1e-6)
        assert not np.isfinite(mined.scores[pair, len(taken) :]).any()


def line(num_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns documents ever further from a query, and the query."""
    angles = np.linspace(0, 1.5, num_documents)
    full = np.zeros((num_documents, WIDTH), np.float16)
    full[:, 0], full[:, 1] = np.cos(angles), np.sin(angles)
    return full, np.eye(1, WIDTH, dtype=np.float16)


def test_known_positives_take_no_ranks_however_many_there_are():
    """Many more than the search first asks for stand before the first candidate."""
    full, query = line(400)
    ids, texts = [f"d{number:03d}" for number in range(400)], [f"text {number}" for number in range(400)]
    rows = {"query": ["why"], "document_id": ["d000"], "positive": [texts[0]]}
    case = Case(ids, texts, full, rows, query, {("why", text) for text in texts[:300]}, set())
    mined = miner_of(case, Rules(2, 1, 5, 0.0, "top")).mine(case.rows, case.queries)
    assert mined.ids.tolist() == [["d301", "d302"]]
    assert (mined.num_known.tolist(), mined.num_near.tolist()) == ([300], [0])


def test_what_was_passed_over_is_counted():
    full, query = line(20)
    ids, texts = [f"d{number:02d}" for number in range(20)], [f"text {number}" for number in range(20)]
    rows = {"query": ["why"], "document_id": ["d10"], "positive": [texts[10]]}
    case = Case(ids, texts, full, rows, query, {("why", texts[10]), ("why", texts[3]), ("why", texts[19])}, set())
    mined = miner_of(case, Rules(1, 2, 14, 0.0, "top")).mine(case.rows, case.queries)
    # Ranks 2 to 13 are d02, d04 to d09 (above the positive) and d11 to d15.
    assert mined.ids.tolist() == [["d11"]]
    assert (mined.num_known.tolist(), mined.num_near.tolist()) == ([2], [7])


def test_a_negative_score_of_the_positive_still_leaves_a_margin():
    """The margin is a share of the score's size: multiplying by .9 would raise a bar below 0."""
    full = np.zeros((3, WIDTH), np.float16)
    full[:, 0], full[:, 1] = [-0.5, -0.52, -0.7], np.sqrt([0.75, 1 - 0.52**2, 0.51])
    rows = {"query": ["why"], "document_id": ["a"], "positive": ["A"]}
    case = Case(["a", "b", "c"], ["A", "B", "C"], full, rows, np.eye(1, WIDTH, dtype=np.float16), {("why", "A")}, set())
    assert mined_ids(case, Rules(2, 0, 3, 0.1, "top")) == [["c"]]


def test_random_choices_reach_the_whole_window_and_differ_among_pairs():
    full, query = line(50)
    ids, texts = [f"d{number:02d}" for number in range(50)], [f"text {number}" for number in range(50)]
    rows = {"query": [f"why {pair}" for pair in range(200)], "document_id": ["d00"] * 200, "positive": [texts[0]] * 200}
    known = {(query, texts[0]) for query in rows["query"]}
    case = Case(ids, texts, full, rows, np.repeat(query, 200, axis=0), known, set())
    found = [own[0] for own in mined_ids(case, Rules(1, 10, 20, 0.0, "random"))]
    assert set(found) == set(ids[11:21])


def test_a_positive_that_the_corpus_lacks_is_named():
    full, query = line(3)
    case = Case(list("abc"), list("ABC"), full, {"query": ["q"], "document_id": ["z"], "positive": ["Z"]}, query, set(), set())
    with pytest.raises(ValueError, match="the positive 'z' is not in the corpus"):
        mined_ids(case, Rules(1, 0, 2, 0.0, "top"))


def test_a_window_that_ends_beyond_the_corpus_is_refused_with_the_number_of_documents():
    Rules(1, 0, 10, 0.0, "top").check(10, "data")
    with pytest.raises(ValueError, match=r"data: 9 documents, the window 0:10 ends beyond them\. Pass a --window that ends at 9"):
        Rules(1, 0, 10, 0.0, "top").check(9, "data")


def test_summaries_of_parts_add_up():
    parts = [
        dict.fromkeys(("num_pairs", "num_full", "num_some", "num_mined", "num_given", "num_known", "num_near"), 1)
        | {"positive_score_total": 0.5, "negative_score_total": 0.25},
        dict.fromkeys(("num_pairs", "num_full", "num_some", "num_mined", "num_given", "num_known", "num_near"), 3)
        | {"positive_score_total": 1.5, "negative_score_total": 0.75},
    ]
    whole = mining.summarise(parts)
    assert whole == mining.summarise([mining.summarise(parts[:1]), mining.summarise(parts[1:])])
    assert (whole["num_pairs"], whole["mined_share"], whole["positive_score"], whole["negative_score"]) == (4, 0.5, 0.5, 0.25)


def test_vectors_that_were_rounded_otherwise_mine_the_same_where_scores_differ_by_more():
    """What a GPU and a CPU make of one text differs by rounding of float16 or bf16."""
    full, query = line(20)
    full, ids, texts = full[5:], [f"d{number:02d}" for number in range(5, 20)], [f"text {number}" for number in range(5, 20)]
    noise = np.random.default_rng(0).uniform(-2e-3, 2e-3, full.shape)  # scores lie at least .03 apart
    rows = {"query": ["why"], "document_id": ["d07"], "positive": ["text 7"]}
    case = Case(ids, texts, full, rows, query, {("why", "text 7")}, set())
    other = dataclasses.replace(case, full=(full + noise).astype(np.float16))
    for own in (Rules(3, 2, 9, 0.0, "top"), Rules(3, 2, 9, 0.0, "random")):
        assert mined_ids(case, own) == mined_ids(other, own)
        assert len(mined_ids(case, own)[0]) == 3
