"""The tune stage's work: what plans of an index are worth on real queries, and what the good ones cost.

Trying every plan would take a search each. One wide shortlist for every setting of the coarse index is enough: a shorter
shortlist is its beginning, and any reranking is an order of its candidates, whose scores at every dim are computed once. Only
plans near the frontier are then searched with, and timed, in turns.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from matryoshka import frontier, funnel, indexing, topk
from matryoshka.answers import Answers, Vectors
from matryoshka.frontier import Choice, FloatArray, Point
from matryoshka.funnel import CallShards, Searcher, Shard
from matryoshka.index import Dial
from matryoshka.indexing import IndexStore
from matryoshka.nested import Float32Array, FunnelPlan, Step, exact_plan
from matryoshka.topk import IntArray

Members = npt.NDArray[np.bool_]

_KEEPS = (10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1_000)
_WIDTHS = (150, 1_000)
_BELOW_FAST = 2.0
_SLACK = 1.5  # times the cost of exact search: what an estimate made of one call may be wrong by
_ROUNDS = 5
_SINGLE_QUERIES = 15


def open_shards(index: IndexStore) -> CallShards:
    """Returns a caller for the shards of an index, opened in this process."""
    return funnel.call_locally([Shard.open(files) for files in index.shards])


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan, what it is worth on each query that chooses, and an estimate of what it costs.

    Shapes: worth [Q].
    """

    plan: FunnelPlan
    worth: FloatArray
    seconds: float


