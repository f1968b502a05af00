"""The funnel: shortlist every document on a narrow prefix, rerank what is left on wider ones.

Each cut is made over all shards together, by (score, id), so the outcome is that of one unsharded search with the same plan.
Shards may live anywhere: ``Searcher`` only needs a way to call a method on each of them.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from matryoshka import topk, vectors
from matryoshka.index import CoarseIndex
from matryoshka.nested import Float32Array, FunnelPlan, shrink
from matryoshka.topk import IntArray

COARSE, VECTORS, IDS = "coarse.faiss", "vectors.npy", "ids.arrow"

# Scores closer than this may have been ordered by rounding; both candidates are then looked at.
_ROUNDING = 1e-5
_EXTRA = 8
_GATHER_BYTES = 64 << 20


class Shard:
    """One part of an index: the coarse index, the full vectors (on disk, mapped), and nothing else."""

    def __init__(self, coarse: CoarseIndex, full: npt.NDArray[np.float16]) -> None:
        self._coarse = coarse
        self._full = full

    @classmethod
    def open(cls, folder: Path) -> "Shard":
        """Returns the shard in a folder; vectors stay on disk until they are looked at."""
        return cls(CoarseIndex.read(folder / COARSE), np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False))

    @property
    def num_documents(self) -> int:
        """Documents in the shard."""
        return int(self._full.shape[0])

    def shortlist(self, queries: Float32Array, num_kept: int) -> tuple[Float32Array, IntArray]:
        """Returns (scores, rows) of a few more than the best ``num_kept`` documents: every one that could belong to them.

        Where the last places are so close that rounding, or a tie, may have decided, more are fetched until a gap shows.
        Scores are then computed again, one document at a time, so that equal vectors score equally in every shard.

        Shapes: queries [Q, dim] -> [Q, M], [Q, M].
        """
        num_fetched = min(num_kept + _EXTRA, self.num_documents)
        while True:
            scores, rows = self._coarse.search(queries, num_fetched)
            if num_fetched == self.num_documents or not (scores[:, num_kept - 1] - scores[:, -1] < _ROUNDING).any():
                return self.score(queries, rows), rows
            num_fetched = min(2 * num_fetched, self.num_documents)

    def score(self, queries: Float32Array, rows: IntArray) -> Float32Array:
        """Returns the inner product of each query with the prefixes of its own candidates; row -1 scores ``PADDING``.

        Shapes: queries [Q, dim], rows [Q, M] -> [Q, M].
        """
        dim = queries.shape[1]
        prefixes = self._full[:, :dim]
        scores = np.empty(rows.shape, dtype=np.float32)
        num_queries = max(_GATHER_BYTES // (4 * dim * max(rows.shape[1], 1)), 1)
        for start in range(0, len(rows), num_queries):
            part = slice(start, start + num_queries)
            candidates = shrink(prefixes[rows[part]], dim)
            scores[part] = np.einsum("qmd,qd->qm", candidates, queries[part])
        return np.where(rows >= 0, scores, np.float32(topk.PADDING))


class CallShards(Protocol):
    """Calls one method on every shard, each with its own arguments, and returns the results in the order of the shards."""

    def __call__(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Returns one result per shard."""


def call_locally(shards: Sequence[Shard]) -> CallShards:
    """Returns a caller for shards in this process."""

    def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(shard, method)(*own) for shard, own in zip(shards, arguments, strict=True)]

    return call


def call_in_turn(folders: Sequence[Path]) -> CallShards:
    """Returns a caller that opens one shard after the other: memory holds one of them, and an only one stays open."""
    open_shard = functools.lru_cache(maxsize=1)(Shard.open)

    def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(open_shard(folder), method)(*own) for folder, own in zip(folders, arguments, strict=True)]

    return call


@dataclass(frozen=True, slots=True)
class Ranking:
    """Results of a search, best first; fewer than K where there are fewer documents.

    Shapes: scores [Q, K], documents [Q, K] (numbers that ``ids`` understands; -1 pads).
    """

    scores: Float32Array
    documents: IntArray
    ids: npt.NDArray[np.object_]


