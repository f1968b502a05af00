"""Other software's indexes over whole vectors, to hold the funnel against: FAISS's own, hnswlib, usearch.

The one door for hnswlib and usearch. FAISS is called as its users call it, without anything of ours in between.
"""

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import numpy.typing as npt

from matryoshka.nested import Float32Array

Parameters = Mapping[str, int]
IntArray = npt.NDArray[np.int64]

_EFFORTS = (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)
_FACTORS = (2, 4, 8, 16, 32)
_MOST_PROBES = 256  # or a quarter of the lists
_POINTS_PER_CENTROID = 64  # FAISS takes 256 by default, for four times the time and the same lists but for chance
_SUBSPACE_DIMS = 2


class PeerIndex(Protocol):
    """An index of other software."""

    def build(self, vectors: Float32Array) -> None:
        """Trains the index if its kind needs it, and puts the vectors in."""

    def search(self, queries: Float32Array, num_results: int, parameters: Parameters) -> IntArray:
        """Returns the rows of the best documents of each query; -1 pads."""

    def write(self, path: Path) -> None:
        """Writes the index to a file."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A kind of index.

    Attributes:
        make: Returns an empty one for documents [N, D], given N, D and a number of threads.
        sweep: Returns the search parameters to try, from quick to thorough, given N.
        bytes_per_document: About what it takes, given D.
        packages: What must be installed.
    """

    make: Callable[[int, int, int], PeerIndex]
    sweep: Callable[[int], list[Parameters]]
    bytes_per_document: Callable[[int], int]
    packages: tuple[str, ...] = ()


def why_not(name: str, width: int) -> str:
    """Returns why a peer cannot run here; empty where it can.

    >>> why_not("ivf_pq_refine", 5)
    'takes an even number of dims only'
    """
    if name == "ivf_pq_refine" and width % _SUBSPACE_DIMS:
        return "takes an even number of dims only"
    missing = [package for package in PEERS[name].packages if importlib.util.find_spec(package) is None]
    return (
        f"not installed: {', '.join(missing)}. Run pip install --constraint .constraints/cpu.txt --editable '.[bench]'."
        if missing
        else ""
    )


def num_lists(num_documents: int) -> int:
    """Returns a usual number of lists of an inverted file: four times the root of the number of documents.

    >>> num_lists(250_000)
    2000
    """
    return max(min(round(4 * math.sqrt(num_documents)), num_documents), 1)


def _shuffled(num_documents: int) -> IntArray:
    """Returns rows in the order in which graphs get them.

    Where near-duplicates stand together, a graph that grows in their order has parts that are hard to reach: on MedQuAD, M 16
    finds .88 of the nearest at efSearch 512, and .94 if the order is random.
    """
    return np.random.default_rng(0).permutation(num_documents)


class _Faiss:
    """An index that FAISS's factory makes; graphs get their documents in random order."""

    def __init__(self, factory: str, width: int, num_threads: int) -> None:
        faiss.omp_set_num_threads(num_threads)
        self._is_graph = factory.startswith("HNSW")
        self._order: IntArray | None = None
        self._index: Any = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        inner = faiss.try_extract_index_ivf(self._index)
        if inner:
            inner.cp.max_points_per_centroid, inner.cp.min_points_per_centroid = _POINTS_PER_CENTROID, 1

    def build(self, vectors: Float32Array) -> None:
        """Trains the index if its kind needs it, and puts the vectors in."""
        if not self._index.is_trained:
            self._index.train(vectors)
        self._order = _shuffled(len(vectors)) if self._is_graph else None
        self._index.add(vectors if self._order is None else vectors[self._order])

    def search(self, queries: Float32Array, num_results: int, parameters: Parameters) -> IntArray:
        """Returns the rows of the best documents of each query; -1 pads."""
        for name, value in parameters.items():
            faiss.ParameterSpace().set_index_parameter(self._index, name, value)
        rows: IntArray = self._index.search(queries, num_results)[1]
        return rows if self._order is None else np.where(rows >= 0, self._order[rows], -1)

    def write(self, path: Path) -> None:
        """Writes the index to a file."""
        faiss.write_index(self._index, str(path))


