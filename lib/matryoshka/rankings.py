"""What systems find: the best documents of each query, by exact search at a dim, quantised, through a funnel, or by words.

Documents are numbers in the order of their ids, so that the order among equals is that of numbers. Of chunked documents each
counts as its best chunk, and stands once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from matryoshka import indexing, topk, units
from matryoshka.funnel import Searcher, Shard
from matryoshka.lexical import LexicalIndex
from matryoshka.nested import Float32Array, shrink
from matryoshka.topk import PADDING, IntArray
from matryoshka.vectors import EmbeddingStore

Vectors = npt.NDArray[np.floating[Any]]
Names = npt.NDArray[np.object_]
Packing = Literal["float16", "int8", "binary"]
Lists = tuple[Float32Array, IntArray]

_MOST_SCORES = 1 << 20  # of queries with candidates, at once: some 60 MB with what ranking them takes
_MOST_WORD_SCORES = 1 << 24
_QUERIES_AT_ONCE = 2_048  # whose signs are compared: many documents tie
_BLOCK_ROWS = 1 << 14  # small units are looked through together
_RESCORED = 4  # so many times the results are kept by the signs alone
_TIMED_QUERIES, _MOST_TIMED_ROWS = 256, 1 << 12
_MOST_TIMED_NUMBERS = 1 << 19  # of documents: .3 GFLOP a pass, and its scores stay in cache


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The documents behind rows of vectors or texts.

    Attributes:
        names: Ids of the documents, sorted, each once: a document's number is its place.
        numbers: The document of each row.
        is_chunked: Whether several rows may be of one document.

    Shapes: names [N], numbers [rows].
    """

    names: Names
    numbers: IntArray
    is_chunked: bool

    @classmethod
    def of(cls, ids: Iterable[str], *, is_chunked: bool = False) -> "Catalogue":
        """Returns the catalogue of rows with these ids.

        Raises:
            ValueError: They are to be chunks, and an id is not a chunk's.
        """
        own = np.array([units.document_of(name) for name in ids] if is_chunked else list(ids), dtype=object)
        names, numbers = np.unique(own, return_inverse=True)
        return cls(names, numbers, is_chunked)

    @classmethod
    def of_store(cls, store: EmbeddingStore, *, is_chunked: bool = False) -> "Catalogue":
        """Returns the catalogue of the rows of an embedding store.

        Raises:
            ValueError: As ``of``.
        """
        return cls.of((name for ids, _ in store.blocks() for name in ids.to_pylist()), is_chunked=is_chunked)

    def find(self, ids: Names) -> IntArray:
        """Returns the numbers of documents, of chunks those that they were cut from; the empty id has none (-1).

        Shapes: ids [Q, K] -> [Q, K].
        """
        known, places = np.unique(ids, return_inverse=True)
        own = np.array([units.document_of(name) if name and self.is_chunked else name for name in known], dtype=object)
        found = np.where(known == "", -1, np.searchsorted(self.names, own))
        return found[places].reshape(ids.shape)


@dataclass(frozen=True, slots=True)
class Rankings:
    """What one system found, best first: by score, then by id.

    Attributes:
        scores: Higher is better; ``PADDING`` where there is nothing more.
        documents: Numbers of a catalogue; -1 pads.

    Shapes: scores [Q, K], documents [Q, K].
    """

    scores: Float32Array
    documents: IntArray

    def ids(self, names: Names) -> list[list[str]]:
        """Returns the ids of the documents, without padding."""
        return [names[row[row >= 0]].tolist() for row in self.documents]


_Search = Callable[[IntArray, int], Lists]
"""Returns (scores, documents) of at least so many candidates for some queries, and all that tie with the last of them."""


def exact(
    store: EmbeddingStore, catalogue: Catalogue, queries: Vectors, dim: int, num_results: int, packing: Packing = "float16"
) -> Rankings:
    """Returns the best documents of each query at one dim; every vector is compared, a few units at a time.

    Args:
        store: The embeddings.
        catalogue: Of the store.
        queries: Full vectors.
        dim: How much of each vector is looked at.
        num_results: K.
        packing: ``int8`` as an index stores vectors; ``binary``: signs alone choose four times as many documents as are wanted,
            which are then ranked by their vectors.

    Shapes: queries [Q, D].
    """
    cut = shrink(queries, dim)
    if packing == "binary":
        parts = (cut[first : first + _QUERIES_AT_ONCE] for first in range(0, len(cut), _QUERIES_AT_ONCE))
        scores, documents = topk.pad([_scan_signs(store, catalogue, part, num_results) for part in parts])
    elif catalogue.is_chunked:
        scores, documents = _scan(store, catalogue, cut, num_results, packing)
    else:
        scores, documents = _compare(store, catalogue, cut, num_results, packing)
    return Rankings(scores, documents)


