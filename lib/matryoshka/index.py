"""The coarse index of a shard. The only room that knows FAISS."""

import contextlib
import errno
import functools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from matryoshka.nested import Float32Array, Step, shrink
from matryoshka.topk import PADDING

Parameters = Mapping[str, int]

_USUAL_RESULTS = 10
_LINK_BYTES, _NODE_BYTES, _NUMBER_BYTES = 4, 12, 8
_LEAST_REACH, _MOST_REACH = 16, 2_048
_MOST_ON_GPU = 2_048  # results per query, of FAISS's own selection
_CLUSTERING_PASSES, _POINTS_PER_CENTROID = 10, 64
_KINDS_ON_GPU = (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)


@dataclass(frozen=True, slots=True)
class Dial:
    """A search parameter that buys quality with time.

    Attributes:
        name: As FAISS has it.
        values: Worth trying, from fast to good.
        is_reach: Whether it says how far a graph is searched: more results than the value make the search go further by itself.
    """

    name: str
    values: tuple[int, ...]
    is_reach: bool = False

    @classmethod
    def of_lists(cls, num_lists: int) -> "Dial":
        """Returns the one of an inverted file."""
        return cls("nprobe", _steps(1, num_lists))


class CoarseIndex:
    """An inner-product index over coarse vectors; documents are rows, numbered from 0.

    What comes out is a function of a query and a document alone, so that the results of several shards can be compared.
    """

    def __init__(self, index: faiss.Index) -> None:
        self._index = index
        self._on_gpu: Any = None
        self._usual = _usual_parameters(index)

    @classmethod
    def train(cls, sample: Float32Array, factory: str) -> "CoarseIndex":
        """Returns an empty index of the given kind, trained if the kind needs it.

        Shapes: sample [N, dim].

        Raises:
            ValueError: FAISS cannot train on this sample.
        """
        index = faiss.index_factory(sample.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            try:
                index.train(np.ascontiguousarray(sample))
            except RuntimeError as error:
                reason = f"cannot be trained on {len(sample)} documents ({_reason(error)})"
                raise ValueError(f"--coarse-index {factory}: {reason}. Choose a smaller one, or Flat.") from None
        return cls(index)

    @classmethod
    def build(cls, vectors: Float32Array, factory: str) -> "CoarseIndex":
        """Returns an index of the given kind, trained on the very vectors that it holds.

        Shapes: vectors [N, dim].
        """
        index = cls.train(vectors, factory)
        index.add(vectors)
        return index

    @classmethod
    def read(cls, path: Path) -> "CoarseIndex":
        """Returns an index from its file; the caller has checked the file's digest.

        Raises:
            ValueError: FAISS cannot read the file.
        """
        try:
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC))
        except RuntimeError as error:
            raise ValueError(f"{path}: not a FAISS index ({_reason(error)}). Run python -m jobs.index.") from None

    def write(self, path: Path) -> None:
        """Writes FAISS's own file format.

        Raises:
            OSError: The disk is full.
        """
        try:
            faiss.write_index(self._index, str(path))
        except RuntimeError as error:
            if os.strerror(errno.ENOSPC) in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise

    def copy_to_gpu(self) -> None:
        """Searches on a GPU from now on, where FAISS has this kind of index for it; graphs and codes of fast scans stay here.

        Raises:
            RuntimeError: This FAISS knows no GPU.
        """
        if not hasattr(faiss, "StandardGpuResources"):
            raise RuntimeError("FAISS: this build knows no GPU. Install the gpu extra, or pass --device cpu.")
        if isinstance(_innermost(self._index), _KINDS_ON_GPU):
            self._on_gpu = faiss.index_cpu_to_gpu(_gpu_resources(), 0, self._index)

    def copy(self) -> "CoarseIndex":
        """Returns another index with the same training and the same documents."""
        return CoarseIndex(faiss.deserialize_index(faiss.serialize_index(self._index)))  # not every kind can be cloned

    def write_plain(self, path: Path, full: Float32Array, query_map: Float32Array | None, step: Step) -> None:
        """Writes this index and full vectors as one FAISS index, which needs nothing of this project to be searched.

        Queries of full width are brought into the coarse space by the file itself, and what is found is reranked by the full
        vectors: with 10 results asked for, the shortlist is the step's. Documents cannot be added to it: it holds the map of
        queries only.

        Shapes: full [N, D] at unit length, in the order of the documents; query_map [D, dim], None: the prefix.
        """
        width = full.shape[1]
        _set_parameters(self._index, dict(step.parameters))
        maps: list[Any] = [
            faiss.RemapDimensionsTransform(width, self.dim, False),  # type: ignore[arg-type]
            faiss.NormalizationTransform(self.dim),
        ]
        if query_map is not None:
            maps = [faiss.LinearTransform(width, self.dim, False)]
            faiss.copy_array_to_vector(np.ascontiguousarray(query_map.T).ravel(), maps[0].A)
            maps[0].is_trained = True
        behind = faiss.IndexPreTransform(self._index)
        for own in reversed(maps):
            behind.prepend_transform(own)
        every = faiss.IndexFlatIP(width)
        every.add(np.ascontiguousarray(full))
        whole = faiss.IndexRefine(behind, every)
        whole.k_factor = max(step.keep / _USUAL_RESULTS, 1.0)
        faiss.write_index(whole, str(path))

    def add(self, vectors: Float32Array) -> None:
        """Adds documents after those that are there.

        Shapes: vectors [N, dim].
        """
        self._index.add(np.ascontiguousarray(vectors, dtype=np.float32))

    @property
    def ntotal(self) -> int:
        """Documents in the index."""
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Width of the coarse vectors."""
        return int(self._index.d)

    @property
    def dial(self) -> Dial | None:
        """What can be tuned when searching, where this kind of index has such a parameter."""
        inner = _innermost(self._index)
        if isinstance(inner, faiss.IndexIVF):
            return Dial.of_lists(int(inner.nlist))
        if isinstance(inner, faiss.IndexHNSW):
            return Dial("efSearch", _steps(_LEAST_REACH, _MOST_REACH), is_reach=True)
        return None

    def search(
        self, queries: Float32Array, num_results: int, parameters: Parameters | None = None
    ) -> tuple[Float32Array, npt.NDArray[np.int64]]:
        """Returns (scores, rows), best first as far as rounding goes; row -1 pads lists that came out short.

        Shapes: queries [Q, dim] -> [Q, num_results], [Q, num_results].
        """
        # Ties may ask for more results than a GPU gives.
        on_gpu = self._on_gpu is not None and num_results <= _MOST_ON_GPU
        index = self._on_gpu if on_gpu else self._index
        _set_parameters(index, {**self._usual, **(parameters or {})}, on_gpu=on_gpu)  # an earlier search's must not stay
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        scores, rows = index.search(queries, num_results)
        if isinstance(index, faiss.IndexFlat) and queries.size:
            # A large batch is one matrix product, whose sums depend on its shape: once more, vector by vector.
            self._index.compute_distance_subset(  # type: ignore[attr-defined]
                len(queries), faiss.swig_ptr(queries), num_results, faiss.swig_ptr(scores), faiss.swig_ptr(rows)
            )
        scores[rows < 0] = PADDING
        return scores, rows


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Has FAISS use so many threads for as long as the block runs."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def train_centroids(sample: Float32Array, num_lists: int) -> Float32Array:
    """Returns centroids at unit length that documents are near to, by inner product; each of some of the sample's documents.

    Shapes: sample [N, dim] -> [num_lists, dim].
    """
    means = faiss.Kmeans(
        sample.shape[1], num_lists, niter=_CLUSTERING_PASSES, spherical=True,
        min_points_per_centroid=1, max_points_per_centroid=_POINTS_PER_CENTROID,
    )  # fmt: skip
    means.train(np.ascontiguousarray(sample))
    assert means.centroids is not None
    return shrink(means.centroids, sample.shape[1])  # of as few documents as lists FAISS makes no means, but takes them


def count_lists(factory: str) -> int:
    """Returns into how many lists a kind of index puts its documents; 0: there are none.

    >>> count_lists("IVF512,PQ32x4fs"), count_lists("Flat")
    (512, 0)
    """
    lists = re.search(r"IVF(\d+)", factory)
    return int(lists[1]) if lists else 0


def _set_parameters(index: faiss.Index, parameters: Parameters, *, on_gpu: bool = False) -> None:
    space: Any = faiss.GpuParameterSpace() if on_gpu else faiss.ParameterSpace()
    for name, value in parameters.items():
        space.set_index_parameter(index, name, value)


@functools.cache
def _gpu_resources() -> Any:
    """Returns the memory for all searches on this process's GPU."""
    return faiss.StandardGpuResources()


