"""The funnel: shortlist every document in a coarse space, rerank what is left on wider prefixes.

Each cut is made over all shards together, by score, with everything that ties with the last place; the results are ordered by
(score, id). So the outcome is that of one unsharded search with the same plan, for every kind of coarse index whose scores are
a function of query and document: all but graphs, which are another graph in every shard. Shards may live anywhere: ``Searcher``
only needs a way to call a method on each of them.

Drivers import this room: torch, and what else computes products, is imported by the process that opens a shard.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from matryoshka import artifacts, conditions, filters, topk
from matryoshka.artifacts import FileRecord
from matryoshka.conditions import Condition
from matryoshka.filters import COLUMNS
from matryoshka.index import CoarseIndex
from matryoshka.nested import Float32Array, FunnelPlan, Step, shrink
from matryoshka.spaces import Space
from matryoshka.storage import Place
from matryoshka.topk import IntArray, Mask

if TYPE_CHECKING:
    from matryoshka.lists import ListedVectors
    from matryoshka.products import StoredVectors

COARSE, DENSE, LISTS, VECTORS, IDS = "coarse.faiss", "coarse.npy", "lists.npz", "vectors.npy", "ids.arrow"

# Scores closer than this may have been ordered by rounding; both candidates are then looked at.
_ROUNDING = 1e-5
_EXTRA_SHARE, _LEAST_EXTRA = 8, 8
_MOST_FETCHED = 1 << 24  # scores and rows at once: 200 MB

# A condition that leaves so few documents is answered by comparing just these at the plan's last dim: at this share a shortlist
# would have to fetch twenty times what it keeps, and so many documents take no longer than a coarse search of all.
_FEW_SHARE, _FEW_DOCUMENTS = 0.05, 20_000


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """Where a shard is.

    Attributes:
        index: Folder of its index.
        key: Of the shard.
        files: Its files.
        removed: The file with the rows that were removed since it was built, if any were.
    """

    index: Place
    key: str
    files: tuple[FileRecord, ...]
    removed: FileRecord | None = None

    @property
    def num_bytes(self) -> int:
        """What there is to hold."""
        return sum(file.num_bytes for file in self.files)

    def resolve(self) -> "ShardFiles":
        """Returns the same with absolute paths, for other processes."""
        return dataclasses.replace(self, index=self.index.resolve())

    @property
    def folder(self) -> Place:
        """The shard's own folder."""
        return self.index / PurePosixPath(self.files[0].path).parent.as_posix()

    def has(self, name: str) -> bool:
        """Returns whether the shard has a file of this name."""
        return any(PurePosixPath(file.path).name == name for file in self.files)

    def path(self, name: str) -> Path:
        """Returns where a file can be opened on this node; from a bucket it is fetched, and held against its digest.

        Raises:
            ValueError: It is not what its receipt says.
        """
        return self._local(next(file for file in self.files if PurePosixPath(file.path).name == name))

    def read_removed(self) -> IntArray:
        """Returns the rows that were removed since the shard was built."""
        if self.removed is None:
            return np.empty(0, np.int64)
        rows: IntArray = np.load(self._local(self.removed), allow_pickle=False)
        return rows

    def _local(self, file: FileRecord) -> Path:
        if isinstance(self.index, Path):  # whoever opened the index has looked at it
            return self.index / file.path
        return artifacts.check_file(self.index, file)


