"""The mine stage's work: for each training pair, documents that a model takes for the positive, though they are not.

Candidates are all documents in the order of (score, id), without those that are known to be right and without a text that stood
further up. Those of a window of ranks are looked at, and those that score too near the positive are left alone: they may be
right, and nobody has said so. All scores are inner products of stored vectors at full width, so that a ranking depends neither
on shards nor on batches. Other hardware rounds vectors otherwise: there, candidates whose scores differ by rounding may change
places, and so may those at the edges of the window and of the margin.
"""

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from matryoshka import artifacts, corpus, funnel, positives, storage, topk
from matryoshka.artifacts import FileRecord, Manifest, Receipt
from matryoshka.corpus import Corpus
from matryoshka.funnel import Ranking, Searcher
from matryoshka.indexing import IndexStore
from matryoshka.nested import Float32Array
from matryoshka.positives import Documents, Hashes, IntArray, Relation
from matryoshka.storage import Place
from matryoshka.vectors import Float16Array

PAIRS = "pairs"
QUERIES, DOCUMENTS, KNOWN = "queries", "documents.npy", "known.npy"

Sampling = Literal["top", "random"]
Mask = npt.NDArray[np.bool_]
Rows = Mapping[str, Sequence[Any]]

_BATCH_ROWS = 4_096
_MOST_CELLS = 1 << 21  # candidates in memory at once, those of all shards: about 100 bytes each
_SLACK = 32  # more than a query usually has of known positives


@dataclass(frozen=True, slots=True)
class Rules:
    """Which candidates are taken.

    Attributes:
        num_negatives: Per pair, those that the data brings included.
        first: How many candidates are passed over.
        last: The candidate, counted from 1, after which no more are looked at.
        relative_margin: A negative scores at most the positive's score less this share of it.
        sampling: ``top``: the best; ``random``: any, by the hash of pair and text.

    Source: Moreira et al. 2024, NV-Retriever, arXiv:2407.15831, section 3 (TopK-PercPos; 0.05 is 95% of the positive's score).
    """

    num_negatives: int
    first: int
    last: int
    relative_margin: float
    sampling: Sampling

    def check(self, num_documents: int, place: str) -> None:
        """Checks that a corpus reaches to the end of the window.

        Raises:
            ValueError: It does not.
        """
        if self.last > num_documents:
            raise ValueError(
                f"{place}: {num_documents} documents, the window {self.first}:{self.last} ends beyond them. Pass a --window that"
                f" ends at {num_documents} or before."
            )