def check_gpu_shortlist(factory: str, dim: int, num_fetched: int) -> None:
    """Checks that FAISS can fetch so many candidates on a GPU, where it has this kind of index for one.

    Raises:
        ValueError: They are too many.
    """
    whole = _make(factory, dim)
    if num_fetched > _MOST_ON_GPU and isinstance(_innermost(whole), _KINDS_ON_GPU):
        raise ValueError(
            f"plan: a shortlist for which {num_fetched} are fetched, and FAISS gives at most {_MOST_ON_GPU} on a GPU. Choose a"
            " shorter one, a dense coarse index, or --device cpu."
        )


def bytes_per_document(factory: str, dim: int) -> float:
    """Returns how many bytes a kind of index takes for one more document: its code, its links, and its number in a list.

    Raises:
        ValueError: FAISS has no such index.
    """
    whole = _make(factory, dim)  # owns its parts: they must not outlive it
    index, num_bytes = faiss.downcast_index(whole), 0.0
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    if isinstance(index, faiss.IndexHNSW):
        # Twice as many links on the lowest level as on each other one, on which stands one in so many documents of the last.
        links = int(faiss.vector_to_array(index.hnsw.cum_nneighbor_per_level)[1]) // 2
        num_bytes += _LINK_BYTES * (2 * links + links / max(links - 1, 1)) + _NODE_BYTES
        index = faiss.downcast_index(index.storage)
    if isinstance(index, faiss.IndexIVF):
        num_bytes += _NUMBER_BYTES
    return num_bytes + int(index.code_size if hasattr(index, "code_size") else index.sa_code_size())


