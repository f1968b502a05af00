"""Made-up vectors with a stated spectrum, for benchmarks at widths and sizes for which there are no real ones.

Documents lie around cluster centres; both vary along direction i with a variance in proportion to i ** -exponent, so that a
prefix holds more than its share, as in vectors of a Matryoshka model. Queries are documents with noise of the same spectrum.

The defaults make searching about as hard as among real vectors. Of 60,000 x 384, the first 64 dims hold .81 / .93 of the exact
top 10 in their best 100 / 400, the first 128 .98 / 1.00; of MiniLM's vectors of forum posts, rotated, .82 / .94 and .98 / 1.00.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from matryoshka import corpus, nested, storage, vectors
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.corpus import Columns, Corpus
from matryoshka.nested import Float32Array, shrink
from matryoshka.vectors import EmbeddingStore, Float16Array

_BLOCK_ROWS = 4_096
_LEAST_UNITS = 64  # so that any usual number of shards can be cut from few documents
_CENTRES, _DOCUMENTS, _QUERIES = range(3)  # streams of random numbers


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What made-up vectors are like.

    Attributes:
        num_documents: N; the first of them are the same for every N.
        width: D.
        exponent: Of the power law of variances.
        num_clusters: How many centres there are.
        cluster_share: Share of the variance that is between centres.
        noise_share: Share of a query's variance that is not its document's.
        seed: Of everything.
    """

    num_documents: int
    width: int
    exponent: float = 0.7
    num_clusters: int = 1_000
    cluster_share: float = 0.5
    noise_share: float = 0.3
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> "Spectrum":
        """Returns the spectrum for a text such as ``250000:1024``: documents and dims.

        Raises:
            ValueError: The text is something else.
        """
        numbers = text.split(":")
        if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
            raise ValueError(f"--synthetic {text}: is not documents:dims. Write for example 250000:1024.")
        return cls(int(numbers[0]), int(numbers[1]))

    @property
    def variances(self) -> npt.NDArray[np.float64]:
        """Variance along each direction; their sum is 1.

        >>> Spectrum(1, 4, exponent=1.0).variances.round(2).tolist()
        [0.48, 0.24, 0.16, 0.12]
        """
        raw = np.arange(1, self.width + 1, dtype=np.float64) ** -self.exponent
        variances: npt.NDArray[np.float64] = raw / raw.sum()
        return variances


def blocks(spectrum: Spectrum, num_queries: int) -> Iterator[tuple[Float16Array, Float32Array]]:
    """Yields documents and the queries near some of them, block by block; queries are drawn near documents at even distances.

    Shapes: documents [B, D], queries [Q, D], each with a B and a Q of its own, all at unit length.
    """
    scales = np.sqrt(spectrum.variances).astype(np.float32)
    centres = _normal(spectrum, _CENTRES, 0, spectrum.num_clusters) * np.float32(np.sqrt(spectrum.cluster_share))
    asked = np.unique(np.linspace(0, spectrum.num_documents - 1, min(num_queries, spectrum.num_documents)).astype(np.int64))
    for number, start in enumerate(range(0, spectrum.num_documents, _BLOCK_ROWS)):
        labels = np.random.default_rng([spectrum.seed, _DOCUMENTS, number, 1]).integers(spectrum.num_clusters, size=_BLOCK_ROWS)
        raw = _normal(spectrum, _DOCUMENTS, number, _BLOCK_ROWS) * np.float32(np.sqrt(1 - spectrum.cluster_share))
        raw = ((raw + centres[labels]) * scales)[: spectrum.num_documents - start]
        own = asked[(asked >= start) & (asked < start + len(raw))] - start
        noise = _normal(spectrum, _QUERIES, number, len(own)) * scales
        near = np.sqrt(1 - spectrum.noise_share) * raw[own] + np.sqrt(spectrum.noise_share) * noise
        yield shrink(raw, spectrum.width).astype(np.float16), shrink(near, spectrum.width)


def _normal(spectrum: Spectrum, stream: int, number: int, num_rows: int) -> Float32Array:
    generator = np.random.default_rng([spectrum.seed, stream, number])
    return generator.standard_normal((num_rows, spectrum.width), dtype=np.float32)


def make_store(folder: Path, spectrum: Spectrum, num_queries: int) -> tuple[EmbeddingStore, Float32Array]:
    """Writes made-up documents as an embedding store; returns it, and the queries.

    Shapes: queries [Q, D].
    """
    queries: list[Float32Array] = []

    def documents() -> Iterator[Float16Array]:
        for block, near in blocks(spectrum, num_queries):
            queries.append(near)
            yield block

    store = write_store(folder, documents(), spectrum.num_documents, spectrum.width)
    return store, np.concatenate(queries)


def write_store(folder: Path, parts: Iterator[Float16Array], num_documents: int, width: int) -> EmbeddingStore:
    """Writes vectors that no model made as an embedding store, and returns it; ids are numbers.

    Shapes: parts of [B, D] each.
    """
    unit_rows = max(min(-(-num_documents // _LEAST_UNITS), _BLOCK_ROWS), 1)
    receipts: list[Receipt] = []
    done = 0
    for part in parts:
        for first in range(0, len(part), unit_rows):
            block, key = part[first : first + unit_rows], f"unit-{len(receipts):06d}"
            path = folder / "units" / f"{key}.parquet"
            with storage.publish(path) as temporary:
                vectors.write_unit(temporary, [f"{number:09d}" for number in range(done, done + len(block))], block)
            receipts.append(Receipt(key, len(block), (FileRecord.of(folder, path),), {"slot": f"{key}:0"}))
            done += len(block)
    identity = {"model": "none", "precision": "float32"}
    source = Corpus(str(folder), Columns(), (), 0)  # there are no texts
    facts = {"width": width, "dims": list(nested.default_dims(width)), "is_tuned": False, "model": "none"}
    facts["corpus"] = corpus.remember(source)
    Manifest("embeddings", identity, {"corpus": source.fingerprint}, facts, tuple(receipts), is_complete=True).write(folder)
    return EmbeddingStore.open(folder)
