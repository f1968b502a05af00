"""From rows that are decided on to the files of a dataset: parts of the corpus, training pairs, queries and judgements.

However its data came, a dataset is made of the same rows: documents on shelves, in the order of the input; links, which
tie a query to a document; and for every split its queries and judgements.
"""

import bisect
import functools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matryoshka import chunks, corpus, leaks, pairs, partitions
from matryoshka.artifacts import FileRecord, Receipt
from matryoshka.chunks import Chunk, ChunkPlan
from matryoshka.leaks import NOWHERE, References
from matryoshka.partitions import Dealer
from matryoshka.splits import DEV, STRENGTH, TEST, TRAIN, strongest
from matryoshka.storage import Place

SPLITS = tuple(STRENGTH)
NEAR, SHARED = "near-duplicate of dev or test", "document that answers dev or test too"
ALL_QUERIES = -1

_SHELF_ROWS = 4_096
_PART_ROWS = 8_192
_DOCUMENTS, _USED, _LINKS, _QUERIES, _QRELS, _REFERENCES = "documents", "used", "links", "queries", "qrels", "references"


class Document(NamedTuple):
    """A text that may become a document."""

    place: int
    id: str
    text: str


class Used(NamedTuple):
    """The place of a text that does become a document."""

    home: int


class Link(NamedTuple):
    """A query and the document that answers it, whose text is at ``home``."""

    home: int
    query_id: str
    query: str
    document_id: str
    split: str
    label: str
    negatives: list[str]
    negative_ids: list[str]


class Query(NamedTuple):
    """A query."""

    id: str
    text: str


class Judgement(NamedTuple):
    """How well a document answers a query."""

    query_id: str
    document_id: str
    grade: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where rows are on their way, and what becomes of them.

    Attributes:
        work: Folder for rows that are on their way; the dataset's files are made in ``out`` below it.
        num_partitions: Into how many partitions rows are dealt out by their keys.
        keeps_all: Whether every text becomes a document, used or not.
        extras: Further columns of the training pairs: ``label``, ``negatives``, ``negative_ids``.
        chunk_plan: How documents are cut, if they are.
        near_duplicates: Similarity from which on a training pair is a leak; None: nothing is.
        keeps_shared: Whether a document that answers dev or test may answer a training pair too, as whoever made the splits says.
        parts: The shelves of each part of the corpus.
    """

    work: Place
    num_partitions: int
    keeps_all: bool = False
    extras: tuple[str, ...] = ()
    chunk_plan: ChunkPlan | None = None
    near_duplicates: float | None = None
    keeps_shared: bool = False
    parts: tuple[tuple[int, ...], ...] = ()

    @property
    def out(self) -> Place:
        """Where the dataset's files are made."""
        return self.work / "out"

    def folder(self, kind: str) -> Place:
        """Returns where rows of a kind are on their way."""
        return self.work / kind

    def part_of(self, home: int) -> int:
        """Returns the part of the corpus that a place belongs to."""
        return bisect.bisect_right(self.parts, home, key=lambda shelves: shelves[0]) - 1


class Shelves:
    """Puts texts on shelves, in the order of their places; ``sizes`` tells first place and rows of each shelf."""

    def __init__(self, layout: Layout) -> None:
        self._folder = layout.folder(_DOCUMENTS)
        self._rows: list[Document] = []
        self.sizes: list[tuple[int, int]] = []

    def add(self, document: Document) -> None:
        """Adds a text."""
        self._rows.append(document)
        if len(self._rows) == _SHELF_ROWS:
            self.close()

    def close(self) -> None:
        """Writes what is left."""
        if self._rows:
            first = self._rows[0].place
            partitions.write_batches(self._folder / f"{first:020d}.arrow", Document, [self._rows])
            self.sizes.append((first, len(self._rows)))
        self._rows = []


