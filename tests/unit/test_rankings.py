import tempfile
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from matryoshka import indexing, products, rankings
from matryoshka.indexing import IndexStore
from matryoshka.lexical import LexicalIndex
from matryoshka.nested import FunnelPlan
from matryoshka.rankings import Catalogue
from matryoshka.vectors import EmbeddingStore

Make = Callable[..., np.ndarray]
MakeStore = Callable[..., EmbeddingStore]


def exact(
    store: EmbeddingStore, queries: np.ndarray, dim: int, k: int, packing: str = "float16", **more: bool
) -> list[list[str]]:
    catalogue = Catalogue.of_store(store, **more)
    return rankings.exact(store, catalogue, queries, dim, k, packing).ids(catalogue.names)


def through_funnel(index: IndexStore, store: EmbeddingStore, plan: list[str], queries: np.ndarray, k: int) -> list[list[str]]:
    catalogue = Catalogue.of_store(store, is_chunked=True)
    searcher = index.searcher(FunnelPlan.parse(plan))
    return rankings.through_funnel(searcher, catalogue, queries, k).ids(catalogue.names)


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
    assert exact(store, queries, dim, k) == brute_force(store, queries, dim, k)


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
    assert exact(store, queries, dim, k, is_chunked=True) == expected


def test_ten_documents_are_found_behind_a_document_of_a_thousand_better_chunks(make_store: MakeStore, random_vectors: Make):
    query = random_vectors(1, 8)
    near = np.repeat(query, 1000, axis=0)
    names = [f"long#{start}-{start + 1}" for start in range(1000)] + [f"d{number}#0-5" for number in range(12)]
    store = make_store({"a:0": (names, np.concatenate([near, random_vectors(12, 8, 5)]))})
    found = exact(store, query, 8, 10, is_chunked=True)[0]
    assert len(set(found)) == 10
    assert found[0] == "long"