class Shard:
    """One part of an index: a coarse index, the stored vectors, and which rows may be found.

    Args:
        stored: float16 or int8, up to a factor of each vector's own.
        coarse: A FAISS index, or coarse vectors, in lists or all compared; None where every search compares full vectors.
        removed: Rows that are gone from the results.
        device: Where inner products are computed.
        columns: What conditions may ask for.

    Shapes: stored [N, D], removed [R].
    """

    def __init__(
        self,
        stored: npt.NDArray[Any],
        coarse: "CoarseIndex | ListedVectors | StoredVectors | None" = None,
        removed: IntArray | None = None,
        device: str = "cpu",
        columns: pa.RecordBatch | None = None,
    ) -> None:
        from matryoshka.products import StoredVectors

        self._coarse, self._columns = coarse, columns
        self._asked: tuple[Condition, Mask] | None = None
        self._vectors = StoredVectors(stored, device)
        self._alive: Mask | None = None
        if removed is not None and len(removed):
            self._alive = np.ones(len(stored), dtype=bool)
            self._alive[removed] = False

    @classmethod
    def open(cls, files: ShardFiles, device: str = "cpu") -> "Shard":
        """Returns the shard in a folder; vectors stay on disk until they are looked at."""
        from matryoshka.lists import ListedVectors
        from matryoshka.products import StoredVectors

        stored = np.load(files.path(VECTORS), mmap_mode="c", allow_pickle=False)
        columns = filters.open_columns(files.path(COLUMNS)) if files.has(COLUMNS) else None
        coarse: CoarseIndex | ListedVectors | StoredVectors | None = None
        if files.has(COARSE):
            coarse = CoarseIndex.read(files.path(COARSE))
            if device == "cuda":
                coarse.copy_to_gpu()
        elif files.has(LISTS):
            coarse = ListedVectors.open(files.path(DENSE), files.path(LISTS), device)
        elif files.has(DENSE):
            coarse = StoredVectors(np.load(files.path(DENSE), mmap_mode="c", allow_pickle=False), device)
        return cls(stored, coarse, files.read_removed(), device, columns)

    @property
    def num_documents(self) -> int:
        """Rows of the shard, those included that were removed."""
        return len(self._vectors)

    def num_allowed(self, condition: Condition | None = None) -> int:
        """Returns how many rows may be found.

        Raises:
            ValueError: The condition does not fit the shard's columns.
        """
        allowed = self._allowed(condition)
        return self.num_documents if allowed is None else int(np.count_nonzero(allowed))

    def shortlist(self, queries: Float32Array, step: Step, condition: Condition | None = None) -> tuple[Float32Array, IntArray]:
        """Returns (scores, rows) of the best documents by the coarse index, and of all that tie with the last of them.

        Where the last places are so close that rounding, or a tie, may have decided, or too many rows were hidden, more are
        fetched until a gap shows.

        Shapes: queries [Q, dim] (coarse vectors) -> [Q, M], [Q, M]; row -1 pads.
        """
        assert self._coarse is not None
        allowed, num_allowed = self._allowed(condition), self.num_allowed(condition)
        if not isinstance(self._coarse, CoarseIndex):
            return self._coarse.find(queries, step.keep, allowed, **dict(step.parameters))
        if not num_allowed:
            return _nothing(len(queries))
        num_wanted = num_fetched_for(step.keep)
        num_hidden = self.num_documents - num_allowed
        # Hidden rows may all stand before the wanted ones; usually they stand anywhere.
        num_fetched = min(num_wanted + num_hidden, 2 * num_wanted * self.num_documents // num_allowed, self.num_documents)
        found: list[tuple[Float32Array, IntArray]] = []
        order: list[IntArray] = []
        pending = np.arange(len(queries))
        while pending.size:
            open_ones = [np.empty(0, np.int64)]
            for now in np.split(pending, range(_at_once(num_fetched), len(pending), _at_once(num_fetched))):
                raw, rows = self._coarse.search(queries[now], num_fetched, dict(step.parameters))
                scores = raw if allowed is None else np.where((rows >= 0) & allowed[rows], raw, np.float32(topk.PADDING))
                is_done = (num_fetched == self.num_documents) | _has_gap(scores, raw, step.keep)
                found.append(topk.cut(scores[is_done], rows[is_done], step.keep))
                order.append(now[is_done])
                open_ones.append(now[~is_done])
            pending = np.concatenate(open_ones)
            num_fetched = min(2 * num_fetched, self.num_documents)
        if not order:
            return _nothing(len(queries))
        scores, rows = topk.pad(found)
        back = np.argsort(np.concatenate(order))
        return scores[back], rows[back]

    def scan(self, queries: Float32Array, num_kept: int, condition: Condition | None = None) -> tuple[Float32Array, IntArray]:
        """Returns (scores, rows) of the best documents by a prefix of the stored vectors, every one compared; ties are kept.

        Shapes: queries [Q, dim] -> [Q, M], [Q, M]; row -1 pads.
        """
        return self._vectors.find(queries, num_kept, self._allowed(condition))

    def score(self, queries: Float32Array, numbers: IntArray, rows: IntArray) -> Float32Array:
        """Returns the inner products of chosen queries with prefixes of chosen documents, pair by pair.

        Shapes: queries [Q, dim], numbers [P] (of queries), rows [P] -> [P].
        """
        return self._vectors.score(queries, numbers, rows)

    def _allowed(self, condition: Condition | None = None) -> Mask | None:
        if condition is None:
            return self._alive
        asked = self._asked  # read once: another thread may ask for another condition meanwhile
        if asked is None or asked[0] != condition:  # a search asks for the same one several times
            mask = filters.select(self._columns, condition)
            asked = self._asked = condition, mask if self._alive is None else mask & self._alive
        return asked[1]


def num_fetched_for(num_kept: int) -> int:
    """Returns how many candidates are fetched for a shortlist, so that a gap shows behind its end."""
    return num_kept + max(num_kept // _EXTRA_SHARE, _LEAST_EXTRA)


def _nothing(num_queries: int) -> tuple[Float32Array, IntArray]:
    return np.empty((num_queries, 0), np.float32), np.empty((num_queries, 0), np.int64)


def _at_once(num_fetched: int) -> int:
    """Returns how many queries may fetch so many rows each without filling the memory."""
    return max(_MOST_FETCHED // num_fetched, 1)


def _has_gap(scores: Float32Array, fetched: Float32Array, num_kept: int) -> Mask:
    """Returns for which queries the best so many stand clear of everything that was not fetched.

    Args:
        scores: Of what may be found, ``PADDING`` elsewhere.
        fetched: Of all that was fetched; a list with ``PADDING`` came out short, so there is no more.
        num_kept: How many are wanted.
    """
    lowest = fetched.min(axis=1)
    last = -np.partition(-scores, min(num_kept, scores.shape[1]) - 1, axis=1)[:, min(num_kept, scores.shape[1]) - 1]
    is_clear: Mask = (lowest == topk.PADDING) | (last >= lowest + _ROUNDING)
    return is_clear


class CallShards(Protocol):
    """Calls one method on every shard, each with its own arguments, and returns the results in the order of the shards."""

    def __call__(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Returns one result per shard."""


def call_locally(shards: Sequence[Shard]) -> CallShards:
    """Returns a caller for shards in this process."""

    def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(shard, method)(*own) for shard, own in zip(shards, arguments, strict=True)]

    return call


def call_in_turn(files: Sequence[ShardFiles]) -> CallShards:
    """Returns a caller that opens one shard after the other: memory holds one of them, and an only one stays open."""
    open_shard = functools.lru_cache(maxsize=1)(Shard.open)

    def call(method: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [getattr(open_shard(own_files), method)(*own) for own_files, own in zip(files, arguments, strict=True)]

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

    A plan whose first step has the dim of the coarse space starts from the coarse index; with another dim it compares that
    prefix of every document, so a plan of one step at full width is exact search.

    Args:
        call: How to reach the shards.
        ids: The ids of each shard's rows.
        plan: The funnel.
        space: Of the coarse indexes; None where the shards have none.

    >>> full = np.eye(4, 8, dtype=np.float16)
    >>> plan = FunnelPlan.parse(["4:3", "8:2"])
    >>> searcher = Searcher(call_locally([Shard(full)]), [pa.array(["a", "b", "c", "d"])], plan)
    >>> searcher.search(np.array([[0, 0, 1, 0.5, 0, 0, 0, 0]], dtype=np.float32), num_results=2).ids.tolist()
    [['c', 'd']]
    """

    def __init__(self, call: CallShards, ids: Sequence[pa.Array], plan: FunnelPlan, space: Space | None = None) -> None:
        self._call = call
        self._ids = ids
        self._plan = plan
        self._space = space
        self._offsets = np.cumsum([0, *(len(part) for part in ids)])

    @property
    def num_documents(self) -> int:
        """Documents in all shards."""
        return int(self._offsets[-1])

    def count_candidates(self, num_results: int) -> int:
        """Returns how many candidates of one query all shards together may hand over, where few documents tie.

        All that tie with the last of a list are handed over: copies of one text may be many more.
        """
        return min(num_results * len(self._ids), self.num_documents)

    def search(self, queries: npt.NDArray[np.floating[Any]], num_results: int, where: str | None = None) -> Ranking:
        """Returns the best documents of each query.

        Args:
            queries: Of any length.
            num_results: K.
            where: Only documents for which this condition holds are found; see ``conditions``. The plan then finds what it
                would find if there were no other documents, or better: few documents are compared one and all.

        Shapes: queries [Q, D]; see ``Ranking`` for what comes out.

        Raises:
            ValueError: ``num_results`` is below 1, a query is not finite, queries are narrower than the plan, or the index
                cannot be asked this condition.
        """
        scores, documents = self.find(queries, num_results, where)
        return Ranking(scores, documents, self._look_up(documents))

    def find(
        self, queries: npt.NDArray[np.floating[Any]], num_results: int, where: str | None = None
    ) -> tuple[Float32Array, IntArray]:
        """Returns (scores, numbers) of the best documents of each query, as ``search`` does, without their ids.

        Shapes: queries [Q, D] -> [Q, K], [Q, K]; number -1 pads.

        Raises:
            ValueError: As ``search``.
        """
        self._check(queries, num_results)
        condition = conditions.parse(where) if where is not None else None
        plan = self._plan_for(condition).for_results(num_results)
        *_, (scores, documents) = self._passes(queries, plan, condition)
        columns = topk.rank(scores, documents, num_results, self._look_up)
        columns = columns[:, : int(np.count_nonzero(documents >= 0, axis=1).max(initial=0))]
        return np.take_along_axis(scores, columns, axis=1), np.take_along_axis(documents, columns, axis=1)

    def trace(self, queries: npt.NDArray[np.floating[Any]], num_results: int) -> list[tuple[int, npt.NDArray[np.object_]]]:
        """Returns (dim, ids) of the documents that each step of the plan leaves, in no order; the empty id pads.

        Shapes: queries [Q, D] -> [Q, M] each.

        Raises:
            ValueError: As ``search``.
        """
        self._check(queries, num_results)
        plan = self._plan.for_results(num_results)
        passes = self._passes(queries, plan, None)
        return [(step.dim, self._look_up(documents)) for step, (_, documents) in zip(plan.steps, passes, strict=True)]

    def _passes(
        self, queries: npt.NDArray[np.floating[Any]], plan: FunnelPlan, condition: Condition | None
    ) -> Iterator[tuple[Float32Array, IntArray]]:
        """Yields what each step of a plan leaves: scores and numbers."""
        scores, documents = self._shortlist(queries, plan.shortlist, condition)
        yield scores, documents
        for step in plan.reranks:
            scores = self._score(shrink(queries, step.dim), documents)
            scores, documents = topk.cut(scores, documents, step.keep)
            yield scores, documents

    def ids_of(self, documents: IntArray) -> pa.Array:
        """Returns the ids of documents.

        Shapes: documents [P] (numbers as in ``Ranking``) -> [P].
        """
        shards = np.searchsorted(self._offsets, documents, side="right") - 1
        order = np.argsort(shards, kind="stable")
        edges = np.searchsorted(shards[order], np.arange(len(self._ids) + 1))
        parts = [
            own.take(pa.array(documents[order[start:stop]] - offset))
            for own, offset, (start, stop) in zip(self._ids, self._offsets, itertools.pairwise(edges), strict=False)
            if stop > start
        ]
        return pa.concat_arrays(parts).take(pa.array(np.argsort(order))) if parts else pa.array([], pa.large_string())

    def _plan_for(self, condition: Condition | None) -> FunnelPlan:
        """Returns the plan, or its last step alone where a condition leaves few documents; all shards together decide."""
        last = self._plan.steps[-1]
        if condition is None or (self._space and self._space.dim == last.dim):
            return self._plan
        num_left = sum(self._call("num_allowed", [(condition,)] * len(self._ids)))
        return self._plan if num_left > max(_FEW_DOCUMENTS, _FEW_SHARE * self.num_documents) else FunnelPlan((last,))

    def score(self, queries: npt.NDArray[np.floating[Any]], documents: IntArray) -> Float32Array:
        """Returns the scores that a search gives documents at the end of the funnel; document -1 scores ``PADDING``.

        Shapes: queries [Q, D], documents [Q, M] (numbers as in ``Ranking``) -> [Q, M].

        Raises:
            ValueError: A query is not finite, or queries are narrower than the plan.
        """
        self._check(queries, num_results=1)
        return self._score(shrink(queries, self._plan.steps[-1].dim), documents)

    def candidates(self, queries: npt.NDArray[np.floating[Any]], step: Step) -> tuple[Float32Array, IntArray]:
        """Returns (scores, documents) that a first step leaves, those that tie with the last of them included; -1 pads.

        Shapes: queries [Q, D] -> [Q, M], [Q, M] (numbers as in ``Ranking``).

        Raises:
            ValueError: As ``score``.
        """
        self._check(queries, num_results=1)
        return self._shortlist(queries, step, None)

    def order(self, scores: Float32Array, documents: IntArray) -> IntArray:
        """Returns the columns of candidates in the order in which a search would return them: by score, then id.

        Shapes: scores [Q, M], documents [Q, M] (numbers as in ``Ranking``) -> [Q, M].
        """
        return topk.rank(scores, documents, scores.shape[1], self._look_up)

    def _check(self, queries: npt.NDArray[np.floating[Any]], num_results: int) -> None:
        if num_results < 1:
            raise ValueError(f"search: {num_results} results asked for. Ask for at least one.")
        width = self._plan.steps[-1].dim
        if queries.ndim != 2 or queries.shape[1] < width:
            raise ValueError(f"search: queries of shape {queries.shape}, the plan needs [Q, {width}]. Use the index's own model.")
        if not np.isfinite(queries).all():
            rows = np.flatnonzero(~np.isfinite(queries).all(axis=1))[:3].tolist()
            raise ValueError(f"search: queries {rows} are not finite. Check the model that made them.")

    def _shortlist(
        self, queries: npt.NDArray[np.floating[Any]], step: Step, condition: Condition | None
    ) -> tuple[Float32Array, IntArray]:
        """Returns the candidates of all shards together."""
        if self._space and self._space.dim == step.dim:
            results = self._call("shortlist", [(self._space.queries(queries), step, condition)] * len(self._ids))
        else:
            results = self._call("scan", [(shrink(queries, step.dim), step.keep, condition)] * len(self._ids))
        scores = np.concatenate([part for part, _ in results], axis=1)
        documents = np.concatenate(
            [np.where(rows >= 0, rows + offset, -1) for (_, rows), offset in zip(results, self._offsets, strict=False)], axis=1
        )
        return topk.cut(scores, documents, step.keep)

    def _score(self, queries: Float32Array, documents: IntArray) -> Float32Array:
        """Asks each shard for the scores of its own candidates, and puts them where they belong."""
        shards = np.where(documents >= 0, np.searchsorted(self._offsets, documents, side="right") - 1, -1)
        places = [np.nonzero(shards == number) for number in range(len(self._ids))]
        arguments = []
        for place, offset in zip(places, self._offsets, strict=False):
            is_here = np.bincount(place[0], minlength=len(queries)) > 0  # queries with a candidate in this shard
            arguments.append((queries[is_here], (np.cumsum(is_here) - 1)[place[0]], documents[place] - offset))
        scores = np.full(documents.shape, topk.PADDING, dtype=np.float32)
        for place, found in zip(places, self._call("score", arguments), strict=True):
            scores[place] = found
        return scores

    def _look_up(self, documents: IntArray) -> npt.NDArray[np.object_]:
        found = np.full(documents.shape, "", dtype=object)
        is_there = documents >= 0
        found[is_there] = self.ids_of(documents[is_there]).to_pylist()
        return found