def pack_parts(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """Returns which shelves make a part of the corpus, each with at most 8,192 rows if it has several.

    >>> pack_parts([(0, 4_096), (1, 4_096), (2, 1)])
    ((0, 1), (2,))
    """
    parts: list[list[int]] = []
    room = 0
    for first, num_rows in sorted(sizes):
        if not parts or num_rows > room:
            parts.append([])
            room = _PART_ROWS
        parts[-1].append(first)
        room -= num_rows
    return tuple(map(tuple, parts))


class SplitDealer:
    """Deals out, for one task, what the dataset's files are made of: queries and judgements by split, links by part."""

    def __init__(self, layout: Layout, task: str) -> None:
        num_parts = len(layout.parts)
        self._layout = layout
        self._queries = Dealer(layout.folder(_QUERIES), task, Query, len(SPLITS))
        self._qrels = Dealer(layout.folder(_QRELS), task, Judgement, len(SPLITS))
        self._links = Dealer(layout.folder(_LINKS), task, Link, num_parts)
        self._used = Dealer(layout.folder(_USED), task, Used, num_parts)
        self._dealers: tuple[Dealer[Any], ...] = (self._queries, self._qrels, self._links, self._used)

    def add_query(self, split: str, query: Query) -> None:
        """Adds a query."""
        self._queries.add(STRENGTH[split], query)

    def add_judgement(self, split: str, judgement: Judgement) -> None:
        """Adds a judgement."""
        self._qrels.add(STRENGTH[split], judgement)

    def add_link(self, link: Link) -> None:
        """Adds a link."""
        self._links.add(self._layout.part_of(link.home), link)

    def use(self, home: int) -> None:
        """Makes a document of the text at a place."""
        self._used.add(self._layout.part_of(home), Used(home))

    def __enter__(self) -> "SplitDealer":
        return self

    def __exit__(self, *failure: Any) -> None:
        for dealer in self._dealers:
            dealer.__exit__(*failure)


def save_references(layout: Layout, number: int) -> None:
    """Saves what training pairs may not come close to: documents that answer dev and test, of one part; or all their queries."""
    path = layout.folder(_REFERENCES) / f"{number + 1:05d}.npz"
    if number == ALL_QUERIES:
        found = [
            (split, NOWHERE, query.text)
            for split in (TEST, DEV)
            for query in partitions.read(layout.folder(_QUERIES), Query, STRENGTH[split])
        ]
        leaks.save(path, found)
        return
    splits: dict[int, str] = {}
    for link in partitions.read(layout.folder(_LINKS), Link, number):
        if link.split != TRAIN:
            splits[link.home] = strongest((link.split, splits.get(link.home, link.split)))
    shelved = _shelved(layout, number) if splits else ()
    found_here = (document for document in shelved if document.place in splits)
    leaks.save(path, ((splits[document.place], document.place, document.text) for document in found_here))


def count_dev_in_test(layout: Layout) -> int:
    """Returns how many texts of dev (queries, and documents that answer them) are near-duplicates of one of test."""
    return _references(layout).count_near(DEV, TEST)


def _references(layout: Layout) -> References:
    return _load_references(layout.folder(_REFERENCES), layout.near_duplicates or 1.0)


@functools.lru_cache(maxsize=1)  # a run's folder has a path of its own
def _load_references(folder: Place, threshold: float) -> References:
    return References.load(folder, threshold)


def _shelved(layout: Layout, number: int) -> Iterator[Document]:
    for first in layout.parts[number]:
        yield from partitions.read_file(layout.folder(_DOCUMENTS) / f"{first:020d}.arrow", Document)


@dataclass(frozen=True, slots=True)
class Part:
    """What became of one part of the corpus.

    Attributes:
        corpus: The file of its documents, below ``Layout.out``.
        pairs: The file of its training pairs, there too.
        num_documents: Its documents, whether they are cut or not.
        near: Pairs left out as near-duplicates, by the split that has the other text.
        num_shared: Pairs whose document answers dev or test too; left out unless ``Layout.keeps_shared``.
    """

    corpus: Receipt
    pairs: Receipt
    num_documents: int
    near: Counter[str]
    num_shared: int


def assemble_part(layout: Layout, number: int) -> Part:
    """Writes one part of the corpus, and the training pairs whose documents are in it."""
    links: dict[int, list[Link]] = defaultdict(list)
    for link in partitions.read(layout.folder(_LINKS), Link, number):
        links[link.home].append(link)
    used = {row.home for row in partitions.read(layout.folder(_USED), Used, number)}
    keys = f"{pairs.CORPUS}/{number:05d}", f"{pairs.PAIRS}/{number:05d}"
    is_labelled = "label" in layout.extras
    paths = [layout.out / f"{key}.parquet" for key in keys]
    num_documents, num_shared, near = 0, 0, Counter[str]()
    with (
        corpus.RowWriter(
            paths[0], pairs.corpus_columns(is_chunked=bool(layout.chunk_plan), is_labelled=is_labelled)
        ) as corpus_file,
        corpus.RowWriter(paths[1], pairs.pair_columns(layout.extras)) as pairs_file,
    ):
        for document in _shelved(layout, number):
            if not layout.keeps_all and document.place not in used:
                continue
            num_documents += 1
            found = chunks.cut(document.text, layout.chunk_plan) if layout.chunk_plan else []
            label = (_label_of(links[document.place]),) if is_labelled else ()
            for row in _corpus_rows(document, found):
                corpus_file.add((*row, *label))
            own = [link for link in links[document.place] if link.split == TRAIN]
            is_shared = len(own) < len(links[document.place])
            kept = _without_leaks(layout, document, own, near) if layout.keeps_shared or not is_shared else []
            num_shared += len(kept if layout.keeps_shared else own) if is_shared else 0
            for link in kept:
                pairs_file.add(_pair_row(layout, link, document, found))
    corpus_receipt = _receipt(layout, keys[0], corpus_file.num_rows)
    return Part(corpus_receipt, _receipt(layout, keys[1], pairs_file.num_rows), num_documents, near, num_shared)


def _label_of(links: Sequence[Link]) -> str:
    """Returns the label of a document; one that stands alone under its label has no pair, and needs none."""
    return links[0].label if links else ""


def _corpus_rows(document: Document, found: Sequence[Chunk]) -> list[tuple[Any, ...]]:
    if not found:
        return [(document.id, document.text)]
    return [(chunk.id_in(document.id), chunk.text, document.id, chunk.start, chunk.end) for chunk in found]


def _without_leaks(layout: Layout, document: Document, links: Sequence[Link], near: Counter[str]) -> list[Link]:
    """Returns those training pairs of a document that come close to no other text of dev or test, and counts the others."""
    if not links or layout.near_duplicates is None:
        return list(links)
    references = _references(layout)
    of_document = references.find(document.text, document.place)
    found = [of_document or references.find(link.query) for link in links]
    near.update(split for split in found if split)
    return [link for link, split in zip(links, found, strict=True) if not split]


def _pair_row(layout: Layout, link: Link, document: Document, found: Sequence[Chunk]) -> tuple[Any, ...]:
    document_id, text = document.id, document.text
    if layout.chunk_plan:
        document_id, text = _best_chunk(found, document_id, link.query)
        own = [
            _best_chunk(chunks.cut(negative, layout.chunk_plan), name, link.query)
            for negative, name in zip(link.negatives, link.negative_ids, strict=True)
        ]
        link = link._replace(negatives=[negative for _, negative in own], negative_ids=[name for name, _ in own])
    return (link.query_id, document_id, link.query, text, *(getattr(link, name) for name in layout.extras))


def _best_chunk(found: Sequence[Chunk], document_id: str, query: str) -> tuple[str, str]:
    """Returns id and text of the chunk of a document that has most of a query."""
    chunk = chunks.best_chunk(found, query)
    return chunk.id_in(document_id), chunk.text


def _receipt(layout: Layout, key: str, num_rows: int) -> Receipt:
    return Receipt(key, num_rows, (FileRecord.of(layout.out, layout.out / f"{key}.parquet"),))


def assemble_split(layout: Layout, split: str) -> tuple[Receipt, Receipt]:
    """Writes the queries and the judgements of one split."""
    return (
        _join(layout, _QUERIES, pairs.QUERIES, split, pairs.QUERY_COLUMNS),
        _join(layout, _QRELS, pairs.QRELS, split, pairs.QRELS_COLUMNS),
    )


def _join(layout: Layout, folder: str, name: str, split: str, columns: dict[str, Any]) -> Receipt:
    key = f"{name}/{split}"
    with corpus.RowWriter(layout.out / f"{key}.parquet", columns) as file:
        for batch in partitions.read_whole(layout.folder(folder), STRENGTH[split]):
            file.add_batch(batch)
    return _receipt(layout, key, file.num_rows)
