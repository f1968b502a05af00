"""The evaluate stage's work: rankings of a test split at every dim, and what they are worth."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from matryoshka import metrics, topk
from matryoshka.funnel import Searcher, Shard
from matryoshka.index import CoarseIndex
from matryoshka.nested import shrink
from matryoshka.vectors import EmbeddingStore

Vectors = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of a report: what ``system`` reached at ``dim`` by ``metric``."""

    system: str
    dim: int
    metric: str
    value: float


def exact_rankings(store: EmbeddingStore, queries: Vectors, dim: int, num_results: int) -> list[list[str]]:
    """Returns the ids of the best documents of each query at one dim; every document is compared, one unit at a time.

    Shapes: queries [Q, D].
    """
    cut = shrink(queries, dim)
    scores = np.full((len(cut), 0), topk.PADDING, dtype=np.float32)
    names = np.full((len(cut), 0), "", dtype=object)
    for ids, block in store.blocks():
        if len(ids):
            shard = Shard(CoarseIndex.build(shrink(block, dim), "Flat"), block)
            block_scores, rows = shard.shortlist(cut, min(num_results, len(ids)))
            block_names = np.asarray(ids.to_pylist(), dtype=object)[rows]
            scores = np.concatenate([scores, block_scores], axis=1)
            names = np.concatenate([names, block_names], axis=1)
            numbers = np.arange(names.size).reshape(names.shape)
            columns = topk.rank(scores, numbers, num_results, names.ravel().take)
            scores, names = np.take_along_axis(scores, columns, axis=1), np.take_along_axis(names, columns, axis=1)
    return names.tolist()


def evaluate_dims(
    system: str, store: EmbeddingStore, queries: Vectors, query_ids: Sequence[str], qrels: metrics.Qrels, dims: Iterable[int]
) -> list[Row]:
    """Returns every measure of a system at every dim, by exact search.

    Shapes: queries [Q, D].
    """
    rows = []
    for dim in dims:
        figures = metrics.measure(qrels, query_ids, exact_rankings(store, queries, dim, metrics.DEPTH))
        rows += [Row(system, dim, name, value) for name, value in figures.items()]
    return rows


def evaluate_funnel(
    system: str, searcher: Searcher, dim: int, queries: Vectors, query_ids: Sequence[str], qrels: metrics.Qrels
) -> list[Row]:
    """Returns every measure of what comes out of an index's funnel; ``dim`` is that of its shortlist.

    Shapes: queries [Q, D].
    """
    ranking = searcher.search(queries, metrics.DEPTH)
    figures = metrics.measure(qrels, query_ids, ranking.ids.tolist())
    return [Row(system, dim, name, value) for name, value in figures.items()]
