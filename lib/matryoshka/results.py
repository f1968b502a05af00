"""Results of a search as files: Parquet and the TREC run format, written as they come, a part at a time."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from matryoshka import corpus, storage
from matryoshka.artifacts import FileRecord, Receipt
from matryoshka.corpus import Corpus
from matryoshka.nested import Float32Array
from matryoshka.storage import Place
from matryoshka.topk import IntArray

Rows: TypeAlias = pa.RecordBatch

PARQUET, TREC = "results.parquet", "results.trec"

_TREC_TAG = "matryoshka"
_ROWS_AT_ONCE = 1 << 20


def to_rows(
    query_ids: pa.Array,
    scores: Float32Array,
    documents: IntArray,
    ids_of: Callable[[IntArray], pa.Array],
    coverage: float | None = None,
) -> Rows:
    """Returns one row per result: ``query_id``, ``rank``, ``document_id``, ``score``, and ``coverage`` if it is given.

    Shapes: query_ids [Q], scores [Q, K], documents [Q, K]; document -1 is no result.

    >>> scores, documents = np.array([[0.5, 0.25]], np.float32), np.array([[1, -1]])
    >>> to_rows(pa.array(["q"]), scores, documents, pa.array(["a", "b"]).take).to_pylist()
    [{'query_id': 'q', 'rank': 1, 'document_id': 'b', 'score': 0.5}]
    """
    is_found = documents >= 0
    queries, places = np.nonzero(is_found)
    columns = {
        "query_id": query_ids.take(pa.array(queries)),
        "rank": pa.array(places + 1),
        "document_id": ids_of(documents[is_found]),
        "score": pa.array(scores[is_found]),
    }
    if coverage is not None:
        columns["coverage"] = pa.array(np.full(len(queries), coverage))
    return pa.record_batch(columns)


def write_results(folder: Place, rows: Iterator[Rows]) -> Receipt:
    """Writes both files; they are there, whole, once all rows have come. Returns their receipt."""
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(storage.publish(folder / name)) for name in (PARQUET, TREC)}
        num_rows = _write(files[PARQUET], files[TREC], rows)
        return Receipt("results", num_rows, tuple(FileRecord.named(name, file) for name, file in files.items()))


def _write(parquet: Path, trec: Path, rows: Iterator[Rows]) -> int:
    """Writes rows to both files, and returns how many there were."""
    num_rows = 0
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(trec.open("wb"))
        writer: pq.ParquetWriter | None = None
        for batch in rows:
            writer = writer or stack.enter_context(pq.ParquetWriter(parquet, batch.schema, compression="zstd"))
            writer.write_batch(batch)
            lines.write(trec_lines(batch))
            num_rows += batch.num_rows
    return num_rows


def trec_lines(rows: Rows) -> bytes:
    """Returns rows as lines of a TREC run."""
    columns = [pc.cast(rows.column(name), pa.large_string()) for name in ("query_id", "document_id", "rank", "score")]
    query, document, rank, score = columns
    constant, tag, blank = (pa.scalar(text, pa.large_string()) for text in ("Q0", f"{_TREC_TAG}\n", " "))
    lines = pc.binary_join_element_wise(query, constant, document, rank, score, tag, blank)
    num_bytes = pc.sum(pc.binary_length(lines)).as_py() or 0
    return bytes(lines.buffers()[2][:num_bytes]) if num_bytes else b""  # a column of texts is one text after the other


def with_texts(rows: Iterator[Rows], source: Corpus, work: Path) -> Iterator[Rows]:
    """Yields the rows with the text of each document; all of them are kept on disk until the corpus was read once.

    Args:
        rows: As from ``to_rows``.
        source: The corpus; documents that it no longer has get no text.
        work: A folder for what is kept meanwhile.
    """
    spooled, found = work / "rows.arrow", work / "texts.arrow"
    ids = _spool(spooled, rows)
    text_schema = pa.schema([("id", pa.large_string()), ("text", pa.large_string())])
    with pa.OSFile(str(found), "wb") as sink, pa.ipc.new_file(sink, text_schema) as writer:
        for batch in corpus.find_rows(source, ids):
            writer.write_batch(batch)
    known, table = (pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in (found, spooled))
    for start in range(0, max(table.num_rows, 1), _ROWS_AT_ONCE):
        part = table.slice(start, _ROWS_AT_ONCE)
        places = pc.index_in(part.column("document_id"), known.column("id"))
        part = part.append_column("text", known.column("text").take(places))
        yield pa.record_batch([column.combine_chunks() for column in part.columns], names=part.column_names)


def _spool(path: Path, rows: Iterator[Rows]) -> pa.Array:
    """Writes rows to an Arrow file, and returns the ids of their documents, each once."""
    ids, pending, num_pending = pa.array([], pa.large_string()), [], 0
    with contextlib.ExitStack() as stack:
        writer: pa.RecordBatchFileWriter | None = None
        for batch in rows:
            writer = writer or stack.enter_context(pa.ipc.new_file(stack.enter_context(pa.OSFile(str(path), "wb")), batch.schema))
            writer.write_batch(batch)
            pending.append(pc.unique(batch.column("document_id")))
            num_pending += len(pending[-1])
            if num_pending > max(len(ids), _ROWS_AT_ONCE):  # so that no more than twice what there is waits
                ids, pending, num_pending = pc.unique(pa.chunked_array([ids, *pending])), [], 0
    return pc.unique(pa.chunked_array([ids, *pending]))