@dataclass(frozen=True, slots=True)
class Candidates:
    """The best documents of some pairs, best first; ``is_known`` and ``is_barred`` (for other reasons) are no negatives.

    Shapes: all [B, M].
    """

    scores: Float32Array
    texts: Hashes
    is_known: Mask
    is_barred: Mask

    @property
    def are_left(self) -> Mask:
        """The candidates that ranks are counted in."""
        return ~(self.is_known | self.is_barred | _repeats(self.texts))


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen of some candidates: columns in their order, -1 pads; and how many were known, or too near the positive.

    Shapes: columns [B, num_negatives], num_known [B], num_near [B].
    """

    columns: IntArray
    num_known: IntArray
    num_near: IntArray


def choose(candidates: Candidates, bars: Float32Array, wanted: IntArray, seeds: Hashes, rules: Rules) -> Choice:
    """Returns the negatives of each pair.

    Args:
        candidates: At least ``rules.last`` that are left, or all that there are.
        bars: No negative scores more than this.
        wanted: How many to choose.
        seeds: Decide random choices.
        rules: Window and sampling.

    Shapes: bars [B], wanted [B], seeds [B].
    """
    are_left = candidates.are_left
    ranks: IntArray = np.cumsum(are_left, axis=1) - are_left
    in_window = are_left & (ranks >= rules.first) & (ranks < rules.last)
    is_near = in_window & (candidates.scores > bars[:, None])
    is_good = in_window & ~is_near
    order = np.argsort(_preferences(is_good, candidates.texts, seeds, rules.sampling), axis=1, kind="stable")
    columns = order[:, : rules.num_negatives]
    num_chosen = np.minimum(wanted, is_good.sum(axis=1))
    columns = np.where(np.arange(columns.shape[1]) < num_chosen[:, None], columns, -1)
    num_known = (candidates.is_known & (ranks < rules.last)).sum(axis=1)
    return Choice(columns, num_known, is_near.sum(axis=1))


def _preferences(is_good: Mask, texts: Hashes, seeds: Hashes, sampling: Sampling) -> Hashes:
    """Returns what to sort by: good candidates come first, in their order or in a random one."""
    good = positives.mix(seeds[:, None], texts) >> np.uint64(1) if sampling == "random" else np.zeros(1, np.uint64)
    return np.where(is_good, good, np.iinfo(np.uint64).max)


def _repeats(texts: Hashes) -> Mask:
    """Returns which texts stand further up in their row already.

    Shapes: [B, M] -> [B, M].
    """
    order = np.argsort(texts, axis=1, kind="stable")
    ranked = np.take_along_axis(texts, order, axis=1)
    repeats = np.zeros(texts.shape, dtype=bool)
    np.put_along_axis(repeats, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    return repeats


@dataclass(frozen=True, slots=True)
class Mined:
    """Negatives of some pairs, in the order of choice: ids (empty pads), scores, and what was passed over.

    Shapes: ids [B, num_negatives], scores [B, num_negatives], positive_scores [B], num_known [B], num_near [B].
    """

    ids: npt.NDArray[np.object_]
    scores: Float32Array
    positive_scores: Float32Array
    num_known: IntArray
    num_near: IntArray

    @classmethod
    def nothing_yet(cls, positive_scores: Float32Array, num_negatives: int) -> "Mined":
        """Returns a place for the negatives of some pairs."""
        shape, counts = (len(positive_scores), num_negatives), np.zeros((2, len(positive_scores)), np.int64)
        return cls(np.full(shape, "", object), np.full(shape, topk.PADDING, np.float32), positive_scores, *counts)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """What is asked about some pairs.

    Attributes:
        queries: Rows of ``vectors``, so that a query is searched once.
        vectors: Of the queries.
        keys: Hashes of the queries, as ``Relation`` knows what answers them.
        labels: Hashes of the labels, if the pairs have any.
        texts: Hashes of the queries as texts of documents.
        seeds: Decide random choices.
        given: Number of the pair, and the negatives that it brings.
        wanted: How many negatives to find.
    """

    queries: IntArray
    vectors: Float16Array
    keys: Hashes
    labels: Hashes | None
    texts: Hashes
    seeds: Hashes
    given: Relation
    wanted: IntArray


class Miner:
    """Mines pairs against one index.

    Args:
        searcher: Over the index; its plan is one pass at full width.
        documents: By row of the index.
        known: What must never be a negative.
        rules: What to take.
    """

    def __init__(self, searcher: Searcher, documents: Documents, known: Relation, rules: Rules) -> None:
        self._searcher = searcher
        self._documents = documents
        self._known = known
        self._rules = rules

    def mine(self, rows: Rows, vectors: Float16Array) -> Mined:
        """Returns the negatives of pairs, given the columns of their file and the vectors of their queries.

        Shapes: vectors [B, D].

        Raises:
            ValueError: A pair's positive is not in the index.
        """
        positive_rows = self._documents.rows_of(rows["document_id"])
        if (positive_rows < 0).any():
            stranger = rows["document_id"][int(np.argmin(positive_rows))]
            raise ValueError(f"mine: the positive '{stranger}' is not in the corpus. Prepare the data again.")
        scores = self._searcher.score(vectors, positive_rows[:, None])[:, 0]
        mined, pairs = Mined.nothing_yet(scores, self._rules.num_negatives), self._read(rows, vectors)
        most = self._searcher.num_documents
        waiting = deque([(np.arange(len(scores)), min(self._rules.last + _SLACK, most))])
        while waiting:
            own, depth = waiting.popleft()
            step = max(_MOST_CELLS // self._searcher.count_candidates(depth), 1)
            if len(own) > step:
                waiting.extend((own[start : start + step], depth) for start in range(0, len(own), step))
                continue
            short = self._mine(pairs, own, depth, mined)
            if len(short) and depth < most:  # known positives took the places: look further down
                waiting.append((short, min(2 * depth, most)))
        return mined

    def _read(self, rows: Rows, vectors: Float16Array) -> _Pairs:
        numbers = {text: number for number, text in enumerate(dict.fromkeys(rows["query"]))}
        queries = np.asarray([numbers[text] for text in rows["query"]])
        first = np.unique(queries, return_index=True)[1]
        keys, given = positives.hash_queries(rows["query"]), [negatives for negatives, _ in given_negatives(rows)]
        seeds = positives.mix(keys, positives.hash_ids(rows["document_id"]))
        counts = np.asarray([len(own) for own in given], dtype=np.int64)
        return _Pairs(
            queries,
            vectors[first],
            keys,
            positives.hash_labels(rows["label"]) if "label" in rows else None,
            positives.hash_texts(rows["query"]),
            seeds,
            Relation.of(
                np.repeat(np.arange(len(counts), dtype=np.uint64), counts),
                positives.hash_texts(text for own in given for text in own),
            ),
            np.maximum(self._rules.num_negatives - counts, 0),
        )

    def _mine(self, pairs: _Pairs, own: IntArray, depth: int, mined: Mined) -> IntArray:
        """Fills in the negatives of some pairs; returns those pairs whose window is not full at this depth."""
        asked, numbers = np.unique(pairs.queries[own], return_inverse=True)
        ranking = self._searcher.search(pairs.vectors[asked], depth)
        ranking = Ranking(ranking.scores[numbers], ranking.documents[numbers], ranking.ids[numbers])
        candidates = self._judge(pairs, own, ranking)
        positive_scores, margin = mined.positive_scores[own], np.float32(self._rules.relative_margin)
        bars = (positive_scores - np.abs(positive_scores) * margin).astype(np.float32)
        choice = choose(candidates, bars, pairs.wanted[own], pairs.seeds[own], self._rules)
        width = choice.columns.shape[1]  # a corpus may be smaller than what is wanted
        taken = choice.columns >= 0
        mined.ids[own, :width] = np.where(taken, np.take_along_axis(ranking.ids, choice.columns, axis=1), "")
        mined.scores[own, :width] = np.where(taken, np.take_along_axis(ranking.scores, choice.columns, axis=1), topk.PADDING)
        mined.num_known[own], mined.num_near[own] = choice.num_known, choice.num_near
        short: IntArray = own[candidates.are_left.sum(axis=1) < self._rules.last]
        return short

    def _judge(self, pairs: _Pairs, own: IntArray, ranking: Ranking) -> Candidates:
        texts = self._documents.texts[np.maximum(ranking.documents, 0)]
        is_known = self._known.holds(pairs.keys[own], texts)
        if pairs.labels is not None:
            is_known |= self._known.holds(pairs.labels[own], texts)
        is_barred = (ranking.documents < 0) | (texts == pairs.texts[own, None]) | pairs.given.holds(own.astype(np.uint64), texts)
        return Candidates(ranking.scores, texts, is_known & (ranking.documents >= 0), is_barred)


def given_negatives(rows: Rows) -> list[tuple[list[str], list[str]]]:
    """Returns (texts, ids) of the negatives that each pair brings."""
    nothing: list[list[str]] = [[]] * len(rows["query"])
    texts, ids = (rows.get(name, nothing) for name in ("negatives", "negative_ids"))
    return [(list(own or ()), list(own_ids or ())) for own, own_ids in zip(texts, ids, strict=True)]


@dataclass(frozen=True, slots=True)
class Sources:
    """All that a worker needs to mine a file.

    Attributes:
        index: Of the corpus, for one pass at full width.
        source: The corpus.
        work: Folder with the hashes of documents, of what is known, and the vectors of queries.
        rules: What to take.
    """

    index: IndexStore
    source: Corpus
    work: Place
    rules: Rules

    def miner(self) -> Miner:
        """Returns the miner; one shard of the index at a time is in memory."""
        searcher = self.index.searcher(call=funnel.call_in_turn(self.index.shards))
        known = Relation.open(self.work / KNOWN)
        return Miner(searcher, Documents.open(self.work / DOCUMENTS), known, self.rules)


def vectors_of(work: Place, pair_file: Place) -> Place:
    """Returns where the vectors of a file's queries are."""
    return work / QUERIES / f"{pair_file.stem}.npy"


