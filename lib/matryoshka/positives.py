"""What is known to answer which query, by hash: a million judgements in tens of megabytes, asked about many candidates at once.

A document is known by the hash of its text, so a twin under another id is known as well. Hashes have 64 bits: should two texts
share one, a candidate more is passed over; a known positive is never taken for something else.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from matryoshka import corpus, storage, units
from matryoshka.pairs import DatasetStore
from matryoshka.storage import Place

Hashes = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]

_BATCH_ROWS = 16_384
_NO_HASHES: Hashes = np.empty(0, np.uint64)


def hash_texts(texts: Iterable[str]) -> Hashes:
    """Returns the hash of each text, without regard to white space.

    >>> bool(np.equal(*hash_texts(["two  words ", "two words"])))
    True
    """
    return _hash(b"text", (" ".join(text.split()) for text in texts))


def hash_queries(texts: Iterable[str]) -> Hashes:
    """Returns the hash of each query's text, without regard to white space and case."""
    return _hash(b"query", (" ".join(text.split()).casefold() for text in texts))


def hash_labels(labels: Iterable[str]) -> Hashes:
    """Returns the hash of each label."""
    return _hash(b"label", labels)


def hash_ids(ids: Iterable[str]) -> Hashes:
    """Returns the hash of each id."""
    return _hash(b"id", ids)


def _hash(kind: bytes, texts: Iterable[str]) -> Hashes:
    return np.frombuffer(
        b"".join(hashlib.blake2b(text.encode(), digest_size=8, person=kind).digest() for text in texts), dtype="<u8"
    )


def mix(left: Hashes, right: Hashes) -> Hashes:
    """Returns one hash for each pair of hashes; arrays are broadcast. For one left side, the order of the results is random.

    Source: the finalizer of SplitMix64, Steele et al. 2014, doi:10.1145/2714064.2660195.
    """
    mixed: Hashes = left * np.uint64(0x9E3779B97F4A7C15) + right
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Relation:
    """A set of (left, right) pairs of hashes, in eight bytes each.

    >>> known = Relation.of(hash_queries(["Why?"]), hash_texts(["because"]))
    >>> known.holds(hash_queries(["why?"]), hash_texts(["because", "no"])[None]).tolist()
    [[True, False]]
    """

    def __init__(self, keys: Hashes) -> None:
        self._keys = keys

    @classmethod
    def of(cls, left: Hashes, right: Hashes) -> Self:
        """Returns the set of these pairs."""
        return cls(np.unique(mix(left, right)))

    @classmethod
    def union(cls, parts: Iterable[Self]) -> Self:
        """Returns the set of what is in any of some sets."""
        return cls(np.unique(np.concatenate([_NO_HASHES, *(part._keys for part in parts)])))

    def holds(self, left: Hashes, right: Hashes) -> npt.NDArray[np.bool_]:
        """Returns whether pairs are in the set.

        Shapes: left [Q], right [Q, M] -> [Q, M].
        """
        return find(mix(left[:, None], right), self._keys) >= 0

    def save(self, path: Path) -> None:
        """Writes a file that ``open`` reads."""
        np.save(path, self._keys, allow_pickle=False)

    @classmethod
    def open(cls, path: Place) -> Self:
        """Returns what ``save`` wrote, mapped from disk."""
        return cls(np.load(storage.local(path), mmap_mode="r", allow_pickle=False))


def find(wanted: Hashes, among: Hashes, order: IntArray | None = None) -> IntArray:
    """Returns where hashes stand among others, which are sorted, or are by ``order``; -1 for those that are not there."""
    if not len(among):
        return np.full(wanted.shape, -1, np.int64)
    places = np.minimum(np.searchsorted(among, wanted, sorter=order), len(among) - 1)
    rows = places if order is None else order[places]
    return np.where(among[rows] == wanted, rows, -1)


class Documents:
    """Hashes of the ids and texts of documents, in the order of an index's rows.

    Shapes: ids [N], texts [N].
    """

    def __init__(self, ids: Hashes, texts: Hashes) -> None:
        self.texts = texts
        self._ids = ids
        self._order = np.argsort(ids)

    def rows_of(self, ids: Iterable[str]) -> IntArray:
        """Returns the row of each id; -1 where there is no such document."""
        return find(hash_ids(ids), self._ids, self._order)

    def save(self, path: Path) -> None:
        """Writes a file that ``open`` reads."""
        np.save(path, np.stack([self._ids, self.texts]), allow_pickle=False)

    @classmethod
    def open(cls, path: Place) -> Self:
        """Returns what ``save`` wrote, mapped from disk."""
        return cls(*np.load(storage.local(path), mmap_mode="r", allow_pickle=False))


