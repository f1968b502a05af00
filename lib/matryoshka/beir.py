"""BEIR folders: documents, queries and judgements by split, as they are, whatever their size.

Source: Thakur et al. 2021, BEIR, arXiv:2104.08663.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from matryoshka import corpus, partitions, sources, splits
from matryoshka.assembly import Document, Judgement, Layout, Link, Query, Shelves, SplitDealer
from matryoshka.cleaning import Rules, Tally
from matryoshka.partitions import Dealer, partition_of, text_id
from matryoshka.splits import Cutoffs, Sample
from matryoshka.storage import Place

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"

_NAMES, _ASKED, _JUDGED, _SETTLED, _WANTED = "names", "asked", "judged", "settled", "wanted"


class Name(NamedTuple):
    """The id of a document, and where its text is."""

    id: str
    place: int


class Asked(NamedTuple):
    """A query."""

    id: str
    place: int
    text: str


class Judged(NamedTuple):
    """A line of the judgements of a split; ``query`` is known once the query was looked up."""

    query_id: str
    document_id: str
    place: int
    grade: int
    split: str
    query: str


class Wanted(NamedTuple):
    """A document that a query asks for."""

    document_id: str
    query_id: str
    query: str
    split: str


def find_splits(folder: Place) -> dict[str, Place]:
    """Returns the judgements of a BEIR folder by split.

    Raises:
        ValueError: There are none, or for a split that is neither train, dev nor test, or there are two files for one split.
    """
    for name in (CORPUS, QUERIES):
        next(corpus.text_lines(folder / name), None)
    found: dict[str, Place] = {}
    paths: list[Place] = sorted((folder / QRELS).glob("*.tsv"), key=lambda path: path.name)
    for path in paths:
        split = splits.known(path.stem)
        if split is None:
            raise ValueError(f"{path}: no split '{path.stem}'. Name it train.tsv, dev.tsv or test.tsv, or take it out.")
        if split in found:
            raise ValueError(
                f"{path}: {found[split].name} has the judgements of split '{split}' too. Take one out, or join them."
            )
        found[split] = path
    if not found:
        raise ValueError(f"{folder}: no qrels/<split>.tsv. A BEIR folder needs judgements for at least one split.")
    return found


def take_corpus(layout: Layout, _rules: Rules, folder: Place) -> Tally:
    """Puts all documents on shelves; those without text are left out."""
    dropped: Counter[str] = Counter()
    shelves = Shelves(layout)
    path = folder / CORPUS
    with Dealer(layout.folder(_NAMES), "names", Name, layout.num_partitions) as dealer:
        for number, row in corpus.read_json_lines(path, ("_id", "text", "title")):
            place = sources.place_of(0, number)
            text = " ".join(filter(None, (row["title"], row["text"]))).strip()
            dealer.add(_partition(layout, row["_id"]), Name(row["_id"], place))
            dropped["empty"] += not text
            if text:
                shelves.add(Document(place, row["_id"], text))
        shelves.close()
    if not shelves.sizes:
        raise ValueError(f"{path}: no text at all. Check that it is the right file.")
    return Tally(shelves.sizes, +dropped)


def take_queries(layout: Layout, _rules: Rules, folder: Place) -> Tally:
    """Deals all queries out by id."""
    path = folder / QUERIES
    num_texts = 0
    with Dealer(layout.folder(_ASKED), "asked", Asked, layout.num_partitions) as dealer:
        for number, row in corpus.read_json_lines(path, ("_id", "text")):
            text = row["text"].strip()
            dealer.add(_partition(layout, row["_id"]), Asked(row["_id"], sources.place_of(1, number), text))
            num_texts += bool(text)
    if not num_texts:
        raise ValueError(f"{path}: no text at all. Check that it is the right file.")
    return Tally()


def take_judgements(layout: Layout, _rules: Rules, path: Place, split: str, number: int) -> Tally:
    """Deals the judgements of a split out by query; ``number`` is that of their file."""
    with Dealer(layout.folder(_JUDGED), split, Judged, layout.num_partitions) as dealer:
        for line, query, document, grade in corpus.read_qrels(path):
            row = Judged(query, document, sources.place_of(number, line), grade, split, "")
            dealer.add(_partition(layout, query), row)
    return Tally()


def _partition(layout: Layout, name: str) -> int:
    return partition_of(text_id("i", name), layout.num_partitions)


def settle_queries(layout: Layout, rules: Rules, number: int) -> Tally:
    """Looks the judged queries of a partition up, and finds what contradicts itself."""
    sample = Sample(rules.limits, rules.splits.salt)
    texts, faults = _look_up(partitions.read(layout.folder(_ASKED), Asked, number))
    dropped = Counter({"empty query": sum(not text for text in texts.values())})
    rows = sorted(partitions.read(layout.folder(_JUDGED), Judged, number), key=_by_query)
    with Dealer(layout.folder(f"{_SETTLED}/{number:06d}"), "settled", Judged, 1) as settled:
        for (_, query_id), group in groupby(rows, key=lambda row: _by_query(row)[:2]):
            judged = list(group)
            faults += _contradictions(judged)
            if not texts.get(query_id):
                dropped["judged query that is not there"] += query_id not in texts
                continue
            for split in dict.fromkeys(row.split for row in judged):
                sample.add(split, query_id)
            for row in judged:
                settled.add(0, row._replace(query=texts[query_id]))
    return Tally((), +dropped, sample.cut(), faults)


def _by_query(row: Judged) -> tuple[str, str, int]:
    return text_id("i", row.query_id), row.query_id, row.place


def _look_up(rows: Iterator[Asked]) -> tuple[dict[str, str], list[tuple[int, int, str]]]:
    texts: dict[str, str] = {}
    places: dict[str, int] = {}
    faults = []
    for row in sorted(rows, key=attrgetter("place")):
        if row.id in texts:
            faults.append((places[row.id], row.place, f"id '{row.id}' stands more than once"))
        texts[row.id], places[row.id] = row.text, row.place
    return texts, faults


def _contradictions(judged: Sequence[Judged]) -> Iterator[tuple[int, int, str]]:
    first: dict[tuple[str, bool], int] = {}
    for row in judged:
        first.setdefault((row.document_id, row.grade > 0), row.place)
    for (document_id, is_positive), place in first.items():
        other = first.get((document_id, not is_positive))
        if is_positive and other is not None:
            what = f"document '{document_id}' answers query '{judged[0].query_id}' and does not"
            yield min(place, other), max(place, other), what


def deal_queries(layout: Layout, rules: Rules, cutoffs: Cutoffs, number: int) -> Tally:
    """Hands the queries and judgements of a partition on, as far as the limits let them in."""
    dropped: Counter[str] = Counter()
    rows = partitions.read(layout.folder(f"{_SETTLED}/{number:06d}"), Judged, 0)
    with (
        SplitDealer(layout, f"{number:06d}") as dealer,
        Dealer(layout.folder(_WANTED), f"{number:06d}", Wanted, layout.num_partitions) as wanted,
    ):
        for query_id, group in groupby(rows, key=attrgetter("query_id")):
            by_split: dict[str, dict[str, int]] = {}
            for row in group:
                by_split.setdefault(row.split, {})[row.document_id] = row.grade
                text = row.query
            for split, grades in by_split.items():
                if not splits.is_let_in(query_id, split, cutoffs, rules.splits.salt):
                    dropped["over the limit"] += 1
                    continue
                dealer.add_query(split, Query(query_id, text))
                for document_id, grade in grades.items():
                    dealer.add_judgement(split, Judgement(query_id, document_id, grade))
                    if grade > 0:
                        wanted.add(_partition(layout, document_id), Wanted(document_id, query_id, text, split))
    return Tally(dropped=dropped)


def link_documents(layout: Layout, _rules: Rules, number: int) -> Tally:
    """Links queries to the documents of a partition that answer them; judged documents that are not there have no link."""
    dropped: Counter[str] = Counter()
    places: dict[str, int] = {}
    faults = []
    for name in sorted(partitions.read(layout.folder(_NAMES), Name, number), key=attrgetter("place")):
        if name.id in places:
            faults.append((places[name.id], name.place, f"id '{name.id}' stands more than once"))
        places[name.id] = name.place
    with SplitDealer(layout, f"links-{number:06d}") as dealer:
        for row in partitions.read(layout.folder(_WANTED), Wanted, number):
            dropped["judged document that is not there"] += row.document_id not in places
            if row.document_id in places:
                home = places[row.document_id]
                dealer.add_link(Link(home, row.query_id, row.query, row.document_id, row.split, "", [], []))
    return Tally(dropped=+dropped, faults=faults)
