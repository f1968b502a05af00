"""What answers queries, and how much of it a ranking has: by judgements, or by what exact search finds.

The measures are those of ``metrics``, computed for many rankings of the same queries at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from matryoshka import metrics, vectors
from matryoshka.frontier import FloatArray
from matryoshka.funnel import Searcher
from matryoshka.indexing import IndexStore
from matryoshka.metrics import Qrels
from matryoshka.topk import IntArray

Vectors = npt.NDArray[np.floating[Any]]

JUDGED, UNJUDGED = "nDCG@10 as a share of exact search", "share of the exact neighbours"


@dataclass(frozen=True, slots=True)
class Answers:
    """Queries, which documents answer each of them, and how rankings are measured by these.

    Attributes:
        measure: ``JUDGED`` or ``UNJUDGED``.
        queries: Full vectors.
        num_results: Documents that a search is asked for.
        keys: For each pair of a query and a document that counts, query * N + document; sorted.
        gains: What it counts.
        discounts: How much of that each place of a ranking is worth.
        ideal: The most that any ranking can reach, for each query.
        num_documents: N.

    Shapes: queries [Q, D], keys [J], gains [J], discounts [K], ideal [Q].
    """

    measure: str
    queries: Vectors
    num_results: int
    keys: IntArray
    gains: FloatArray
    discounts: FloatArray
    ideal: FloatArray
    num_documents: int

    @classmethod
    def judged(cls, index: IndexStore, queries: Vectors, query_ids: Sequence[str], qrels: Qrels, num_results: int) -> "Answers":
        """Returns what judgements say; every query has a document that answers it, and plans are to come close in nDCG@10.

        Raises:
            ValueError: None of these documents is in the index.
        """
        wanted = [{name: grade for name, grade in qrels[query].items() if grade > 0} for query in query_ids]
        names = sorted({name for own in wanted for name in own})
        numbers, num_documents = _find(index, names)
        if not numbers:
            raise ValueError(f"{index.folder}: none of the {len(names)} judged documents is in it. Pass the data of this index.")
        gains = {
            query * num_documents + number: float(grade)
            for query, own in enumerate(wanted)
            for name, grade in own.items()
            for number in numbers.get(name, ())
        }
        discounts = 1 / np.log2(np.arange(metrics.SHALLOW) + 2)
        grades = [sorted(own.values(), reverse=True)[: metrics.SHALLOW] for own in wanted]
        ideal = np.array([float(np.dot(own, discounts[: len(own)])) for own in grades])
        keys = np.array(sorted(gains), dtype=np.int64)
        own_gains = np.array([gains[key] for key in keys.tolist()])
        return cls(JUDGED, queries, max(num_results, metrics.SHALLOW), keys, own_gains, discounts, ideal, num_documents)

    @classmethod
    def unjudged(cls, exact: Searcher, queries: Vectors, num_results: int) -> "Answers":
        """Returns what exact search finds, where nobody judged: plans are to find the same documents."""
        documents = exact.search(queries, num_results).documents
        num_documents = exact.num_documents
        rows, _ = np.nonzero(documents >= 0)
        keys = np.sort(rows * num_documents + documents[documents >= 0])
        ideal = np.count_nonzero(documents >= 0, axis=1).astype(np.float64)
        return cls(UNJUDGED, queries, num_results, keys, np.ones(len(keys)), np.ones(num_results), ideal, num_documents)

    def gains_of(self, queries: IntArray, documents: IntArray) -> FloatArray:
        """Returns what documents count for queries; document -1 counts nothing.

        Shapes: queries [Q] (numbers), documents [Q, M] -> [Q, M].
        """
        wanted = queries[:, None] * self.num_documents + documents
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        gains: FloatArray = np.where((documents >= 0) & (self.keys[places] == wanted), self.gains[places], 0.0)
        return gains

    def worth(self, queries: IntArray, gains: FloatArray) -> FloatArray:
        """Returns what rankings reach of the ideal, given the gains of their documents in order.

        Shapes: queries [Q] (numbers), gains [Q, K] -> [Q].
        """
        depth = min(gains.shape[1], len(self.discounts))
        reached: FloatArray = gains[:, :depth] @ self.discounts[:depth] / self.ideal[queries]
        return reached


def _find(index: IndexStore, names: Sequence[str]) -> tuple[dict[str, list[int]], int]:
    """Returns the numbers of documents by id (a removed row may have the same one), and how many there are in all."""
    numbers: dict[str, list[int]] = {}
    start = 0
    for ids in index.open_ids():
        for row, place in zip(*(found.tolist() for found in vectors.find(ids, names)), strict=True):
            numbers.setdefault(names[place], []).append(start + row)
        start += len(ids)
    return numbers, start
