"""The evaluate stage's work: rankings of a split at every dim, similarities of sentences, and what they are worth."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from matryoshka import metrics, topk, units
from matryoshka.funnel import Searcher, Shard
from matryoshka.nested import Float32Array, shrink
from matryoshka.topk import IntArray
from matryoshka.vectors import EmbeddingStore, Float16Array

Vectors = npt.NDArray[np.floating[Any]]
Names = npt.NDArray[np.object_]

HEADLINES = ("nDCG@10", metrics.SPEARMAN)

_MOST_SCORES = 1 << 20  # of queries with candidates, at once: some 60 MB with what ranking them takes


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of a report: what ``system`` reached at ``dim`` by ``metric``."""

    system: str
    dim: int
    metric: str
    value: float


@dataclass(frozen=True, slots=True)
class Profile:
    """A system's model: its size, and how fast it was in this evaluation; None where that was not measured."""

    system: str
    num_bytes: int
    num_parameters: int
    width: int
    max_tokens: int | None
    documents_per_second: float | None
    queries_per_second: float | None


@dataclass(frozen=True, slots=True)
class _Candidates:
    """What a search for some queries found, best first: scores and documents, as numbers of their ``names``.

    Shapes: scores [Q, M], documents [Q, M].
    """

    scores: Float32Array
    documents: IntArray
    names: Names


_Search = Callable[[IntArray, int], _Candidates]
"""Returns at least so many candidates for some queries, given by their numbers, and all that tie with the last of them."""


def exact_rankings(
    store: EmbeddingStore, queries: Vectors, dim: int, num_results: int, *, is_chunked: bool = False
) -> list[list[str]]:
    """Returns the ids of the best documents of each query at one dim; every vector is compared, one unit at a time.

    Args:
        store: The embeddings.
        queries: Full vectors.
        dim: How much of each vector is looked at.
        num_results: K.
        is_chunked: Whether the store's rows are chunks: a document then scores as its best chunk, and stands once.

    Shapes: queries [Q, D].
    """
    cut = shrink(queries, dim)
    scores = np.full((len(cut), 0), topk.PADDING, dtype=np.float32)
    names = np.full((len(cut), 0), "", dtype=object)
    for ids, block in store.blocks():
        if len(ids):
            search, num_documents = _block_search(ids.to_pylist(), block, cut, is_chunked=is_chunked)
            block_scores, block_names = _best_documents(search, len(cut), len(ids), min(num_results, num_documents))
            # A document that is among the best of all is among the best of the unit that holds its best chunk.
            both = np.concatenate([scores, block_scores], axis=1), np.concatenate([names, block_names], axis=1)
            scores, names = _pick(both[0], *_number(both[1]), num_results)
    return _without_padding(names)


def _block_search(ids: Sequence[str], block: Float16Array, cut: Float32Array, *, is_chunked: bool) -> tuple[_Search, int]:
    """Returns a search through one unit, and how many documents it has."""
    own = [units.document_of(name) for name in ids] if is_chunked else ids
    documents, names = _number(np.asarray(own, dtype=object))
    shard = Shard(block)

    def search(rows: IntArray, num_asked: int) -> _Candidates:
        scores, found = shard.scan(cut[rows], num_asked)
        return _Candidates(scores, documents[found], names)

    return search, len(names)


