from collections.abc import Callable, Sequence
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.funnel import Ranking, Searcher, Shard, call_locally
from matryoshka.index import CoarseIndex
from matryoshka.nested import FunnelPlan, Step, shrink
from matryoshka.products import CoarseVectors, StoredVectors
from matryoshka.spaces import Space

Make = Callable[..., np.ndarray]
WIDTH = 12
plans = st.sampled_from([["12:4"], ["4:6", "12:3"], ["3:10", "6:5", "12:2"], ["4:1000", "8:1000"]]).map(FunnelPlan.parse)


@st.composite
def corpora(draw: st.DrawFn) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Documents of a few different vectors, so that many are equal; ids in no order; queries."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pool = shrink(rng.standard_normal((draw(st.integers(1, 12)), WIDTH)), WIDTH).astype(np.float16)
    full = pool[rng.integers(0, len(pool), draw(st.integers(1, 60)))]
    ids = [f"d{number}" for number in rng.permutation(len(full))]
    return full, ids, rng.standard_normal((3, WIDTH)).astype(np.float32)


def search(full: np.ndarray, ids: list[str], cuts: Sequence[int], plan: FunnelPlan, queries: np.ndarray, k: int) -> Ranking:
    edges = sorted({0, len(full), *(cut for cut in cuts if cut < len(full))})
    parts = [(full[start:stop], pa.array(ids[start:stop])) for start, stop in pairwise(edges)]
    shards = [Shard(block, CoarseIndex.build(shrink(block, plan.shortlist.dim), "Flat")) for block, _ in parts]
    return Searcher(call_locally(shards), [names for _, names in parts], plan, Space("prefix", plan.shortlist.dim)).search(
        queries, k
    )


def brute_force(full: np.ndarray, ids: list[str], plan: FunnelPlan, query: np.ndarray, k: int) -> list[str]:
    kept = list(range(len(full)))
    for step in plan.for_results(k).steps:
        prefixes, prefix = full[:, : step.dim].astype(np.float64), query[: step.dim].astype(np.float64)
        scores = prefixes @ prefix / np.linalg.norm(prefixes, axis=1)
        # Equal vectors score equally, but for the order of their sums; different ones differ by far more than 1e-9.
        kept = sorted(kept, key=lambda row, scores=scores: (-round(scores[row], 9), ids[row]))
        last = round(scores[kept[: step.keep][-1]], 9)
        kept = [row for row in kept if round(scores[row], 9) >= last]
    return [ids[row] for row in kept[:k]]


@given(corpora(), plans, st.integers(1, 20), st.lists(st.integers(1, 59), max_size=4))
@settings(deadline=None, max_examples=60)
def test_any_cut_into_shards_gives_what_one_shard_and_brute_force_give(
    case: tuple[np.ndarray, list[str], np.ndarray], plan: FunnelPlan, k: int, cuts: list[int]
):
    full, ids, queries = case
    found = search(full, ids, cuts, plan, queries, k).ids.tolist()
    assert found == search(full, ids, [], plan, queries, k).ids.tolist()
    assert found == [brute_force(full, ids, plan, query, k) for query in queries]


@given(corpora(), plans, st.lists(st.integers(1, 59), max_size=4), st.randoms())
@settings(deadline=None, max_examples=60)
def test_a_ranking_does_not_depend_on_the_order_of_the_documents(
    case: tuple[np.ndarray, list[str], np.ndarray], plan: FunnelPlan, cuts: list[int], random: Random
):
    full, ids, queries = case
    order = list(range(len(full)))
    random.shuffle(order)
    shuffled = search(full[order], [ids[row] for row in order], cuts, plan, queries, 5)
    assert shuffled.ids.tolist() == search(full, ids, cuts, plan, queries, 5).ids.tolist()


@given(corpora(), plans, st.lists(st.integers(1, 59), max_size=4))
@settings(deadline=None, max_examples=60)
def test_more_results_than_documents_returns_each_document_once(
    case: tuple[np.ndarray, list[str], np.ndarray], plan: FunnelPlan, cuts: list[int]
):
    full, ids, queries = case
    ranking = search(full, ids, cuts, plan, queries, len(full) + 7)
    assert ranking.ids.shape == (len(queries), len(full))
    assert all(sorted(found) == sorted(ids) for found in ranking.ids.tolist())
    assert (ranking.documents >= 0).all()