def key_of(pair_file: Place) -> str:
    """Returns the key of the receipt for a file of pairs."""
    return f"{PAIRS}/{pair_file.stem}"


def mine_file(sources: Sources, pair_file: Place, folder: Place) -> Receipt:
    """Mines one file of pairs, publishes it with its negatives, and returns its receipt.

    Raises:
        ValueError: A pair's positive is not in the index, or a file is damaged.
    """
    start, counts = time.perf_counter(), Counter[str]()
    found = deque(_mine_batches(sources, pair_file))
    # All at once: a look for texts is a look through the whole corpus.
    texts = corpus.find_texts(sources.source, (name for mined in found for name in mined.ids.ravel() if name))

    def extend(rows: dict[str, list[Any]]) -> tuple[corpus.Lists, corpus.Lists]:
        mined, given = found.popleft(), given_negatives(rows)
        counts.update(_count(mined, [len(own) for own, _ in given], sources.rules.num_negatives))
        names = [[name for name in own if name] for own in mined.ids]
        return (
            [[*own, *(texts[name] for name in more)] for (own, _), more in zip(given, names, strict=True)],
            [[*own, *more] for (_, own), more in zip(given, names, strict=True)],
        )

    with storage.publish(folder / PAIRS / pair_file.name) as temporary:
        corpus.extend_rows(pair_file, temporary, _BATCH_ROWS, ("negatives", "negative_ids"), extend)
        record = FileRecord.named(f"{PAIRS}/{pair_file.name}", temporary)
    details = {**summarise([counts]), "seconds": round(time.perf_counter() - start, 3)}
    return Receipt(key_of(pair_file), int(counts["num_pairs"]), (record,), details)