def time_products(store: EmbeddingStore, queries: Vectors, dims: Sequence[int]) -> dict[int, float]:
    """Returns the seconds that comparing one query with one row takes at each dim; nothing where there are none of either.

    The matrix product alone is timed, on the CPU: 256 queries at once and the same sample of rows at every dim, both in memory
    (few ones are repeated), after a warm-up. Reading, choosing the best and ranking cost the same at every dim.

    Shapes: queries [Q, D].
    """
    from matryoshka import products

    _, block = next(_blocks(store), (0, np.empty((0, 0), np.float16)))
    if not len(block) or not len(queries):
        return {}
    num_rows = min(_MOST_TIMED_ROWS, max(_MOST_TIMED_NUMBERS // max(dims), 1))
    rows, asked = block[np.arange(num_rows) % len(block)], queries[np.arange(_TIMED_QUERIES) % len(queries)]
    return {dim: products.time_products(shrink(asked, dim), shrink(rows, dim)) / (_TIMED_QUERIES * num_rows) for dim in dims}


def through_funnel(searcher: Searcher, catalogue: Catalogue, queries: Vectors, num_results: int) -> Rankings:
    """Returns the documents that an index's funnel gives for each query.

    With chunks, the funnel is asked for more of them where the first ones belong to too few documents; its shortlists grow
    only where they would not hold that many.

    Shapes: queries [Q, D].
    """

    def search(rows: IntArray, num_asked: int) -> Lists:
        ranking = searcher.search(queries[rows], num_asked)
        return ranking.scores, catalogue.find(ranking.ids)

    if catalogue.is_chunked:
        scores, documents = _best_documents(search, len(queries), searcher.num_documents, num_results)
    else:
        scores, documents = search(np.arange(len(queries)), num_results)
    return Rankings(scores, documents)


def by_words(index: LexicalIndex, catalogue: Catalogue, queries: Sequence[str], num_results: int) -> Rankings:
    """Returns the documents that share words with each query, by BM25.

    Args:
        index: Of the texts of the catalogue's rows.
        catalogue: Of the documents.
        queries: Their texts.
        num_results: K.
    """
    num_rows = len(catalogue.numbers)
    size = max(_MOST_WORD_SCORES // max(num_rows, 1), 1)

    def search(rows: IntArray, num_asked: int) -> Lists:
        parts = []
        for first in range(0, len(rows), size):
            scores = index.score([queries[row] for row in rows[first : first + size]])
            scores[scores <= 0] = PADDING
            parts.append(topk.cut(scores, np.broadcast_to(np.arange(num_rows), scores.shape), num_asked))
        scores, found = topk.pad(parts)
        return scores, np.where(found >= 0, catalogue.numbers[found], -1)

    return Rankings(*_best_documents(search, len(queries), num_rows, num_results))


def _compare(store: EmbeddingStore, catalogue: Catalogue, cut: Float32Array, num_results: int, packing: Packing) -> Lists:
    """Returns the best documents where each is one row."""
    scores, documents = np.full((len(cut), 0), PADDING, dtype=np.float32), np.full((len(cut), 0), -1)
    for first, block in _blocks(store):
        more, found = Shard(_pack(block, packing)).scan(cut, num_results)
        own = np.where(found >= 0, catalogue.numbers[first + found], -1)
        both = np.concatenate([scores, more], axis=1), np.concatenate([documents, own], axis=1)
        scores, documents = topk.cut(*both, num_results)
    return _rank(scores, documents, num_results)


def _blocks(store: EmbeddingStore) -> Iterator[tuple[int, npt.NDArray[np.float16]]]:
    """Yields the number of the first row, and the vectors, of units or of several small ones together."""
    first, waiting, num_waiting = 0, [], 0
    for _, block in store.blocks():
        waiting.append(block)
        num_waiting += len(block)
        if num_waiting >= _BLOCK_ROWS:
            yield first, np.concatenate(waiting)
            first, waiting, num_waiting = first + num_waiting, [], 0
    if num_waiting:
        yield first, np.concatenate(waiting)


def _pack(block: npt.NDArray[np.float16], packing: Packing) -> npt.NDArray[Any]:
    if packing == "binary":
        return np.where(block >= 0, 1, -1).astype(np.int8)
    return indexing.pack(block, packing)


def _score(
    store: EmbeddingStore, cut: Float32Array, numbers: IntArray, rows: IntArray, packing: Packing = "float16"
) -> Float32Array:
    """Returns the scores of chosen queries and rows, each depending on these two alone.

    Shapes: numbers [P] (of queries), rows [P] -> [P].
    """
    scores = np.empty(len(rows), np.float32)
    for first, block in _blocks(store):
        own = np.flatnonzero((rows >= first) & (rows < first + len(block)))
        if own.size:
            scores[own] = Shard(_pack(block, packing)).score(cut, numbers[own], rows[own] - first)
    return scores


def _scan(store: EmbeddingStore, catalogue: Catalogue, cut: Float32Array, num_results: int, packing: Packing) -> Lists:
    """Returns the best documents, unit by unit: one that is among the best of all is so in the unit with its best row."""
    scores, documents = np.full((len(cut), 0), PADDING, dtype=np.float32), np.full((len(cut), 0), -1)
    for first, block in _blocks(store):
        shard, own = Shard(_pack(block, packing)), catalogue.numbers[first : first + len(block)]

        def search(rows: IntArray, num_asked: int, shard: Shard = shard, own: IntArray = own) -> Lists:
            found_scores, found = shard.scan(cut[rows], num_asked)
            return found_scores, np.where(found >= 0, own[found], -1)

        more = _best_documents(search, len(cut), len(block), min(num_results, len(np.unique(own))))
        scores, documents = np.concatenate([scores, more[0]], axis=1), np.concatenate([documents, more[1]], axis=1)
        scores, documents = _rank(scores, documents, num_results)
    return scores, documents


def _scan_signs(store: EmbeddingStore, catalogue: Catalogue, cut: Float32Array, num_results: int) -> Lists:
    """Returns the best documents among those that signs choose: more, where the rows belong to too few documents."""

    def search(rows: IntArray, num_asked: int) -> Lists:
        return _by_signs(store, catalogue, cut[rows], num_asked)

    return _best_documents(search, len(cut), len(catalogue.numbers), num_results)


def _by_signs(store: EmbeddingStore, catalogue: Catalogue, cut: Float32Array, num_results: int) -> Lists:
    """Returns candidates that agree with a query in most signs, and what ties with the last of them, scored by their vectors."""
    signs = np.where(cut >= 0, 1, -1).astype(np.float32)
    scores, rows = np.full((len(cut), 0), PADDING, dtype=np.float32), np.full((len(cut), 0), -1)
    keep = _RESCORED * num_results
    for first, block in _blocks(store):
        more, found = Shard(_pack(block, "binary")).scan(signs, keep)
        both = np.concatenate([scores, more], axis=1), np.concatenate([rows, np.where(found >= 0, first + found, -1)], axis=1)
        scores, rows = topk.cut(*both, keep)
    numbers, places = np.nonzero(rows >= 0)
    scores = np.full(rows.shape, PADDING, dtype=np.float32)
    scores[numbers, places] = _score(store, cut, numbers, rows[numbers, places])
    return scores, np.where(rows >= 0, catalogue.numbers[rows], -1)


def _best_documents(search: _Search, num_queries: int, num_rows: int, num_results: int) -> Lists:
    """Returns scores and numbers of the best documents of each query, whatever number of rows belongs to one of them.

    Where the rows that came back belong to too few documents, more are asked for: that is exact, since a document that is
    not among them has no row as good as the last. Queries go in parts, so that memory is bounded even where one document
    fills everything.

    Shapes: [Q, num_results], padded with ``PADDING`` and -1.
    """
    scores = np.full((num_queries, num_results), PADDING, dtype=np.float32)
    documents = np.full((num_queries, num_results), -1)
    num_asked, pending = min(num_results, num_rows), np.arange(num_queries if num_rows else 0)
    while pending.size:
        short = []
        size = max(_MOST_SCORES // num_asked, 1)
        for rows in (pending[start : start + size] for start in range(0, len(pending), size)):
            found, own = search(rows, num_asked)
            best, best_documents = _rank(found, own, num_results)
            scores[rows, : best.shape[1]], documents[rows, : best.shape[1]] = best, best_documents
            is_short = np.count_nonzero(best > PADDING, axis=1) < num_results
            is_cut = np.count_nonzero(found > PADDING, axis=1) >= num_asked  # else there is nothing more
            short.append(rows[is_short & is_cut])
        pending = np.concatenate(short) if num_asked < num_rows else np.empty(0, np.int64)
        num_asked = min(2 * num_asked, num_rows)
    return scores, documents


def _rank(scores: Float32Array, documents: IntArray, num_results: int) -> Lists:
    """Returns scores and numbers of the best documents of each query among candidates, each document once.

    Shapes: scores [Q, M], documents [Q, M] -> [Q, min(num_results, M)] each.
    """
    single = topk.once_per_document(scores, documents)
    columns = np.lexsort((documents, -single), axis=1)[:, :num_results]
    best = np.take_along_axis(single, columns, axis=1)
    return best, np.where(best > PADDING, np.take_along_axis(documents, columns, axis=1), -1)
