"""What point clouds say of the models that made them: how alike two are, how pairs lie, how spread, how clustered; 2-D views."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.floating[Any]]
Float64Array = npt.NDArray[np.float64]

FEWEST_FOR_CKA = 4

_SHARPNESS = 2.0  # t of the Gaussian potential, as published
_ROWS_AT_ONCE = 1024


def linear_cka(left: Points, right: Points) -> float:
    """Returns how alike two representations of the same texts are: 1 if one is the other turned and scaled, 0 if unrelated.

    Of the estimators of the kernels' agreement, this is the unbiased one: the usual one calls unrelated representations
    alike as soon as they are wide (D / (N + D)). Everything is summed in D x E matrices, in float64: N is not squared.

    Shapes: left [N, D], right [N, E].

    Raises:
        ValueError: There are fewer than four texts.

    Source: Kornblith et al. 2019, arXiv:1905.00414, eq. 5; Song et al. 2012, JMLR 13, eq. 5 (unbiased estimator).
    """
    if len(left) < FEWEST_FOR_CKA:
        raise ValueError(f"CKA: {len(left)} texts are too few. Take at least {FEWEST_FOR_CKA}.")
    first, second = _centred(left), _centred(right)
    norms = _agreement(first, first) * _agreement(second, second)
    return float(_agreement(first, second) / np.sqrt(norms)) if norms > 0 else 0.0


def _centred(points: Points) -> Float64Array:
    return np.asarray(points - points.mean(axis=0, dtype=np.float64), np.float64)


def _agreement(left: Float64Array, right: Float64Array) -> float:
    """Returns the unbiased estimate of the Hilbert-Schmidt independence criterion of linear kernels, but for a factor of N.

    The kernels have zeros on their diagonals. Sums over them come from sums over rows: the columns of centred ones add to 0.
    """
    count = len(left)
    squares, others = (np.einsum("nd,nd->n", own, own) for own in (left, right))
    joint = np.square(left.T @ right).sum() - squares @ others
    # With centred points, the sums of a kernel's rows are the diagonal that was taken out, with the other sign.
    return float(joint + squares.sum() * others.sum() / ((count - 1) * (count - 2)) - 2 / (count - 2) * (squares @ others))


def alignment(queries: Points, positives: Points) -> float:
    """Returns the mean squared distance between unit vectors that belong together: lower is better, 0 is the best.

    Shapes: queries [N, D], positives [N, D].

    Source: Wang and Isola 2020, arXiv:2005.10242, section 4.1.
    """
    difference = queries.astype(np.float64) - positives.astype(np.float64)
    return float(np.einsum("nd,nd->n", difference, difference).mean())


def uniformity(vectors: Points) -> float:
    """Returns the log of the mean Gaussian potential of all pairs of unit vectors: lower is more evenly spread, 0 is one point.

    Shapes: vectors [N, D]; no N x N matrix is held.

    Source: Wang and Isola 2020, arXiv:2005.10242, section 4.1.
    """
    points, total = vectors.astype(np.float64), 0.0
    squares = np.einsum("nd,nd->n", points, points)
    for start in range(0, len(points), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        distances = squares[rows, None] + squares - 2 * points[rows] @ points.T  # [rows, N]
        total += np.exp(-_SHARPNESS * np.maximum(distances, 0)).sum()
    num_pairs = len(points) * (len(points) - 1)
    return float(np.log((total - len(points)) / num_pairs))  # a point is no pair with itself


def energy(vectors: Points, dims: Iterable[int]) -> list[tuple[int, float]]:
    """Returns, for each dim, which share of the variance of full vectors lies in a prefix of so many.

    Shapes: vectors [N, D].
    """
    variances = vectors.astype(np.float64).var(axis=0)
    shares = np.cumsum(variances) / max(variances.sum(), np.finfo(np.float64).tiny)
    return [(dim, float(shares[dim - 1])) for dim in dims]


def silhouette(vectors: Points, labels: Sequence[str]) -> float | None:
    """Returns how well labels separate unit vectors, from -1 to 1; None where there are not two labels, one of several vectors.

    Of each vector: how much further, by cosine, the nearest other label is than its own, over the larger of both. Distances
    to all vectors of a label are those to their sum, so that there is a matrix of vectors and labels only.

    Shapes: vectors [N, D], labels [N].

    Source: Rousseeuw 1987, doi:10.1016/0377-0427(87)90125-7; alone under its label, a vector counts as 0.
    """
    names, own = np.unique(np.asarray(labels, dtype=object), return_inverse=True)
    counts = np.bincount(own)
    if len(names) < 2 or counts.max() < 2:
        return None
    points = vectors.astype(np.float64)
    sums = np.zeros((len(names), points.shape[1]))
    np.add.at(sums, own, points)
    rows = np.arange(len(points))
    far = counts - points @ sums.T  # [N, labels]: summed cosine distances
    inner = (far[rows, own] - (1 - np.einsum("nd,nd->n", points, points))) / np.maximum(counts[own] - 1, 1)
    means = far / counts
    means[rows, own] = np.inf
    outer = means.min(axis=1)
    larger = np.maximum(inner, outer)
    values = np.divide(outer - inner, larger, out=np.zeros(len(points)), where=(larger > 0) & (counts[own] > 1))
    return float(values.mean())


def principal_plane(vectors: Points) -> Float64Array:
    """Returns the points in the plane of most variance; of each axis, the largest component is positive.

    Shapes: vectors [N, D] -> [N, 2].
    """
    centred = _centred(vectors)
    _, axes = np.linalg.eigh(centred.T @ centred)  # ascending
    plane = axes[:, :-3:-1]
    plane = plane * np.sign(plane[np.abs(plane).argmax(axis=0), np.arange(plane.shape[1])])
    return np.asarray(centred @ plane)


def superimpose(points: Float64Array, target: Float64Array) -> Float64Array:
    """Returns the points turned, mirrored and moved to where they lie closest to their targets; distances among them stay.

    Shapes: points [N, 2], target [N, 2].

    Source: Schoenemann 1966, doi:10.1007/BF02289451 (orthogonal Procrustes problem).
    """
    left, _, right = np.linalg.svd(_centred(points).T @ _centred(target))
    return np.asarray(_centred(points) @ (left @ right) + target.mean(axis=0))