def _best_documents(search: _Search, num_queries: int, num_rows: int, num_results: int) -> tuple[Float32Array, Names]:
    """Returns scores and names of the best documents of each query, whatever number of rows belongs to one of them.

    Where the rows that came back belong to too few documents, more are asked for: that is exact, since a document that is
    not among them has no row as good as the last. Queries go in parts, so that memory is bounded even where one document
    fills everything.

    Shapes: [Q, num_results], padded with ``PADDING`` and the empty name.
    """
    scores = np.full((num_queries, num_results), topk.PADDING, dtype=np.float32)
    names = np.full((num_queries, num_results), "", dtype=object)
    num_asked, pending = min(num_results, num_rows), np.arange(num_queries)
    while pending.size:
        short = []
        size = max(_MOST_SCORES // num_asked, 1)
        for rows in (pending[start : start + size] for start in range(0, len(pending), size)):
            found = search(rows, num_asked)
            best, best_names = _pick(found.scores, found.documents, found.names, num_results)
            scores[rows, : best.shape[1]], names[rows, : best.shape[1]] = best, best_names
            single = topk.once_per_document(found.scores, found.documents)
            short.append(rows[np.count_nonzero(single > topk.PADDING, axis=1) < num_results])
        pending = np.concatenate(short) if num_asked < num_rows else np.empty(0, np.int64)
        num_asked = min(2 * num_asked, num_rows)
    return scores, names


def _pick(scores: Float32Array, documents: IntArray, known: Names, num_results: int) -> tuple[Float32Array, Names]:
    """Returns scores and names of the best documents of each query among candidates, each document once."""
    single = topk.once_per_document(scores, documents)
    columns = topk.rank(single, documents, num_results, known.take)
    best = np.take_along_axis(single, columns, axis=1)
    return best, np.where(best > topk.PADDING, known[np.take_along_axis(documents, columns, axis=1)], "")


def _number(names: Names) -> tuple[IntArray, Names]:
    """Returns a number for each name, in the shape of the names, and the name of each number."""
    known, numbers = np.unique(names, return_inverse=True)
    return numbers.reshape(names.shape), known


def _without_padding(names: Names) -> list[list[str]]:
    return [[name for name in row if name] for row in names.tolist()]


def funnel_rankings(searcher: Searcher, queries: Vectors, num_results: int, *, is_chunked: bool = False) -> list[list[str]]:
    """Returns the ids of the documents that an index's funnel gives for each query, best first.

    With chunks, the funnel is asked for more of them where the first ones belong to too few documents; its shortlists grow
    only where they would not hold that many.

    Shapes: queries [Q, D].
    """
    if not is_chunked:
        return _without_padding(searcher.search(queries, num_results).ids)

    def search(rows: IntArray, num_asked: int) -> _Candidates:
        ranking = searcher.search(queries[rows], num_asked)
        own = [units.document_of(name) if name else "" for name in ranking.ids.ravel()]
        return _Candidates(ranking.scores, *_number(np.asarray(own, dtype=object).reshape(ranking.ids.shape)))

    _, names = _best_documents(search, len(queries), searcher.num_documents, num_results)
    return _without_padding(names)


def evaluate_dims(
    system: str,
    store: EmbeddingStore,
    queries: Vectors,
    query_ids: Sequence[str],
    qrels: metrics.Qrels,
    dims: Iterable[int],
    *,
    is_chunked: bool = False,
) -> list[Row]:
    """Returns every measure of a system at every dim, by exact search.

    Shapes: queries [Q, D].
    """
    rows = []
    for dim in dims:
        rankings = exact_rankings(store, queries, dim, metrics.DEPTH, is_chunked=is_chunked)
        rows += [Row(system, dim, name, value) for name, value in metrics.measure(qrels, query_ids, rankings).items()]
    return rows


def evaluate_funnel(
    system: str,
    searcher: Searcher,
    dim: int,
    queries: Vectors,
    query_ids: Sequence[str],
    qrels: metrics.Qrels,
    *,
    is_chunked: bool = False,
) -> list[Row]:
    """Returns every measure of what comes out of an index's funnel; ``dim`` is that of its shortlist.

    Shapes: queries [Q, D].
    """
    rankings = funnel_rankings(searcher, queries, metrics.DEPTH, is_chunked=is_chunked)
    return [Row(system, dim, name, value) for name, value in metrics.measure(qrels, query_ids, rankings).items()]


def evaluate_similarity(
    system: str, firsts: Vectors, seconds: Vectors, scores: Sequence[float], dims: Iterable[int]
) -> list[Row]:
    """Returns, at every dim, the rank correlation of the cosines of pairs with the scores that people gave them.

    Shapes: firsts [N, D], seconds [N, D], scores [N].
    """
    given, rows = np.asarray(scores), []
    for dim in dims:
        cosines = np.einsum("nd,nd->n", shrink(firsts, dim), shrink(seconds, dim))
        rows.append(Row(system, dim, metrics.SPEARMAN, metrics.spearman(given, cosines)))
    return rows


@dataclass(frozen=True, slots=True)
class Ranking:
    """Systems in order.

    Attributes:
        metric: By which measure.
        dims: The dims that all systems have; the mean is over these.
        means: Of each system, best first.
        best_per_dim: At every dim that any system has.
    """

    metric: str
    dims: tuple[int, ...]
    means: Mapping[str, float]
    best_per_dim: Mapping[int, str]

    @property
    def best(self) -> str:
        """The first system."""
        return next(iter(self.means))


def rank_systems(rows: Sequence[Row]) -> Ranking:
    """Returns systems ranked by the mean of the headline measure over the dims that all of them have.

    A wide model is not praised, nor blamed, for dims that a narrow one lacks. Of equals, the first one given stands first.

    Raises:
        ValueError: There is no such dim.

    >>> ranking = rank_systems([Row("a", 8, "nDCG@10", 0.9), Row("a", 4, "nDCG@10", 0.3), Row("b", 4, "nDCG@10", 0.5)])
    >>> ranking.best, ranking.dims, ranking.best_per_dim
    ('b', (4,), {8: 'a', 4: 'b'})
    """
    metric = next((name for name in HEADLINES if any(row.metric == name for row in rows)), HEADLINES[0])
    values = {(row.system, row.dim): row.value for row in rows if row.metric == metric}
    systems = list(dict.fromkeys(system for system, _ in values))
    all_dims = sorted({dim for _, dim in values}, reverse=True)
    shared = tuple(dim for dim in all_dims if all((system, dim) in values for system in systems))
    if not shared:
        raise ValueError(f"ranking: no dim that all of {', '.join(systems)} have. Evaluate them at one that they share.")
    means = {system: float(np.mean([values[system, dim] for dim in shared])) for system in systems}
    by_dim = {dim: {system: values[system, dim] for system in systems if (system, dim) in values} for dim in all_dims}
    best_per_dim = {dim: max(own, key=own.__getitem__) for dim, own in by_dim.items()}
    ordered = sorted(systems, key=lambda system: -means[system])
    return Ranking(metric, shared, {system: means[system] for system in ordered}, best_per_dim)
