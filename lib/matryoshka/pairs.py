"""The dataset that every later stage reads: documents, queries and judgements by split, and training pairs, all Parquet.

corpus/part-00000.parquet         id, text                    cut into chunks also: document_id, start, end
queries/<split>.parquet           id, text
qrels/<split>.parquet             query_id, document_id, grade
pairs/train-00000.parquet ...     query_id, document_id, query, positive

Training pairs and documents have a ``label`` where texts are labelled (empty for a document without a pair), and pairs have
``negatives`` and ``negative_ids`` where the data brings some.

A chunk's id is ``<document id>#<start>-<end>``, in characters of the document. Judgements are of documents, never of
chunks; a training pair of chunked data names, and holds, the chunk of its document that has most words of the query.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from matryoshka import artifacts, corpus, metrics, storage
from matryoshka.artifacts import Manifest, Receipt
from matryoshka.corpus import Columns
from matryoshka.splits import TRAIN
from matryoshka.storage import Place

CORPUS, QUERIES, QRELS, PAIRS = "corpus", "queries", "qrels", "pairs"

CORPUS_COLUMNS = {"id": str, "text": str}
QUERY_COLUMNS = {"id": str, "text": str}
QRELS_COLUMNS = {"query_id": str, "document_id": str, "grade": int}

_PAIR_COLUMNS = {"query_id": str, "document_id": str, "query": str, "positive": str}
_CHUNK_COLUMNS = {"document_id": str, "start": int, "end": int}
_EXTRA_COLUMNS: dict[str, Any] = {"label": str, "negatives": list[str], "negative_ids": list[str]}


def corpus_columns(*, is_chunked: bool, is_labelled: bool) -> dict[str, Any]:
    """Returns the columns of documents, those included that only some data has."""
    return {**CORPUS_COLUMNS, **(_CHUNK_COLUMNS if is_chunked else {}), **({"label": str} if is_labelled else {})}


def pair_columns(extras: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the columns of training pairs, those included that only some data has."""
    return {**_PAIR_COLUMNS, **{name: _EXTRA_COLUMNS[name] for name in extras}}


@dataclass(frozen=True, slots=True)
class DatasetStore:
    """A finished dataset artifact."""

    folder: Place
    manifest: Manifest

    @classmethod
    def open(cls, folder: Place) -> "DatasetStore":
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
        return corpus.fingerprint([(PurePosixPath(file.path).name, file.digest) for file in files], Columns())

    @property
    def num_documents(self) -> int:
        """Documents of the corpus; of a chunked one, its chunks."""
        return sum(receipt.num_rows for receipt in self.manifest.receipts if receipt.key.startswith(f"{CORPUS}/"))

    def _read(self, kind: str, split: str) -> dict[str, list[Any]]:
        own = {receipt.key.removeprefix(f"{kind}/"): receipt for receipt in self.manifest.receipts}
        if split not in own:
            found = sorted(key for key in own if "/" not in key)
            raise ValueError(f"{self.folder}: no split '{split}' (found: {', '.join(found) or 'none'}). Pass --split.")
        path = artifacts.check_file(self.folder, own[split].files[0])
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

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have queries."""
        queries = (receipt for receipt in self.manifest.receipts if receipt.key.startswith(f"{QUERIES}/"))
        return tuple(receipt.key.partition("/")[2] for receipt in queries if receipt.num_rows)

    @property
    def judged_splits(self) -> tuple[str, ...]:
        """Those of them that have judgements: labelled text has none for train."""
        judged = {receipt.key for receipt in self.manifest.receipts if receipt.num_rows}
        return tuple(split for split in self.splits if f"{QRELS}/{split}" in judged)

    @property
    def is_chunked(self) -> bool:
        """Whether the corpus holds chunks of documents, whose ids lead back to them."""
        return bool(self.manifest.facts.get("is_chunked"))

    @property
    def num_pairs(self) -> int:
        """How many training pairs there are."""
        return sum(receipt.num_rows for receipt in self._pair_receipts())

    def _pair_receipts(self) -> list[Receipt]:
        return [receipt for receipt in self.manifest.receipts if receipt.key.startswith(f"{PAIRS}/")]

    def pair_files(self) -> list[Place]:
        """Returns the files of the training pairs, in order, each exactly what its receipt says.

        Raises:
            ValueError: The dataset has no training pairs, or a file is missing, truncated or altered.
        """
        if not self.num_pairs:
            raise ValueError(f"{self.folder}: no training pairs (no split '{TRAIN}'). Prepare data that has some.")
        receipts = self._pair_receipts()
        own = dataclasses.replace(self.manifest, receipts=tuple(receipts))
        # From a bucket, the workers that need a file fetch it: here its size must do.
        unread = () if storage.is_local(self.folder) else [PurePosixPath(receipt.files[0].path).name for receipt in receipts]
        faults = artifacts.find_faults(self.folder, own, only_sizes=unread)
        if faults:
            raise ValueError(f"{faults[0]}. Run the job that made it again with --replace.")
        return [self.folder / receipt.files[0].path for receipt in receipts]
