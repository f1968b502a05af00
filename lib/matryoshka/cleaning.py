"""Queries and the documents that answer them, made clean: texts of their own, each query in one split, no pair twice.

Three passes, each over parts that fit in memory: over the input (empty and short texts), over the documents (one text is
one document, whatever its ids), over the queries (one split, no duplicates, no contradictions). Rows move between them
through ``partitions``, documents' texts excepted, which stay on their shelves.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import NamedTuple

from matryoshka import partitions, sources, splits
from matryoshka.assembly import Document, Judgement, Layout, Link, Query, Shelves, SplitDealer
from matryoshka.partitions import Dealer, partition_of, text_id
from matryoshka.sources import Column, Slice
from matryoshka.splits import Cutoffs, Sample, SplitRule

_CANDIDATES, _IDS, _CLAIMS, _KEPT = "candidates", "ids", "claims", "kept"


class Raw(NamedTuple):
    """A row of the input: a query, a document that answers it, and texts that do not."""

    place: int
    query: str
    positive: str
    negatives: list[str]
    id: str
    group: str
    split: str


class Candidate(NamedTuple):
    """A query and a text (named by its hash): number 0 of its row is the one that answers it, the others do not."""

    document_key: str
    place: int
    id: str
    split: str
    query: str
    number: int
    negative: str


class Claim(NamedTuple):
    """A query and a document, as it is to be judged query by query."""

    query_id: str
    place: int
    query: str
    document_id: str
    home: int
    split: str
    number: int
    negative: str


class Named(NamedTuple):
    """A document id and the text that it stands for."""

    id: str
    document_key: str
    place: int


@dataclass(frozen=True, slots=True)
class PairColumns:
    """Which columns of a file hold what; None: nothing does."""

    query: str
    positive: str
    negatives: str | None = None
    id: str | None = None
    group: str | None = None
    split: str | None = None

    def wanted(self) -> list[Column]:
        """Returns the columns to read."""
        ids = (self.id, self.group, self.split)
        found = [Column(self.query), Column(self.positive), *(Column(name, "id") for name in ids if name)]
        return [*found, Column(self.negatives, "texts")] if self.negatives else found


@dataclass(frozen=True, slots=True)
class Rules:
    """What is clean.

    Attributes:
        splits: How a row gets its split.
        limits: Most queries of each split.
        min_query: Fewest characters of a query.
        min_document: Fewest characters of a document.
        one_to_one: Whether a query keeps one document only, and a document one query.
        pairs_per_text: For labelled text: with how many others of its label a text is a training pair.
    """

    splits: SplitRule
    limits: Mapping[str, int | None] = field(default_factory=dict)
    min_query: int = 1
    min_document: int = 1
    one_to_one: bool = False
    pairs_per_text: int = 1


@dataclass(frozen=True, slots=True)
class Tally:
    """What a task counted: shelves that it filled, pairs by split, what it left out by reason, faults by place."""

    sizes: Sequence[tuple[int, int]] = ()
    dropped: Counter[str] = field(default_factory=Counter)
    lowest: Mapping[str, list[bytes]] = field(default_factory=dict)
    faults: Sequence[tuple[int, int, str]] = ()


def fold(text: str) -> str:
    """Returns a text as documents are compared: without regard to white space."""
    return " ".join(text.split())


def fold_query(text: str) -> str:
    """Returns a text as queries are compared: without regard to white space and case."""
    return fold(text).casefold()


def read_rows(part: Slice, columns: PairColumns, rule: SplitRule) -> Iterator[Raw]:
    """Yields the rows of a slice of a file.

    Raises:
        ValueError: As ``sources.read``; or a row has no id or group where the file has a column of them, or an unknown split.
    """
    wanted = columns.wanted()
    names = [column.name for column in wanted]
    at = {key: names.index(name) for key in ("id", "group", "split") if (name := getattr(columns, key))}
    of_file = rule.of_path(part.path)
    for place, values in sources.read(part, wanted):
        own = {key: values[position] for key, position in at.items()}
        if not all(own.get(key, "x") for key in ("id", "group")):
            where = sources.describe_place(part.path, place)
            raise ValueError(f"{where} has no id or no group. Fill the column, or leave its option out.")
        split = splits.checked(own["split"], sources.describe_place(part.path, place)) if "split" in own else of_file
        negatives = values[-1] if columns.negatives else []
        yield Raw(place, values[0], values[1], negatives, own.get("id", ""), own.get("group", ""), split)


def take(layout: Layout, rules: Rules, task: str, rows: Iterable[Raw]) -> Tally:
    """Deals rows out by document, and puts their texts on shelves; empty and short ones are left out."""
    dropped: Counter[str] = Counter()
    shelves = Shelves(layout)
    with Dealer(layout.folder(_CANDIDATES), task, Candidate, layout.num_partitions) as dealer:
        for row in rows:
            reason = _fault(row, rules)
            if reason:
                dropped[reason] += 1
                continue
            key = text_id("d", fold(row.positive))
            shelves.add(Document(row.place, row.id or key, row.positive))
            split = row.split or rules.splits.of(row.group or fold_query(row.query))
            dealer.add(partition_of(key, layout.num_partitions), Candidate(key, row.place, row.id, split, row.query, 0, ""))
            for number, negative in enumerate(filter(None, map(str.strip, row.negatives)), start=1):
                other = text_id("d", fold(negative))
                candidate = Candidate(other, row.place, "", split, row.query, number, negative)
                dealer.add(partition_of(other, layout.num_partitions), candidate)
        shelves.close()
    return Tally(shelves.sizes, dropped)


def _fault(row: Raw, rules: Rules) -> str:
    query, document = len(row.query.strip()), len(row.positive.strip())
    if not query or not document:
        return "empty"
    return "too short" if query < rules.min_query or document < rules.min_document else ""


def settle_documents(layout: Layout, rules: Rules, number: int) -> Tally:
    """Gives every text of a partition its id, which is that of its first row, and deals its pairs out by query."""
    dropped: Counter[str] = Counter()
    rows = sorted(
        partitions.read(layout.folder(_CANDIDATES), Candidate, number), key=attrgetter("document_key", "place", "number")
    )
    task = f"{number:06d}"
    with (
        Dealer(layout.folder(_CLAIMS), task, Claim, layout.num_partitions) as claims,
        Dealer(layout.folder(_IDS), task, Named, layout.num_partitions) as ids,
    ):
        for key, group in groupby(rows, key=attrgetter("document_key")):
            candidates = list(group)
            positives = [row for row in candidates if not row.number]
            first = positives[0] if positives else candidates[0]
            best = min(positives, key=_by_strength) if rules.one_to_one else None
            for row in candidates:
                if best and not row.number and row is not best:
                    dropped["duplicate document"] += 1
                    continue
                query_id = text_id("q", fold_query(row.query))
                claim = Claim(query_id, row.place, row.query, first.id or key, first.place, row.split, row.number, row.negative)
                claims.add(partition_of(query_id, layout.num_partitions), claim)
            places = {row.id: row.place for row in reversed(positives) if row.id}  # the first one's, by id
            for name, place in sorted(places.items(), key=itemgetter(1)):
                ids.add(partition_of(text_id("i", name), layout.num_partitions), Named(name, key, place))
    return Tally(dropped=dropped)


def _by_strength(row: Candidate | Claim) -> tuple[int, int]:
    return splits.STRENGTH[row.split], row.place


def settle_queries(layout: Layout, rules: Rules, number: int) -> Tally:
    """Decides which pairs of the queries of a partition are kept, and finds what contradicts itself."""
    dropped, faults = Counter[str](), list(_ambiguous_ids(layout, number))
    sample = Sample(rules.limits, rules.splits.salt)
    rows = sorted(partitions.read(layout.folder(_CLAIMS), Claim, number), key=attrgetter("query_id", "place", "number"))
    with Dealer(layout.folder(f"{_KEPT}/{number:06d}"), "kept", Claim, 1) as kept:
        for query_id, group in groupby(rows, key=attrgetter("query_id")):
            claims = list(group)
            faults += _contradictions(claims)
            judged = list(_judge([row for row in claims if not row.number], rules, dropped))
            if judged:
                sample.add(judged[0].split, query_id)
            for row in judged + [row for row in claims if judged and row.number]:
                kept.add(0, row)
    return Tally((), dropped, sample.cut(), faults)


def _judge(positives: Sequence[Claim], rules: Rules, dropped: Counter[str]) -> Iterator[Claim]:
    """Yields the pairs of a query that are kept, all of them in its one split: no answer that is known is forgotten."""
    seen: set[str] = set()
    ordered = sorted(positives, key=_by_strength)
    for row in ordered:
        if row.document_id in seen:
            dropped["duplicate"] += 1
        elif seen and rules.one_to_one:
            dropped["duplicate query"] += 1
        else:
            seen.add(row.document_id)
            yield row._replace(split=ordered[0].split)


def _contradictions(claims: Sequence[Claim]) -> Iterator[tuple[int, int, str]]:
    positive = {row.document_id: row.place for row in reversed(claims) if not row.number}
    for row in claims:
        if row.number and row.document_id in positive:
            places = sorted((positive[row.document_id], row.place))
            yield places[0], places[1], f"the same text answers '{row.query:.60}' and does not"


def _ambiguous_ids(layout: Layout, number: int) -> Iterator[tuple[int, int, str]]:
    places: dict[str, dict[str, int]] = defaultdict(dict)
    for row in partitions.read(layout.folder(_IDS), Named, number):
        places[row.id][row.document_key] = row.place
    for name, found in places.items():
        if len(found) > 1:
            first, second = sorted(found.values())[:2]
            yield first, second, f"id '{name}' stands for two different texts"


def deal_pairs(layout: Layout, rules: Rules, cutoffs: Cutoffs, number: int) -> Tally:
    """Hands the kept pairs of a partition on to the dataset's files, as far as the limits let them in."""
    dropped: Counter[str] = Counter()
    rows = partitions.read(layout.folder(f"{_KEPT}/{number:06d}"), Claim, 0)
    with SplitDealer(layout, f"{number:06d}") as dealer:
        for query_id, group in groupby(rows, key=attrgetter("query_id")):
            claims = list(group)
            positives = [row for row in claims if not row.number]
            split = positives[0].split
            if not splits.is_let_in(query_id, split, cutoffs, rules.splits.salt):
                dropped["over the limit"] += len(positives)
                continue
            negatives = {row.document_id: row.negative for row in claims if row.number}
            dealer.add_query(split, Query(query_id, positives[0].query))
            for row in positives:
                dealer.add_judgement(split, Judgement(query_id, row.document_id, 1))
                dealer.use(row.home)
                texts, ids = list(negatives.values()), list(negatives)
                dealer.add_link(Link(row.home, query_id, positives[0].query, row.document_id, split, "", texts, ids))
    return Tally(dropped=dropped)
