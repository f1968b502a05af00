"""Datasets for tests: written by hand, or prepared in this process, one task after the other."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from matryoshka import artifacts, corpus, pairs, preparation
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.cleaning import PairColumns, Rules
from matryoshka.pairs import DatasetStore
from matryoshka.preparation import Finishing, Source
from matryoshka.splits import SplitRule
from matryoshka.storage import Place

FRACTIONS = {"test": 0.3, "dev": 0.2, "train": 0.5}
RULES = Rules(SplitRule("hash", FRACTIONS, "salt"))
COLUMNS = PairColumns("query", "positive", id="id", group="group")

Grades = Mapping[str, Mapping[str, int]]


def write(
    folder: Path, documents: Mapping[str, str], queries: Mapping[str, Mapping[str, str]], qrels: Mapping[str, Grades]
) -> DatasetStore:
    """Writes a dataset without training pairs."""
    receipts = [_write(folder, "corpus/part-00000", pairs.CORPUS_COLUMNS, list(documents.items()))]
    for split, own in queries.items():
        judged = [(query, *judgement) for query, grades in qrels[split].items() for judgement in grades.items()]
        receipts.append(_write(folder, f"queries/{split}", pairs.QUERY_COLUMNS, list(own.items())))
        receipts.append(_write(folder, f"qrels/{split}", pairs.QRELS_COLUMNS, judged))
    facts = {"documents": len(documents), "queries": {split: len(own) for split, own in queries.items()}}
    Manifest("dataset", {}, facts=facts, receipts=tuple(receipts), is_complete=True).write(folder)
    return DatasetStore.open(folder)


def _write(folder: Path, key: str, columns: dict[str, Any], rows: Sequence[tuple[Any, ...]]) -> Receipt:
    path = folder / f"{key}.parquet"
    with corpus.RowWriter(path, columns) as writer:
        for row in rows:
            writer.add(row)
    return Receipt(key, len(rows), (FileRecord.of(folder, path),))


def in_turn(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Calls tasks one after the other."""
    return itertools.starmap(function, arguments)


def backwards(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Calls tasks one after the other, the last one first; results come in the order of the arguments."""
    return reversed([function(*own) for own in reversed(arguments)])


def prepare(
    source: Source,
    folder: Place,
    rules: Rules = RULES,
    finishing: Finishing = Finishing(),  # noqa: B008 - it is immutable
    run: preparation.RunTasks = in_turn,
    num_partitions: int | None = None,
) -> DatasetStore:
    """Prepares a dataset as the job does."""
    work = folder / ".partial-work"
    prepared = preparation.prepare(source, rules, finishing, work, run, num_partitions)
    for path, receipt in prepared.moves.items():
        artifacts.storage.move(path, folder / receipt.files[0].path)
    artifacts.storage.remove(work)
    receipts = tuple(prepared.moves.values())
    Manifest("dataset", {}, facts=prepared.facts, receipts=receipts, is_complete=True).write(folder)
    return DatasetStore.open(folder)


def columns_of(paths: Sequence[Path]) -> dict[str, list[Any]]:
    """Returns the columns of some files together."""
    parts = [pq.read_table(path).to_pydict() for path in paths]
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}