def _mine_batches(sources: Sources, pair_file: Place) -> Iterator[Mined]:
    miner, start = sources.miner(), 0
    vectors = np.load(storage.local(vectors_of(sources.work, pair_file)), mmap_mode="r", allow_pickle=False)
    for rows in corpus.read_rows(pair_file, _BATCH_ROWS):
        stop = start + len(rows["query"])
        yield miner.mine(rows, vectors[start:stop])
        start = stop


def _count(mined: Mined, num_given: Sequence[int], num_negatives: int) -> dict[str, float]:
    taken = np.isfinite(mined.scores)
    num_all = taken.sum(axis=1) + np.asarray(num_given, dtype=np.int64)
    return {
        "num_pairs": len(num_all),
        "num_full": int((num_all >= num_negatives).sum()),
        "num_some": int(((num_all > 0) & (num_all < num_negatives)).sum()),
        "num_mined": int(taken.sum()),
        "num_given": sum(num_given),
        "num_known": int(mined.num_known.sum()),
        "num_near": int(mined.num_near.sum()),
        "positive_score_total": float(mined.positive_scores.sum(dtype=np.float64)),
        "negative_score_total": float(mined.scores[taken].sum(dtype=np.float64)),
    }


_COUNTED = ("num_pairs", "num_full", "num_some", "num_mined", "num_given", "num_known", "num_near")
_TOTALS = ("positive_score_total", "negative_score_total")


def summarise(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns counts over all parts, and what they say: shares of pairs and of negatives, and mean scores.

    Args:
        parts: Counts, or what came out of here before.
    """
    totals: Counter[str] = Counter(dict.fromkeys((*_COUNTED, *_TOTALS), 0))
    for part in parts:
        totals.update({name: part[name] for name in totals})
    num_pairs, num_mined = max(totals["num_pairs"], 1), max(totals["num_mined"], 1)
    return {
        **totals,
        "full_share": round(totals["num_full"] / num_pairs, 4),
        "some_share": round(totals["num_some"] / num_pairs, 4),
        "mined_share": round(totals["num_mined"] / max(totals["num_mined"] + totals["num_given"], 1), 4),
        "positive_score": round(totals["positive_score_total"] / num_pairs, 4),
        "negative_score": round(totals["negative_score_total"] / num_mined, 4),
    }


@dataclass(frozen=True, slots=True)
class NegativesStore:
    """A finished negatives artifact: the training pairs of a dataset, with hard negatives."""

    folder: Place
    manifest: Manifest

    @classmethod
    def open(cls, folder: Place) -> "NegativesStore":
        """Returns the negatives in a folder.

        Raises:
            ValueError: There are none, or they are not finished.
        """
        return cls(folder, artifacts.read_complete(folder, "negatives"))

    @property
    def num_negatives(self) -> int:
        """How many were asked for per pair; a pair has fewer where no candidate qualified, more where the data brought more."""
        return int(self.manifest.identity["num_negatives"])

    @property
    def data(self) -> str:
        """Fingerprint of the dataset whose pairs these are."""
        return str(self.manifest.identity["data"])

    def pair_files(self) -> list[Place]:
        """Returns the files with the pairs and their negatives, one for each file of the dataset, in its order.

        Raises:
            ValueError: A file is missing or not what its receipt says.
        """
        faults = artifacts.find_faults(self.folder, self.manifest)
        if faults:
            raise ValueError(f"{faults[0]}. Run the job that made it again with --replace.")
        return [self.folder / receipt.files[0].path for receipt in self.manifest.receipts]
