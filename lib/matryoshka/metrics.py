"""Measures of retrieval and of similarity. The only room that knows scipy and ir-measures, whose definitions are used.

Source: MacAvaney et al. 2022, Streamlining Evaluation with ir-measures, arXiv:2111.13466.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ir_measures
import numpy as np
import numpy.typing as npt
from ir_measures import RR, P, R, nDCG
from scipy import stats

MEASURES = {"nDCG@10": nDCG @ 10, "Recall@10": R @ 10, "MRR@10": RR @ 10, "P@1": P @ 1}
"""P@1 is the share of queries whose first document is relevant: with labelled data, the accuracy of the nearest neighbour."""

SPEARMAN = "Spearman"
DEPTH = 10

Qrels = Mapping[str, Mapping[str, int]]


def group_qrels(judgements: Iterable[tuple[str, str, int]]) -> dict[str, dict[str, int]]:
    """Returns judgements by query."""
    grouped: dict[str, dict[str, int]] = {}
    for query, document, grade in judgements:
        grouped.setdefault(query, {})[document] = grade
    return grouped


def measure(qrels: Qrels, query_ids: Sequence[str], rankings: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the mean of every measure over the judged queries; a judged query with no results counts as 0.

    The order of a ranking is taken as it is: scores are not looked at again, so ties stay as (score, id) ordered them.

    >>> qrels = {"q": {"a": 1}}
    >>> measure(qrels, ["q"], [["b", "a"]])["MRR@10"]
    0.5
    """
    run = {
        query: {document: float(-position) for position, document in enumerate(ranking) if document}
        for query, ranking in zip(query_ids, rankings, strict=True)
    }
    means = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)
    return {name: float(means[measure]) for name, measure in MEASURES.items()}


def spearman(left: npt.NDArray[np.floating[Any]], right: npt.NDArray[np.floating[Any]]) -> float:
    """Returns the rank correlation of two series; equal values share the mean of their ranks. A series without order gives 0.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.9, 0.3]))
    0.5
    """
    if min(len(np.unique(left)), len(np.unique(right))) < 2:
        return 0.0
    return float(stats.spearmanr(left, right).statistic)
