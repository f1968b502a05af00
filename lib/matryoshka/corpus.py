"""Text in: Parquet files with named columns, and BEIR folders. The only room that knows pyarrow's tables.

Everything that can be wrong with an input is found here, by ``inspect``, before a worker is taken.
"""

import collections
import contextlib
import functools
import glob
import itertools
import json
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from matryoshka import shapes, storage
from matryoshka.shapes import ListOf
from matryoshka.storage import Place
from matryoshka.units import InputFile, Unit

_BATCH_ROWS = 16_384
_SHOWN = 3
_MOST_HASHES = 2**25  # at once: 256 MiB
_LOOKED_AT = 1_000
_COMPARED_AT_ONCE = 16  # batches
_FORMATS = {".parquet": "Parquet", ".csv": "CSV", ".jsonl": "JSONL"}
_TYPES = {int: pa.int64(), str: pa.large_string(), list[str]: pa.list_(pa.large_string())}


Stamps = tuple[tuple[str, int, int | str], ...]
Lists = Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of the columns of a corpus."""

    id: str = "id"
    text: str = "text"


@dataclass(frozen=True, slots=True)
class Corpus:
    """A checked corpus: where it is, its files, how many of its rows have no text, and ``stamps`` from before it was read."""

    root: str
    columns: Columns
    files: tuple[InputFile, ...]
    num_empty: int
    stamps: Stamps = ()

    @property
    def num_rows(self) -> int:
        """Rows of all files, those without text included."""
        return sum(file.num_rows for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Identity of the content: names and digests of the files, and which columns are read."""
        return fingerprint([(file.name, file.digest) for file in self.files], self.columns)

    def path_of(self, name: str) -> Place:
        """Returns where a file of the corpus is."""
        return storage.place(self.root) / name

    def stamp_of(self, name: str) -> str | None:
        """Returns the ETag that a file in a bucket had when it was checked; None on disk."""
        if isinstance(storage.place(self.root), Path):
            return None
        return next((str(stamp) for own, _, stamp in self.stamps if own == name), None)

    def read(self, unit: Unit) -> tuple[list[str], list[str]]:
        """Returns (ids, texts) of the rows of one unit that have text; see ``read_unit``."""
        return read_unit(self.path_of(unit.name), self.columns, unit, self.stamp_of(unit.name))


def fingerprint(files: Sequence[tuple[str, str]], columns: Columns) -> str:
    """Returns the identity of a corpus, given names and digests of its files."""
    return storage.digest_json([[list(file) for file in files], columns.id, columns.text])


def find_files(location: str, suffixes: Sequence[str] = (".parquet",)) -> tuple[Place, list[Place]]:
    """Returns the root and the files of a folder with one of the suffixes, a glob pattern, or one file, in a stable order.

    Raises:
        ValueError: Nothing is there.
    """
    path = storage.place(location)
    files: list[Place]
    if path.is_dir():
        names = sorted(map(PurePosixPath, storage.names(path)))
        files = [path / str(name) for name in names if name.suffix in suffixes and not _is_hidden(name)]
        root = path
    elif path.is_file():
        files, root = [path], path.parent
    else:
        root, files = _find_like(path)
    if not files:
        kinds, patterns = _in_words([_FORMATS[suffix] for suffix in suffixes]), _in_words([f"*{suffix}" for suffix in suffixes])
        raise ValueError(f"{location}: no {kinds} files here. Pass a folder with {patterns} files, a file, or a glob pattern.")
    return root.absolute(), [file.absolute() for file in files]


