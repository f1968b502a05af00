"""Measures of retrieval, query by query, and of similarity. The only room that knows scipy.

Definitions are those of ir-measures, to which a test holds them: linear gains, relevant from grade 1. Its own dictionaries take
1.2 s for 3,000 queries and 100 results; these arrays take .1 s.

Source: MacAvaney et al. 2022, Streamlining Evaluation with ir-measures, arXiv:2111.13466.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

NDCG, SPEARMAN = "nDCG@10", "Spearman"

DEEP = ("Recall@100", "MAP@100")
"""What ten results say nothing about."""

SHALLOW, DEPTH = 10, 100

Qrels = Mapping[str, Mapping[str, int]]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Names = npt.NDArray[np.object_]


def group_qrels(judgements: Iterable[tuple[str, str, int]]) -> dict[str, dict[str, int]]:
    """Returns judgements by query."""
    grouped: dict[str, dict[str, int]] = {}
    for query, document, grade in judgements:
        grouped.setdefault(query, {})[document] = grade
    return grouped


@dataclass(frozen=True, slots=True)
class Judgements:
    """Which documents answer which queries, in numbers.

    Attributes:
        query_ids: Of the judged queries: first those that were asked, in their order, then those that were not.
        asked: Where the former stand among all that were asked.
        num_documents: N.
        keys: For each pair of a judged query and a document that is there, query * N + document; sorted.
        grades: Of these pairs; below 0 is 0.
        num_relevant: Of each judged query, documents that are not there included.
        ideal: The most that discounted gains of ten documents can come to.

    Shapes: asked [Q'], keys [J], grades [J], num_relevant [Q], ideal [Q].
    """

    query_ids: tuple[str, ...]
    asked: IntArray
    num_documents: int
    keys: IntArray
    grades: FloatArray
    num_relevant: FloatArray
    ideal: FloatArray

    @classmethod
    def of(cls, qrels: Qrels, query_ids: Sequence[str], names: Names) -> "Judgements":
        """Returns judgements in numbers.

        Args:
            qrels: The judgements.
            query_ids: Of the queries that were asked.
            names: Ids of the documents, sorted, each once: a document's number is its place.
        """
        asked = [place for place, query in enumerate(query_ids) if query in qrels]
        known = [query_ids[place] for place in asked]
        ordered = (*known, *sorted(qrels.keys() - set(known)))
        pairs = [(row, name, grade) for row, query in enumerate(ordered) for name, grade in qrels[query].items()]
        rows = np.array([row for row, _, _ in pairs], dtype=np.int64)
        grades = np.array([max(grade, 0) for _, _, grade in pairs], dtype=np.float64)
        wanted = np.array([name for _, name, _ in pairs], dtype=object)
        places = np.minimum(np.searchsorted(names, wanted), max(len(names) - 1, 0))
        is_there = names[places] == wanted if len(names) else np.zeros(len(wanted), dtype=bool)
        keys = rows[is_there] * len(names) + places[is_there]
        order = np.argsort(keys)
        num_relevant = np.bincount(rows[grades > 0], minlength=len(ordered)).astype(np.float64)
        best = [sorted(qrels[query].values(), reverse=True)[:SHALLOW] for query in ordered]
        ideal = np.array([float(np.dot(np.maximum(own, 0), _discounts(len(own)))) for own in best])
        return cls(
            ordered, np.array(asked, dtype=np.int64), len(names), keys[order], grades[is_there][order], num_relevant, ideal
        )

    def grades_of(self, documents: IntArray) -> FloatArray:
        """Returns the grades of documents that were found for the queries that were asked; what nobody judged has grade 0.

        Shapes: documents [asked, K] (-1 pads) -> [Q, K]; queries that were not asked found nothing.
        """
        found = np.zeros((len(self.query_ids), documents.shape[1]))
        own = documents[self.asked]
        if len(self.keys):
            wanted = np.arange(len(own))[:, None] * self.num_documents + own
            places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
            found[: len(own)] = np.where((own >= 0) & (self.keys[places] == wanted), self.grades[places], 0.0)
        return found

    def measure(self, documents: IntArray) -> dict[str, FloatArray]:
        """Returns every measure of every judged query; one that found nothing, or has no relevant document, counts 0.

        The order of a ranking is taken as it is: scores are not looked at again.

        Shapes: documents [asked, K] (-1 pads) -> [Q] each.
        """
        grades = self.grades_of(documents[:, :DEPTH])
        is_relevant = grades > 0
        num_found = np.cumsum(is_relevant, axis=1)
        ranks = np.arange(1, grades.shape[1] + 1)
        shallow = min(SHALLOW, grades.shape[1])
        precision = np.where(is_relevant, num_found / ranks, 0.0)
        reciprocal = np.where(is_relevant[:, :shallow], 1 / ranks[:shallow], 0.0)
        return {
            NDCG: _share(grades[:, :shallow] @ _discounts(shallow), self.ideal),
            "Recall@10": _share(is_relevant[:, :shallow].sum(axis=1), self.num_relevant),
            "Recall@100": _share(is_relevant.sum(axis=1), self.num_relevant),
            "MRR@10": reciprocal.max(axis=1, initial=0.0),
            "MAP@100": _share(precision.sum(axis=1), self.num_relevant),
            # Queries whose first document is relevant; with labelled data, the accuracy of the nearest neighbour.
            "Success@1": is_relevant[:, :1].any(axis=1).astype(np.float64),
        }


def _discounts(num_ranks: int) -> FloatArray:
    discounts: FloatArray = 1 / np.log2(np.arange(num_ranks) + 2)
    return discounts


def _share(part: npt.NDArray[Any], whole: FloatArray) -> FloatArray:
    shares: FloatArray = np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)
    return shares


def measure(qrels: Qrels, query_ids: Sequence[str], rankings: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the mean of every measure over the judged queries; the empty name is no result.

    >>> qrels = {"q": {"a": 1}}
    >>> measure(qrels, ["q"], [["b", "a"]])["MRR@10"]
    0.5
    """
    names = np.array(sorted({name for ranking in rankings for name in ranking if name}), dtype=object)
    numbers = {name: number for number, name in enumerate(names)}
    found = [[numbers[name] for name in ranking if name] for ranking in rankings]
    documents = np.full((len(found), max(map(len, found), default=0)), -1)
    for row, own in enumerate(found):
        documents[row, : len(own)] = own
    return {name: float(own.mean()) for name, own in Judgements.of(qrels, query_ids, names).measure(documents).items()}


def spearman(left: npt.NDArray[np.floating[Any]], right: npt.NDArray[np.floating[Any]]) -> float:
    """Returns the rank correlation of two series; equal values share the mean of their ranks. A series without order gives 0.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.9, 0.3]))
    0.5
    """
    from scipy import stats  # half a second to import, for this one figure

    if min(len(np.unique(left)), len(np.unique(right))) < 2:
        return 0.0
    return float(stats.spearmanr(left, right).statistic)