class Tuner:
    """Measures the plans of one index by one set of answers, in this process.

    Args:
        index: The index.
        answers: The queries, and what answers them.
        is_choosing: Which queries choose; the others confirm.
        call: How to reach the shards.

    Shapes: is_choosing [Q].
    """

    def __init__(self, index: IndexStore, answers: Answers, is_choosing: Members, call: CallShards) -> None:
        self._index, self._answers, self._call = index, answers, call
        self._chosen, self._others = np.flatnonzero(is_choosing), np.flatnonzero(~is_choosing)
        self._queries = answers.queries[self._chosen]
        self._known: dict[int, _Scores] = {}
        self._scan = index.searcher(index.plan_for("exact"), call)
        self._exact = exact_plan(index.width, answers.num_results)

    def trials(self, least: float, enough: float, slack: float = _SLACK) -> Iterator[Trial]:
        """Yields the plans that keep at least a share of exact search, and may be faster than this, which comes last.

        A setting of the coarse index whose shortlist alone takes longer than exact search is the last of its kind, and no
        shortlist is made longer where a shorter one surely keeps the share that is enough, or costs too much already.

        Args:
            least: Share of exact search.
            enough: Share that nobody asks more than.
            slack: Estimates of costs are taken for too high only if they are so many times that of exact search.
        """
        seconds, ranking = _timed(lambda: self._scan.search(self._queries, self._answers.num_results))
        worth = self._answers.worth(self._chosen, self._answers.gains_of(self._chosen, ranking.documents))
        exact = Trial(self._exact, worth, seconds / len(self._queries))
        for steps in self._starts():
            for step in steps:
                found = self._try(step, exact, least * worth.mean(), enough, slack * exact.seconds)
                if found is None:
                    break
                yield from found
        yield exact

    def _starts(self) -> Iterator[list[Step]]:
        """Yields the first steps that an index can make, those of one kind together, from fast to good."""
        layout = self._index.layout
        _, coarse = indexing.open_trained(self._index.folder, layout, self._index.training)
        if coarse and layout.dim < self._index.width:
            yield self._coarse_starts(layout.dim, coarse.dial)
        dims = sorted(dim for dim in self._index.dims if dim < self._index.width)
        yield [Step(dim, self._keeps()[-1]) for dim in dims if not (coarse and dim == layout.dim)]

    def _coarse_starts(self, dim: int, dial: Dial | None) -> list[Step]:
        """Returns the settings of the coarse index, each with the longest shortlist that makes sense with it.

        A graph that is searched for so many results finds the same ones if half as many are asked for, but goes further by
        itself if more are.
        """
        keeps = self._keeps()
        if dial is None:
            return [Step(dim, keeps[-1])]
        longest = {value: [keep for keep in keeps if not dial.is_reach or 2 * keep <= value][-1:] for value in dial.values}
        return [Step(dim, keep, ((dial.name, value),)) for value, own in longest.items() for keep in own]

    def _keeps(self) -> list[int]:
        """Returns the lengths of shortlists worth trying, shortest first."""
        least, most = self._answers.num_results, self._answers.num_documents
        return [least, *(keep for keep in _KEEPS if least < keep < most), *([most] if least < most <= _KEEPS[-1] else [])]

    def _try(self, step: Step, exact: Trial, bar: float, enough: float, limit: float) -> list[Trial] | None:
        """Returns the plans that begin with a first step or with a shorter shortlist; None: they all take too long."""
        found: list[Trial] = []
        for width in sorted({min(step.keep, width) for width in _WIDTHS}):
            wide = self._look(dataclasses.replace(step, keep=width))
            if wide.quick > limit:
                return None
            found = [trial for trial in self._trials_of(wide, bar) if trial.seconds < limit]
            is_enough = any(frontier.interval(trial.worth[None], exact.worth)[0] >= enough for trial in found[-1:])
            if is_enough or wide.slow + width * min(known.seconds for known in self._known.values()) > limit:
                break
        return found

    def _look(self, step: Step) -> "_Wide":
        """Returns the shortlists of a first step, and how long they take."""
        searcher = self._index.searcher(FunnelPlan((step,)), self._call)
        short = Step(step.dim, self._answers.num_results, step.parameters)
        searcher.candidates(self._queries[:1], short)  # what was not looked at yet is read from disk
        quick, _ = _timed(lambda: searcher.candidates(self._queries, short))
        slow, (scores, documents) = _timed(lambda: searcher.candidates(self._queries, step))
        order = np.argsort(-scores, axis=1, kind="stable")
        scores, documents = np.take_along_axis(scores, order, axis=1), np.take_along_axis(documents, order, axis=1)
        return _Wide(step, short.keep, quick / len(scores), slow / len(scores), scores, documents)

    def _trials_of(self, wide: "_Wide", bar: float) -> Iterator[Trial]:
        """Yields the plans that begin with a wide shortlist, or a shorter one, and reach the bar on average."""
        first, width = wide.step, self._index.width
        score = functools.cache(lambda dim: self._score(wide, dim))
        final, final_seconds = score(width)
        worth = self._ranked(wide, final)
        last = Step(width, self._answers.num_results)
        middles = [dim for dim in self._index.dims if first.dim < dim < width]
        for keep in (keep for keep in self._keeps() if keep <= first.keep):
            members, steps = wide.members(keep), (dataclasses.replace(first, keep=keep),)
            direct = Trial(FunnelPlan((*steps, last)), worth(members), wide.seconds(keep) + keep * final_seconds)
            if direct.worth.mean() < bar:
                continue  # whatever is left of these is worth no more
            for middle, fewer in ((dim, fewer) for dim in middles for fewer in self._keeps() if 2 * fewer <= keep):
                scores, seconds = score(middle)
                own = worth(_best(scores, members, fewer))
                if own.mean() >= bar:
                    cost = wide.seconds(keep) + keep * seconds + fewer * final_seconds
                    yield Trial(FunnelPlan((*steps, Step(middle, fewer), last)), own, cost)
            yield direct

    def _ranked(self, wide: "_Wide", scores: Float32Array) -> Callable[[Members], FloatArray]:
        """Returns what says how much those among the candidates are worth that get as far as the last ranking."""
        order = self._scan.order(scores, wide.documents)
        gains = np.take_along_axis(self._answers.gains_of(self._chosen, wide.documents), order, axis=1)
        gains = np.concatenate([gains, np.zeros((len(gains), 1))], axis=1)  # the last column: nobody's place
        places = np.argsort(order, axis=1)  # of each candidate, if all were ranked

        def worth(members: Members) -> FloatArray:
            taken = np.where(members, places[:, : members.shape[1]], order.shape[1])
            depth = min(self._answers.num_results, taken.shape[1])
            best = np.sort(np.partition(taken, depth - 1, axis=1)[:, :depth], axis=1)
            return self._answers.worth(self._chosen, np.take_along_axis(gains, best, axis=1))

        return worth

    def _score(self, wide: "_Wide", dim: int) -> tuple[Float32Array, float]:
        """Returns the scores of the candidates at a dim, and how long one takes."""
        if dim not in self._known:
            searcher = Searcher(self._call, self._index.open_ids(), FunnelPlan((Step(dim, 1),)))
            self._known[dim] = _Scores(searcher, self._queries)
        return self._known[dim].look_up(wide.documents), self._known[dim].seconds

    def measure(self, trials: Sequence[Trial], exact: Trial, batch: int, confidence: float) -> list[Point]:
        """Returns what trials, and exact search after them, cost and are worth on the other queries, by really searching.

        Plans take turns, so that a machine that is slow for a while is slow for all of them; medians of the rounds count.
        """
        every = [*trials, exact]
        searchers = {trial.plan: self._searcher(trial.plan) for trial in every}
        worth = np.stack([self._confirm(searcher) for searcher in searchers.values()])
        chosen = frontier.share(np.stack([trial.worth for trial in every]), exact.worth)
        confirmed, (low, high) = frontier.share(worth, worth[-1]), frontier.interval(worth, worth[-1], confidence)
        queries, num_results = self._answers.queries, self._answers.num_results
        in_batches = _time_in_turn(searchers, queries, num_results, batch, _ROUNDS)
        alone = _time_in_turn(searchers, queries, num_results, 1, _SINGLE_QUERIES)
        shares = np.stack([chosen, confirmed, low, high], axis=1).tolist()
        return [
            Point(plan, share, other, lower, upper, batch / in_batches[plan], 1000 * alone[plan])
            for plan, (share, other, lower, upper) in zip(searchers, shares, strict=True)
        ]

    def _searcher(self, plan: FunnelPlan) -> Searcher:
        return self._scan if plan == self._exact else self._index.searcher(plan, self._call)

    def _confirm(self, searcher: Searcher) -> FloatArray:
        documents = searcher.search(self._answers.queries[self._others], self._answers.num_results).documents
        return self._answers.worth(self._others, self._answers.gains_of(self._others, documents))


