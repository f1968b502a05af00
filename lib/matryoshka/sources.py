"""Rows in: Parquet, CSV and JSONL files with named columns, a slice of a file at a time."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pyarrow import csv

from matryoshka import corpus, storage, units
from matryoshka.storage import Place

PARQUET, CSV, JSONL = SUFFIXES = (".parquet", ".csv", ".jsonl")

_SLICE_ROWS = 131_072
_BLOCK_BYTES = 16 * 2**20  # no row of a CSV file may be longer
_ROW_BITS = 40
_LOOKED_AT = 1_000


class Column(NamedTuple):
    """A column that is wanted: one text, an id (a text or a whole number), or texts (one, or a list of them)."""

    name: str
    kind: Literal["text", "id", "texts"] = "text"


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of one file that one task reads: ``start`` to ``stop`` of a Parquet file, all rows of any other."""

    path: str
    number: int
    start: int = 0
    stop: int | None = None

    @property
    def title(self) -> str:
        """Number of the file and of the first row, for the names of what is made of it."""
        return f"{self.number:06d}-{self.start:012d}"


def place_of(number: int, row: int) -> int:
    """Returns one number for a row of a file: rows are in the order of their places."""
    return number << _ROW_BITS | row


def describe_place(path: str, place: int) -> str:
    """Returns file and row of a place, for people; a row of Parquet counts from 0, the header of CSV is row 1."""
    return f"{path}: {_row_in_words(path, place)}"


def describe_places(files: Sequence[str], first: int, second: int) -> str:
    """Returns files and rows of two places, which may be one, for people."""
    one, two = files[first >> _ROW_BITS], files[second >> _ROW_BITS]
    if first == second:
        return describe_place(one, first)
    other = _row_in_words(two, second) if one == two else describe_place(two, second)
    return f"{describe_place(one, first)} and {other}"


def _row_in_words(path: str, place: int) -> str:
    return f"{'row' if path.endswith((PARQUET, CSV)) else 'line'} {place & (1 << _ROW_BITS) - 1}"


def plan_slices(paths: Sequence[Place], columns: Sequence[Column]) -> list[Slice]:
    """Returns the slices of files, every row of every file in one of them, after a look at what columns the files have.

    Raises:
        ValueError: A file is not readable, is of an unknown kind, or lacks a column.
    """
    slices = []
    for number, path in enumerate(paths):
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: neither Parquet, CSV nor JSONL. Name it *.parquet, *.csv or *.jsonl, or convert it.")
        if path.suffix != PARQUET:
            corpus.check_names(path, _csv_names(path) if path.suffix == CSV else _json_names(path), _names(columns))
            slices.append(Slice(str(path), number))
            continue
        file = corpus.open_parquet(path)
        corpus.check_columns(path, file.schema_arrow, _names(columns), _names(columns, "id"), _names(columns, "texts"))
        whole = units.InputFile(str(path), "", file.metadata.num_rows)
        slices += [Slice(str(path), number, unit.start, unit.stop) for unit in units.plan_units([whole], _SLICE_ROWS)]
    return slices


def _names(columns: Sequence[Column], kind: str | None = None) -> list[str]:
    return [column.name for column in columns if kind in (None, column.kind)]


def read(part: Slice, columns: Sequence[Column]) -> Iterator[tuple[int, list[Any]]]:
    """Yields place and values of every row: a text (empty where there is none), or a list of texts.

    Raises:
        ValueError: The file is not readable, not UTF-8, or a value is of another kind.
    """
    path = storage.place(part.path)
    if path.suffix == JSONL:
        rows = _read_json(path, columns)
    else:
        batches = _read_csv(path, columns) if path.suffix == CSV else _read_parquet(path, columns, part.start, part.stop)
        rows = _rows(batches, columns)
    for row, values in rows:
        yield place_of(part.number, row), values


Batches = Iterator[tuple[int, pa.RecordBatch]]


def _rows(batches: Batches, columns: Sequence[Column]) -> Iterator[tuple[int, list[Any]]]:
    for first, batch in batches:
        values = [_values(batch.column(column.name).to_pylist(), column) for column in columns]
        for row, own in enumerate(zip(*values, strict=True), start=first):
            yield row, list(own)


def _values(values: list[Any], column: Column) -> list[Any]:
    if column.kind == "texts":
        return [_texts(value) for value in values]
    return [value or "" for value in values]


def _texts(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if text is not None and text != ""]


def _read_parquet(path: Place, columns: Sequence[Column], start: int, stop: int | None) -> Batches:
    batches = corpus.text_batches(
        path, list(dict.fromkeys(_names(columns))), _names(columns, "id"), start, stop, _names(columns, "texts")
    )
    for batch in batches:
        yield start, batch
        start += batch.num_rows


def _open_csv(path: Place, names: Sequence[str]) -> csv.CSVStreamingReader:
    try:
        return csv.open_csv(
            path if storage.is_local(path) else path.open("rb"),
            csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            csv.ParseOptions(newlines_in_values=True),
            csv.ConvertOptions(column_types=dict.fromkeys(names, pa.large_string()), include_columns=list(names)),
        )
    except (pa.ArrowException, OSError) as error:
        raise _csv_fault(path, error) from None


def _csv_fault(path: Place, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0]
    return ValueError(f"{path}: not readable as CSV in UTF-8 ({reason}; the header is row 1). Mend it, or take it out.")


def _csv_names(path: Place) -> list[str]:
    try:
        names: list[str] = _open_csv(path, ()).schema.names
    except UnicodeDecodeError as error:
        raise _csv_fault(path, error) from None
    return names


def _read_csv(path: Place, columns: Sequence[Column]) -> Batches:
    row = 2
    reader = _open_csv(path, list(dict.fromkeys(_names(columns))))
    try:
        for batch in reader:
            yield row, batch
            row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _csv_fault(path, error) from None


def _json_names(path: Place) -> list[str]:
    """Returns the keys that any of the first lines has: a line may lack those that have no value there."""
    lines = itertools.islice(corpus.text_lines(path), _LOOKED_AT)
    return list(dict.fromkeys(key for number, line in lines for key in _json_object(path, number, line)))


def _json_object(path: Place, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: line {number} is not JSON ({error}). Mend it, or take it out.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: line {number} is not a JSON object. Mend it, or take it out.")
    return value


def _read_json(path: Place, columns: Sequence[Column]) -> Iterator[tuple[int, list[Any]]]:
    for number, line in corpus.text_lines(path):
        value = _json_object(path, number, line)
        yield number, [_json_value(path, number, column, value.get(column.name)) for column in columns]


def _json_value(path: Place, number: int, column: Column, value: Any) -> Any:
    if column.kind == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    texts = _texts(value) if column.kind == "texts" else ["" if value is None else value]
    if not all(isinstance(text, str) and _is_text(text) for text in texts):
        wanted = "a text or a list of texts" if column.kind == "texts" else "text"
        found = f"{type(value).__name__} {value!r:.40}"
        raise ValueError(f"{path}: line {number}: '{column.name}' is not {wanted} (found: {found}). Mend it, or take it out.")
    return texts if column.kind == "texts" else texts[0]


def _is_text(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