def _innermost(index: faiss.Index) -> faiss.Index:
    """Returns the index that does the searching, below what transforms vectors or ranks results again."""
    inner = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform | faiss.IndexRefine):
        inner = faiss.downcast_index(inner.index if isinstance(inner, faiss.IndexPreTransform) else inner.base_index)
    return inner


def _usual_parameters(index: faiss.Index) -> Parameters:
    """Returns the search parameters that an index has of itself."""
    inner = _innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        return {"nprobe": int(inner.nprobe)}
    return {"efSearch": int(inner.hnsw.efSearch)} if isinstance(inner, faiss.IndexHNSW) else {}


def _steps(first: int, last: int) -> tuple[int, ...]:
    """Returns the powers of two between two numbers, what is halfway between them, and the last number itself.

    >>> _steps(1, 10)
    (1, 2, 3, 4, 6, 8, 10)
    """
    powers = [1 << power for power in range(last.bit_length())]
    return tuple(sorted({step for power in powers for step in (power, power * 3 // 2) if first <= step < last} | {last}))


def is_trained(factory: str, dim: int) -> bool:
    """Returns whether a kind of index takes vectors as they come."""
    return bool(faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT).is_trained)


def check_parameters(factory: str, dim: int, parameters: Parameters) -> None:
    """Checks that the search parameters are the one that a kind of index is tuned by: only that is set anew for every search.

    Raises:
        ValueError: There is another one.
    """
    dial = CoarseIndex(faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)).dial
    for name in parameters:
        if dial is None or name != dial.name:
            there = f" (it has '{dial.name}')" if dial else ""
            raise ValueError(f"plan: an index of kind {factory} has no parameter '{name}'{there}. Leave it out.")


def check_factory(factory: str, dim: int, num_documents: int) -> None:
    """Checks that FAISS has such an index, and that so many documents can be put into it.

    Raises:
        ValueError: It has not, it must learn from more documents than there are, or it loses vectors.
    """
    probe = _make(factory, dim)
    if not probe.is_trained:
        needed = _needed_documents(probe)
        if num_documents < needed:
            raise ValueError(
                f"--coarse-index {factory}: needs {needed} documents to learn from, and there are {num_documents}. Choose a"
                " smaller one, or Flat."
            )
        return
    random = np.random.default_rng(0).standard_normal((dim, min(4, dim)))
    known = np.linalg.qr(random).Q.T.astype(np.float32)
    try:
        _, rows = CoarseIndex.build(known, factory).search(known, 1)
    except (RuntimeError, ValueError):
        rows = np.empty((0, 1), dtype=np.int64)
    if rows.ravel().tolist() != list(range(len(known))):
        raise ValueError(f"--coarse-index {factory}: does not find unit vectors again. Choose Flat or HNSW32.")


def _make(factory: str, dim: int) -> faiss.Index:
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        raise ValueError(
            f"--coarse-index {factory}: not a FAISS factory string for {dim} dims. Write for example Flat or HNSW32."
        ) from None


def _needed_documents(index: faiss.Index) -> int:
    """Returns how many documents a kind of index needs to be trained: one for each of its centroids."""
    needed = 1
    inner = _innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        needed = int(inner.nlist)
    quantiser = getattr(inner, "pq", None)
    return max(needed, int(quantiser.ksub) if quantiser is not None else 1)


def _reason(error: RuntimeError) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
