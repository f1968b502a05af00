"""Maps of a sample of vectors in two dimensions, and clusters to colour them by. The one door for scikit-learn.

It computes on one thread: sums keep their order, so that a map comes out the same again, and on a busy machine no thread of
OpenMP waits for the others longer than it works.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from matryoshka import geometry
from matryoshka.geometry import Float64Array, Points

Method = Literal["t-SNE", "PCA"]

_PERPLEXITY = 30.0
_FEWEST_FOR_TSNE = 30
_FIRST_SPREAD = 1e-4  # of the first axis: what t-SNE begins with
_TRIALS = 4


def suitable_method(wanted: Method, num_points: int) -> Method:
    """Returns the method, or PCA where there are too few points to have neighbours."""
    return wanted if num_points >= _FEWEST_FOR_TSNE else "PCA"


def draw(before: Points, after: Points, method: Method, seed: int) -> tuple[Float64Array, Float64Array]:
    """Returns where each text is on a map of the vectors before, and on one of those after; a move between them means something.

    The second t-SNE begins where the first one ended, and the second map is turned, mirrored and moved to lie on the first as
    well as it can; its distances stay its own.

    Shapes: before [N, D], after [N, D] -> [N, 2] each.

    Source: van der Maaten and Hinton 2008, JMLR 9; Kobak and Berens 2019, doi:10.1038/s41467-019-13056-x (how it begins).
    """
    if method == "PCA":
        first, second = geometry.principal_plane(before), geometry.principal_plane(after)
    else:
        first = _embed(before, geometry.principal_plane(before), seed)
        second = _embed(after, first, seed)
    first = first - first.mean(axis=0)
    return first, geometry.superimpose(second, first)


def _embed(vectors: Points, start: Float64Array, seed: int) -> Float64Array:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    spread = float(start[:, 0].std()) or 1.0
    perplexity = min(_PERPLEXITY, (len(vectors) - 1) / 3)
    made = TSNE(2, perplexity=perplexity, init=(start / spread * _FIRST_SPREAD).astype(np.float32), random_state=seed)
    with threadpool_limits(1):
        return np.asarray(made.fit_transform(vectors.astype(np.float32)), np.float64)


def cluster(vectors: Points, num_clusters: int, seed: int) -> npt.NDArray[np.int64]:
    """Returns the number of each vector's cluster by k-means: the largest cluster is 0.

    Shapes: vectors [N, D] -> [N].
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    means = KMeans(min(num_clusters, len(vectors)), n_init=_TRIALS, random_state=seed)
    with threadpool_limits(1):
        means.fit(vectors.astype(np.float32))
    counts = np.bincount(means.labels_, minlength=means.n_clusters)
    places = np.argsort(np.argsort(-counts, kind="stable"), kind="stable")
    return np.asarray(places[means.labels_], np.int64)