def _in_words(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _is_hidden(path: PurePosixPath) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _find_like(pattern: Place) -> tuple[Place, list[Place]]:
    """Returns the part of a glob pattern that is fixed, and the files that are like the pattern."""
    parts = pattern.parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    if isinstance(pattern, Path):
        root = Path(*parts[:fixed]) if fixed else Path()
        names = glob.glob(str(pattern), recursive=True)  # noqa: PTH207 - absolute patterns
        return root, sorted(Path(name) for name in names if Path(name).is_file())
    folder = pattern.parents[len(parts) - fixed - 1]
    there = set(storage.names(folder))
    like = (path.relative_to(folder).as_posix() for path in folder.glob("/".join(parts[fixed:])))
    return folder, [folder / str(name) for name in sorted(PurePosixPath(name) for name in like if name in there)]


def open_parquet(path: Place) -> pq.ParquetFile:
    """Returns an opened Parquet file.

    Raises:
        ValueError: It is missing, truncated or not Parquet.
    """
    try:
        file = pq.ParquetFile(storage.source(path), memory_map=True)
        file.schema_arrow.names  # noqa: B018 - they may not be UTF-8
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable Parquet file ({reason}). Write it again, or take it out.") from None
    return file


def has_column(path: Place, column: str) -> bool:
    """Returns whether a Parquet file has a column.

    Raises:
        ValueError: As ``open_parquet``.
    """
    return column in open_parquet(path).schema_arrow.names


def text_batches(
    path: Place,
    columns: Sequence[str],
    id_columns: Collection[str],
    start: int = 0,
    stop: int | None = None,
    list_columns: Collection[str] = (),
) -> Iterator[pa.RecordBatch]:
    """Yields rows ``start`` to ``stop`` as text; row groups that lie outside are not read.

    Args:
        path: The file.
        columns: Which columns, in this order.
        id_columns: Those of them that may also hold whole numbers.
        start: First row.
        stop: Row after the last one; None: the file's end.
        list_columns: Those of the columns that may also hold lists of texts.

    Raises:
        ValueError: The file is not readable, a column is missing or not text, or a value is not UTF-8.
    """
    file = open_parquet(path)
    check_columns(path, file.schema_arrow, columns, id_columns, list_columns)
    for row, batch in _rows(path, file, columns, start, stop):
        arrays = [_as_text(path, column, batch.column(column), row) for column in columns]
        yield pa.record_batch(arrays, names=list(columns))


def _rows(
    path: Place, file: pq.ParquetFile, columns: Sequence[str], start: int, stop: int | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields (number of the first row, rows) of rows ``start`` to ``stop``; row groups that lie outside are not read."""
    groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    edges = list(itertools.accumulate(groups, initial=0))
    stop = edges[-1] if stop is None else stop
    wanted = [number for number in range(len(groups)) if edges[number] < stop and edges[number + 1] > start]
    row = edges[wanted[0]] if wanted else 0
    try:
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=wanted, columns=list(dict.fromkeys(columns))):
            first, last = max(start - row, 0), min(stop - row, batch.num_rows)
            if first < last:
                yield row + first, batch.slice(first, last - first)
            row += batch.num_rows
            if row >= stop:
                break
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged after row {row} ({str(error).splitlines()[0]}). Write it again.") from None


def check_columns(
    path: Place,
    schema: pa.Schema,
    columns: Sequence[str],
    id_columns: Collection[str],
    list_columns: Collection[str] = (),
) -> None:
    """Checks that columns are there and hold texts; see ``text_batches``.

    Raises:
        ValueError: One does not, or is there more than once.
    """
    check_names(path, schema.names, columns)
    for column in columns:
        kind = schema.field(column).type
        if column in list_columns and hasattr(kind, "value_field"):
            kind = kind.value_type
        value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        readable = pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind) or pa.types.is_string_view(value_kind)
        if not (readable or (pa.types.is_integer(value_kind) and column in id_columns)):
            kind = schema.field(column).type
            raise ValueError(f"{path}: column '{column}' is {kind}, not text. Convert it to string, or name another column.")


def check_names(path: Place, names: Sequence[str], columns: Iterable[str]) -> None:
    """Checks that a file with columns of these names has the wanted ones, each once.

    Raises:
        ValueError: It does not.
    """
    flags = {name: f"--{name}-column" for name in ("id", "text", "query", "positive", "title", "body", "label")}
    flags["embedding"] = "--vector-column"
    for column in columns:
        if names.count(column) > 1:
            raise ValueError(f"{path}: column '{column}' is there more than once. Rename or drop all but one of them.")
        if column not in names:
            found = ", ".join(f"'{name}'" for name in names) or "none"
            flag = flags.get(column, "the option that names this column")
            raise ValueError(f"{path}: no column '{column}' (found: {found}). Pass {flag} with the right name.")


def _as_text(path: Place, column: str, values: pa.Array, first_row: int) -> pa.Array:
    text = pc.cast(values, _TYPES[list[str]] if hasattr(values.type, "value_field") else _TYPES[str])
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        row = next(i for i in range(len(text)) if not _is_utf8(text.slice(i, 1)))
        raise ValueError(
            f"{path}: column '{column}', row {first_row + row}: not UTF-8. Convert the file to UTF-8 and run again."
        ) from None
    return text


def _is_utf8(value: pa.Array) -> bool:
    try:
        value.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def has_text(texts: pa.Array) -> pa.Array:
    """Returns a mask of the rows whose text is neither null nor blank."""
    return pc.fill_null(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(texts)), 0), False)


def inspect(location: str, columns: Columns, known: Mapping[str, Any] | None = None) -> Corpus:
    """Returns a corpus whose every row was checked: columns, types, UTF-8, ids there and each once.

    Args:
        location: A folder, a glob pattern, or a file.
        columns: Which columns hold ids and texts.
        known: What ``remember`` gave after an earlier check. If nothing has changed since, no file is read again.

    Raises:
        ValueError: Anything is wrong with the input; the file, and the row or id, are named.
    """
    root, paths = find_files(location)
    stamps = stamp(root, paths)
    if known:
        before = recall(known)
        if (before.root, before.columns, before.stamps) == (str(root), columns, stamps):
            return before
    with ThreadPoolExecutor() as pool:
        digests = dict(zip(paths, pool.map(storage.digest_file, paths), strict=True))
        _refuse_copies(digests)
        checked = list(pool.map(lambda path: _inspect_file(path, columns), paths))
        _refuse_duplicates(paths, columns, sum(num_rows for num_rows, _ in checked), pool)
    files = tuple(
        InputFile(_name_in(root, path), digests[path], num_rows) for path, (num_rows, _) in zip(paths, checked, strict=True)
    )
    corpus = Corpus(str(root), columns, files, sum(num_empty for _, num_empty in checked), stamps)
    if corpus.num_rows == corpus.num_empty:
        raise ValueError(f"{location}: no row with text (rows: {corpus.num_rows}). Check --text-column.")
    return corpus


def survey(location: str, columns: Columns) -> Corpus:
    """Returns a corpus by what its files say of themselves: names, columns, types and numbers of rows; no row is read.

    It has no digests, and nobody has counted its rows without text: enough to plan with, not to embed.

    Raises:
        ValueError: A file is not readable, or lacks a column.
    """
    root, paths = find_files(location)
    with ThreadPoolExecutor() as pool:
        counts = list(pool.map(lambda path: _survey_file(path, columns), paths))
    files = tuple(InputFile(_name_in(root, path), "", count) for path, count in zip(paths, counts, strict=True))
    if not sum(counts):
        raise ValueError(f"{location}: no row with text (rows: 0). Pass files with documents.")
    return Corpus(str(root), columns, files, 0, stamp(root, paths))


def _survey_file(path: Place, columns: Columns) -> int:
    file = open_parquet(path)
    check_columns(path, file.schema_arrow, [columns.id, columns.text], [columns.id])
    return int(file.metadata.num_rows)


def stamp(root: Place, paths: Iterable[Place]) -> Stamps:
    """Returns names, sizes and times (or ETags) of files: where all are as before, the content is taken to be as well.

    Raises:
        FileNotFoundError: One is not there.
    """
    names = [_name_in(root, path) for path in paths]
    found = storage.stamps(root, names)
    if None in found:
        raise FileNotFoundError(f"{root / names[found.index(None)]}: is gone. Run the same command again.")
    return tuple((name, *own) for name, own in zip(names, found, strict=True) if own)


def _name_in(root: Place, path: Place) -> str:
    return PurePosixPath(str(path)).relative_to(str(root)).as_posix()


def is_unchanged(corpus: Corpus) -> bool:
    """Returns whether every file of a corpus is there as it was when it was checked."""
    found = storage.stamps(storage.place(corpus.root), [file.name for file in corpus.files])
    return [(name, *own) if own else None for (name, *_), own in zip(corpus.stamps, found, strict=True)] == list(corpus.stamps)


def remember(corpus: Corpus) -> dict[str, Any]:
    """Returns, as JSON, what ``recall`` reads, and what lets ``inspect`` skip a corpus that has not changed since."""
    return {
        "root": corpus.root,
        "id_column": corpus.columns.id,
        "text_column": corpus.columns.text,
        "stamps": corpus.stamps,
        "files": [{"name": file.name, "digest": file.digest, "num_rows": file.num_rows} for file in corpus.files],
        "num_empty": corpus.num_empty,
    }


_REMEMBERED = {
    "root": str,
    "id_column": str,
    "text_column": str,
    "stamps": ListOf((str, int, int | str)),
    "files": ListOf({"name": str, "digest": str, "num_rows": int}),
    "num_empty": int,
}


def recall(known: Any) -> Corpus:
    """Returns the corpus that ``remember`` described.

    Raises:
        ValueError: It described none, or a file of it leads out of the corpus.
    """
    shapes.check(known, _REMEMBERED, "manifest: the corpus")
    outside = next((file["name"] for file in known["files"] if shapes.leads_out(file["name"])), None)
    if outside is not None:
        raise ValueError(f"manifest: the corpus: {outside!r:.80} leads out of it. Restore the file, or make it anew.")
    files = tuple(InputFile(**file) for file in known["files"])
    stamps = tuple((name, size, mtime) for name, size, mtime in known["stamps"])
    return Corpus(known["root"], Columns(known["id_column"], known["text_column"]), files, known["num_empty"], stamps)


def _inspect_file(path: Place, columns: Columns) -> tuple[int, int]:
    """Returns how many rows a file has, and how many of them have no text."""
    num_empty = row = 0
    for batch in text_batches(path, [columns.id, columns.text], [columns.id]):
        batch_ids = batch.column(0)
        missing = pc.fill_null(pc.equal(batch_ids, ""), True)
        if pc.any(missing).as_py():
            first = row + pc.index(missing, True).as_py()
            raise ValueError(f"{path}: column '{columns.id}', row {first}: no id. Give every document an id.")
        num_empty += batch.num_rows - pc.sum(has_text(batch.column(1))).as_py()
        row += batch.num_rows
    return row, num_empty


def _refuse_copies(digests: Mapping[Place, str]) -> None:
    by_digest: dict[str, Place] = {}
    for path, digest in digests.items():
        first = by_digest.setdefault(digest, path)
        if first is not path and open_parquet(path).metadata.num_rows:
            raise ValueError(f"{path}: is a copy of {first}, so every id stands twice. Take one of them out.")


def _refuse_duplicates(paths: Sequence[Place], columns: Columns, num_rows: int, pool: ThreadPoolExecutor) -> None:
    """Checks that no id stands twice, in memory that is bounded whatever the size of the corpus.

    Hashes of ids are compared, a share of all hashes at a time; ids of equal hash are then looked at themselves.
    """
    num_shares = -(-num_rows // _MOST_HASHES)
    for share in range(num_shares):
        parts = pool.map(lambda path: _hash_ids(path, columns, share, num_shares), paths)  # noqa: B023 - used at once
        hashes = np.concatenate(list(parts))
        hashes.sort()
        repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        for start in range(0, len(repeated), _LOOKED_AT):
            _refuse_repeated(paths, columns, set(repeated[start : start + _LOOKED_AT].tolist()), len(repeated))


def _hash_ids(path: Place, columns: Columns, share: int, num_shares: int) -> npt.NDArray[np.int64]:
    """Returns the hashes of a file's ids that fall into one share of all hashes."""
    batches = text_batches(path, [columns.id], [columns.id])
    parts = [np.empty(0, np.int64)]
    for batch in batches:
        hashes = np.fromiter(map(hash, batch.column(0).to_pylist()), np.int64, batch.num_rows)
        parts.append(hashes if num_shares == 1 else hashes[hashes % num_shares == share])
    return np.concatenate(parts)


def _refuse_repeated(paths: Sequence[Place], columns: Columns, hashes: Collection[int], num_repeated: int) -> None:
    """Checks whether ids of equal hash are equal."""
    counts: collections.Counter[str] = collections.Counter()
    places: dict[str, list[str]] = {}
    for path in paths:
        for batch in text_batches(path, [columns.id], [columns.id]):
            found = [name for name in batch.column(0).to_pylist() if hash(name) in hashes]
            counts.update(found)
            for name in found:
                places.setdefault(name, []).append(str(path))
    names = [name for name, count in counts.items() if count > 1]
    if names:
        where = dict.fromkeys(place for name in names for place in places[name])
        raise ValueError(
            f"{', '.join(list(where)[:_SHOWN])}: {num_repeated} ids stand more than once"
            f" (first: {', '.join(map(repr, names[:_SHOWN]))}). Give each document its own id."
        )


def read_unit(path: Place, columns: Columns, unit: Unit, stamp: str | None = None) -> tuple[list[str], list[str]]:
    """Returns (ids, texts) of the rows of one unit that have text, in the order of the file; see ``is_as_planned``.

    Raises:
        ChangedError: The file is not the one that was planned with.
        ValueError: It is not readable.
    """
    with _as_planned(path, unit, stamp):
        return read_documents(path, columns, unit.start, unit.stop)


def read_documents(path: Place, columns: Columns, start: int, stop: int) -> tuple[list[str], list[str]]:
    """Returns (ids, texts) of the rows from ``start`` to ``stop`` that have text, in the order of the file.

    Raises:
        ValueError: The file is not readable, or lacks a column.
    """
    batches = text_batches(path, [columns.id, columns.text], [columns.id], start, stop)
    parts = [batch.filter(has_text(batch.column(1))) for batch in batches]
    table = pa.Table.from_batches(parts) if parts else pa.table({columns.id: [], columns.text: []})
    return table.column(0).to_pylist(), table.column(1).to_pylist()


def read_columns(path: Place, unit: Unit, names: Sequence[str], stamp: str | None = None) -> pa.Table:
    """Returns columns of all rows of one unit, as they are stored; see ``is_as_planned``.

    Raises:
        ChangedError: The file is not the one that was planned with.
        ValueError: It is not readable, or lacks a column.
    """
    with _as_planned(path, unit, stamp):
        file = open_parquet(path)
        check_names(path, file.schema_arrow.names, names)
        parts = [batch for _, batch in _rows(path, file, names, unit.start, unit.stop)]
        schema = pa.schema([file.schema_arrow.field(name) for name in dict.fromkeys(names)])
        return pa.Table.from_batches([batch.select(schema.names) for batch in parts], schema)


@contextlib.contextmanager
def _as_planned(path: Place, unit: Unit, stamp: str | None) -> Iterator[None]:
    """Has a file that is not the one that was planned with, before it is read or once reading it fails, named as such.

    Raises:
        ChangedError: It is not.
    """
    changed = storage.ChangedError(f"{path}: changed since this run began. Run the same command again.")
    if not is_as_planned(path, unit, stamp):
        raise changed
    try:
        yield
    except ValueError as error:
        raise (error if is_as_planned(path, unit, stamp) else changed) from None


def is_as_planned(path: Place, unit: Unit, stamp: str | None = None) -> bool:
    """Returns whether a file is there and the one that a unit was planned with.

    Args:
        path: Of the file.
        unit: Some of its rows.
        stamp: ``Corpus.stamp_of`` the file: by its ETag, an object in a bucket is known without being read.
    """
    (found,) = storage.stamps(path.parent, [path.name])
    if found is None or (isinstance(path, Path) and not path.is_file()):
        return False
    return found[1] == stamp if stamp else _digest_once(path, *found) == unit.digest


def _digest_once(path: Place, size: int, mark: int | str) -> str:
    """Returns a file's digest; a worker that does many units of a file reads it all for the first one only."""
    with _digesting:  # threads at units of one file wait for the first of them
        return _digest(path, size, mark)


_digesting = threading.Lock()


@functools.lru_cache(maxsize=1024)
def _digest(path: Place, _size: int, _mark: int | str) -> str:
    return storage.digest_file(path)


def read_texts(source: Corpus) -> tuple[list[str], list[str]]:
    """Returns (ids, texts) of all rows that have text: for small inputs, such as queries."""
    parts = [source.read(Unit(file.name, file.digest, 0, file.num_rows)) for file in source.files]
    return [name for names, _ in parts for name in names], [text for _, texts in parts for text in texts]


def find_texts(corpus: Corpus, ids: Iterable[str]) -> dict[str, str]:
    """Returns the texts of the documents with these ids; ids that are no longer in the corpus are left out."""
    return find_texts_in([corpus.path_of(file.name) for file in corpus.files], ids, corpus.columns)


def find_texts_in(paths: Iterable[Place], ids: Iterable[str], columns: Columns) -> dict[str, str]:
    """Returns the texts of the documents of some files that have these ids."""
    wanted = pa.array(sorted(set(ids)), pa.large_string())
    found: dict[str, str] = {}
    for path in paths:
        if len(found) == len(wanted):
            break
        for batch in text_batches(path, [columns.id, columns.text], [columns.id]):
            hits = batch.filter(pc.is_in(batch.column(0), wanted))
            found.update(zip(hits.column(0).to_pylist(), hits.column(1).to_pylist(), strict=True))
    return found


def find_rows(source: Corpus, ids: pa.Array) -> Iterator[pa.RecordBatch]:
    """Yields ids and texts of the documents with these ids, in the order of the corpus."""
    for file in source.files:
        batches = text_batches(source.path_of(file.name), [source.columns.id, source.columns.text], [source.columns.id])
        while group := list(itertools.islice(batches, _COMPARED_AT_ONCE)):  # each time, all ids are made ready to be looked up
            table = pa.Table.from_batches(group).rename_columns(["id", "text"])
            yield from table.filter(pc.is_in(table.column("id"), ids)).to_batches()


def read_ids(paths: Iterable[Place], column: str = "id") -> Iterator[str]:
    """Yields the ids of the documents of some files; no text is read.

    Raises:
        ValueError: A file has no such column, or a row no id.
    """
    for path in paths:
        row = 0
        for batch in text_batches(path, [column], [column]):
            ids = batch.column(0)
            if ids.null_count:
                row += pc.index(pc.is_null(ids), True).as_py()
                raise ValueError(f"{path}: column '{column}', row {row}: no id. Give every row one.")
            yield from ids.to_pylist()
            row += len(ids)


def write_rows(path: Path, rows: Mapping[str, Sequence[Any]]) -> None:
    """Writes columns as one Parquet file, with zstd."""
    pq.write_table(pa.table(dict(rows)), path, compression="zstd")


def read_rows(path: Place, num_rows: int, columns: Sequence[str] | None = None) -> Iterator[dict[str, list[Any]]]:
    """Yields the columns of a Parquet file, at most ``num_rows`` rows at a time.

    Raises:
        ValueError: The file is missing or damaged.
    """
    for batch in _batches(path, num_rows, columns):
        yield batch.to_pydict()


def _batches(path: Place, num_rows: int, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    file = open_parquet(path)
    try:
        yield from file.iter_batches(num_rows, columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged ({str(error).splitlines()[0]}). Write it again.") from None


def count_rows(path: Place) -> int:
    """Returns how many rows a Parquet file has.

    Raises:
        ValueError: The file is missing or damaged.
    """
    return int(open_parquet(path).metadata.num_rows)


def extend_rows(
    source: Place, target: Path, num_rows: int, names: Sequence[str], extend: Callable[[dict[str, list[Any]]], Sequence[Lists]]
) -> None:
    """Copies a Parquet file, at most ``num_rows`` rows at a time, and gives it columns that hold lists of texts.

    Args:
        source: The file.
        target: Where to; columns that the file has under one of the names are left behind.
        num_rows: Rows in memory at a time, and in a row group.
        names: The new columns.
        extend: Returns the values of the new columns, given those of all columns of the file.
    """
    kept = [field for field in open_parquet(source).schema_arrow if field.name not in names]
    schema = pa.schema([*kept, *(pa.field(name, pa.list_(pa.string())) for name in names)])
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for batch in _batches(source, num_rows):
            lists = [pa.array(values, pa.list_(pa.string())) for values in extend(batch.to_pydict())]
            arrays = [*(batch.column(field.name) for field in kept), *lists]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def schema(columns: Mapping[str, Any]) -> pa.Schema:
    """Returns the schema of named columns of ``int``, ``str`` or ``list[str]``."""
    return pa.schema([(name, _TYPES[kind]) for name, kind in columns.items()])


class RowWriter:
    """Writes rows to a Parquet file, some thousand at a time; the file is there, whole, when the block ends.

    Args:
        path: The file.
        columns: As for ``schema``.
    """

    def __init__(self, path: Place, columns: Mapping[str, Any]) -> None:
        self._path, self._schema = path, schema(columns)
        self._stack = contextlib.ExitStack()
        self._rows: list[tuple[Any, ...]] = []
        self._waiting = self._schema.empty_table()
        self.num_rows = 0

    def __enter__(self) -> Self:
        temporary = self._stack.enter_context(storage.publish(self._path))
        self._writer = self._stack.enter_context(pq.ParquetWriter(temporary, self._schema, compression="zstd"))
        return self

    def add(self, row: tuple[Any, ...]) -> None:
        """Adds a row."""
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) == _BATCH_ROWS:
            self._write()

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Adds rows that are a batch of these columns already; what is written does not depend on how they were cut."""
        self._waiting = pa.concat_tables([self._waiting, pa.table(batch.cast(self._schema))])
        self.num_rows += batch.num_rows
        while self._waiting.num_rows >= _BATCH_ROWS:
            self._writer.write_table(self._waiting.slice(0, _BATCH_ROWS).combine_chunks())
            self._waiting = self._waiting.slice(_BATCH_ROWS)

    def _write(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._writer.write_table(pa.table(arrays, schema=self._schema))
        self._rows = []

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._rows and error is None:
            self._write()
        if self._waiting.num_rows and error is None:
            self._writer.write_table(self._waiting.combine_chunks())
        self._stack.__exit__(kind, error, trace)


def read_json_lines(path: Place, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields line and text values of the objects of a JSON Lines file; a key that only some have is empty in the others.

    Args:
        path: The file.
        keys: The first of them must be in every line.

    Raises:
        ValueError: The file is missing, not UTF-8, or a line is not an object with the first key.
    """
    for number, line in text_lines(path):
        yield number, _json_row(path, number, line, keys)


def text_lines(path: Place) -> Iterator[tuple[int, str]]:
    """Yields number and text of the lines of a file that are not blank; the first is number 1.

    Raises:
        ValueError: The file is missing, or not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}). A BEIR folder needs this file.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}). Convert the file to UTF-8.") from None


def _json_row(path: Place, number: int, line: str, keys: Sequence[str]) -> dict[str, str]:
    try:
        value = json.loads(line)
        row = {key: _json_text(value.get(key), may_be_number=key == keys[0]) for key in keys}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path}: line {number} is not a JSON object of texts. Mend it, or take it out.") from None
    if not row.get(keys[0]):
        raise ValueError(f"{path}: line {number} is not a JSON object with '{keys[0]}'. Mend it, or take it out.")
    return row


def _json_text(value: Any, *, may_be_number: bool) -> str:
    if may_be_number and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None and not isinstance(value, str):
        raise TypeError
    text = value or ""
    text.encode()  # half a surrogate pair can be written as JSON, but is no text
    return text


def read_qrels(path: Place) -> Iterator[tuple[int, str, str, int]]:
    """Yields line, query id, document id and grade of a BEIR qrels file; a header line is skipped.

    Raises:
        ValueError: The file is missing, or a line does not have three tab-separated fields with a whole number last.
    """
    for number, line in text_lines(path):
        fields = line.split("\t")
        if number == 1 and not fields[-1].strip().lstrip("-").isdecimal():
            continue
        try:
            query, document, grade = fields
            yield number, query, document, int(grade)
        except ValueError:
            raise ValueError(f"{path}: line {number} is not 'query-id<TAB>document-id<TAB>grade'. Mend it.") from None
