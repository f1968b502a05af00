"""Work plans as pure code: which rows make a unit, which units make a shard, which split a key falls into, whose a chunk is.

A plan depends on the corpus and the sizes asked for only, never on how many workers will do it: a run that is resumed on a
larger cluster finds the same units.
"""

import bisect
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of a corpus: its name below the corpus, the SHA-256 of its bytes, and its number of rows."""

    name: str
    digest: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows ``start`` to ``stop`` (exclusive) of one input file: what one worker does in one go."""

    name: str
    digest: str
    start: int
    stop: int

    @classmethod
    def of(cls, key: str, slot: str, digest: str) -> "Unit":
        """Returns the unit with this key and slot, given the whole digest of its file."""
        name, _, start = slot.rpartition(":")
        return cls(name, digest, int(start), int(key.rpartition("-")[2]))

    @property
    def key(self) -> str:
        """Identity of the content: another byte in the file is another key, another name is not."""
        return f"{self.digest[:24]}-{self.start:010d}-{self.stop:010d}"

    @property
    def title(self) -> str:
        """File and rows (the first is 0, the last is not among them), for people."""
        return f"{self.name}, rows {self.start} to {self.stop}"

    @property
    def slot(self) -> str:
        """Place in the corpus: stays when the file's content changes, and so keeps the unit in its shard."""
        return f"{self.name}:{self.start}"

    @property
    def num_rows(self) -> int:
        """Rows of the input in this unit, those without text included."""
        return self.stop - self.start


def plan_units(files: Iterable[InputFile], unit_rows: int) -> list[Unit]:
    """Returns the units of a corpus: every row of every file in exactly one, none with more than ``unit_rows`` rows.

    Rows of a file are spread evenly, so that no unit is a small rest.

    >>> [unit.num_rows for unit in plan_units([InputFile("a", "0", 10)], unit_rows=4)]
    [3, 3, 4]
    """
    units = []
    for file in files:
        count = -(-file.num_rows // unit_rows)
        edges = [file.num_rows * i // count for i in range(count + 1)] if count else []
        units += [Unit(file.name, file.digest, start, stop) for start, stop in itertools.pairwise(edges)]
    return units


def sample_units(files: Sequence[InputFile], num_parts: int, part_rows: int) -> list[Unit]:
    """Returns places of a corpus to look at: one in each of ``num_parts`` equal stretches of it, anywhere there, always the same.

    A place ends with its file. Of a corpus with no more rows than are to be looked at, all rows are.

    >>> [unit.num_rows for unit in sample_units([InputFile("a", "0", 6)], num_parts=2, part_rows=3)]
    [3, 3]
    """
    total = sum(file.num_rows for file in files)
    if total <= num_parts * part_rows:
        return plan_units(files, max(-(-total // num_parts), 1))
    ends, places = list(itertools.accumulate(file.num_rows for file in files)), []
    for part in range(num_parts):
        first, room = total * part // num_parts, total // num_parts - part_rows
        row = first + int.from_bytes(sample_rank(str(part), "place")[:8], "big") % (room + 1)
        number = bisect.bisect_right(ends, row)
        file, start = files[number], row - (ends[number] - files[number].num_rows)
        places.append(Unit(file.name, file.digest, start, min(start + part_rows, file.num_rows)))
    return places


def assign_shards(rows_by_slot: Mapping[str, int], num_shards: int, previous: Mapping[str, int]) -> dict[str, int]:
    """Returns the shard of every slot: old slots stay where they were, new files go to the emptiest shard.

    A first build cuts the slots, in their order, into runs of about equal rows. A file that has grown puts its new slots
    beside its old ones, so that changing or removing a file touches its own shards only. The shards that an earlier build
    had stay, even where ``num_shards`` is smaller than their count.

    >>> assign_shards({"a:0": 5, "b:0": 5, "c:0": 10}, 2, {})
    {'a:0': 0, 'b:0': 0, 'c:0': 1}
    >>> assign_shards({"a:0": 5, "c:0": 10, "c:10": 9, "d:0": 1}, 2, {"a:0": 0, "b:0": 0, "c:0": 1})
    {'a:0': 0, 'c:0': 1, 'c:10': 1, 'd:0': 0}
    """
    kept = {slot: previous[slot] for slot in rows_by_slot if slot in previous}
    if not kept:
        return _cut_evenly(rows_by_slot, num_shards)
    shard_of_file = {slot.rpartition(":")[0]: shard for slot, shard in kept.items()}
    load = dict.fromkeys(range(max(num_shards, *(shard + 1 for shard in kept.values()))), 0)
    for slot, shard in kept.items():
        load[shard] += rows_by_slot[slot]
    assigned = {}
    for slot, rows in rows_by_slot.items():
        if slot not in kept:
            emptiest = min(load, key=lambda shard: (load[shard], shard))
            kept[slot] = shard_of_file.setdefault(slot.rpartition(":")[0], emptiest)
            load[kept[slot]] += rows
        assigned[slot] = kept[slot]
    return assigned


def _cut_evenly(rows_by_slot: Mapping[str, int], num_shards: int) -> dict[str, int]:
    total, done, shard = sum(rows_by_slot.values()), 0, 0
    assigned: dict[str, int] = {}
    for remaining, (slot, rows) in zip(range(len(rows_by_slot), 0, -1), rows_by_slot.items(), strict=True):
        is_full = done >= total * (shard + 1) / num_shards
        must_open = num_shards - shard - 1 >= remaining
        if assigned and shard < num_shards - 1 and (is_full or must_open):
            shard += 1
        assigned[slot] = shard
        done += rows
    return assigned


def choose_split(key: str, fractions: Mapping[str, float], salt: str) -> str:
    """Returns the split of a key by its hash: the same for ever, whatever other keys come or go.

    Args:
        key: An id, or the name of the group whose members must stay together.
        fractions: Share of each split; the last one takes what the others leave.
        salt: Another salt gives another, equally fixed, division.

    >>> choose_split("numpy", {"test": 0.2, "dev": 0.1, "train": 0.7}, salt="matryoshka")
    'train'
    """
    position = int.from_bytes(hashlib.sha256((salt + key).encode()).digest()[:8], "big") / 2**64
    for split, share in fractions.items():
        if position < share:
            return split
        position -= share
    return list(fractions)[-1]


def sample_rank(key: str, salt: str) -> bytes:
    """Returns the place of a key in an order that its hash decides: the first so many keys are a sample."""
    return hashlib.sha256((salt + key).encode()).digest()


def sample_keys(keys: Sequence[str], limit: int, salt: str) -> list[str]:
    """Returns at most ``limit`` of the keys, chosen by hash, in their given order: a larger limit only adds."""
    chosen = set(sorted(keys, key=lambda key: sample_rank(key, salt))[:limit])
    return [key for key in keys if key in chosen]


def chunk_id(document_id: str, start: int, end: int) -> str:
    """Returns the id of characters ``start`` to ``end`` (exclusive) of a document."""
    return f"{document_id}#{start}-{end}"


def document_of(chunk: str) -> str:
    """Returns the id of the document that a chunk was cut from, given the chunk's id.

    The document's own id may hold anything, so the chunk's is read from the right.

    Raises:
        ValueError: It is not the id of a chunk.

    >>> document_of(chunk_id("report#4-2", 0, 512))
    'report#4-2'
    """
    document, separator, span = chunk.rpartition("#")
    start, dash, end = span.partition("-")
    if not (separator and dash and start.isdecimal() and end.isdecimal()):
        raise ValueError(f"'{chunk}': not the id of a chunk (document#start-end). Prepare the data again.")
    return document
