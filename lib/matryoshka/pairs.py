"""The dataset that every later stage reads: documents, queries and judgements by split, and training pairs, all Parquet.

corpus/part-00000.parquet     id, text
queries/<split>.parquet       id, text
qrels/<split>.parquet         query_id, document_id, grade
pairs/train.parquet           query_id, document_id, query, positive
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matryoshka import artifacts, corpus, metrics, storage, units
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.corpus import Columns

CORPUS = "corpus"
TRAIN = "train"

_PART_ROWS = 50_000
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Pair:
    """A query and a document that answers it; pairs of one ``group`` stay in one split."""

    query: str
    document: str
    group: str
    document_id: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """Documents, and for every split its queries and judgements; ``dropped`` counts what was left out, by reason."""

    documents: Mapping[str, str]
    queries: Mapping[str, Mapping[str, str]]
    qrels: Mapping[str, Mapping[str, Mapping[str, int]]]
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, Any]:
        """Returns how much there is of everything, for people."""
        return {
            "documents": len(self.documents),
            "queries": {split: len(queries) for split, queries in self.queries.items()},
            "dropped": dict(self.dropped),
        }


def text_id(prefix: str, text: str) -> str:
    """Returns an id that depends on the text alone.

    >>> text_id("q", "what is a prefix?")
    'q-cb6a109818fe6be5'
    """
    return f"{prefix}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def from_pairs(
    pairs: Iterable[Pair],
    fractions: Mapping[str, float],
    limits: Mapping[str, int | None],
    salt: str,
    *,
    one_to_one: bool = False,
) -> Dataset:
    """Returns the dataset of question-and-answer pairs: cleaned, split by hash of the group, sampled by hash of the query.

    Texts are compared without regard to white space, queries without regard to case too. A document text that stands under
    several ids is one document, under the first of them; a query may have several documents, and a document several queries.
    A pair that is empty or was seen before is dropped and counted, and so is one whose query or document is already in
    another split: it would leak.

    Args:
        pairs: The pairs.
        fractions: Share of the groups in each split; the last split takes the rest.
        limits: Most queries of each split; documents of queries over the limit are left out as well.
        salt: See ``choose_split``.
        one_to_one: Also drops a pair whose query or document stands in an earlier pair.

    Raises:
        ValueError: Two texts stand under one id.
    """
    dropped: Counter[str] = Counter()
    documents: dict[str, str] = {}
    id_of_text: dict[str, str] = {}
    text_of_id: dict[str, str] = {}
    queries: dict[str, tuple[str, str]] = {}
    split_of_document: dict[str, str] = {}
    relevant: dict[str, dict[str, int]] = {}
    for pair in pairs:
        query, text = " ".join(pair.query.split()).casefold(), " ".join(pair.document.split())
        if not query or not text:
            dropped["empty"] += 1
            continue
        document_id = id_of_text.get(text, pair.document_id)
        if text_of_id.setdefault(pair.document_id, text) != text:
            raise ValueError(f"prepare: id '{pair.document_id}' stands for two different texts. Give each document its own id.")
        split = units.choose_split(pair.group, fractions, salt)
        key = text_id("q", query)
        if document_id in relevant.get(key, ()):
            dropped["duplicate"] += 1
        elif one_to_one and (key in relevant or text in id_of_text):
            dropped["duplicate query" if key in relevant else "duplicate document"] += 1
        elif queries.get(key, (split,))[0] != split or split_of_document.get(document_id, split) != split:
            dropped["in another split"] += 1
        else:
            queries.setdefault(key, (split, pair.query))
            split_of_document[document_id] = split
            documents.setdefault(document_id, pair.document)
            id_of_text[text] = document_id
            relevant.setdefault(key, {})[document_id] = 1
    return _sample(documents, queries, relevant, fractions, limits, salt, dropped)


def _sample(
    documents: Mapping[str, str],
    queries: Mapping[str, tuple[str, str]],
    relevant: Mapping[str, Mapping[str, int]],
    fractions: Mapping[str, float],
    limits: Mapping[str, int | None],
    salt: str,
    dropped: Counter[str],
) -> Dataset:
    kept: dict[str, list[str]] = {}
    for split in fractions:
        keys = [key for key, (own, _) in queries.items() if own == split]
        kept[split] = units.sample_keys(keys, limits.get(split), salt)
        dropped["over the limit"] += len(keys) - len(kept[split])
    used = {document for keys in kept.values() for key in keys for document in relevant[key]}
    return Dataset(
        {name: text for name, text in documents.items() if name in used},
        {split: {key: queries[key][1] for key in keys} for split, keys in kept.items()},
        {split: {key: dict(relevant[key]) for key in keys} for split, keys in kept.items()},
        +dropped,
    )


def read_pair_files(
    location: str, query_column: str, positive_column: str, id_column: str | None, group_column: str | None
) -> list[Pair]:
    """Returns the pairs of Parquet files with named columns.

    Raises:
        ValueError: A file is not readable, a column is missing or not text, or there is no pair.
    """
    _, paths = corpus.find_files(location)
    names = list(dict.fromkeys(filter(None, (query_column, positive_column, id_column, group_column))))
    pairs = []
    for path in paths:
        columns = dict(
            zip(
                names,
                corpus.read_columns(path, names, [name for name in (id_column, group_column) if name]).to_pydict().values(),
                strict=True,
            )
        )
        texts = zip(columns[query_column], columns[positive_column], strict=True)
        for row, (query, positive) in enumerate((query or "", positive or "") for query, positive in texts):
            document_id = columns[id_column][row] if id_column else text_id("d", positive)
            group = columns[group_column][row] if group_column else text_id("d", positive)
            if document_id is None or group is None:
                raise ValueError(f"{path}: row {row} has no id or no group. Fill the column, or leave its option out.")
            pairs.append(Pair(query, positive, group, document_id))
    if not pairs:
        raise ValueError(f"{location}: no pairs (0 rows). Pass files with rows.")
    return pairs


def read_beir(folder: Path, limits: Mapping[str, int | None], salt: str) -> Dataset:
    """Returns the dataset of a BEIR folder: all its documents, and every split for which it has judgements.

    Raises:
        ValueError: A file is missing or damaged, an id stands twice, or a split judges no query of the folder.

    Source: Thakur et al. 2021, BEIR, arXiv:2104.08663.
    """
    documents, dropped = _read_texts(folder / "corpus.jsonl", ("_id", "text", "title"))
    all_queries, dropped_queries = _read_texts(folder / "queries.jsonl", ("_id", "text"))
    splits = sorted(path.stem for path in (folder / "qrels").glob("*.tsv"))
    if not splits:
        raise ValueError(f"{folder}: no qrels/<split>.tsv. A BEIR folder needs judgements for at least one split.")
    queries: dict[str, dict[str, str]] = {}
    qrels: dict[str, dict[str, dict[str, int]]] = {}
    for split in splits:
        path = folder / "qrels" / f"{split}.tsv"
        judged = metrics.group_qrels(corpus.read_qrels(path))
        known = units.sample_keys([query for query in judged if query in all_queries], limits.get(split), salt)
        if not known:
            raise ValueError(f"{path}: judges no query of {folder / 'queries.jsonl'}. Pass files that belong together.")
        queries[split] = {query: all_queries[query] for query in known}
        qrels[split] = {query: judged[query] for query in known}
    return Dataset(documents, queries, qrels, +Counter({"empty": dropped, "empty query": dropped_queries}))


def _read_texts(path: Path, keys: Sequence[str]) -> tuple[dict[str, str], int]:
    texts: dict[str, str] = {}
    num_empty = 0
    for row in corpus.read_json_lines(path, keys):
        key, text = row.pop("_id"), " ".join(filter(None, (row.get("title", ""), row["text"]))).strip()
        if key in texts:
            raise ValueError(f"{path}: id '{key}' stands more than once. Give each its own id.")
        if text:
            texts[key] = text
        num_empty += not text
    if not texts:
        raise ValueError(f"{path}: no text at all. Check that it is the right file.")
    return texts, num_empty


def write(folder: Path, dataset: Dataset) -> list[Receipt]:
    """Writes a dataset's files, each atomically, and returns their receipts."""
    files: dict[str, Mapping[str, Sequence[Any]]] = {}
    ids = list(dataset.documents)
    for number, start in enumerate(range(0, len(ids), _PART_ROWS)):
        part = ids[start : start + _PART_ROWS]
        files[f"{CORPUS}/part-{number:05d}"] = {"id": part, "text": [dataset.documents[key] for key in part]}
    for split, queries in dataset.queries.items():
        judged = [(query, *judgement) for query, judgements in dataset.qrels[split].items() for judgement in judgements.items()]
        files[f"queries/{split}"] = {"id": list(queries), "text": list(queries.values())}
        files[f"qrels/{split}"] = dict(
            zip(
                ("query_id", "document_id", "grade"),
                map(list, zip(*judged, strict=True)) if judged else ([], [], []),
                strict=True,
            )
        )
        if split == TRAIN:
            files[f"pairs/{split}"] = _training_pairs(dataset, judged)
    return [_write_file(folder, name, columns) for name, columns in files.items()]


