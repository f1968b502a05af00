"""Systems held against each other on the same queries: gains with intervals and tests; and which dim is enough."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from matryoshka import evaluation, significance
from matryoshka.evaluation import BINARY, FUNNEL, INT8
from matryoshka.metrics import NDCG
from matryoshka.runs import Series

FLOOR = 0.95

_BYTES_PER_NUMBER = 2  # float16, as embeddings are stored
_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one system gained on another, query by query.

    Attributes:
        before: The one system.
        after: The other.
        dim: Of the other.
        before_dim: Of the one; None: it has none.
        metric: Name of the measure.
        gain: Mean difference.
        low: Lower end of its 95% interval; None where there are fewer than two queries.
        high: Upper end.
        p_value: Of the paired permutation test.
        p_corrected: The same, corrected for the number of comparisons of its family.
        wins: Queries that gained.
        ties: Queries that did neither.
        losses: Queries that lost.
        detectable: Gain whose whole interval would be above 0 in 80% of the cases; None: these queries do not tell.
    """

    before: str
    after: str
    dim: int
    before_dim: int | None
    metric: str
    gain: float
    low: float | None
    high: float | None
    p_value: float
    p_corrected: float
    wins: int
    ties: int
    losses: int
    detectable: float | None

    @property
    def num_queries(self) -> int:
        """Judged queries."""
        return self.wins + self.ties + self.losses


def compare(series: Sequence[Series], metric: str = NDCG) -> list[Comparison]:
    """Returns every comparison that a report makes, by one measure.

    Models are held against the first one, dim by dim, and against words at their full width; a model through a funnel, or
    quantised, against itself. p-values are corrected in two families: each model against the first one at the widest dim of
    both, which is what verdicts rest on (of two models, one test, which stays as it is); and all that is asked besides, so
    that no side question changes an answer.
    """
    pairs = list(_pairs(series))
    if not pairs:
        return []
    differences = np.stack([after.values[metric] - before.values[metric] for before, after in pairs], axis=1)
    ends = significance.mean_intervals(differences)
    p_values = significance.p_values(differences)
    is_main, corrected = _are_main(pairs), np.empty(len(pairs))
    for family in (is_main, ~is_main):
        corrected[family] = significance.correct(p_values[family])
    gains = differences.mean(axis=0)
    return [
        Comparison(
            before.system, after.system, after.dim or 0, before.dim, metric, float(gains[number]), *ends[number],
            float(p_values[number]), float(corrected[number]),
            *significance.count_outcomes(differences[:, number]), significance.detectable(differences[:, number]),
        )
        for number, (before, after) in enumerate(pairs)
    ]  # fmt: skip


def _pairs(series: Sequence[Series]) -> Iterator[tuple[Series, Series]]:
    plain = [own for own in series if evaluation.is_plain(own)]
    at = {(own.system, own.dim): own for own in plain}
    widest: dict[str, Series] = {}
    for own in plain:
        widest[own.system] = max(widest.get(own.system, own), own, key=lambda one: one.dim or 0)
    words = next((own for own in series if own.dim is None), None)
    first = plain[0].system if plain else ""
    for own in series:
        base = own.system.removesuffix(FUNNEL)
        if own.system.endswith(FUNNEL) and base in widest:
            yield widest[base], own
        base = own.system.removesuffix(INT8).removesuffix(BINARY)
        if base != own.system and (base, own.dim) in at:
            yield at[base, own.dim], own
        if own.system != first and (own.system, own.dim) in at and (first, own.dim) in at:
            yield at[first, own.dim], own
        if words and widest.get(own.system) is own:
            yield words, own


def _are_main(pairs: Sequence[tuple[Series, Series]]) -> npt.NDArray[np.bool_]:
    """Returns which comparisons hold a model against the first one at the widest dim of both."""
    widest: dict[str, int] = {}
    for number, (before, after) in enumerate(pairs):
        if evaluation.is_plain(before) and evaluation.is_plain(after):
            known = pairs[widest.get(after.system, number)][1]
            if (after.dim or 0) >= (known.dim or 0):
                widest[after.system] = number
    return np.isin(np.arange(len(pairs)), list(widest.values()))


def find(comparisons: Sequence[Comparison], before: str, after: str) -> Comparison | None:
    """Returns the comparison of two systems at the widest dim that both have."""
    own = [one for one in comparisons if (one.before, one.after) == (before, after)]
    return max(own, key=lambda one: one.dim, default=None)


@dataclass(frozen=True, slots=True)
class Resolution:
    """What a dim costs and keeps.

    Attributes:
        dim: The dim.
        value: Of the headline measure.
        retained: Share of what full width reaches.
        low: Lower end of the share's 95% interval.
        bytes_per_million: Of the vectors of a million documents, of chunked ones with all their chunks.
        microseconds_per_query: In which a query is compared with every document of this corpus, in memory, in a batch; None
            where it was not measured.
        seconds_per_million: In which a thousand queries are compared with a million documents, one and all; None: the same.
    """

    dim: int
    value: float
    retained: float
    low: float
    bytes_per_million: int
    microseconds_per_query: float | None
    seconds_per_million: float | None


@dataclass(frozen=True, slots=True)
class Resolutions:
    """Which dim is enough.

    Attributes:
        system: Whose dims these are.
        floor: Share of full width's quality that is to be kept.
        recommended: The least dim whose whole interval keeps it.
        by_dim: Widest first.
    """

    system: str
    floor: float
    recommended: int
    by_dim: tuple[Resolution, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Returns what ``dataclasses.asdict`` described."""
        return cls(**{**value, "by_dim": tuple(Resolution(**one) for one in value["by_dim"])})


def resolutions(
    series: Sequence[Series],
    system: str,
    floor: float,
    microseconds: Mapping[int, float],
    num_documents: int,
    rows_per_document: float = 1.0,
    metric: str = NDCG,
) -> Resolutions | None:
    """Returns what each dim of a system keeps of full width; None where full width finds nothing, or one query cannot tell.

    Args:
        series: Of all systems.
        system: Which one.
        floor: Share that is to be kept.
        microseconds: In which one query is compared with all documents, by dim.
        num_documents: So many.
        rows_per_document: Vectors of each, on average.
        metric: Name of the measure.
    """
    own = sorted((one for one in series if one.system == system and one.dim is not None), key=lambda one: -(one.dim or 0))
    if not own or not own[0].values[metric].any() or len(own[0].values[metric]) < 2:
        return None
    values = np.stack([one.values[metric] for one in own], axis=1)
    drawn = significance.resampled_means(values)
    shares = np.divide(drawn, drawn[:, :1], out=np.ones_like(drawn), where=drawn[:, :1] > 0)
    low, _ = significance.interval(shares, len(values))
    means = values.mean(axis=0)
    by_dim = []
    for place, dim in enumerate(one.dim or 0 for one in own):
        taken = microseconds.get(dim)
        scaled = None if taken is None else round(taken / max(num_documents, 1) * 1_000, 3)  # us a query and document, times 1e9
        by_dim.append(
            Resolution(
                dim, float(means[place]), float(means[place] / means[0]), float(low[place]),
                round(_BYTES_PER_NUMBER * dim * _MILLION * rows_per_document), taken, scaled,
            )
        )  # fmt: skip
    enough = [one.dim for one in by_dim if one.low >= floor]
    return Resolutions(system, floor, min(enough, default=by_dim[0].dim), tuple(by_dim))
