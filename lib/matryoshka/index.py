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

    @property
    def dim(self) -> int:
        """Dims of the prefixes."""
        return int(self._index.d)

    def search(self, queries: Float32Array, num_results: int) -> tuple[Float32Array, npt.NDArray[np.int64]]:
        """Returns (scores, rows), best first; row -1 pads lists that came out short.

        Shapes: queries [Q, dim] -> [Q, num_results], [Q, num_results].
        """
        scores, rows = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), num_results)
        return scores, rows


def needs_training(factory: str, dim: int) -> bool:
    """Returns whether an index of this kind must learn from the data first.

    Raises:
        ValueError: FAISS knows no such index.
    """
    try:
        return not faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT).is_trained
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"--coarse-index {factory}: not a FAISS factory string ({reason}). Write for example Flat.") from None
