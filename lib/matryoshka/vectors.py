"""The embedding store: one Parquet file per unit with ``id`` and ``embedding`` (fixed-size list of float16).

Any tool reads the files; a lower resolution is a prefix, normalised again (``nested.shrink``).
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from matryoshka import artifacts, shapes, storage
from matryoshka.shapes import ListOf
from matryoshka.storage import Place

Float16Array = npt.NDArray[np.float16]

_END_BYTES = 8
EMBEDDING = "embedding"

_FACTS = {"width": int, "dims": ListOf(int), "is_tuned?": bool, "model?": str}
_DETAILS = {"slot": str}


def write_unit(path: Path, ids: Sequence[str], vectors: Float16Array) -> None:
    """Writes the vectors of one unit.

    Shapes: ids [N], vectors [N, D].
    """
    numbers = pa.field("element", pa.float16(), nullable=False)  # what may be null takes half as long again to read
    embedding = pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(vectors).ravel()), type=pa.list_(numbers, vectors.shape[1])
    )
    table = pa.table({"id": pa.array(ids, pa.large_string()), EMBEDDING: embedding})
    # Random mantissas neither repeat nor compress; reading is three times faster without trying.
    pq.write_table(table, path, use_dictionary=False, compression={"id": "zstd", EMBEDDING: "none"})


def read_unit(file: Path | bytes, path: Place | None = None) -> tuple[pa.Array, Float16Array]:
    """Returns (ids, vectors) of one unit; rows stay in their order.

    Args:
        file: Where it is, or its bytes.
        path: What errors call it, if not that.

    Shapes: ids [N], vectors [N, D].

    Raises:
        ValueError: The file is not a unit of an embedding store.
    """
    try:
        table = pq.read_table(pa.BufferReader(file) if isinstance(file, bytes) else file, memory_map=True)
        embedding = table.column(EMBEDDING).combine_chunks()
        width = embedding.type.list_size
        vectors = embedding.flatten().to_numpy().reshape(-1, width)
        return table.column("id").combine_chunks(), vectors
    except (pa.ArrowException, OSError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path or file!s}: not a file of embeddings ({error}). Run python -m jobs.embed again.") from None


class ArrayWriter:
    """Writes a NumPy file part by part, and digests it on the way; unlike NumPy's ``tofile``, it says why where it cannot write.

    Args:
        path: The file.
        num_rows: Of all parts together.

    Raises:
        OSError: The disk is full, or out of order.
    """

    def __init__(self, path: Path, num_rows: int) -> None:
        self._file, self._num_rows, self._digest = path.open("wb"), num_rows, hashlib.sha256()
        self.num_bytes = 0

    def append(self, part: npt.NDArray[Any]) -> None:
        """Writes the next rows; the first ones say what all are like."""
        if not self.num_bytes:
            head, described = io.BytesIO(), np.lib.format.dtype_to_descr(part.dtype)
            shape = (self._num_rows, *part.shape[1:])
            np.lib.format.write_array_header_1_0(head, {"descr": described, "fortran_order": False, "shape": shape})
            self._write(head.getbuffer())
        self._write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)

    def _write(self, data: memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += data.nbytes

    @property
    def digest(self) -> str:
        """The SHA-256 of what was written, in hex."""
        return self._digest.hexdigest()

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read_ids(path: Place) -> pa.Array:
    """Returns the ids of one unit; no vector is read.

    Raises:
        ValueError: The file is not a unit of an embedding store.
    """
    try:
        return (
            pq.read_table(storage.source(path), columns=["id"], memory_map=True)
            .column("id")
            .combine_chunks()
            .cast(pa.large_string())
        )
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a file of embeddings ({error}). Run python -m jobs.embed again.") from None


def mean_id_bytes(store: "EmbeddingStore") -> float:
    """Returns what an id takes in an index, on average over the first unit that has any: its text, and where it ends."""
    receipts = [receipt for receipt in store.manifest.receipts if receipt.num_rows]
    ids = read_ids(store.folder / receipts[0].files[0].path) if receipts else pa.array([], pa.large_string())
    return float(pc.mean(pc.binary_length(ids)).as_py() or 0) + _END_BYTES


def read_embeddings(paths: Sequence[Place], width: int) -> Float16Array:
    """Returns the vectors of Parquet files that anybody may have written: a list of ``width`` numbers in column ``embedding``.

    Shapes: [N, width].

    Raises:
        ValueError: A file is not readable, or a row has no vector of this width, or one that is not finite.
    """
    parts = [_read_embeddings(path, width) for path in paths]
    return np.concatenate(parts)


def _read_embeddings(path: Place, width: int) -> Float16Array:
    try:
        column = pq.read_table(storage.source(path), columns=["embedding"]).column("embedding").combine_chunks()
        lengths = set(pc.unique(pc.list_value_length(column)).to_pylist())
        numbers = column.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False)
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no vectors in column 'embedding' ({str(error).splitlines()[0]}). Pass another file.") from None
    if lengths - {width}:
        raise ValueError(f"{path}: rows of column 'embedding' do not have {width} numbers each. Use the index's own model.")
    if not np.isfinite(numbers).all():
        row = int(np.flatnonzero(~np.isfinite(numbers))[0]) // width
        raise ValueError(f"{path}: column 'embedding', row {row}: not finite. Check the model that made it.")
    found: Float16Array = numbers.reshape(-1, width).astype(np.float16)
    return found


@dataclass(frozen=True, slots=True)
class EmbeddingStore:
    """A finished embeddings artifact."""

    folder: Place
    manifest: artifacts.Manifest

    @classmethod
    def open(cls, folder: Place) -> "EmbeddingStore":
        """Returns the store in a folder.

        Raises:
            ValueError: There is none, or it is not finished.
        """
        manifest, place = artifacts.read_complete(folder, "embeddings"), f"{folder / artifacts.MANIFEST}"
        shapes.check(manifest.facts, _FACTS, place)
        for receipt in manifest.receipts:
            shapes.check(receipt.details, _DETAILS, f"{place}: unit {receipt.key}")
            if len(receipt.files) != 1:
                raise ValueError(f"{place}: unit {receipt.key} has {len(receipt.files)} files, not one. Embed again.")
        return cls(folder, manifest)

    @property
    def width(self) -> int:
        """D, the dims of a full vector."""
        return int(self.manifest.facts["width"])

    @property
    def dims(self) -> tuple[int, ...]:
        """The resolutions of the model that made the vectors, widest first."""
        return tuple(self.manifest.facts["dims"])

    def blocks(self) -> Iterator[tuple[pa.Array, Float16Array]]:
        """Yields (ids, vectors) unit by unit: memory holds one unit at a time.

        Raises:
            ValueError: A file is missing or not what its receipt says.
        """
        for receipt in self.manifest.receipts:
            yield read_checked(self.folder, receipt.files[0])


def read_checked(folder: Place, file: artifacts.FileRecord) -> tuple[pa.Array, Float16Array]:
    """Returns (ids, vectors) of a file that is exactly what its receipt says; see ``read_unit``.

    Raises:
        ValueError: It is missing or not what its receipt says.
    """
    return read_unit(artifacts.read_file(folder, file), folder / file.path)


def write_ids(path: Path, ids: Sequence[pa.Array]) -> None:
    """Writes ids as an Arrow file that ``open_ids`` can map into memory."""
    column = pa.chunked_array([pa.concat_arrays([chunk.cast(pa.large_string()) for chunk in ids])], pa.large_string())
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("id", pa.large_string())])) as writer:
        writer.write_table(pa.table({"id": column}))


def write_id_table(path: Path, ids: pa.Array) -> None:
    """Writes ids as the column ``id`` of a Parquet file, in their order."""
    pq.write_table(pa.table({"id": ids}), path, compression="zstd")


def open_ids(path: Path) -> pa.Array:
    """Returns ids that stay on disk until they are looked at."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().column("id").combine_chunks()


def take(ids: pa.Array, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.object_]:
    """Returns the ids of some rows."""
    return np.asarray(ids.take(pa.array(rows)).to_pylist(), dtype=object)


def find(ids: pa.Array, wanted: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns (rows, places): where the wanted ids stand, and which of them is at each of these rows.

    >>> [found.tolist() for found in find(pa.array(["a", "b", "c"]), ["c", "x", "a"])]
    [[0, 2], [2, 0]]
    """
    places = pc.index_in(ids, value_set=pa.array(wanted, ids.type))
    rows = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
    return rows, places.drop_null().to_numpy().astype(np.int64)