@dataclass(frozen=True, slots=True)
class _Wide:
    """A wide shortlist of each query, best first; its beginning is what a shorter one would be.

    Attributes:
        step: That made it.
        shortest: Length of the short shortlist that was timed beside it.
        quick: Seconds for one query, of the short one.
        slow: Seconds for one query, of the wide one.
        scores: Of the first step.
        documents: Their numbers; -1 pads.

    Shapes: scores [Q, M], documents [Q, M].
    """

    step: Step
    shortest: int
    quick: float
    slow: float
    scores: Float32Array
    documents: IntArray

    def seconds(self, keep: int) -> float:
        """Returns about how long a shortlist of this length takes, for one query of a batch."""
        share = (keep - self.shortest) / max(self.step.keep - self.shortest, 1)
        return self.quick + share * max(self.slow - self.quick, 0.0)

    def members(self, keep: int) -> Members:
        """Returns which candidates a shortlist of this length has, as far as the columns that any query needs.

        Shapes: -> [Q, M'], M' <= M.
        """
        members = _best(self.scores, self.scores > topk.PADDING, keep)
        return members[:, : max(int(np.count_nonzero(members, axis=1).max(initial=0)), 1)]


class _Scores:
    """Scores of queries and documents at one dim, each computed once, however many shortlists have the document.

    Args:
        searcher: Its plan ends at the dim.
        queries: Full vectors.

    Shapes: queries [Q, D].
    """

    def __init__(self, searcher: Searcher, queries: Vectors) -> None:
        self._searcher, self._queries = searcher, queries
        self._keys, self._scores = np.array([-1]), np.array([topk.PADDING], dtype=np.float32)
        self.seconds = 0.0

    def look_up(self, documents: IntArray) -> Float32Array:
        """Returns the scores of documents; document -1 scores ``PADDING``. The first call says how long one takes.

        Shapes: documents [Q, M] -> [Q, M].
        """
        keys = np.where(documents >= 0, np.arange(len(documents))[:, None] * self._searcher.num_documents + documents, -1)
        is_new = self._keys[self._places(keys)] != keys
        seconds, fresh = _timed(lambda: self._searcher.score(self._queries, np.where(is_new, documents, -1)))
        self.seconds = self.seconds or seconds / max(int(np.count_nonzero(is_new)), 1)
        merged = np.concatenate([self._keys, keys[is_new]])
        order = np.argsort(merged)
        self._keys, self._scores = merged[order], np.concatenate([self._scores, fresh[is_new]])[order]
        return self._scores[self._places(keys)]

    def _places(self, keys: IntArray) -> IntArray:
        return np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)


