"""Documents that are to stay out of an index: the list of their ids, and which rows of a shard they are.

The list is part of the index and only grows. A shard that is there already gets tombstones, the rows that no search may find;
a shard that is built later leaves the documents out.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from matryoshka import artifacts, corpus, storage, vectors
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.funnel import IDS
from matryoshka.storage import Place
from matryoshka.topk import IntArray
from matryoshka.vectors import EmbeddingStore

REMOVED = "removed"
"""Key of the list's receipt, and folder of the list and of the tombstones."""

_LISTS = "ids-*.arrow"


@dataclass(frozen=True, slots=True)
class Removed:
    """The ids that stay out of an index: the receipt of the list as it was left, and all ids with those that are added now."""

    listed: Receipt | None
    ids: pa.Array
    num_added: int

    @classmethod
    def open(cls, folder: Place, manifest: Manifest | None, journal: Sequence[Receipt], added: pa.Array) -> "Removed":
        """Returns what an index, finished or not, is known to leave out, with more ids.

        Args:
            folder: Of the index.
            manifest: Its own; None where there is none that can be read.
            journal: Its own.
            added: More ids.

        Raises:
            ValueError: A list is missing or altered.
        """
        listed = longest_list([*manifest.receipts, *journal]) if manifest else None
        faults = artifacts.find_faults(folder, Manifest("index", {}, receipts=(listed,), is_complete=True)) if listed else []
        known, before = {*map(str, added.to_pylist())}, none()
        if listed and not faults:
            before = open_list(folder, listed)
            known.update(before.to_pylist())
        named = PurePosixPath(listed.files[0].path).name if listed else ""
        for path in _lists(folder, named):  # what a run has written that no receipt names: it was killed, or they were lost
            more = _read_whole(path)
            known.update([] if more is None else more.to_pylist())
            faults += [f"{path}: its bytes were altered"] if more is None and not listed else []
        if faults:
            again = "or index into another --output, with --remove and all ids that are to stay out"
            raise ValueError(f"{faults[0]}. Restore it, {again}.")
        return cls(listed, _in_order(known), len(known) - len(before))

    def remember(self, folder: Place) -> Receipt | None:
        """Writes the list into an index, if there is more than its receipt has, and returns its receipt; None: it is empty."""
        return remember(folder, self.ids) if self.num_added else self.listed


def read(location: str, column: str) -> pa.Array:
    """Returns the ids in a column of Parquet files, sorted and each once.

    Raises:
        ValueError: Nothing is there, a file has no such column, or a row has no id.
    """
    _, paths = corpus.find_files(location)
    return _in_order(corpus.read_ids(paths, column))


def none() -> pa.Array:
    """Returns no ids."""
    return _in_order([])


def longest_list(receipts: Sequence[Receipt]) -> Receipt | None:
    """Returns the receipt of the latest list among those of an index and its journal: it only grows."""
    lists = [receipt for receipt in receipts if receipt.key == REMOVED]
    return max(lists, key=_length, default=None)


def _length(listed: Receipt) -> int:
    found = listed.details.get("num_ids")
    return found if isinstance(found, int) else 0


def remember(folder: Place, ids: pa.Array) -> Receipt:
    """Writes the list into an index and returns its receipt; a longer list has another file, so the one before stays whole."""
    name = _name_of(ids)
    with storage.publish(folder / REMOVED / name) as temporary:
        vectors.write_ids(temporary, [ids])
        record = FileRecord.named(f"{REMOVED}/{name}", temporary)
    return Receipt(REMOVED, 0, (record,), {"num_ids": len(ids)})


def _name_of(ids: pa.Array) -> str:
    return _LISTS.replace("*", storage.digest_json(ids.to_pylist())[:16])


def _lists(folder: Place, but: str) -> list[Place]:
    """Returns the lists in an index, but for the one of this name."""
    paths: list[Place] = sorted((folder / REMOVED).glob(_LISTS)) if (folder / REMOVED).is_dir() else []
    return [path for path in paths if path.name != but]


def _read_whole(path: Place) -> pa.Array | None:
    """Returns the ids of a list that is what its name says."""
    try:
        found = vectors.open_ids(storage.local(path))
        return found if _name_of(found) == path.name else None
    except (pa.ArrowException, ValueError, KeyError):
        return None


def open_list(folder: Place, listed: Receipt) -> pa.Array:
    """Returns the ids of a list.

    Raises:
        ValueError: Its file is missing or altered.
    """
    return vectors.open_ids(artifacts.check_file(folder, listed.files[0]))


def find(ids: pa.Array, wanted: pa.Array) -> IntArray:
    """Returns the rows of the ids that are wanted, in order.

    >>> find(pa.array(["a", "b", "c"]), pa.array(["c", "x", "a"])).tolist()
    [0, 2]
    """
    return np.flatnonzero(pc.is_in(ids, value_set=wanted.cast(ids.type)).to_numpy(zero_copy_only=False))


def unknown(store: EmbeddingStore, ids: pa.Array) -> list[str]:
    """Returns the ids that no document has."""
    for receipt in store.manifest.receipts:
        if not len(ids):
            break
        here = vectors.read_ids(store.folder / receipt.files[0].path)
        ids = ids.filter(pc.invert(pc.is_in(ids, value_set=here)))
    names: list[str] = ids.to_pylist()
    return names


def bury(folder: Place, shard: Receipt, listed: Receipt) -> Receipt:
    """Writes which rows of a shard are on the list, and returns a receipt: so many documents less than the shard's says.

    Another list has another file, so the tombstones before stay whole.
    """
    record = _ids_of(shard)
    rows = find(vectors.open_ids(storage.local(folder / record.path, record.digest)), open_list(folder, listed))
    name = f"{shard.key}-{listed.files[0].digest[:16]}.npy"
    with storage.publish(folder / REMOVED / name) as temporary:
        with temporary.open("wb") as file:
            np.save(file, rows)
        marks = FileRecord.named(f"{REMOVED}/{name}", temporary)
    details = {"shard": record.digest, "list": listed.files[0].digest}
    return Receipt(key_of(shard), -len(rows), (marks,), details)


def key_of(shard: Receipt) -> str:
    """Returns the key of a shard's tombstones."""
    return f"{REMOVED}/{shard.key}"


def is_clean(shard: Receipt, listed: Receipt, finished: Mapping[str, Receipt]) -> bool:
    """Returns whether a shard finds nothing on the list: by its build, or by tombstones for this build and this list."""
    tombstones = finished.get(key_of(shard))
    current = {"shard": _ids_of(shard).digest, "list": listed.files[0].digest}
    return leaves_out(shard, listed) or (tombstones is not None and tombstones.details == current)


def leaves_out(shard: Receipt, listed: Receipt) -> bool:
    """Returns whether a shard was built without the documents on the list, so that it needs no tombstones."""
    return bool(shard.details.get("list") == listed.files[0].digest)


def _ids_of(shard: Receipt) -> FileRecord:
    return next(file for file in shard.files if PurePosixPath(file.path).name == IDS)


def _in_order(ids: Iterable[str]) -> pa.Array:
    return pa.array(sorted(set(ids)), pa.large_string())
