"""Coarse vectors in lists: only the documents in the lists nearest to a query are compared with it.

A list has the documents that are nearest to the same centroid; all shards share the centroids. Which lists a query looks into,
and every score, are functions of the query and a document alone, so that the results of several shards can be compared.

Source: Jégou et al. 2011, Product Quantization for Nearest Neighbor Search, doi:10.1109/TPAMI.2010.57 (the inverted file).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matryoshka import kernels, scans, topk
from matryoshka.index import Dial
from matryoshka.nested import Float32Array
from matryoshka.products import CoarseVectors, Ranked, StoredVectors
from matryoshka.topk import IntArray, Mask

# Products of everything take as long as lists of so much of it (250,000 x 256 and 2,000 lists, one core with AMX).
_WORTH_IT = 1 / 32
_MOST_NOTED = 1 << 24  # of the queries that one thread works on: 128 MB, of which little is touched


class CoarseLists:
    """Collects coarse vectors, block by block, and writes them list by list.

    Args:
        centroids: Shared by all shards.

    Shapes: centroids [L, dim].
    """

    def __init__(self, centroids: Float32Array) -> None:
        collected = CoarseVectors()
        collected.add(centroids)
        self._centroids, self._collected = collected.stored(), CoarseVectors()
        self._lists: list[IntArray] = []

    @property
    def dial(self) -> Dial:
        """What can be tuned when searching: into how many lists a query looks, as long as that saves something, or into all."""
        dial, num_lists = Dial.of_lists(len(self._centroids)), len(self._centroids)
        values = tuple(value for value in dial.values if value <= _WORTH_IT * num_lists or value == num_lists)
        return dataclasses.replace(dial, values=values)

    def add(self, vectors: Float32Array) -> None:
        """Adds documents after those that are there; each goes into the list of the centroid with the greatest inner product.

        Shapes: vectors [N, dim].
        """
        if len(vectors):
            _, nearest = self._centroids.best(vectors, 1)
            self._lists.append(np.where(nearest >= 0, nearest, len(self._centroids)).min(axis=1))  # of equal ones the first
        self._collected.add(vectors)

    def write(self, path: Path, lists_path: Path) -> None:
        """Writes what ``ListedVectors`` opens: the vectors, as a file that can be mapped into memory, and the lists."""
        lists = np.concatenate([np.empty(0, np.int64), *self._lists])
        rows = np.argsort(lists, kind="stable")
        edges = np.concatenate([[0], np.cumsum(np.bincount(lists, minlength=len(self._centroids)))])
        self._collected.write_in_order(path, rows)
        with lists_path.open("wb") as file:
            np.savez(file, centroids=self._centroids.bits.view(np.uint16), edges=edges, rows=rows.astype(np.uint32))


class ListedVectors:
    """Coarse vectors of a shard, in lists.

    Args:
        stored: List by list, the bits of bfloat16; may be mapped from disk.
        lists: ``centroids`` (bits of bfloat16), ``edges`` (where each list begins, and where the last one ends) and ``rows``
            (of the documents, in the order of the lists).
        device: ``cpu`` or ``cuda``, where all documents are compared whatever is asked for: lists would save nothing.

    Shapes: stored [N, dim], centroids [L, dim], edges [L + 1], rows [N].
    """

    def __init__(self, stored: npt.NDArray[np.uint16], lists: Mapping[str, npt.NDArray[Any]], device: str = "cpu") -> None:
        self._all, self._centroids = StoredVectors(stored, device), StoredVectors(lists["centroids"])
        self._edges, self._rows = lists["edges"], lists["rows"]
        self._has_lists = device == "cpu"

    @classmethod
    def open(cls, path: Path, lists: Path, device: str = "cpu") -> "ListedVectors":
        """Returns the vectors and lists in two files; vectors stay on disk until they are looked at."""
        with np.load(lists, allow_pickle=False) as found:
            return cls(np.load(path, mmap_mode="c", allow_pickle=False), dict(found), device)

    def find(self, queries: Float32Array, num_kept: int, allowed: Mask | None = None, nprobe: int | None = None) -> Ranked:
        """Returns (scores, rows) of the best in the lists nearest to each query, and of all that tie with the last; -1 pads.

        Where lists would save nothing, all documents are compared.

        Args:
            queries: Of the coarse space.
            num_kept: How many are wanted.
            allowed: Which rows may be found; None: all.
            nprobe: Into how many lists each query looks; None: into all.

        Shapes: queries [Q, dim], allowed [N] -> [Q, M], [Q, M]; in no order.
        """
        num_lists = len(self._centroids)
        if not self._has_lists or nprobe is None or nprobe > _WORTH_IT * num_lists:
            scores, positions = self._all.find(queries, num_kept, None if allowed is None else allowed[self._rows])
            return scores, np.where(positions >= 0, self._rows[positions].astype(np.int64), -1)
        queries = self._all.as_compared(queries)
        _, nearest = self._centroids.best(queries, nprobe)
        visible = np.ones(0, np.bool_) if allowed is None else np.ascontiguousarray(allowed)
        num_threads = scans.num_threads("cpu")
        size = max(min(-(-len(queries) // num_threads), _MOST_NOTED // _room_for(num_kept)), 1)
        parts = [slice(start, start + size) for start in range(0, len(queries), size)]
        return topk.pad(scans.in_threads(lambda part: self._compare(queries[part], nearest[part], num_kept, visible), parts))

    def _compare(self, queries: Float32Array, nearest: IntArray, num_kept: int, allowed: Mask) -> Ranked:
        """Returns what ``find`` does, by one thread.

        Shapes: queries [Q, dim], nearest [Q, P] (lists; -1 pads), allowed [N] or [0] -> [Q, M], [Q, M].
        """
        numbers, columns = np.nonzero(nearest >= 0)
        probed = nearest[numbers, columns]
        order = np.argsort(probed, kind="stable")
        lists, starts = np.unique(probed[order], return_index=True)
        starts = np.append(starts, len(order))
        counts, room = np.empty(len(queries), np.int64), _room_for(num_kept)
        while True:
            notes = np.empty((len(queries), room), np.int64)
            where = self._edges, self._rows, allowed, lists, starts, numbers[order]
            if kernels.compare_lists(queries, self._all.bits, *where, num_kept, counts, notes):
                break
            room *= 2  # so many tie with the last of the best
        return scans.read_noted(counts, notes)


def _room_for(num_kept: int) -> int:
    return 2 * num_kept + kernels.BLOCK
