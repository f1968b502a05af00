"""What plans cost and what they are worth: which of them no other beats, and which is the cheapest that holds a floor.

Half of the queries choose, and the other half confirms: of many plans, the best on some queries is partly the luckiest on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from matryoshka import units
from matryoshka.nested import FunnelPlan

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

LEAST_QUERIES = 30
CONFIDENCE = 0.95

_SALT = "tune"
_RESAMPLES = 1_000
_MOST_LOST, _LEAST_LOST = 4.0, 0.2
_CAUTION = (1.25, 1.6, 2.5)


@dataclass(frozen=True, slots=True)
class Point:
    """A plan, what it is worth as a share of exact search at full width, and what it costs.

    Attributes:
        plan: The funnel.
        chosen: Share on the half of the queries that choose.
        confirmed: Share on the other half.
        low: Lower end of the confidence interval of ``confirmed``.
        high: Upper end.
        queries_per_second: In batches.
        milliseconds: For one query alone.
    """

    plan: FunnelPlan
    chosen: float
    confirmed: float
    low: float
    high: float
    queries_per_second: float
    milliseconds: float

    def as_json(self) -> dict[str, Any]:
        """Returns the point as a JSON value."""
        figures = {name: round(getattr(self, name), 5) for name in ("chosen", "confirmed", "low", "high")}
        speed = {name: float(f"{getattr(self, name):.4g}") for name in ("queries_per_second", "milliseconds")}
        return {"plan": self.plan.parts, **figures, **speed}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Returns the point that ``as_json`` described."""
        return cls(**{**value, "plan": FunnelPlan.parse(value["plan"])})


@dataclass(frozen=True, slots=True)
class Choice:
    """The cheapest plan that holds a floor.

    Attributes:
        floor: Least share of exact search.
        point: The plan.
        passed_over: Cheaper ones that held the floor where it was chosen, but were not confirmed.
    """

    floor: float
    point: Point
    passed_over: tuple[Point, ...] = ()


def floors(floor: float) -> dict[str, float]:
    """Returns the floor of each named quality: ``balanced`` holds the one that was asked for.

    ``fast`` may lose four times as much as that, ``high`` a fifth of it.

    >>> floors(0.995)
    {'fast': 0.98, 'balanced': 0.995, 'high': 0.999}
    """
    lost = 1 - floor
    return {
        "fast": round(max(1 - _MOST_LOST * lost, 0.0), 9),
        "balanced": floor,
        "high": round(1 - _LEAST_LOST * lost, 9),
    }


def choosing(query_ids: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Returns which queries choose; the others confirm. It depends on each query's id alone.

    Raises:
        ValueError: Either half has too few to say anything.
    """
    fractions = {"choose": 0.5, "confirm": 0.5}
    is_choosing = np.array([units.choose_split(name, fractions, _SALT) == "choose" for name in query_ids], dtype=bool)
    num_choosing = int(np.count_nonzero(is_choosing))
    num_confirming = len(is_choosing) - num_choosing
    if min(num_choosing, num_confirming) < LEAST_QUERIES:
        raise ValueError(
            f"tune: {num_choosing} queries to choose by and {num_confirming} to confirm with; {LEAST_QUERIES} of each are"
            f" needed. Give more queries: at least {3 * LEAST_QUERIES}, better some hundreds."
        )
    return is_choosing


def share(worth: FloatArray, reference: FloatArray) -> FloatArray:
    """Returns what plans reach on average, as a share of what exact search reaches on the same queries.

    Shapes: worth [..., Q], reference [Q] -> [...].
    """
    shares: FloatArray = worth.mean(axis=-1) / reference.mean()
    return shares


def interval(worth: FloatArray, reference: FloatArray, confidence: float = CONFIDENCE) -> tuple[FloatArray, FloatArray]:
    """Returns the ends of the confidence intervals of shares: the queries are drawn again and again, with replacement.

    The draws are the same for every plan and every run.

    Shapes: worth [P, Q], reference [Q] -> [P], [P].

    Source: Efron 1979, Bootstrap methods: another look at the jackknife, doi:10.1214/aos/1176344552 (percentile intervals).
    """
    num_queries = len(reference)
    draws = np.random.default_rng(0).multinomial(num_queries, np.full(num_queries, 1 / num_queries), _RESAMPLES)
    totals = draws @ reference  # [R]
    # Where a draw holds no query that exact search answers, there is nothing to have a share of.
    shares = np.divide(worth @ draws.T, totals, out=np.ones((len(worth), _RESAMPLES)), where=totals > 0)
    outside = (1 - confidence) / 2
    low, high = np.quantile(shares, [outside, 1 - outside], axis=1)
    return low, high


def staircase(costs: npt.ArrayLike, worth: npt.ArrayLike) -> IntArray:
    """Returns the places of what nothing else beats, cheapest first: each costs more than the one before, and is worth more.

    >>> staircase([3.0, 1.0, 2.0, 4.0], [0.9, 0.5, 0.4, 0.9]).tolist()
    [1, 0]
    """
    order = np.lexsort((-np.asarray(worth), np.asarray(costs)))
    ranked = np.asarray(worth, dtype=np.float64)[order]
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(ranked)[:-1]])
    kept: IntArray = order[ranked > best_before]
    return kept


def frontier(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no other beats in both speed and share on the choosing half, fastest first."""
    costs = [1 / point.queries_per_second for point in points]
    return [points[place] for place in staircase(costs, [point.chosen for point in points])]


def choose(points: Sequence[Point], floor: float, exact: Point) -> Choice:
    """Returns the cheapest plan that holds a floor where it is chosen, if the other half of the queries confirms it.

    It is confirmed if the whole interval of its share lies at or above the floor; else the next one is looked at, and in the
    end exact search, which needs no confirming.
    """
    holding = sorted((point for point in points if point.chosen >= floor), key=lambda point: -point.queries_per_second)
    cheaper = [point for point in holding if point.queries_per_second > exact.queries_per_second]
    for number, point in enumerate(cheaper):
        if point.low >= floor:
            return Choice(floor, point, tuple(cheaper[:number]))
    return Choice(floor, exact, tuple(cheaper))


def worth_timing(costs: FloatArray, shares: FloatArray, lows: FloatArray, wanted: Sequence[float], most: int = 10) -> list[int]:
    """Returns the places of the plans to be timed, given estimates of what they cost.

    These are some of those that nothing else beats, by their share and by the lower end of its interval, spread evenly over
    the orders of magnitude of what they lose; and for each floor the cheapest that hold it, by either, since of estimates that
    are close any may be wrong, and some that cost more, for the case that the other half of the queries asks for more.
    """
    chosen: list[int] = []
    for worth in (shares, lows):
        steps = staircase(costs, worth)
        lost = np.log(np.maximum(1 - worth[steps], 1e-4))
        levels = np.linspace(lost.max(initial=0.0), lost.min(initial=0.0), most)
        chosen += [int(steps[np.abs(lost - level).argmin()]) for level in levels if steps.size]
        for floor in wanted:
            holding = np.flatnonzero(worth >= floor)
            ordered = holding[np.argsort(costs[holding], kind="stable")]
            chosen += ordered[:3].tolist()
            for times in _CAUTION if ordered.size else ():
                chosen += ordered[costs[ordered] >= times * costs[ordered[0]]][:1].tolist()
    return sorted(set(chosen))