@given(corpora(), plans, st.integers(1, 20), st.lists(st.integers(1, 59), max_size=4))
@settings(deadline=None, max_examples=60)
def test_scores_are_inner_products_of_unit_vectors_best_first(
    case: tuple[np.ndarray, list[str], np.ndarray], plan: FunnelPlan, k: int, cuts: list[int]
):
    full, ids, queries = case
    ranking = search(full, ids, cuts, plan, queries, k)
    dim = plan.steps[-1].dim
    products = shrink(queries, dim) @ shrink(full, dim).T
    rows = np.array([[ids.index(name) for name in found] for found in ranking.ids.tolist()])
    # Sums of a dozen float32 products in another order.
    np.testing.assert_allclose(ranking.scores, np.take_along_axis(products, rows, axis=1), atol=1e-6)
    assert (np.diff(ranking.scores, axis=1) <= 0).all()


@pytest.mark.parametrize("dim", [3, 37, 384, 1000])
def test_equal_vectors_score_equally_wherever_they_stand(random_vectors: Make, dim: int):
    shard = Shard(random_vectors(3, dim)[np.arange(2000) % 3])
    queries = shrink(random_vectors(2, dim, 1), dim)
    numbers, rows = np.repeat([0, 1], 2000), np.tile(np.arange(2000), 2)
    whole = shard.score(queries, numbers, rows).reshape(2, 2000)
    assert all(len(np.unique(whole[query, start::3])) == 1 for query in range(2) for start in range(3))
    alone = shard.score(queries[1:], np.array([0]), np.array([5]))
    assert alone[0] == whole[1, 5]


def test_equal_vectors_tie_in_a_shortlist_whatever_the_size_of_their_shards(random_vectors: Make):
    # For 20 queries and more FAISS multiplies matrices; a BLAS may order its sums by the number of documents.
    width, rows = 65, np.random.default_rng(0).integers(0, 5, 600)
    full, ids, queries = random_vectors(5, width)[rows], [f"d{n}" for n in range(600)], random_vectors(40, width, 1)
    plan = FunnelPlan.parse([f"{width}:30"])
    found = search(full, ids, [1, 3, 10, 77, 300], plan, queries, 30).ids.tolist()
    assert found == [brute_force(full, ids, plan, query, 30) for query in queries]


@pytest.mark.parametrize("num_documents", [8_191, 12_300, 21_001, 30_000])
def test_a_scan_of_several_blocks_finds_what_brute_force_finds(random_vectors: Make, num_documents: int):
    full, queries = random_vectors(num_documents, 6), shrink(random_vectors(5, 6, 1), 6)
    scores, rows = Shard(full).scan(queries, 7)
    expected = np.sort(queries @ shrink(full, 6).T, axis=1)[:, :-8:-1]
    np.testing.assert_allclose(-np.sort(-scores, axis=1)[:, :7], expected, atol=1e-6)  # sums of six products
    assert ((rows >= 0).sum(axis=1) >= 7).all()


INNER = ["Flat", "SQ8", "PQ11x4fs", "RaBitQ", "RaBitQfs"]
KINDS = ["dense", *INNER, "SQfp16", "PQ11x4", *(f"IVF3,{kind}" for kind in INNER)]


@given(corpora(), st.sampled_from(KINDS), st.integers(1, 20), st.lists(st.integers(1, 59), max_size=4))
@settings(max_examples=150)
def test_shards_of_one_training_give_what_one_shard_gives(
    case: tuple[np.ndarray, list[str], np.ndarray], factory: str, keep: int, cuts: list[int]
):
    full, ids, queries = case
    sample = np.random.default_rng(0).standard_normal((200, WIDTH)).astype(np.float32)
    plan = FunnelPlan((Step(WIDTH - 1, keep), Step(WIDTH, keep)))
    space = Space("rotation", WIDTH - 1, *2 * [np.eye(WIDTH, WIDTH - 1, dtype=np.float32)])
    trained = None if factory == "dense" else CoarseIndex.train(space.documents(sample), factory)

    def coarse_of(block: np.ndarray) -> CoarseIndex | StoredVectors:
        collected = trained.copy() if trained else CoarseVectors()
        collected.add(space.documents(block))
        return collected if trained else collected.stored()

    def found(cuts: Sequence[int]) -> list[list[str]]:
        shards, names = [], []
        for start, stop in pairwise(sorted({0, len(full), *(cut for cut in cuts if cut < len(full))})):
            shards.append(Shard(full[start:stop], coarse_of(full[start:stop])))
            names.append(pa.array(ids[start:stop]))
        return Searcher(call_locally(shards), names, plan, space).search(queries, keep).ids.tolist()

    assert found(cuts) == found([])


