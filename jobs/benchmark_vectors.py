"""What the benchmark of searching searches, and with what: an index's vectors, made up or not, its queries and judgements."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from jobs.terminal import say
from matryoshka import storage
from matryoshka.nested import Float32Array, shrink
from matryoshka.storage import Place

if TYPE_CHECKING:
    from jobs.benchmark import Settings
    from matryoshka.indexing import IndexStore
    from matryoshka.metrics import Qrels
    from matryoshka.synthetic import Spectrum
    from matryoshka.vectors import EmbeddingStore

MADE_QUERIES = 2_048

_RESULTS = 10
_BLOCK_ROWS = 4_096


@dataclass(frozen=True, slots=True)
class Vectors:
    """What every system searches, and with what.

    Attributes:
        documents: The full vectors of the index's shards, in their order.
        ids: Of the documents; empty where nothing is judged.
        queries: At unit length.
        query_ids: Of the queries.
        qrels: Judgements of these queries; empty where there are none.
        spectrum: Of vectors that were made up.

    Shapes: documents [N, D], queries [Q, D].
    """

    documents: Float32Array
    ids: npt.NDArray[np.object_]
    queries: Float32Array
    query_ids: list[str]
    qrels: "Qrels"
    spectrum: "Spectrum | None" = None

    @property
    def num_results(self) -> int:
        """K: how many documents are asked for."""
        return min(_RESULTS, len(self.documents))


def prepare(settings: "Settings", scratch: Path) -> "tuple[IndexStore, Vectors]":
    """Returns the index that the settings name, or one of made-up vectors, and what is searched.

    Raises:
        ValueError: The index, the queries or the judgements cannot be used.
    """
    from matryoshka.synthetic import Spectrum

    if settings.synthetic:
        return _make(settings, Spectrum.parse(settings.synthetic), scratch)
    return _open(settings, storage.place(settings.index or ""))


def _make(settings: "Settings", spectrum: "Spectrum", scratch: Path) -> "tuple[IndexStore, Vectors]":
    """Returns an index of made-up vectors, which the index job built, and what is searched."""
    from matryoshka import synthetic

    say(f"benchmark: making {spectrum.num_documents:,} vectors of {spectrum.width} dims")
    store, queries = synthetic.make_store(scratch / "embeddings", spectrum, MADE_QUERIES)
    index = build_index(settings, store, scratch / "index", settings.shards[0])
    names = [f"q{number}" for number in range(len(queries))]
    return index, Vectors(documents_of(index), np.empty(0, dtype=object), queries, names, {}, spectrum)


def build_index(settings: "Settings", store: "EmbeddingStore", folder: Path, num_shards: int) -> "IndexStore":
    """Returns an index that the index job builds: what was asked for, and else what that job chooses."""
    from jobs import index as index_job
    from matryoshka.indexing import IndexStore

    own = {name: getattr(settings, name) for name in ("space", "plan", "coarse_index")}
    folders = {"embeddings": str(store.folder), "output": str(folder)}
    index_job.run(index_job.Settings(**folders, **own, shards=num_shards, device="cpu"))
    return IndexStore.open(folder)


def _open(settings: "Settings", folder: Place) -> "tuple[IndexStore, Vectors]":
    """Returns the index of a folder, and what is searched."""
    from matryoshka.indexing import IndexStore

    index = IndexStore.open(folder)
    if not index.manifest.num_rows:
        raise ValueError(f"{index.folder}: has no documents. Index some first.")
    if any(shard.removed for shard in index.shards):
        raise ValueError(f"{index.folder}: documents were removed since its shards were built. Measure one built without them.")
    query_ids, queries = _read_queries(settings, index)
    qrels = _read_judgements(settings, set(query_ids))
    ids = np.array([name for part in index.open_ids() for name in part.to_pylist()] if qrels else [], dtype=object)
    if qrels and not {name for own in qrels.values() for name in own}.intersection(ids.tolist()):
        raise ValueError(f"{index.folder}: has none of the judged documents. Index the corpus that was judged.")
    return index, Vectors(documents_of(index), ids, queries, query_ids, qrels)


def documents_of(index: "IndexStore") -> Float32Array:
    """Returns the full vectors of all shards, in their order, at unit length.

    Shapes: [N, D].
    """
    from matryoshka.funnel import VECTORS

    documents = np.empty((index.manifest.num_rows, index.width), np.float32)
    done = 0
    for shard in index.shards:
        stored = np.load(shard.path(VECTORS), mmap_mode="r", allow_pickle=False)
        for start in range(0, len(stored), _BLOCK_ROWS):
            block = shrink(stored[start : start + _BLOCK_ROWS], index.width)
            documents[done : done + len(block)] = block
            done += len(block)
    return documents


def _read_queries(settings: "Settings", index: "IndexStore") -> tuple[list[str], Float32Array]:
    """Returns ids and vectors of the queries.

    Raises:
        ValueError: There are none, they cannot be read, or their vectors are not of the index's width.
    """
    from matryoshka import corpus, vectors

    if settings.beir:
        query_ids, texts = _read_beir_queries(storage.place(settings.beir), settings.split)
        return query_ids, _encode(settings, index, texts)
    _, paths = corpus.find_files(settings.queries or "")
    if not corpus.has_column(paths[0], "embedding"):
        source = corpus.inspect(settings.queries or "", corpus.Columns(settings.id_column, settings.text_column))
        query_ids, texts = corpus.read_texts(source)
        return query_ids, _encode(settings, index, texts)
    found = vectors.read_embeddings(paths, index.width)
    if not len(found):
        raise ValueError(f"{settings.queries}: no queries. Pass a file that has some.")
    batches = (batch for path in paths for batch in corpus.text_batches(path, (settings.id_column,), (settings.id_column,)))
    return [name for batch in batches for name in batch.column(0).to_pylist()], shrink(found, index.width)


def _read_beir_queries(folder: Place, split: str) -> tuple[list[str], list[str]]:
    """Returns ids and texts of the queries that a split judges."""
    from matryoshka import beir, corpus

    judged = {query for _, query, _, _ in corpus.read_qrels(_qrels_of(folder, split))}
    rows = [row for _, row in corpus.read_json_lines(folder / beir.QUERIES, ("_id", "text")) if row["_id"] in judged]
    if not rows:
        raise ValueError(f"{folder}: {beir.QUERIES} has none of the queries that split '{split}' judges. Mend one of them.")
    return [row["_id"] for row in rows], [row["text"] for row in rows]


def _qrels_of(folder: Place, split: str) -> Place:
    from matryoshka import beir

    return folder / beir.QRELS / f"{split}.tsv"


def _encode(settings: "Settings", index: "IndexStore", texts: list[str]) -> Float32Array:
    """Returns the vectors of queries by the index's own model."""
    from matryoshka import model
    from matryoshka.encode import Encoder

    moved_to = settings.model if "model" in settings.model_fields_set else None
    info = model.describe_maker(index.folder, index.manifest, moved_to)
    model.quieten()
    encoder = Encoder(info.folder, "cpu", index.manifest.facts["precision"])
    return shrink(encoder.encode(texts, "query").vectors, index.width)


def _read_judgements(settings: "Settings", query_ids: set[str]) -> "Qrels":
    """Returns the judgements of the queries.

    Raises:
        ValueError: None of the queries is judged.
    """
    from matryoshka import corpus, metrics

    path = _qrels_of(storage.place(settings.beir), settings.split) if settings.beir else None
    path = storage.place(settings.qrels) if settings.qrels else path
    if path is None:
        return {}
    own = [(query, document, grade) for _, query, document, grade in corpus.read_qrels(path) if query in query_ids]
    if not own:
        raise ValueError(f"{path}: judges none of the queries. Pass the judgements of these queries.")
    return metrics.group_qrels(own)
