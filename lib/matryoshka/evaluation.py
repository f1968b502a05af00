"""The evaluate stage's figures: what systems reach by every measure, with intervals, and which of several models is best."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from matryoshka import metrics, significance
from matryoshka.nested import shrink
from matryoshka.runs import Series

Vectors = npt.NDArray[np.floating[Any]]

HEADLINES = (metrics.NDCG, metrics.SPEARMAN)

FUNNEL, INT8, BINARY = "+funnel", "+int8", "+binary"
VARIANTS = (FUNNEL, INT8, BINARY)
"""Ends of the names of systems that are a model's other ways of being searched."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of a report: what ``system`` reached at ``dim`` by ``metric``.

    Attributes:
        system: Its name.
        dim: None where there is none, as of words.
        metric: Name of the measure.
        value: Mean over the judged queries.
        low: Lower end of the 95% interval over queries; None where there are no single queries, or one.
        high: Upper end.
    """

    system: str
    dim: int | None
    metric: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """A system's model: its size, how fast it was in this evaluation (None: not measured), and whether this project tuned it."""

    system: str
    num_bytes: int
    num_parameters: int
    width: int
    max_tokens: int | None
    documents_per_second: float | None
    queries_per_second: float | None
    is_tuned: bool = False


def figures(series: Sequence[Series]) -> list[Row]:
    """Returns every measure of every system at every dim, with intervals over the queries."""
    named = [(own, name) for own in series for name in own.values]
    if not named:
        return []
    values = np.stack([own.values[name] for own, name in named], axis=1)
    ends = significance.mean_intervals(values)
    return [
        Row(own.system, own.dim, name, float(mean), low, high)
        for (own, name), mean, (low, high) in zip(named, values.mean(axis=0), ends, strict=True)
    ]


def is_plain(row: Row | Series) -> bool:
    """Returns whether a system is a model, searched exactly by its vectors as they are."""
    return row.dim is not None and not row.system.endswith(VARIANTS)


def evaluate_similarity(
    system: str, firsts: Vectors, seconds: Vectors, scores: Sequence[float], dims: Iterable[int]
) -> list[Row]:
    """Returns, at every dim, the rank correlation of the cosines of pairs with the scores that people gave them.

    Shapes: firsts [N, D], seconds [N, D], scores [N].
    """
    given, rows = np.asarray(scores), []
    for dim in dims:
        cosines = np.einsum("nd,nd->n", shrink(firsts, dim), shrink(seconds, dim))
        rows.append(Row(system, dim, metrics.SPEARMAN, metrics.spearman(given, cosines)))
    return rows


@dataclass(frozen=True, slots=True)
class Ranking:
    """Systems in order.

    Attributes:
        metric: By which measure.
        dims: The dims that all systems have; the mean is over these.
        means: Of each system, best first.
        best_per_dim: At every dim that any system has.
    """

    metric: str
    dims: tuple[int, ...]
    means: Mapping[str, float]
    best_per_dim: Mapping[int, str]

    @property
    def best(self) -> str:
        """The first system."""
        return next(iter(self.means))


def rank_systems(rows: Sequence[Row]) -> Ranking:
    """Returns systems ranked by the mean of the headline measure over the dims that all of them have.

    A wide model is not praised, nor blamed, for dims that a narrow one lacks. Of equals, the first one given stands first.

    Raises:
        ValueError: There is no such dim.

    >>> ranking = rank_systems([Row("a", 8, "nDCG@10", 0.9), Row("a", 4, "nDCG@10", 0.3), Row("b", 4, "nDCG@10", 0.5)])
    >>> ranking.best, ranking.dims, ranking.best_per_dim
    ('b', (4,), {8: 'a', 4: 'b'})
    """
    metric = next((name for name in HEADLINES if any(row.metric == name for row in rows)), HEADLINES[0])
    values = {(row.system, row.dim or 0): row.value for row in rows if row.metric == metric and is_plain(row)}
    systems = list(dict.fromkeys(system for system, _ in values))
    all_dims = sorted({dim for _, dim in values}, reverse=True)
    shared = tuple(dim for dim in all_dims if all((system, dim) in values for system in systems))
    if not shared:
        raise ValueError(f"ranking: no dim that all of {', '.join(systems)} have. Evaluate them at one that they share.")
    means = {system: float(np.mean([values[system, dim] for dim in shared])) for system in systems}
    by_dim = {dim: {system: values[system, dim] for system in systems if (system, dim) in values} for dim in all_dims}
    best_per_dim = {dim: max(own, key=own.__getitem__) for dim, own in by_dim.items()}
    ordered = sorted(systems, key=lambda system: -means[system])
    return Ranking(metric, shared, {system: means[system] for system in ordered}, best_per_dim)
