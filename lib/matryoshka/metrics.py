"""Retrieval measures. The only room that knows ir-measures, whose definitions are used as they are.

Source: MacAvaney et al. 2022, Streamlining Evaluation with ir-measures, arXiv:2111.13466.
"""

from collections.abc import Iterable, Mapping, Sequence

import ir_measures
from ir_measures import RR, R, nDCG

MEASURES = {"nDCG@10": nDCG @ 10, "Recall@10": R @ 10, "MRR@10": RR @ 10}
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