class Searcher:
    """Searches the shards of one index with one plan.

    Args:
        call: How to reach the shards.
        ids: The ids of each shard's rows.
        plan: The funnel.

    >>> full = np.eye(4, 8, dtype=np.float16)
    >>> shard = Shard(CoarseIndex.build(shrink(full, 4), "Flat"), full)
    >>> plan = FunnelPlan.parse(["4:3", "8:2"])
    >>> searcher = Searcher(call_locally([shard]), [pa.array(["a", "b", "c", "d"])], plan)
    >>> searcher.search(np.array([[0, 0, 1, 0.5, 0, 0, 0, 0]], dtype=np.float32), num_results=2).ids.tolist()
    [['c', 'd']]
    """

    def __init__(self, call: CallShards, ids: Sequence[pa.Array], plan: FunnelPlan) -> None:
        self._call = call
        self._ids = ids
        self._plan = plan
        self._offsets = np.cumsum([0, *(len(part) for part in ids)])

    @property
    def num_documents(self) -> int:
        """Documents in all shards."""
        return int(self._offsets[-1])

    def count_candidates(self, num_results: int) -> int:
        """Returns how many candidates of one query all shards together may hand over."""
        return min(num_results * len(self._ids), self.num_documents)

    def search(self, queries: npt.NDArray[np.floating[Any]], num_results: int) -> Ranking:
        """Returns the best documents of each query.

        Shapes: queries [Q, D]; see ``Ranking`` for what comes out.

        Raises:
            ValueError: ``num_results`` is below 1, a query is not finite, or queries are narrower than the plan.
        """
        self._check(queries, num_results)
        plan = self._plan.for_results(num_results)
        scores, documents = self._shortlist(shrink(queries, plan.shortlist.dim), plan.shortlist.keep)
        for step in plan.reranks:
            scores = self._score(shrink(queries, step.dim), documents)
            scores, documents = self._cut(scores, documents, step.keep)
        scores, documents = scores[:, :num_results], documents[:, :num_results]
        return Ranking(scores, documents, self._look_up(documents))

    def score(self, queries: npt.NDArray[np.floating[Any]], documents: IntArray) -> Float32Array:
        """Returns the scores that a search gives documents at the end of the funnel; document -1 scores ``PADDING``.

        Shapes: queries [Q, D], documents [Q, M] (numbers as in ``Ranking``) -> [Q, M].

        Raises:
            ValueError: A query is not finite, or queries are narrower than the plan.
        """
        self._check(queries, num_results=1)
        return self._score(shrink(queries, self._plan.steps[-1].dim), documents)

    def _check(self, queries: npt.NDArray[np.floating[Any]], num_results: int) -> None:
        if num_results < 1:
            raise ValueError(f"search: {num_results} results asked for. Ask for at least one.")
        width = self._plan.steps[-1].dim
        if queries.ndim != 2 or queries.shape[1] < width:
            raise ValueError(f"search: queries of shape {queries.shape}, the plan needs [Q, {width}]. Use the index's own model.")
        if not np.isfinite(queries).all():
            rows = np.flatnonzero(~np.isfinite(queries).all(axis=1))[:3].tolist()
            raise ValueError(f"search: queries {rows} are not finite. Check the model that made them.")

    def _shortlist(self, queries: Float32Array, num_kept: int) -> tuple[Float32Array, IntArray]:
        results = self._call("shortlist", [(queries, num_kept)] * len(self._ids))
        scores = np.concatenate([part for part, _ in results], axis=1)
        documents = np.concatenate(
            [np.where(rows >= 0, rows + offset, -1) for (_, rows), offset in zip(results, self._offsets, strict=False)], axis=1
        )
        return self._cut(scores, documents, num_kept)

    def _score(self, queries: Float32Array, documents: IntArray) -> Float32Array:
        """Asks each shard for the scores of its own candidates; together they cover all."""
        sizes = np.diff(self._offsets)
        local = [documents - offset for offset in self._offsets[:-1]]
        own = [np.where((rows >= 0) & (rows < size), rows, -1) for rows, size in zip(local, sizes, strict=True)]
        scores = self._call("score", [(queries, rows) for rows in own])
        return np.maximum.reduce(scores) if scores else np.empty(documents.shape, np.float32)

    def _cut(self, scores: Float32Array, documents: IntArray, num_kept: int) -> tuple[Float32Array, IntArray]:
        columns = topk.rank(scores, documents, num_kept, self._look_up)
        return np.take_along_axis(scores, columns, axis=1), np.take_along_axis(documents, columns, axis=1)

    def _look_up(self, documents: IntArray) -> npt.NDArray[np.object_]:
        found = np.full(documents.shape, "", dtype=object)
        shards = np.searchsorted(self._offsets, documents, side="right") - 1
        for shard, ids in enumerate(self._ids):
            mask = (shards == shard) & (documents >= 0)
            found[mask] = vectors.take(ids, documents[mask] - self._offsets[shard])
        return found