@given(corpora(), st.integers(1, 20), st.data())
def test_removed_documents_are_never_found_and_hide_no_others(
    case: tuple[np.ndarray, list[str], np.ndarray], keep: int, data: st.DataObject
):
    full, ids, queries = case
    removed = np.array(sorted(data.draw(st.sets(st.integers(0, len(full) - 1)))), dtype=np.int64)
    left = np.setdiff1d(np.arange(len(full)), removed)
    coarse, space = CoarseIndex.build(shrink(full, 4), "Flat"), Space("prefix", 4)
    for plan in (FunnelPlan.parse([f"4:{keep + 5}", "12:5"]), FunnelPlan.parse(["12:5"])):
        found = Searcher(call_locally([Shard(full, coarse, removed)]), [pa.array(ids)], plan, space).search(queries, 5)
        rebuilt = Shard(full[left], CoarseIndex.build(shrink(full[left], 4), "Flat"))
        without = Searcher(call_locally([rebuilt]), [pa.array([ids[row] for row in left])], plan, space).search(queries, 5)
        assert found.ids.tolist() == without.ids.tolist()


def test_an_approximate_index_returns_no_padding_as_documents(random_vectors: Make):
    full = random_vectors(40, 8)
    shards = [Shard(full[part], CoarseIndex.build(shrink(full[part], 4), "HNSW4")) for part in (slice(0, 3), slice(3, 40))]
    ids = [pa.array([f"d{n}" for n in range(3)]), pa.array([f"d{n}" for n in range(3, 40)])]
    ranking = Searcher(call_locally(shards), ids, FunnelPlan.parse(["4:40", "8:40"]), Space("prefix", 4)).search(
        random_vectors(5, 8, 1), 40
    )
    assert ((ranking.ids == "") == (ranking.documents < 0)).all()
    assert (np.isneginf(ranking.scores) == (ranking.documents < 0)).all()
    assert all(len(set(found) - {""}) == len([name for name in found if name]) for found in ranking.ids.tolist())


def test_a_shard_is_sent_only_the_queries_that_have_candidates_in_it(random_vectors: Make):
    full, queries = random_vectors(30, WIDTH), random_vectors(5, WIDTH, 1)
    parts = [slice(0, 10), slice(10, 20), slice(20, 30)]
    call, sent = call_locally([Shard(full[part]) for part in parts]), dict[str, list[int]]()

    def counting(method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        sent[method] = [len(own[0]) for own in arguments]
        return call(method, arguments)

    searcher = Searcher(counting, [pa.array([f"d{n}" for n in range(30)][part]) for part in parts], FunnelPlan.parse(["12:9"]))
    documents = np.array([[1, 12, -1], [-1, 2, 3], [-1, -1, -1], [9, 19, 0], [13, -1, 11]])
    scores = searcher.score(queries, documents)
    assert sent == {"score": [3, 3, 0]}
    exact = np.einsum("qd,qmd->qm", shrink(queries, WIDTH), shrink(full, WIDTH)[documents])
    np.testing.assert_allclose(scores, np.where(documents >= 0, exact, -np.inf), atol=2e-3)


def test_no_queries_give_no_rankings(random_vectors: Make):
    ranking = search(random_vectors(5, WIDTH), list("abcde"), [2], FunnelPlan.parse(["4:3", "12:3"]), np.zeros((0, WIDTH)), 3)
    assert ranking.ids.shape[0] == 0


BAD = {
    "no results": (np.ones((1, WIDTH)), 0, r"search: 0 results asked for\. Ask for at least one"),
    "too narrow": (np.ones((1, 11)), 1, r"search: queries of shape \(1, 11\), the plan needs \[Q, 12\]\. Use the index's own"),
    "one vector": (np.ones(WIDTH), 1, r"search: queries of shape \(12,\)"),
    "not finite": (np.array([[1.0] * WIDTH, [np.nan] * WIDTH, [np.inf] * WIDTH]), 1, r"queries \[1, 2\] are not finite\. Check"),
}


@pytest.mark.parametrize("fault", BAD)
def test_queries_that_cannot_be_searched_are_refused(random_vectors: Make, fault: str):
    queries, k, message = BAD[fault]
    with pytest.raises(ValueError, match=message):
        search(random_vectors(5, WIDTH), list("abcde"), [2], FunnelPlan.parse(["4:3", "12:3"]), queries, k)
