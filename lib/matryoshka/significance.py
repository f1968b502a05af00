"""What a set of queries can tell: intervals, paired tests, corrected for their number, and the gain that it could have shown.

Queries are what is sampled: every statistic is over the differences, or values, of single queries. Draws are seeded, shared by
all systems, and made in parts, so that memory is bounded whatever the number of queries.

Source: Smucker et al. 2007, A comparison of statistical significance tests for information retrieval evaluation,
doi:10.1145/1321440.1321528 (the permutation and the bootstrap test).
"""

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

CONFIDENCE, SIGNIFICANT, POWER = 0.95, 0.05, 0.8

_RESAMPLES, _PERMUTATIONS = 4_000, 10_000
_SEED = 0
_NUMBERS_AT_ONCE = 1 << 22  # of a part of the draws: 32 MB
_SAME = 1e-9  # figures that are closer differ by rounding

_NORMAL = NormalDist()


def resampled_means(values: FloatArray) -> FloatArray:
    """Returns the means of columns over queries that are drawn again and again, with replacement; all columns share the draws.

    Shapes: values [Q, C] -> [R, C].
    """
    num_queries = len(values)
    rng = np.random.default_rng(_SEED)
    parts = []
    for size in _parts(_RESAMPLES, num_queries):
        drawn = rng.integers(0, num_queries, (size, num_queries)) + np.arange(size)[:, None] * num_queries
        counts = np.bincount(drawn.ravel(), minlength=size * num_queries).reshape(size, num_queries)
        parts.append(counts @ values / num_queries)
    return np.concatenate(parts)


def interval(resampled: FloatArray, num_queries: int, confidence: float = CONFIDENCE) -> tuple[FloatArray, FloatArray]:
    """Returns the ends of confidence intervals: percentiles of resampled statistics, set wider where queries are few.

    Shapes: resampled [R, C] -> [C], [C].

    Source: Hesterberg 2015, What teachers should know about the bootstrap, doi:10.1080/00031305.2015.1089789 (expanded
    percentiles: as the quantiles of Student's t to those of the normal distribution).

    >>> low, high = interval(np.linspace(0, 1, 1001)[:, None], 1_000_000)
    >>> round(float(low[0]), 3), round(float(high[0]), 3)
    (0.025, 0.975)
    """
    outside = _NORMAL.cdf(-math.sqrt(num_queries / max(num_queries - 1, 1)) * _student(1 - (1 - confidence) / 2, num_queries - 1))
    low, high = np.quantile(resampled, [outside, 1 - outside], axis=0)
    return low, high


def mean_intervals(values: FloatArray) -> list[tuple[float | None, float | None]]:
    """Returns the ends of the confidence interval of each column's mean; fewer than two queries have none.

    Shapes: values [Q, C].
    """
    if len(values) < 2:
        return [(None, None)] * values.shape[1]
    low, high = interval(resampled_means(values), len(values))
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _student(level: float, freedom: int) -> float:
    """Returns a quantile of Student's t, by its expansion around the normal one: .9% too small for five degrees of freedom."""
    z, freedom = _NORMAL.inv_cdf(level), max(freedom, 1)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def p_values(differences: FloatArray) -> FloatArray:
    """Returns how likely a mean at least as far from 0 would be if signs of differences were chance, column by column.

    Signs of queries are flipped at random, those of all columns alike; what was observed counts as one of the flips, so a
    p-value is never 0, and the test holds its level for any number of queries.

    Shapes: differences [Q, C] -> [C].
    """
    rng = np.random.default_rng(_SEED)
    bar = np.abs(differences.sum(axis=0)) - _SAME
    num_as_far = np.ones(differences.shape[1])
    for size in _parts(_PERMUTATIONS, len(differences)):
        signs = 2.0 * rng.integers(0, 2, (size, len(differences)), dtype=np.int8) - 1.0
        num_as_far += np.count_nonzero(np.abs(signs @ differences) >= bar, axis=0)
    return num_as_far / (_PERMUTATIONS + 1)


def _parts(num_draws: int, num_queries: int) -> Iterator[int]:
    """Yields sizes of the parts in which draws are made."""
    size = max(_NUMBERS_AT_ONCE // max(num_queries, 1), 1)
    for start in range(0, num_draws, size):
        yield min(size, num_draws - start)


def correct(values: FloatArray) -> FloatArray:
    """Returns p-values corrected for their number: at most 5% of such families have any below .05 without a true difference.

    Shapes: values [C] -> [C].

    Source: Holm 1979, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6.

    >>> correct(np.array([0.01, 0.04, 0.03])).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * (len(values) - np.arange(len(values))))
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def count_outcomes(differences: FloatArray) -> tuple[int, int, int]:
    """Returns (wins, ties, losses).

    >>> count_outcomes(np.array([0.5, 0.0, -0.1, 0.2]))
    (2, 1, 1)
    """
    wins, losses = int(np.count_nonzero(differences > _SAME)), int(np.count_nonzero(differences < -_SAME))
    return wins, len(differences) - wins - losses, losses


def detectable(differences: FloatArray) -> float | None:
    """Returns how far above 0 a true mean must be for the whole interval of so many queries, differing so much, to be above 0
    in 80% of the cases; None where they do not say how much they differ: fewer than two, or all alike.

    >>> round(detectable(np.tile([-0.3, 0.3], 500)), 4)
    0.0266
    """
    spread = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    if spread < _SAME:
        return None
    needed = _NORMAL.inv_cdf(1 - SIGNIFICANT / 2) + _NORMAL.inv_cdf(POWER)
    return needed * spread / math.sqrt(len(differences))
