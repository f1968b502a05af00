"""Labelled text: messages of one label answer one another.

Documents are the train split's messages. Queries are the messages of every split. For those of dev and test, relevant is
every document of their label; for those of train nothing is judged, as that is a square of judgements, and a message would
be its own answer: a training pair is a message with another one of its label, and pairs and documents name their label.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from matryoshka import partitions, sources, splits
from matryoshka.assembly import Document, Judgement, Layout, Link, Query, Shelves, SplitDealer
from matryoshka.cleaning import Rules, Tally, fold_query
from matryoshka.partitions import Dealer, partition_of, text_id
from matryoshka.sources import Column, Slice
from matryoshka.splits import TRAIN, Cutoffs, Sample, SplitRule

ALONE = "alone under its label in train"

_MESSAGES, _SETTLED, _GROUPS = "messages", "settled", "groups"


class Message(NamedTuple):
    """A text with a label; its key is the same for texts that differ in white space or case only."""

    key: str
    place: int
    text: str
    label: str
    split: str


@dataclass(frozen=True, slots=True)
class LabelColumns:
    """Which columns of a file hold what; None: nothing does."""

    text: str
    label: str
    group: str | None = None
    split: str | None = None

    def wanted(self) -> list[Column]:
        """Returns the columns to read."""
        return [Column(self.text), *(Column(name, "id") for name in (self.label, self.group, self.split) if name)]


def read_rows(part: Slice, columns: LabelColumns, rule: SplitRule) -> Iterator[Message]:
    """Yields the rows of a slice of a file; rows without a text have no key.

    Raises:
        ValueError: As ``sources.read``; or a row has no label or no group, or an unknown split.
    """
    optional = [name for name in (columns.group, columns.split) if name]
    of_file = rule.of_path(part.path)
    for place, (text, label, *more) in sources.read(part, columns.wanted()):
        key = text_id("d", fold_query(text)) if text.strip() else ""
        own = dict(zip(optional, more, strict=True))
        where = sources.describe_place(part.path, place)
        if not label or not all(own.values()):
            raise ValueError(f"{where} has no label, group or split. Fill the column, or take the row out.")
        split = splits.checked(own[columns.split], where) if columns.split else of_file
        yield Message(key, place, text, label, split or rule.of(own[columns.group] if columns.group else key))


def take(layout: Layout, rules: Rules, task: str, rows: Iterable[Message]) -> Tally:
    """Deals messages out by text, and puts them on shelves; empty and short ones are left out."""
    dropped: Counter[str] = Counter()
    shelves = Shelves(layout)
    with Dealer(layout.folder(_MESSAGES), task, Message, layout.num_partitions) as dealer:
        for row in rows:
            if not row.key or len(row.text.strip()) < rules.min_document:
                dropped["too short" if row.key else "empty"] += 1
                continue
            shelves.add(Document(row.place, row.key, row.text))
            dealer.add(partition_of(row.key, layout.num_partitions), row)
        shelves.close()
    return Tally(shelves.sizes, dropped)


def settle_messages(layout: Layout, rules: Rules, number: int) -> Tally:
    """Keeps every text of a partition once, in one split and under one label."""
    dropped: Counter[str] = Counter()
    sample = Sample(rules.limits, rules.splits.salt)
    rows = sorted(partitions.read(layout.folder(_MESSAGES), Message, number), key=lambda row: (row.key, *_strength(row)))
    with Dealer(layout.folder(f"{_SETTLED}/{number:06d}"), "settled", Message, 1) as settled:
        for key, group in groupby(rows, key=attrgetter("key")):
            first, *others = group
            settled.add(0, first)
            sample.add(first.split, key)
            dropped.update(_why(first, row) for row in others)
    return Tally((), dropped, sample.cut())


def _strength(row: Message) -> tuple[int, int]:
    return splits.STRENGTH[row.split], row.place


def _why(kept: Message, dropped: Message) -> str:
    if kept.split != dropped.split:
        return "in another split"
    return "duplicate" if kept.label == dropped.label else "under another label"


def deal_messages(layout: Layout, rules: Rules, cutoffs: Cutoffs, number: int) -> Tally:
    """Deals the kept messages of a partition out by label, as far as the limits let them in."""
    dropped: Counter[str] = Counter()
    with Dealer(layout.folder(_GROUPS), f"{number:06d}", Message, layout.num_partitions) as dealer:
        for row in partitions.read(layout.folder(f"{_SETTLED}/{number:06d}"), Message, 0):
            is_let_in = splits.is_let_in(row.key, row.split, cutoffs, rules.splits.salt)
            dropped["over the limit"] += not is_let_in
            # One that is not let in has no split, but still counts as one of its label.
            own = row if is_let_in else row._replace(split="")
            dealer.add(partition_of(text_id("l", row.label), layout.num_partitions), own)
    return Tally(dropped=+dropped)


def settle_labels(layout: Layout, rules: Rules, number: int) -> Tally:
    """Makes pairs and judgements within every label of a partition; a label with a single message is a fault.

    The messages of a label stand in a circle, in the order of their hashes: each is a pair with the next ones.
    """
    dropped: Counter[str] = Counter()
    faults: list[tuple[int, int, str]] = []
    rows = sorted(
        partitions.read(layout.folder(_GROUPS), Message, number), key=lambda row: (text_id("l", row.label), row.label, row.key)
    )
    with SplitDealer(layout, f"{number:06d}") as dealer:
        for label, group in groupby(rows, key=attrgetter("label")):
            messages = list(group)
            if len(messages) == 1:
                faults.append((messages[0].place, messages[0].place, f"label '{label}' has a single text"))
            documents = [row for row in messages if row.split == TRAIN]
            dropped[ALONE] += len(documents) == 1
            _judge(dealer, [row for row in messages if row.split], documents, dropped)
            _link(dealer, documents, rules.pairs_per_text)
    return Tally((), +dropped, faults=faults)


def _judge(dealer: SplitDealer, messages: Sequence[Message], documents: Sequence[Message], dropped: Counter[str]) -> None:
    if not documents:
        dropped["no document of its label"] += len(messages)
        return
    for row in messages:
        query_id = _query_id(row)
        dealer.add_query(row.split, Query(query_id, row.text))
        for document in documents if row.split != TRAIN else ():
            dealer.add_judgement(row.split, Judgement(query_id, document.key, 1))


def _link(dealer: SplitDealer, documents: Sequence[Message], pairs_per_text: int) -> None:
    for number, row in enumerate(documents):
        dealer.use(row.place)
        for step in range(1, min(pairs_per_text, len(documents) - 1) + 1):
            other = documents[(number + step) % len(documents)]
            dealer.add_link(Link(other.place, _query_id(row), row.text, other.key, TRAIN, row.label, [], []))


def _query_id(row: Message) -> str:
    return f"q{row.key[1:]}"