def read(data: DatasetStore, index_ids: Iterable[Any]) -> tuple[Documents, Relation]:
    """Returns the documents of a dataset, and the texts that are known to be right for queries, and for labels.

    Known for a query are the documents that any split judges relevant for a query of the same text, and the positives of every
    pair with such a query. Known for a label are its documents, and the positives and the queries of its pairs. What is known
    of a document holds for each of its chunks.

    Args:
        data: The dataset.
        index_ids: Ids of an index of its corpus, shard by shard, as Arrow arrays.

    Raises:
        ValueError: A file is damaged, or the index has documents that the dataset does not have.
    """
    ids, owners, texts, of_labels = _read_corpus(data)
    order = np.argsort(ids)
    rows = np.concatenate([np.empty(0, np.int64), *(find(part, ids, order) for part in _hash_index(index_ids))])
    if (rows < 0).any():
        raise ValueError(f"{data.folder}: lacks {(rows < 0).sum()} documents of the index. Mine into another --output.")
    documents = Documents(ids[rows], texts[rows])
    order = np.argsort(owners)
    owners, texts = owners[order], texts[order]
    of_split = (_read_qrels(data, split, owners, texts) for split in data.splits)
    of_pairs = (_read_pairs(part, data.is_chunked, owners, texts) for part in _pair_rows(data))
    return documents, Relation.union(itertools.chain([of_labels], of_split, of_pairs))


def _read_corpus(data: DatasetStore) -> tuple[Hashes, Hashes, Hashes, Relation]:
    """Returns hashes of the ids, of the ids of the documents that they are (chunks of), and of the texts of all rows; and which
    text has which label.
    """
    parts, of_labels = [(_NO_HASHES, _NO_HASHES, _NO_HASHES)], []
    for path in corpus.find_files(data.corpus)[1]:
        names = ["id", "text", *(["label"] if corpus.has_column(path, "label") else [])]
        for part in corpus.read_rows(path, _BATCH_ROWS, names):
            ids, texts = hash_ids(part["id"]), hash_texts(text or "" for text in part["text"])
            owners = hash_ids(map(units.document_of, part["id"])) if data.is_chunked else ids
            parts.append((ids, owners, texts))
            if "label" in part:
                of_labels.append(Relation.of(hash_labels(part["label"]), texts))
    ids, owners, texts = (np.concatenate(own) for own in zip(*parts, strict=True))
    return ids, owners, texts, Relation.union(of_labels)


def _hash_index(index_ids: Iterable[Any]) -> Iterator[Hashes]:
    for ids in index_ids:
        for start in range(0, len(ids), _BATCH_ROWS):
            yield hash_ids(ids.slice(start, _BATCH_ROWS).to_pylist())


def _read_qrels(data: DatasetStore, split: str, owners: Hashes, texts: Hashes) -> Relation:
    names, keys = [_NO_HASHES], [_NO_HASHES]
    for part in corpus.read_rows(data.folder / "queries" / f"{split}.parquet", _BATCH_ROWS, ["id", "text"]):
        names.append(hash_ids(part["id"]))
        keys.append(hash_queries(part["text"]))
    query_ids, query_keys = np.concatenate(names), np.concatenate(keys)
    order = np.argsort(query_ids)
    found = []
    for part in corpus.read_rows(data.folder / "qrels" / f"{split}.parquet", _BATCH_ROWS):
        rows = find(hash_ids(part["query_id"]), query_ids, order)
        counts = (rows >= 0) & (np.asarray(part["grade"]) > 0)
        found.append(_relate(query_keys[rows[counts]], hash_ids(part["document_id"])[counts], owners, texts))
    return Relation.union(found)


def _pair_rows(data: DatasetStore) -> Iterator[dict[str, list[Any]]]:
    for path in data.pair_files():
        yield from corpus.read_rows(path, _BATCH_ROWS)


def _read_pairs(part: dict[str, list[Any]], is_chunked: bool, owners: Hashes, texts: Hashes) -> Relation:
    keys, positives = hash_queries(part["query"]), hash_texts(part["positive"])
    own = hash_ids(map(units.document_of, part["document_id"]) if is_chunked else part["document_id"])
    known = [Relation.of(keys, positives), _relate(keys, own, owners, texts)]
    if "label" in part:
        labels = hash_labels(part["label"])
        known += [Relation.of(labels, positives), Relation.of(labels, hash_texts(part["query"]))]
    return Relation.union(known)


def _relate(keys: Hashes, wanted: Hashes, owners: Hashes, texts: Hashes) -> Relation:
    """Returns the set of each key with every text of the document that is wanted with it.

    Shapes: keys [M], wanted [M], owners [N] (sorted), texts [N].
    """
    first, last = (np.searchsorted(owners, wanted, side=side) for side in ("left", "right"))
    counts = last - first
    starts = np.cumsum(counts) - counts  # of each key's run in what comes out
    places = np.arange(counts.sum()) + np.repeat(first - starts, counts)
    return Relation.of(np.repeat(keys, counts), texts[places])
