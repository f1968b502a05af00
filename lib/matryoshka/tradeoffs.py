"""Quality against speed: recall where ties count, the best rate at a quality, and systems at equal quality."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.floating[Any]]

OURS, EXACT, OUR_EXACT = "ours", "exact", "ours_exact"

_ROUNDING = 1e-6  # scores of one document and query, summed in another order, differ by less
_HNSW = ("hnsw16", "hnsw32")
_AT_RECALL = {
    "exact@0.99": ((EXACT,), 0.99),
    "hnsw@0.985": (_HNSW, 0.985),
    "hnsw@0.99": (_HNSW, 0.99),
    "ivf_flat@0.95": (("ivf_flat",), 0.95),
    "ivf_pq_refine@0.95": (("ivf_pq_refine",), 0.95),
}
_WHERE_MEASURED = {"hnswlib@0.99": (("hnswlib",), 0.99), "usearch@0.99": (("usearch",), 0.99)}
_NDCG_SHARE = 0.995


@dataclass(frozen=True, slots=True)
class Point:
    """What one setting of a system reaches: its recall, its rate in a batch, and nDCG@10 where queries are judged."""

    label: str
    recall: float
    queries_per_second: float
    ndcg: float | None = None


def share_found(scores: Scores, best: Scores) -> float:
    """Returns the mean share of the best K documents that were found; one that scores as high as the last of them counts.

    Args:
        scores: Of what was found, each document once, in no order; -inf pads.
        best: Of the best documents.

    Shapes: scores [Q, M], best [Q, K].

    >>> share_found(np.array([[0.9, 0.5, 0.5], [0.9, 0.4, 0.1]]), np.array([[0.9, 0.5], [0.9, 0.8]]))
    0.75
    """
    num_wanted = best.shape[1]
    counts = np.count_nonzero(scores >= best.min(axis=1, keepdims=True) - _ROUNDING, axis=1)
    return float(np.minimum(counts, num_wanted).mean() / num_wanted)


def envelope(points: Iterable[Point]) -> list[Point]:
    """Returns the points that no other one beats, which has no less recall and a higher rate; by recall, lowest first.

    >>> [point.label for point in envelope([Point("a", 0.9, 50), Point("b", 0.8, 40), Point("c", 0.99, 10)])]
    ['a', 'c']
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.recall, -point.queries_per_second)):
        if not kept or point.queries_per_second > kept[-1].queries_per_second:
            kept.append(point)
    return kept[::-1]


def rate_at(points: Iterable[Point], recall: float) -> float | None:
    """Returns the queries per second at which a system reaches a recall; None: it never does.

    Between two neighbours of the envelope the logarithm of the rate is taken to be linear in recall. Below the lowest of
    them it is that one's rate: nothing is extrapolated.

    >>> round(rate_at([Point("a", 0.9, 100.0), Point("b", 1.0, 1.0)], 0.95) or 0.0, 6)
    10.0
    """
    best = envelope(points)
    if not best or recall > best[-1].recall:
        return None
    if recall <= best[0].recall:
        return best[0].queries_per_second
    lower, upper = next(pair for pair in itertools.pairwise(best) if recall <= pair[1].recall)
    share = (recall - lower.recall) / (upper.recall - lower.recall)
    logs = math.log(lower.queries_per_second), math.log(upper.queries_per_second)
    inside = math.exp(logs[0] + share * (logs[1] - logs[0]))
    return min(max(inside, upper.queries_per_second), lower.queries_per_second)


def compare(
    points: Mapping[str, Sequence[Point]], build_seconds: Mapping[str, float]
) -> tuple[dict[str, float | None], list[str]]:
    """Returns the ratios of rates at equal quality, ours over another system's, and why a ratio is None.

    Where there are several of a kind, the one that is fastest at that quality is taken.

    Args:
        points: Of each system that was measured.
        build_seconds: Of the same.
    """
    wanted = _AT_RECALL | {name: own for name, own in _WHERE_MEASURED.items() if own[0][0] in points}
    found = {name: _ratio_at(points, *own) for name, own in wanted.items()}
    found |= {"hnsw_build": _build_ratio(points, build_seconds), "ours_exact": _exact_ratio(points)}
    if any(point.ndcg is not None for point in points[OURS]):
        found["exact@ndcg0.995"] = _ratio_at_ndcg(points)
    ratios = {name: own if isinstance(own, float) else None for name, own in found.items()}
    return ratios, [f"{name}: none, {own}" for name, own in found.items() if isinstance(own, str)]


def _ratio_at(points: Mapping[str, Sequence[Point]], peers: Sequence[str], recall: float) -> float | str:
    """Returns the ratio, or why there is none."""
    measured = [name for name in peers if name in points]
    if not measured:
        return f"no {' or '.join(peers)} was measured"
    theirs = [rate for name in measured if (rate := rate_at(points[name], recall)) is not None]
    ours = rate_at(points[OURS], recall)
    if ours is None or not theirs:
        return f"{OURS if ours is None else ' or '.join(measured)} never reaches a recall of {recall}"
    return ours / max(theirs)


def _ratio_at_ndcg(points: Mapping[str, Sequence[Point]]) -> float | str:
    if EXACT not in points:
        return f"no {EXACT} was measured"
    exact = points[EXACT][0]
    floor = _NDCG_SHARE * (exact.ndcg or 0.0)
    rates = [point.queries_per_second for point in points[OURS] if (point.ndcg or 0.0) >= floor]
    return max(rates) / exact.queries_per_second if rates else f"{OURS} never keeps {_NDCG_SHARE:.1%} of the exact nDCG@10"


def _build_ratio(points: Mapping[str, Sequence[Point]], build_seconds: Mapping[str, float]) -> float | str:
    """Returns build times of HNSW over ours: of the graph that is fastest at 0.99, or else of the one built faster."""
    measured = [name for name in _HNSW if name in points]
    if not measured:
        return f"no {' or '.join(_HNSW)} was measured"
    best = max(measured, key=lambda name: (rate_at(points[name], 0.99) or 0.0, -build_seconds[name]))
    return build_seconds[best] / max(build_seconds[OURS], 1e-9)


def _exact_ratio(points: Mapping[str, Sequence[Point]]) -> float | str:
    """Returns the rates of the two exact scans."""
    missing = [name for name in (OUR_EXACT, EXACT) if name not in points]
    if missing:
        return f"no {missing[0]} was measured"
    return points[OUR_EXACT][0].queries_per_second / points[EXACT][0].queries_per_second
