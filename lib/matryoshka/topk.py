"""Ranked lists: cutting and merging them so that the outcome never depends on how the corpus was sharded.

The order is: higher score first, then smaller id. An entry with score -inf is padding and ranks last.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
IdLookup = Callable[[IntArray], npt.NDArray[np.object_]]

PADDING = -np.inf


def rank(scores: npt.NDArray[np.float32], documents: IntArray, num_kept: int, ids: IdLookup) -> IntArray:
    """Returns the columns of the best ``num_kept`` candidates of each query, best first.

    Ids are looked up only for candidates whose score another candidate of the same query has too, so a ranking without ties
    costs no look-up at all.

    Args:
        scores: Higher is better; ``PADDING`` marks no candidate.
        documents: Numbers that ``ids`` understands.
        num_kept: K; fewer come back where there are fewer candidates.
        ids: Returns the ids of a flat array of document numbers.

    Shapes: scores [Q, M], documents [Q, M] -> [Q, min(K, M)].
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    # Only ties that reach into the kept part matter, but a tie may begin inside it and end outside.
    tied = np.zeros(ranked.shape, dtype=bool)
    equal = (ranked[:, 1:] == ranked[:, :-1]) & np.isfinite(ranked[:, 1:])
    tied[:, 1:] |= equal
    tied[:, :-1] |= equal
    rows = np.flatnonzero(tied[:, : num_kept + 1].any(axis=1))
    if rows.size:
        tied_documents = np.take_along_axis(documents[rows], order[rows], axis=1)
        _, positions = np.unique(ids(tied_documents[tied[rows]]), return_inverse=True)
        keys = np.zeros(tied_documents.shape, dtype=np.int64)
        keys[tied[rows]] = positions
        resolved = np.lexsort((keys, -ranked[rows]), axis=1)
        order[rows] = np.take_along_axis(order[rows], resolved, axis=1)
    return order[:, :num_kept]


def cut(scores: npt.NDArray[np.float32], documents: IntArray, num_kept: int) -> tuple[npt.NDArray[np.float32], IntArray]:
    """Returns the best ``num_kept`` candidates of each query and all that tie with the last of them, in no order; -1 pads.

    Without an order among equals no id is looked up, and the outcome is the same however documents were sharded.

    Shapes: scores [Q, M], documents [Q, M] -> [Q, L], [Q, L].

    >>> cut(np.array([[0.5, 0.9, 0.5, 0.1]], np.float32), np.array([[4, 8, 5, 6]]), 2)[1].tolist()
    [[8, 4, 5]]
    """
    num_columns = scores.shape[1]
    if num_columns <= num_kept:
        return scores, np.where(scores > PADDING, documents, -1)
    order = np.argpartition(-scores, num_kept - 1, axis=1)
    last = np.take_along_axis(scores, order[:, num_kept - 1 : num_kept], axis=1)
    width = max(int(np.count_nonzero((scores >= last) & (scores > PADDING), axis=1).max(initial=0)), num_kept)
    if num_kept < width < num_columns:
        order = np.argpartition(-scores, width - 1, axis=1)
    order = order[:, :width]
    best, found = np.take_along_axis(scores, order, axis=1), np.take_along_axis(documents, order, axis=1)
    is_kept = (best >= last) & (best > PADDING)
    return np.where(is_kept, best, np.float32(PADDING)), np.where(is_kept, found, -1)


def line_up(
    num_queries: int, numbers: IntArray, documents: IntArray, scores: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], IntArray]:
    """Returns pairs of a query's number and a document as one line of candidates per query; -1 pads.

    Shapes: numbers [P], documents [P], scores [P] -> [Q, M], [Q, M].

    >>> line_up(2, np.array([1, 0, 1]), np.array([7, 8, 9]), np.array([0.1, 0.2, 0.3], np.float32))[1].tolist()
    [[8, -1], [7, 9]]
    """
    order = np.argsort(numbers, kind="stable")
    numbers = numbers[order]
    counts = np.bincount(numbers, minlength=num_queries)
    columns = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (num_queries, int(counts.max(initial=0)))
    all_scores, all_documents = np.full(shape, PADDING, np.float32), np.full(shape, -1)
    all_scores[numbers, columns], all_documents[numbers, columns] = scores[order], documents[order]
    return all_scores, all_documents


def pad(parts: Sequence[tuple[npt.NDArray[np.float32], IntArray]]) -> tuple[npt.NDArray[np.float32], IntArray]:
    """Returns the candidates of several lots of queries as one, padded to the longest list.

    Shapes: each [Q, M] with a Q and an M of its own.
    """
    width = max((scores.shape[1] for scores, _ in parts), default=0)
    num_queries = sum(len(scores) for scores, _ in parts)
    all_scores, all_documents = np.full((num_queries, width), PADDING, np.float32), np.full((num_queries, width), -1)
    start = 0
    for scores, documents in parts:
        all_scores[start : start + len(scores), : scores.shape[1]] = scores
        all_documents[start : start + len(scores), : scores.shape[1]] = documents
        start += len(scores)
    return all_scores, all_documents


def once_per_document(scores: npt.NDArray[np.float32], documents: IntArray) -> npt.NDArray[np.float32]:
    """Returns the scores with ``PADDING`` in place of all but the best of each document: a document scores as its best chunk.

    Shapes: scores [Q, M], documents [Q, M] -> [Q, M].

    >>> once_per_document(np.array([[0.5, 0.9, 0.7]], np.float32), np.array([[4, 8, 4]])).tolist()
    [[-inf, 0.8999999761581421, 0.699999988079071]]
    """
    order = np.lexsort((-scores, documents), axis=1)
    grouped = np.take_along_axis(documents, order, axis=1)
    is_again = np.zeros(grouped.shape, dtype=bool)
    is_again[:, 1:] = grouped[:, 1:] == grouped[:, :-1]
    kept = scores.copy()
    np.put_along_axis(kept, order, np.where(is_again, np.float32(PADDING), np.take_along_axis(scores, order, axis=1)), axis=1)
    return kept
