"""Pairs of sentences that people scored by how much they mean the same.

Read are STS-benchmark's own file, which has tabs, no header and no quoting; files with a header and commas or tabs; and Parquet.

Source: Cer et al. 2017, SemEval-2017 Task 1, arXiv:1708.00055.
"""

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from matryoshka import corpus
from matryoshka.storage import Place

COLUMNS = ("score", "sentence1", "sentence2")

_OWN_COLUMNS = slice(4, 7)  # score and sentences; some rows have two more, with their sources
_PARQUET_MAGIC = b"PAR1"

Row = tuple[float, str, str]


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Scores (higher is more alike) and both sentences of each pair; ``num_unusable`` rows had no score or no sentence."""

    scores: tuple[float, ...]
    firsts: tuple[str, ...]
    seconds: tuple[str, ...]
    num_unusable: int


def read(path: Place) -> ScoredPairs:
    """Returns the pairs of a file.

    Raises:
        ValueError: It cannot be read, has other columns, or has no two pairs of different scores.
    """
    rows = [_usable(fields) for fields in _fields(path)]
    pairs = [row for row in rows if row]
    if not pairs:
        raise ValueError(f"{path}: no row with a score and two sentences ({len(rows)} rows). Pass a file that has some.")
    if len({score for score, _, _ in pairs}) < 2:
        raise ValueError(f"{path}: all {len(pairs)} rows have the same score, so they order nothing. Pass a file with several.")
    scores, firsts, seconds = zip(*pairs, strict=True)
    return ScoredPairs(scores, firsts, seconds, len(rows) - len(pairs))


def _fields(path: Place) -> Iterator[tuple[Any, ...]]:
    try:
        with path.open("rb") as file:
            is_parquet = file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
        if is_parquet:
            return _of_parquet(path)
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or type(error).__name__}). Pass an STS file.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}). Convert the file to UTF-8.") from None
    own = [tuple(line.split("\t")[_OWN_COLUMNS]) for line in text.split("\n") if line.strip()]
    header = text.partition("\n")[0]
    if not set(COLUMNS) <= set(re.split(r"[,\t\r]", header)) and any(map(_usable, own)):
        return iter(own)
    return _of_named(path, text, "\t" if "\t" in header else ",")


def _of_parquet(path: Place) -> Iterator[tuple[Any, ...]]:
    file = corpus.open_parquet(path)
    _check_names(path, file.schema_arrow.names)
    columns = file.read(columns=list(COLUMNS)).to_pydict()
    return zip(*(columns[name] for name in COLUMNS), strict=True)


def _of_named(path: Place, text: str, delimiter: str) -> Iterator[tuple[Any, ...]]:
    """Yields the rows of a file with a header: tabs are without quoting, as everywhere with these data; commas are CSV."""
    lines = io.StringIO(text, newline="")
    rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if delimiter == "\t" else csv.DictReader(lines)
    try:
        _check_names(path, rows.fieldnames or ())
        yield from (tuple(row[name] for name in COLUMNS) for row in rows)
    except csv.Error as error:
        raise ValueError(f"{path}: line {rows.line_num} is not CSV ({error}). Mend it.") from None


def _check_names(path: Place, found: Iterable[str]) -> None:
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        names = ", ".join(f"'{name}'" for name in found)[:200]
        raise ValueError(
            f"{path}: no column '{missing[0]}' (found: {names or 'nothing'}). Name the columns {', '.join(COLUMNS)},"
            " or pass STS-benchmark's own file."
        )


def _usable(fields: Iterable[Any]) -> Row | None:
    """Returns a row, or None where it has no score or lacks a sentence."""
    try:
        score, first, second = fields
        number = float(score)
    except (TypeError, ValueError):
        return None
    first, second = str(first or "").strip(), str(second or "").strip()
    return (number, first, second) if math.isfinite(number) and first and second else None