def _best(scores: Float32Array, members: Members, keep: int) -> Members:
    """Returns which members are the best ``keep`` of their query or tie with the last of these, as ``topk.cut`` has it.

    Shapes: scores [Q, M] or wider, members [Q, M] -> [Q, M].
    """
    if members.shape[1] <= keep:
        return members
    own = np.where(members, scores[:, : members.shape[1]], np.float32(topk.PADDING))
    last = -np.partition(-own, keep - 1, axis=1)[:, keep - 1 : keep]
    best: Members = members & (own >= last)
    return best


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _time_in_turn(
    searchers: Mapping[FunnelPlan, Searcher], queries: Vectors, num_results: int, batch: int, num_rounds: int
) -> dict[FunnelPlan, float]:
    """Returns the median seconds of a batch for every plan; each round has other queries, the same for all plans."""
    seconds: dict[FunnelPlan, list[float]] = {plan: [] for plan in searchers}
    for number in range(num_rounds):
        rows = np.arange(number * batch, (number + 1) * batch) % len(queries)
        for plan, searcher in searchers.items():
            own, _ = _timed(lambda searcher=searcher, rows=rows: searcher.search(queries[rows], num_results))  # type: ignore[misc]
            seconds[plan].append(own)
    return {plan: float(np.median(own)) for plan, own in seconds.items()}


@dataclass(frozen=True, slots=True)
class Tuning:
    """What tuning an index found.

    Attributes:
        answers: What plans were measured on.
        num_choosing: Queries that chose; the others confirmed.
        num_trials: Plans whose worth was computed.
        points: The frontier, fastest first.
        exact: Exact search at full width.
        choices: The plan of each named quality.
    """

    answers: Answers
    num_choosing: int
    num_trials: int
    points: tuple[Point, ...]
    exact: Point
    choices: Mapping[str, Choice]

    def as_json(self) -> dict[str, Any]:
        """Returns what is kept with the index."""
        return {
            "measure": self.answers.measure,
            "num_choosing": self.num_choosing,
            "num_confirming": len(self.answers.queries) - self.num_choosing,
            "num_trials": self.num_trials,
            "frontier": [point.as_json() for point in self.points],
            "exact": self.exact.as_json(),
            "plans": {
                name: {
                    "floor": choice.floor,
                    **choice.point.as_json(),
                    "passed_over": [point.plan.parts for point in choice.passed_over],
                }
                for name, choice in self.choices.items()
            },
        }


def tune(
    index: IndexStore,
    answers: Answers,
    query_ids: Sequence[str],
    call: CallShards,
    floor: float = 0.995,
    confidence: float = frontier.CONFIDENCE,
    batch: int = 1024,
) -> Tuning:
    """Returns the frontier of an index, and the cheapest plan for each named quality.

    Args:
        index: The index.
        answers: What to measure plans by.
        query_ids: Of the answers' queries; their hashes say which of them choose.
        call: How to reach the shards.
        floor: Least share of exact search that the balanced plan keeps.
        confidence: Of the intervals that must hold the floors.
        batch: Queries that are searched at once when plans are timed.

    Raises:
        ValueError: There are too few queries, the index leaves no way to search exactly, or that finds nothing.
    """
    is_choosing = frontier.choosing(query_ids)
    tuner, wanted = Tuner(index, answers, is_choosing, call), frontier.floors(floor)
    trials = list(tuner.trials(1 - _BELOW_FAST * (1 - wanted["fast"]), enough=wanted["high"]))
    *others, exact = trials
    if not exact.worth.any():
        raise ValueError(f"{index.folder}: exact search finds no judged document for any query. Check that data and index agree.")
    worth = np.stack([trial.worth for trial in trials])
    shares, (lows, _) = frontier.share(worth, exact.worth), frontier.interval(worth, exact.worth)
    costs = np.array([trial.seconds for trial in trials])
    timed = frontier.worth_timing(costs[:-1], shares[:-1], lows[:-1], list(wanted.values()))
    *points, exact_point = tuner.measure([others[place] for place in timed], exact, batch, confidence)
    choices = {name: frontier.choose(points, own, exact_point) for name, own in wanted.items()}
    every = tuple(frontier.frontier([*points, exact_point]))
    return Tuning(answers, int(np.count_nonzero(is_choosing)), len(trials), every, exact_point, choices)
