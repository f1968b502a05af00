"""Datasets of a few rows, written as the prepare job writes them, with what it writes for some sources only."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matryoshka import corpus, storage
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.pairs import DatasetStore

Judgement = tuple[str, str, int]


def write_dataset(
    folder: Path,
    documents: Mapping[str, str],
    queries: Mapping[str, Mapping[str, str]],
    qrels: Mapping[str, Iterable[Judgement]],
    pairs: Sequence[Mapping[str, Sequence[Any]]],
    *,
    is_chunked: bool = False,
    labels: Mapping[str, str] | None = None,
) -> DatasetStore:
    """Writes a finished dataset: the corpus as one file, with labels by id, and a file of pairs for each entry of ``pairs``."""
    labelled = {"label": [labels[name] for name in documents]} if labels else {}
    files: dict[str, Mapping[str, Sequence[Any]]] = {"corpus/part-00000": _columns(documents) | labelled}
    for split, texts in queries.items():
        judged = list(qrels[split])
        names = ("query_id", "document_id", "grade")
        files[f"queries/{split}"] = _columns(texts)
        files[f"qrels/{split}"] = {name: [row[place] for row in judged] for place, name in enumerate(names)}
    files |= {f"pairs/train-{number:05d}": columns for number, columns in enumerate(pairs)}
    receipts = tuple(_write(folder, name, columns) for name, columns in files.items())
    counts = {"documents": len(documents), "queries": {split: len(texts) for split, texts in queries.items()}}
    facts = {**counts, "dropped": {}, "is_chunked": is_chunked}
    Manifest("dataset", {"source": "made by hand"}, facts=facts, receipts=receipts, is_complete=True).write(folder)
    return DatasetStore.open(folder)


def _columns(texts: Mapping[str, str]) -> dict[str, list[str]]:
    return {"id": list(texts), "text": list(texts.values())}


def _write(folder: Path, name: str, columns: Mapping[str, Sequence[Any]]) -> Receipt:
    path = folder / f"{name}.parquet"
    with storage.publish(path) as temporary:
        corpus.write_rows(temporary, columns)
    return Receipt(name, len(next(iter(columns.values()))), (FileRecord.of(folder, path),))


def pair_rows(
    queries: Mapping[str, str], documents: Mapping[str, str], judged: Iterable[tuple[str, str]]
) -> dict[str, list[str]]:
    """Returns the columns of a file of pairs."""
    rows = list(judged)
    return {
        "query_id": [query for query, _ in rows],
        "document_id": [document for _, document in rows],
        "query": [queries[query] for query, _ in rows],
        "positive": [documents[document] for _, document in rows],
    }