class _Hnswlib:
    """A graph of hnswlib, with M and efConstruction as they come."""

    def __init__(self, num_documents: int, width: int, num_threads: int) -> None:
        import hnswlib

        self._num_threads = num_threads
        self._index = hnswlib.Index(space="ip", dim=width)
        self._index.init_index(max_elements=num_documents)

    def build(self, vectors: Float32Array) -> None:
        """Puts the vectors in."""
        order = _shuffled(len(vectors))
        self._index.add_items(vectors[order], order, num_threads=self._num_threads)

    def search(self, queries: Float32Array, num_results: int, parameters: Parameters) -> IntArray:
        """Returns the rows of the best documents of each query."""
        self._index.set_ef(parameters["ef"])
        labels, _ = self._index.knn_query(queries, k=num_results, num_threads=self._num_threads)
        return np.asarray(labels).astype(np.int64)

    def write(self, path: Path) -> None:
        """Writes the index to a file."""
        self._index.save_index(str(path))


class _Usearch:
    """A graph of usearch in float32, with connectivity and expansion as they come."""

    def __init__(self, _num_documents: int, width: int, num_threads: int) -> None:
        from usearch.index import Index

        self._num_threads = num_threads
        self._index: Any = Index(ndim=width, metric="ip", dtype="f32")

    def build(self, vectors: Float32Array) -> None:
        """Puts the vectors in."""
        order = _shuffled(len(vectors))
        self._index.add(order.astype(np.uint64), vectors[order], threads=self._num_threads)

    def search(self, queries: Float32Array, num_results: int, parameters: Parameters) -> IntArray:
        """Returns the rows of the best documents of each query; -1 pads."""
        self._index.expansion_search = parameters["expansion_search"]
        matches: Any = self._index.search(queries, num_results, threads=self._num_threads)
        keys = np.atleast_2d(matches.keys).astype(np.int64)
        counts: Any = getattr(matches, "counts", keys.shape[1])  # the matches of an only query are not padded
        return np.where(np.arange(keys.shape[1]) < np.reshape(counts, (-1, 1)), keys, -1)

    def write(self, path: Path) -> None:
        """Writes the index to a file."""
        self._index.save(str(path))


def _probes(num_documents: int) -> list[int]:
    most = max(min(num_lists(num_documents), _MOST_PROBES), num_lists(num_documents) // 4)
    return [1 << power for power in range(most.bit_length())]


def _graph_bytes(width: int, num_links: int) -> int:
    return 4 * width + 2 * 4 * num_links + 32


def _hnsw(num_links: int) -> Peer:
    return Peer(
        lambda _, width, num_threads: _Faiss(f"HNSW{num_links},Flat", width, num_threads),
        lambda _: [{"efSearch": effort} for effort in _EFFORTS],
        lambda width: _graph_bytes(width, num_links),
    )


PEERS = {
    "exact": Peer(
        lambda _, width, num_threads: _Faiss("Flat", width, num_threads),
        lambda _: [{}],
        lambda width: 4 * width,
    ),
    "hnsw16": _hnsw(16),
    "hnsw32": _hnsw(32),
    "ivf_flat": Peer(
        lambda num_documents, width, num_threads: _Faiss(f"IVF{num_lists(num_documents)},Flat", width, num_threads),
        lambda num_documents: [{"nprobe": probes} for probes in _probes(num_documents)],
        lambda width: 4 * width + 8,
    ),
    "ivf_pq_refine": Peer(
        lambda num_documents, width, num_threads: _Faiss(
            f"IVF{num_lists(num_documents)},PQ{width // _SUBSPACE_DIMS}x4fs,Refine(SQfp16)", width, num_threads
        ),
        lambda num_documents: [
            {"nprobe": probes, "k_factor_rf": factor} for probes in _probes(num_documents)[2:] for factor in _FACTORS
        ],
        lambda width: width // 4 + 2 * width + 8,
    ),
    "hnswlib": Peer(
        _Hnswlib,
        lambda _: [{"ef": effort} for effort in _EFFORTS],
        lambda width: _graph_bytes(width, 16),
        ("hnswlib",),
    ),
    "usearch": Peer(
        _Usearch,
        lambda _: [{"expansion_search": effort} for effort in _EFFORTS],
        lambda width: _graph_bytes(width, 16),
        ("usearch",),
    ),
}