def _training_pairs(dataset: Dataset, judged: Sequence[tuple[str, str, int]]) -> dict[str, list[str]]:
    usable = [(query, document) for query, document, grade in judged if grade > 0 and document in dataset.documents]
    return {
        "query_id": [query for query, _ in usable],
        "document_id": [document for _, document in usable],
        "query": [dataset.queries[TRAIN][query] for query, _ in usable],
        "positive": [dataset.documents[document] for _, document in usable],
    }


def _write_file(folder: Path, name: str, columns: Mapping[str, Sequence[Any]]) -> Receipt:
    path = folder / f"{name}.parquet"
    with storage.publish(path) as temporary:
        corpus.write_rows(temporary, columns)
    return Receipt(name, len(next(iter(columns.values()))), (FileRecord.of(folder, path),))


@dataclass(frozen=True, slots=True)
class DatasetStore:
    """A finished dataset artifact."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> "DatasetStore":
        """Returns the dataset in a folder.

        Raises:
            ValueError: There is none, or it is not finished.
        """
        return cls(folder, artifacts.read_complete(folder, "dataset"))

    @property
    def corpus(self) -> str:
        """Where the documents are, for the embed stage."""
        return str(self.folder / CORPUS)

    @property
    def corpus_fingerprint(self) -> str:
        """The fingerprint of the documents alone, as the embed stage computes it."""
        files = [receipt.files[0] for receipt in self.manifest.receipts if receipt.key.startswith(f"{CORPUS}/")]
        return corpus.fingerprint([(Path(file.path).name, file.digest) for file in files], Columns())

    @property
    def num_documents(self) -> int:
        """Documents of the corpus; of a chunked one, its chunks."""
        return sum(receipt.num_rows for receipt in self.manifest.receipts if receipt.key.startswith(f"{CORPUS}/"))

    @property
    def is_chunked(self) -> bool:
        """Whether the corpus holds chunks, whose ids are ``<document id>#<start>-<end>``."""
        return bool(self.manifest.facts.get("is_chunked"))

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(split for split, count in self.manifest.facts["queries"].items() if count)

    @property
    def num_pairs(self) -> int:
        """Training pairs."""
        return sum(receipt.num_rows for receipt in self.manifest.receipts if receipt.key.startswith("pairs/"))

    def pair_files(self) -> list[Path]:
        """Returns the files with the training pairs, in order.

        Raises:
            ValueError: The dataset has no training pairs.
        """
        receipts = [receipt for receipt in self.manifest.receipts if receipt.key.startswith("pairs/")]
        if not sum(receipt.num_rows for receipt in receipts):
            raise ValueError(f"{self.folder}: no training pairs (no split '{TRAIN}'). Prepare data that has some.")
        return [self.folder / receipt.files[0].path for receipt in receipts]

    def _read(self, kind: str, split: str) -> dict[str, list[Any]]:
        path = self.folder / kind / f"{split}.parquet"
        if not path.is_file():
            found = sorted(file.stem for file in path.parent.glob("*.parquet"))
            raise ValueError(f"{self.folder}: no split '{split}' (found: {', '.join(found) or 'none'}). Pass --split.")
        columns: dict[str, list[Any]] = corpus.open_parquet(path).read().to_pydict()
        if not next(iter(columns.values())):
            raise ValueError(f"{self.folder}: split '{split}' is empty. Pass another --split, or more data to prepare.")
        return columns

    def queries(self, split: str) -> tuple[list[str], list[str]]:
        """Returns (ids, texts) of the queries of a split.

        Raises:
            ValueError: The dataset has no such split, or it has no queries.
        """
        columns = self._read("queries", split)
        return columns["id"], columns["text"]

    def qrels(self, split: str) -> dict[str, dict[str, int]]:
        """Returns the judgements of a split.

        Raises:
            ValueError: The dataset has no such split, or it has no judgements.
        """
        columns = self._read("qrels", split)
        return metrics.group_qrels(zip(columns["query_id"], columns["document_id"], columns["grade"], strict=True))

    def training_pairs(self) -> dict[str, list[str]]:
        """Returns the columns ``query_id``, ``document_id``, ``query`` and ``positive`` of the training pairs.

        Raises:
            ValueError: The dataset has no training pairs.
        """
        path = self.folder / "pairs" / f"{TRAIN}.parquet"
        columns = corpus.open_parquet(path).read().to_pydict() if path.is_file() else {"query": []}
        if not columns["query"]:
            raise ValueError(f"{self.folder}: no training pairs (no split '{TRAIN}'). Prepare data that has some.")
        return columns
