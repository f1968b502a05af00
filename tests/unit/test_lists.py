import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka import index, kernels, lists, products
from matryoshka.lists import CoarseLists, ListedVectors

_NUM_LISTS = 128
_FEW_PROBES = 4


def rounded(vectors: np.ndarray) -> np.ndarray:
    return torch.from_numpy(vectors.astype(np.float32)).bfloat16().double().numpy()


def make(centroids: np.ndarray, *blocks: np.ndarray) -> ListedVectors:
    """Returns documents in lists, as a shard's files have them."""
    collected = CoarseLists(centroids.astype(np.float32))
    for block in blocks:
        collected.add(block.astype(np.float32))
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "coarse.npy", Path(folder) / "lists.npz"
        collected.write(*paths)
        return ListedVectors.open(*paths)


def as_sets(found: tuple[np.ndarray, np.ndarray]) -> list[set[tuple[float, int]]]:
    return [
        set(zip(own[there := line >= 0].tolist(), line[there].tolist(), strict=True)) for own, line in zip(*found, strict=True)
    ]


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray | None]:
    """Centroids, documents of which many are equal, queries, how many to keep, and a mask."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width, num_documents = draw(st.sampled_from([1, 3, 8, 33])), draw(st.sampled_from([1, 7, 300, 2_000]))
    centroids = rng.standard_normal((_NUM_LISTS, width))
    pool = rng.standard_normal((draw(st.sampled_from([1, 30, 2_000])), width))
    documents = pool[rng.integers(0, len(pool), num_documents)]
    queries = rng.standard_normal((draw(st.integers(1, 9)), width)).astype(np.float32)
    allowed = rng.random(num_documents) < draw(st.sampled_from([0.0, 0.1, 0.9])) if draw(st.booleans()) else None
    return centroids, documents, queries, draw(st.sampled_from([1, 4, 50])), allowed


@given(cases())
@settings(max_examples=80)
def test_a_query_finds_the_best_of_the_lists_nearest_to_it_and_everything_that_ties(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray | None],
):
    centroids, documents, queries, num_kept, allowed = case
    scores, rows = make(centroids, documents).find(queries, num_kept, allowed, nprobe=_FEW_PROBES)
    nearness = rounded(documents) @ rounded(centroids).T
    own_list, (second, first) = nearness.argmax(axis=1), np.sort(nearness, axis=1)[:, -2:].T
    is_clear = first - second > 1e-4  # so that rounding chose no other list
    truth = rounded(queries) @ rounded(documents).T
    for number, query in enumerate(rounded(queries)):
        near = rounded(centroids) @ query
        order = np.argsort(-near)
        if near[order[_FEW_PROBES - 1]] - near[order[_FEW_PROBES]] < 1e-4:
            continue  # rounding may have chosen another list
        is_seen = np.isin(own_list, order[:_FEW_PROBES]) & (True if allowed is None else allowed)
        found = rows[number][rows[number] >= 0]
        assert len(set(found)) == len(found)
        assert allowed is None or allowed[found].all()
        assert is_seen[found[is_clear[found]]].all()
        np.testing.assert_allclose(scores[number][rows[number] >= 0], truth[number][found], atol=1e-4)
        last = np.sort(truth[number][found])[-num_kept] if len(found) >= num_kept else -np.inf
        assert set(np.flatnonzero(is_seen & is_clear & (truth[number] > last + 1e-4))) <= set(found)


@given(cases(), st.lists(st.integers(1, 1_999), max_size=3))
@settings(max_examples=40)
def test_what_is_found_does_not_depend_on_the_cut_into_shards_or_on_other_queries(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray | None], cuts: list[int]
):
    centroids, documents, queries, num_kept, allowed = case
    whole = as_sets(make(centroids, documents).find(queries, num_kept, allowed, nprobe=_FEW_PROBES))
    parts: list[set[tuple[float, int]]] = [set() for _ in queries]
    for start, stop in pairwise(sorted({0, len(documents), *(cut for cut in cuts if cut < len(documents))})):
        shard, own = make(centroids, documents[start:stop]), None if allowed is None else allowed[start:stop]
        for number, query in enumerate(queries):
            (alone,) = as_sets(shard.find(query[None], num_kept, own, nprobe=_FEW_PROBES))
            parts[number] |= {(score, row + start) for score, row in alone}
    for found, every in zip(whole, parts, strict=True):
        last = sorted((score for score, _ in every), reverse=True)[:num_kept][-1:]
        assert found == {(score, row) for score, row in every if last and score >= last[0]}


@given(cases())
@settings(max_examples=30)
def test_all_documents_are_compared_where_lists_save_nothing(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray | None],
):
    centroids, documents, queries, num_kept, allowed = case
    listed, collected = make(centroids, documents), products.CoarseVectors()
    collected.add(documents.astype(np.float32))
    expected = as_sets(collected.stored().find(queries, num_kept, allowed))
    assert as_sets(listed.find(queries, num_kept, allowed)) == expected
    assert as_sets(listed.find(queries, num_kept, allowed, nprobe=_NUM_LISTS)) == expected


def test_more_ties_than_there_is_room_for_are_all_found():
    documents = np.repeat(np.eye(2, 8), [500, 3], axis=0)
    assert len(documents) > lists._room_for(5)
    (found,) = as_sets(make(np.eye(_NUM_LISTS, 8), documents).find(np.eye(1, 8, dtype=np.float32), 5, nprobe=1))
    assert {row for _, row in found} == set(range(500))


def test_queries_are_shared_among_threads_in_parts_that_fit(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    listed = make(rng.standard_normal((_NUM_LISTS, 8)), rng.standard_normal((900, 8)), rng.standard_normal((1, 8)))
    queries = rng.standard_normal((50, 8)).astype(np.float32)
    expected = as_sets(listed.find(queries, 6, nprobe=_FEW_PROBES))
    monkeypatch.setattr(lists, "_MOST_NOTED", 3 * (2 * 6 + kernels.BLOCK))
    assert as_sets(listed.find(queries, 6, nprobe=_FEW_PROBES)) == expected


def test_empty_lists_are_no_obstacle_and_documents_without_direction_go_into_the_first():
    centroids = np.eye(_NUM_LISTS)
    listed = make(centroids, np.zeros((3, _NUM_LISTS)), np.eye(2, _NUM_LISTS, 20))
    assert np.diff(listed._edges).nonzero()[0].tolist() == [0, 20, 21]
    (found,) = as_sets(listed.find(np.eye(1, _NUM_LISTS, 21, dtype=np.float32), 10, nprobe=1))
    assert found == {(1.0, 4)}


def test_the_dial_leaves_out_what_saves_nothing():
    assert CoarseLists(np.eye(128, dtype=np.float32)).dial.values == (1, 2, 3, 4, 128)


def test_centroids_are_where_documents_are():
    rng = np.random.default_rng(0)
    middles = np.eye(6, 16)
    sample = np.repeat(middles, 100, axis=0) + 0.05 * rng.standard_normal((600, 16))
    centroids = index.train_centroids(sample.astype(np.float32), 6)
    assert np.sort((centroids @ middles.T).argmax(axis=1)).tolist() == list(range(6))
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