def test_queries_in_parts_are_ranked_as_all_at_once(make_store: MakeStore, random_vectors: Make, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(3)
    names = chunks_of([30, 1, 1, 5, 1, 2, 40], rng)
    store = make_store({"a:0": (names, random_vectors(len(names), 8))}, "chunks")
    queries = random_vectors(7, 8, 4)
    whole = exact(store, queries, 4, 5, is_chunked=True)
    monkeypatch.setattr(rankings, "_MOST_SCORES", 20)
    assert exact(store, queries, 4, 5, is_chunked=True) == whole


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
    plan = [f"4:{len(chunks)}", f"8:{len(chunks)}"]
    queries = random_vectors(3, 8, seed + 100)
    vectors = full.astype(np.float64)
    scores = queries.astype(np.float64) @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    with tempfile.TemporaryDirectory() as name:
        found = through_funnel(make_index(store, 2, name), store, plan, queries, k)
    assert found == documents_by_brute_force(chunks, scores, k)


def test_a_short_funnel_gives_the_documents_of_its_own_chunks_and_grows_only_where_they_are_too_few(
    make_store: MakeStore, make_index: Callable[..., IndexStore], random_vectors: Make
):
    query = random_vectors(1, 8)
    names = [f"long#{start}-{start + 1}" for start in range(50)] + [f"d{number}#0-5" for number in range(30)]
    store = make_store({"a:0": (names, np.concatenate([np.repeat(query, 50, axis=0), random_vectors(30, 8, 5)]))})
    found = through_funnel(make_index(store), store, ["4:5", "8:3"], query, 10)[0]
    assert len(set(found)) == 10
    assert found[0] == "long"


def test_a_corpus_id_that_is_not_a_chunks_is_named(make_store: MakeStore, random_vectors: Make):
    store = make_store({"a:0": (["plain"], random_vectors(1, 8))})
    with pytest.raises(ValueError, match="'plain': not the id of a chunk"):
        exact(store, random_vectors(1, 8), 8, 1, is_chunked=True)


def test_a_thousand_copies_of_one_text_are_ordered_by_id_and_hide_nothing(make_store: MakeStore, random_vectors: Make):
    """More copies tie than are fetched: these queries are searched anew, score by score."""
    rng, query = np.random.default_rng(0), random_vectors(1, 8)
    names = [f"d{number:04}" for number in rng.permutation(1_020)]
    block = np.concatenate([np.repeat(query, 1_000, axis=0), random_vectors(20, 8, 5)])
    store = make_store({"a:0": (names[:700], block[:700]), "b:0": (names[700:], block[700:])})
    assert exact(store, np.concatenate([query, random_vectors(2, 8, 9)]), 8, 10)[0] == sorted(names[:1_000])[:10]


def test_small_units_together_give_what_each_alone_does(
    make_store: MakeStore, random_vectors: Make, monkeypatch: pytest.MonkeyPatch
):
    store = make_store({f"{n}:0": ([f"d{n}-{row}" for row in range(9)], random_vectors(9, 8, n)) for n in range(6)})
    queries = random_vectors(5, 8, 50)
    whole = exact(store, queries, 4, 7)
    monkeypatch.setattr(rankings, "_BLOCK_ROWS", 10)
    assert exact(store, queries, 4, 7) == whole


def test_scores_go_down_and_end_in_padding(make_store: MakeStore, random_vectors: Make):
    store = make_store({"a:0": ([f"d{n}" for n in range(5)], random_vectors(5, 8))})
    found = rankings.exact(store, Catalogue.of_store(store), random_vectors(3, 8, 4), 8, 10)
    assert found.scores.shape == (3, 5)
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_int8_finds_what_vectors_in_254_steps_give(make_store: MakeStore, random_vectors: Make):
    block, queries = random_vectors(200, 8), random_vectors(5, 8, 1)
    store = make_store({"a:0": ([f"d{n:03}" for n in range(200)], block)})
    packed = make_store({"a:0": ([f"d{n:03}" for n in range(200)], indexing.pack(block, "int8").astype(np.float16))}, "packed")
    assert exact(store, queries, 4, 20, "int8") == exact(packed, queries, 4, 20)


def test_signs_choose_four_times_as_many_and_vectors_rank_them(make_store: MakeStore, random_vectors: Make):
    block, queries, k = random_vectors(300, 8), random_vectors(4, 8, 1), 5
    store = make_store({"a:0": ([f"d{n:03}" for n in range(200)], block[:200]), "b:0": (
        [f"d{n:03}" for n in range(200, 300)], block[200:])})  # fmt: skip
    for row, found in enumerate(exact(store, queries, 8, k, "binary")):
        agree = ((block >= 0) == (queries[row] >= 0)).sum(axis=1)
        chosen = np.flatnonzero(agree >= np.sort(agree)[::-1][4 * k - 1])
        scores = block.astype(np.float64) @ queries[row]
        assert found == [f"d{n:03}" for n in sorted(chosen, key=lambda n, scores=scores: -scores[n])[:k]]


def test_signs_find_ten_documents_behind_one_of_a_thousand_better_chunks(make_store: MakeStore, random_vectors: Make):
    query = random_vectors(1, 8)
    names = [f"long#{start}-{start + 1}" for start in range(1000)] + [f"d{number}#0-5" for number in range(12)]
    store = make_store({"a:0": (names, np.concatenate([np.repeat(query, 1000, axis=0), random_vectors(12, 8, 5)]))})
    found = exact(store, np.concatenate([query, random_vectors(3, 8, 6)]), 8, 10, "binary", is_chunked=True)
    assert [len(set(row)) for row in found] == [10] * 4
    assert found[0][0] == "long"


@chunked
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_signs_give_as_many_documents_as_are_asked_for_however_they_are_cut(
    make_store: MakeStore, random_vectors: Make, counts: list[int], num_units: int, dim: int, k: int, seed: int
):
    chunks = chunks_of(counts, np.random.default_rng(seed))
    full = random_vectors(len(chunks), 8, seed)
    parts = np.array_split(np.arange(len(chunks)), num_units)
    store = make_store({f"{n}:0": ([chunks[row] for row in rows], full[rows]) for n, rows in enumerate(parts)})
    found = exact(store, random_vectors(3, 8, seed + 100), dim, k, "binary", is_chunked=True)
    assert [len(set(row)) for row in found] == [len(row) for row in found] == [min(k, len(counts))] * 3


def test_products_are_timed_at_every_dim_in_a_sample_of_one_size_whatever_the_corpus_holds(
    make_store: MakeStore, random_vectors: Make, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def note(queries: np.ndarray, documents: np.ndarray) -> float:
        asked.append((queries.shape, documents.shape))
        return 2.0

    monkeypatch.setattr(products, "time_products", note)
    monkeypatch.setattr(rankings, "_MOST_TIMED_NUMBERS", 800)
    store = make_store({"a:0": ([f"d{n}" for n in range(5)], random_vectors(5, 8))})
    taken = rankings.time_products(store, random_vectors(3, 8, 1), (8, 4))
    assert asked == [((256, 8), (100, 8)), ((256, 4), (100, 4))]
    assert taken == pytest.approx(dict.fromkeys((8, 4), 2.0 / 25_600))
    assert rankings.time_products(store, random_vectors(0, 8), (8,)) == {}
    assert rankings.time_products(make_store({"a:0": ([], random_vectors(0, 8))}, "empty"), random_vectors(3, 8), (8,)) == {}


@pytest.mark.parametrize("is_chunked", [False, True])
def test_words_find_the_documents_that_share_some_and_no_others(is_chunked: bool):
    texts = ["a red fox", "a red red fox", "blue whales", "foxes", "grass"]
    ids = [f"d{n}#0-9" if is_chunked else f"d{n}" for n in range(5)]
    catalogue = Catalogue.of(ids, is_chunked=is_chunked)
    found = rankings.by_words(LexicalIndex(texts), catalogue, ["red fox", "whale", "nothing known"], 10).ids(catalogue.names)
    assert found[0][:2] == ["d1", "d0"]
    assert (set(found[0]), found[1:]) == ({"d0", "d1", "d3"}, [["d2"], []])


def test_a_document_counts_as_its_best_chunk_for_words_too():
    texts = ["fox", "fox fox fox den", "whale", "fox in a long long sentence"]
    catalogue = Catalogue.of(["a#0-3", "b#0-9", "a#4-9", "a#10-20"], is_chunked=True)
    found = rankings.by_words(LexicalIndex(texts), catalogue, ["fox whale"], 2).ids(catalogue.names)
    assert found == [["a", "b"]]
