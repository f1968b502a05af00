"""Rows on their way from one task to another: dealt out to partitions on disk, so that no process holds all of them.

A task writes one file for all partitions, with a record batch for each; who reads a partition reads that batch of every
file, and no more of it. A key's partition is a range of hashes: sorted partitions, one after the other, are sorted, whatever
their number.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, get_type_hints

import pyarrow as pa

from matryoshka import corpus, storage
from matryoshka.storage import Place

_ROWS_AT_ONCE = 65_536
_KEY_BITS = 64
_FILES_AT_ONCE = 8  # of a bucket
_SMALL_BYTES = 2**20

R = TypeVar("R", bound=tuple[Any, ...])


def text_id(prefix: str, text: str) -> str:
    """Returns an id that depends on the text alone.

    >>> text_id("q", "what is a prefix?")
    'q-cb6a109818fe6be5'
    """
    return f"{prefix}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def partition_of(key: str, num_partitions: int) -> int:
    """Returns the partition of a key that ``text_id`` made."""
    return int(key[-16:], 16) * num_partitions >> _KEY_BITS


class Dealer(Generic[R]):
    """Deals the rows of one task out to partitions; they are on disk when its block ends.

    Args:
        folder: Of these rows, from all tasks.
        task: Name of the task, another for each; a task that is done again replaces what it wrote.
        kind: A ``NamedTuple`` of whole numbers, texts and lists of texts.
        num_partitions: How many there are.
    """

    def __init__(self, folder: Place, task: str, kind: type[R], num_partitions: int) -> None:
        self._folder, self._task, self._kind = folder, task, kind
        self._rows: list[list[R]] = [[] for _ in range(num_partitions)]
        self._num_rows = self._num_files = 0

    def add(self, partition: int, row: R) -> None:
        """Adds a row to a partition."""
        self._rows[partition].append(row)
        self._num_rows += 1
        if self._num_rows == _ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        write_batches(self._folder / f"{self._task}-{self._num_files:05d}.arrow", self._kind, self._rows)
        self._num_files += 1
        self._rows = [[] for _ in self._rows]
        self._num_rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None and self._num_rows:
            self._flush()


def write_batches(path: Place, kind: type[R], batches: Iterable[Sequence[R]]) -> None:
    """Writes a temporary file of several runs of rows."""
    schema = corpus.schema(get_type_hints(kind))
    with (
        _created(path) as temporary,
        pa.ipc.new_file(temporary, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer,
    ):
        for rows in batches:
            columns = zip(*rows, strict=True) if rows else [()] * len(schema)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


@contextlib.contextmanager
def _created(path: Place) -> Iterator[Path]:
    """Yields where to write a file that nobody needs after this run: on a disk, nobody waits until it is there for good."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{storage.TEMPORARY}{path.name}"
        yield temporary
        temporary.replace(path)
    else:
        with storage.publish(path) as temporary:
            yield temporary


def read_file(path: Place, kind: type[R]) -> Iterator[R]:
    """Yields the rows of a temporary file that holds a single run of them."""
    yield from _rows(_open_batch(path, 0, is_small=True), kind)


def _rows(batch: pa.RecordBatch, kind: type[R]) -> Iterator[R]:
    columns = [column.to_pylist() for column in batch.columns]
    yield from map(kind._make, zip(*columns, strict=True))  # type: ignore[attr-defined]


def _open_batch(path: Place, number: int, *, is_small: bool) -> pa.RecordBatch:
    """Returns one run of rows; what is small comes from a bucket as a whole, by one request instead of four."""
    if isinstance(path, Path):
        file = pa.memory_map(str(path))
    else:
        file = pa.BufferReader(path.read_bytes()) if is_small else pa.PythonFile(storage.source(path))
    with file:
        return pa.ipc.open_file(file).get_batch(number)


def read_whole(folder: Place, partition: int) -> Iterator[pa.RecordBatch]:
    """Yields the rows of one partition as ``read`` does, for those who only hand them on."""
    if isinstance(folder, Path):
        for path in sorted(folder.glob("*.arrow")):
            yield _open_batch(path, partition, is_small=False)
        return
    files = sorted(storage.sizes(folder).items())
    with ThreadPoolExecutor(_FILES_AT_ONCE, "partition") as pool:
        for first in range(0, len(files), _FILES_AT_ONCE):
            some = files[first : first + _FILES_AT_ONCE]
            yield from pool.map(lambda own: _open_batch(folder / own[0], partition, is_small=own[1] <= _SMALL_BYTES), some)


def read(folder: Place, kind: type[R], partition: int) -> Iterator[R]:
    """Yields the rows of one partition, task by task, in the order in which each added them."""
    for batch in read_whole(folder, partition):
        yield from _rows(batch, kind)
