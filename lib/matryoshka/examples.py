"""Training pairs as token ids on disk, mapped into memory by every rank, and which of them must not be each other's negatives.

Texts are tokenised once, before training, in parts that any worker can make.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from matryoshka import corpus, storage
from matryoshka.storage import Place
from matryoshka.tokens import Role, Tokeniser

IntArray = npt.NDArray[np.int64]

_NOTHING = 0  # key of what stands where a pair has fewer negatives than others
_BATCH_ROWS = 4_096


def column_names(num_negatives: int) -> tuple[str, ...]:
    """Returns the names of the texts of a pair.

    >>> column_names(2)
    ('query', 'positive', 'negative-0', 'negative-1')
    """
    return ("query", "positive", *(f"negative-{number}" for number in range(num_negatives)))


def key_of(text: str) -> int:
    """Returns a number that texts share if and (but for one in 2^63) only if they differ in white space and case alone."""
    folded = " ".join(text.split()).casefold()
    return int.from_bytes(hashlib.blake2b(folded.encode(), digest_size=8).digest(), "big") >> 1 or 1


def tokenise_part(path: Place, target: Place, tokeniser: Tokeniser, num_negatives: int) -> int:
    """Tokenises the pairs of one Parquet file into a folder, which appears complete or not at all.

    Args:
        path: With columns ``query`` and ``positive``; ``negatives`` (lists of texts) where ``num_negatives`` is not 0; and
            ``label`` where it has one.
        target: The folder.
        tokeniser: Of the model; it cuts texts to the window that is trained with.
        num_negatives: How many negatives of each pair to take; where there are fewer, an empty text stands that nothing sees.

    Returns:
        The number of pairs.
    """
    columns: dict[str, list[npt.NDArray[Any]]] = {}
    for rows in _read_rows(path, num_negatives):
        for name, texts in rows.items():
            if name == "label":
                if None in texts:
                    raise ValueError(f"{path}: a pair has no label (null). Give every pair one, or leave the column out.")
                columns.setdefault("labels", []).append(np.array([key_of(text or "") for text in texts], dtype=np.int64))
                continue
            role: Role = "query" if name == "query" else "document"
            tokens = tokeniser([text or "" for text in texts], role)
            keys = [_NOTHING if text is None else key_of(text) for text in texts]
            columns.setdefault(f"{name}.ids", []).append(tokens.ids)
            columns.setdefault(f"{name}.lengths", []).append(tokens.lengths)
            columns.setdefault(f"{name}.keys", []).append(np.array(keys, dtype=np.int64))
    with storage.publish(target) as temporary:
        temporary.mkdir()
        for name, parts in columns.items():
            np.save(temporary / f"{name}.npy", np.concatenate(parts), allow_pickle=False)
    return sum(map(len, columns.get("query.keys", [])))


def _read_rows(path: Place, num_negatives: int) -> Iterator[dict[str, Sequence[str | None]]]:
    file = corpus.open_parquet(path)
    known = file.schema_arrow.names
    if num_negatives and "negatives" not in known:
        raise ValueError(f"{path}: no column 'negatives'. Mine them with python -m jobs.mine, or pass --num-negatives 0.")
    wanted = ["query", "positive", *(["negatives"] if num_negatives else []), *(["label"] if "label" in known else [])]
    nothing = file.schema_arrow.empty_table()  # a file without rows is a part as well
    for batch in itertools.chain([nothing], file.iter_batches(_BATCH_ROWS, columns=wanted)):
        rows: dict[str, Any] = {name: batch.column(name).to_pylist() for name in wanted}
        negatives = rows.pop("negatives", [])
        for number in range(num_negatives):
            rows[f"negative-{number}"] = [own[number] if own and number < len(own) else None for own in negatives]
        yield rows


@dataclass(frozen=True, slots=True)
class Column:
    """One text of every pair: token ids end to end, part by part, and where each text begins.

    Attributes:
        ids: Of each part, on disk.
        edges: First token of each text of a part, and one more; [n + 1] for each part.
        firsts: First row of each part.
        keys: See ``key_of``; [N].
    """

    ids: tuple[npt.NDArray[np.int32], ...]
    edges: tuple[IntArray, ...]
    firsts: IntArray
    keys: IntArray

    @classmethod
    def open(cls, folders: Sequence[Path], name: str) -> "Column":
        """Returns a column of some parts; its ids stay on disk until they are taken."""
        lengths = [np.load(folder / f"{name}.lengths.npy", allow_pickle=False) for folder in folders]
        return cls(
            tuple(np.load(folder / f"{name}.ids.npy", mmap_mode="r", allow_pickle=False) for folder in folders),
            tuple(np.concatenate([[0], np.cumsum(part)]) for part in lengths),
            np.cumsum([0, *map(len, lengths)])[:-1],
            np.concatenate([np.load(folder / f"{name}.keys.npy", allow_pickle=False) for folder in folders]),
        )

    @property
    def lengths(self) -> IntArray:
        """Tokens of each text; [N]."""
        return np.concatenate([np.diff(edges) for edges in self.edges])

    def take(self, rows: IntArray) -> tuple[npt.NDArray[np.int32], IntArray]:
        """Returns (ids, lengths) of the texts of some rows, end to end.

        Shapes: rows [n] -> [T], [n].
        """
        parts = np.searchsorted(self.firsts, rows, side="right") - 1
        pieces = []
        for part, row in zip(parts.tolist(), (rows - self.firsts[parts]).tolist(), strict=True):
            pieces.append(self.ids[part][self.edges[part][row] : self.edges[part][row + 1]])
        return np.concatenate(pieces), np.fromiter(map(len, pieces), np.int64, len(pieces))


@dataclass(frozen=True, slots=True)
class Examples:
    """All training pairs, and what is known to answer each query.

    Attributes:
        columns: ``query``, ``positive`` and the negatives, by name.
        groups: Number of each pair's query, the same for equal texts; [N].
        known: Keys of the documents that answer a query, group after group.
        known_edges: Where each group begins in ``known``, and one more.
        labels: Number of each pair's label, where pairs have labels; [N].
        label_keys: Keys of all texts that have a label, ascending.
        label_of_key: Their labels.
    """

    columns: Mapping[str, Column]
    groups: IntArray
    known: IntArray
    known_edges: IntArray
    labels: IntArray | None = None
    label_keys: IntArray | None = None
    label_of_key: IntArray | None = None

    @classmethod
    def open(cls, places: Sequence[Place], num_negatives: int) -> "Examples":
        """Returns the pairs of some parts that ``tokenise_part`` made, in the order of the parts."""
        folders = [storage.local(place) for place in places]
        columns = {name: Column.open(folders, name) for name in column_names(num_negatives)}
        queries, positives = columns["query"].keys, columns["positive"].keys
        order = np.lexsort((positives, queries))
        _, groups = np.unique(queries, return_inverse=True)
        edges = np.searchsorted(groups[order], np.arange(groups.max(initial=-1) + 2))
        if not (folders[0] / "labels.npy").is_file():
            return cls(columns, groups, positives[order], edges)
        raw = np.concatenate([np.load(folder / "labels.npy", allow_pickle=False) for folder in folders])
        labels = np.unique(raw, return_inverse=True)[1]
        keys, firsts = np.unique(np.concatenate([queries, positives]), return_index=True)
        return cls(columns, groups, positives[order], edges, labels, keys, np.concatenate([labels, labels])[firsts])

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self.groups)

    @property
    def lengths(self) -> IntArray:
        """Tokens of each pair, its negatives included; [N]."""
        total: IntArray = np.sum([column.lengths for column in self.columns.values()], axis=0, dtype=np.int64)
        return total

    def mask(self, rows: IntArray, all_rows: IntArray) -> npt.NDArray[np.bool_]:
        """Returns which documents of a batch must not count as negatives of which queries.

        These are, for each query: every document that is known to answer it, wherever it stands, copies of its own positive
        included, and every text of its own label. Its own positive, of course, stays in.

        Args:
            rows: Of the pairs whose queries are looked at, which are among ``all_rows``.
            all_rows: Of all pairs of the batch; their positives, then each further column, are its documents.

        Shapes: rows [n], all_rows [B] -> [n, B times the documents of a pair].
        """
        documents = np.concatenate([self.columns[name].keys[all_rows] for name in self.columns if name != "query"])
        mask = np.zeros((len(rows), len(documents)), dtype=bool)
        for number, group in enumerate(self.groups[rows].tolist()):
            own = self.known[slice(*self.known_edges[group : group + 2])]  # ascending
            mask[number] = own[np.searchsorted(own, documents).clip(max=len(own) - 1)] == documents
        if self.labels is not None:
            mask |= self._labels_of(documents)[None, :] == self.labels[rows][:, None]
        mask |= documents == _NOTHING
        place = {row: number for number, row in enumerate(all_rows.tolist())}
        mask[np.arange(len(rows)), [place[row] for row in rows.tolist()]] = False
        return mask

    def _labels_of(self, keys: IntArray) -> IntArray:
        """Returns the label of each text, or -1 where it has none."""
        assert self.label_keys is not None
        assert self.label_of_key is not None
        places = np.searchsorted(self.label_keys, keys).clip(max=len(self.label_keys) - 1)
        return np.where(self.label_keys[places] == keys, self.label_of_key[places], -1)


def read_labels(paths: Sequence[Place]) -> IntArray | None:
    """Returns a number for the label of each pair of some files, or None where they have no labels; [N].

    Raises:
        ValueError: Some pairs have none.
    """
    if not corpus.has_column(paths[0], "label"):
        return None
    tables = [corpus.open_parquet(path).read(columns=["label"]) for path in paths]
    labels = [label for table in tables for label in table.column(0).to_pylist()]
    if None in labels:
        raise ValueError(f"{paths[0].parent}: a pair has no label. Fill the column, and prepare the data again.")
    keys = [key_of(label) for label in labels]
    return np.unique(np.array(keys, dtype=np.int64), return_inverse=True)[1]


def name_pairs(paths: Sequence[Place], rows: Sequence[int]) -> list[str]:
    """Returns the query and document ids of some pairs, for a message; ``paths`` are the files that were tokenised."""
    edges = [0, *itertools.accumulate(corpus.open_parquet(path).metadata.num_rows for path in paths)]
    names = []
    for row in rows:
        part = next(number for number in range(len(paths)) if row < edges[number + 1])
        table = corpus.open_parquet(paths[part]).read(columns=["query_id", "document_id"]).slice(row - edges[part], 1)
        names.append("/".join(str(column[0]) for column in table.columns))
    return names
