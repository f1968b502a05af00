"""The coarse index of a shard. The only room that knows FAISS."""

from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from matryoshka.nested import Float32Array


class CoarseIndex:
    """An inner-product index over prefixes of unit length; documents are rows, numbered from 0."""

    def __init__(self, index: faiss.Index) -> None:
        self._index = index

    @classmethod
    def build(cls, prefixes: Float32Array, factory: str) -> "CoarseIndex":
        """Returns an index of the given kind.

        Shapes: prefixes [N, dim].
        """
        index = faiss.index_factory(prefixes.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.add(np.ascontiguousarray(prefixes))
        return cls(index)

    @classmethod
    def read(cls, path: Path) -> "CoarseIndex":
        """Returns an index from its file; the caller has checked the file's digest.

        Raises:
            ValueError: FAISS cannot read the file.
        """
        try:
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP))
        except RuntimeError as error:
            raise ValueError(f"{path}: not a FAISS index ({str(error).splitlines()[0]}). Run python -m jobs.index.") from None

    def write(self, path: Path) -> None:
        """Writes FAISS's own file format."""
        faiss.write_index(self._index, str(path))

    @property
    def ntotal(self) -> int:
        """Documents in the index."""
        return int(self._index.ntotal)

    def search(self, queries: Float32Array, num_results: int) -> tuple[Float32Array, npt.NDArray[np.int64]]:
        """Returns (scores, rows), best first; row -1 pads lists that came out short.

        Shapes: queries [Q, dim] -> [Q, num_results], [Q, num_results].
        """
        scores, rows = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), num_results)
        return scores, rows


def check_factory(factory: str, dim: int) -> None:
    """Builds a small index of a kind, to see that it can be done.

    Raises:
        ValueError: FAISS knows no such index, it must learn from data first, or it cannot hold vectors as they come.
    """
    try:
        probe = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        raise ValueError(f"--coarse-index {factory}: not a FAISS factory string. Write for example Flat or HNSW32.") from None
    if not probe.is_trained:
        raise ValueError(f"--coarse-index {factory}: needs training. Choose one that does not, such as Flat or HNSW32.")
    random = np.random.default_rng(0).standard_normal((dim, min(4, dim)))
    known = np.linalg.qr(random).Q.T.astype(np.float32)
    try:
        _, rows = CoarseIndex.build(known, factory).search(known, 1)
    except RuntimeError:
        rows = np.empty((0, 1), dtype=np.int64)
    if rows.ravel().tolist() != list(range(len(known))):
        raise ValueError(f"--coarse-index {factory}: does not find unit vectors again. Choose Flat or HNSW32.")
