"""A split's queries put to systems: what each finds, kept as runs, and what the queries tell of systems beside each other."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from matryoshka import comparison, corpus, evaluation, lexical, metrics, rankings, runs, showcase, units, verdict
from matryoshka.artifacts import FileRecord
from matryoshka.corpus import Columns
from matryoshka.indexing import IndexStore
from matryoshka.lexical import LexicalIndex
from matryoshka.metrics import Judgements, Qrels
from matryoshka.pairs import DatasetStore
from matryoshka.rankings import Catalogue, Packing, Rankings, Vectors
from matryoshka.report import Report
from matryoshka.runs import Series
from matryoshka.showcase import Searches
from matryoshka.storage import Place
from matryoshka.vectors import EmbeddingStore
from matryoshka.verdict import Training


@dataclass(frozen=True, slots=True)
class Task:
    """Queries, documents and judgements of a split."""

    data: DatasetStore
    split: str
    query_ids: list[str]
    queries: list[str]
    qrels: Qrels

    @classmethod
    def open(cls, data: DatasetStore, split: str) -> "Task":
        """Returns the task of a dataset's split.

        Raises:
            ValueError: There is no such split, or none of its queries has judgements.
        """
        query_ids, queries = data.queries(split)
        qrels = data.qrels(split)
        if qrels.keys().isdisjoint(query_ids):
            raise ValueError(f"{data.folder}: no query of split '{split}' has judgements. Pass another --split.")
        return cls(data, split, query_ids, queries, qrels)

    @property
    def texts(self) -> dict[str, str]:
        """The texts of the queries by id."""
        return dict(zip(self.query_ids, self.queries, strict=True))

    @property
    def judged_ids(self) -> tuple[str, ...]:
        """Ids of the judged queries, in the order of all values."""
        return Judgements.of(self.qrels, self.query_ids, np.empty(0, dtype=object)).query_ids

    @property
    def remarks(self) -> tuple[str, ...]:
        """Returns what was left out."""
        num_unjudged = len(set(self.query_ids) - self.qrels.keys())
        return (f"{num_unjudged} queries without judgements were left out.",) if num_unjudged else ()

    def find_texts(self, names: Collection[str]) -> dict[str, str]:
        """Returns the texts of documents by id; of chunked ones, that of the first chunk."""
        _, paths = corpus.find_files(self.data.corpus)
        if not self.data.is_chunked:
            return corpus.find_texts_in(paths, names, Columns())
        wanted, first = set(names), dict[str, str]()
        for name in corpus.read_ids(paths) if wanted else ():
            document = units.document_of(name)
            if document in wanted:
                first.setdefault(document, name)
        found = corpus.find_texts_in(paths, first.values(), Columns())
        return {units.document_of(name): text for name, text in found.items()}

    def count_rows(self) -> float:
        """Returns the rows of a document on average: its chunks, if it was cut."""
        if not self.data.is_chunked:
            return 1.0
        _, paths = corpus.find_files(self.data.corpus)
        catalogue = Catalogue.of(corpus.read_ids(paths), is_chunked=True)
        return len(catalogue.numbers) / max(len(catalogue.names), 1)


@dataclass(frozen=True, slots=True)
class Findings:
    """What searches of a split found.

    Attributes:
        series: What each system got on every query.
        records: The runs that were written.
        microseconds: In which one query is compared with all documents, by dim.
        num_documents: So many; one that was cut into chunks counts once.
        shown: A sample of searches.
        frontier: Plans of the index, as a JSON value.
        training: What the model's training cost.
        remarks: What was left out.
    """

    series: tuple[Series, ...] = ()
    records: tuple[FileRecord, ...] = ()
    microseconds: Mapping[int, float] = field(default_factory=dict)
    num_documents: int = 0
    shown: Searches | None = None
    frontier: Mapping[str, Any] | None = None
    training: Training | None = None
    remarks: tuple[str, ...] = ()

    def and_then(self, others: "Findings") -> "Findings":
        """Returns others with these systems before them."""
        series, records = (*self.series, *others.series), (*self.records, *others.records)
        return dataclasses.replace(others, series=series, records=records, remarks=(*self.remarks, *others.remarks))


class _Keeper:
    """Keeps what systems found: a run on disk, and what every query got."""

    def __init__(self, task: Task, output: Place, catalogue: Catalogue) -> None:
        self._query_ids, self._output, self.catalogue = task.query_ids, output, catalogue
        self.judged = Judgements.of(task.qrels, task.query_ids, catalogue.names)
        self.series: list[Series] = []
        self.records: list[FileRecord] = []

    def keep(self, system: str, dim: int | None, found: Rankings, depth: int = metrics.DEPTH) -> None:
        """Keeps what one system found; of fewer results than ``DEPTH``, without the measures that need so many."""
        values = self.judged.measure(found.documents)
        if depth < metrics.DEPTH:
            values = {name: own for name, own in values.items() if name not in metrics.DEEP}
        names = self.catalogue.names
        top = runs.first_documents(found, names, self.judged.asked, len(self.judged.query_ids))
        self.series.append(Series(system, dim, values, top))
        self.records.append(runs.write_trec(self._output, self.series[-1].label, self._query_ids, found, names))


def search_words(task: Task, output: Place) -> Findings:
    """Returns what BM25 finds, and writes its run below a folder; of more texts than it holds in memory, a remark alone."""
    num_rows = task.data.num_documents
    if num_rows > lexical.MOST_TEXTS:
        said = f"BM25 was left out: {num_rows:,} texts, and it holds at most {lexical.MOST_TEXTS:,} in memory."
        return Findings(remarks=(said,))
    ids, texts = corpus.read_texts(corpus.inspect(task.data.corpus, Columns()))
    keeper = _Keeper(task, output, Catalogue.of(ids, is_chunked=task.data.is_chunked))
    keeper.keep(lexical.NAME, None, rankings.by_words(LexicalIndex(texts), keeper.catalogue, task.queries, metrics.DEPTH))
    return Findings(tuple(keeper.series), tuple(keeper.records))


def search_vectors(
    task: Task,
    output: Place,
    system: str,
    store: EmbeddingStore,
    queries: Vectors,
    dims: Sequence[int],
    index: IndexStore | None = None,
    packings: Sequence[Packing] = (),
) -> Findings:
    """Returns what a model finds by exact search at every dim, quantised, and through an index's funnel; writes all runs.

    Args:
        task: What is asked.
        output: Folder below which runs are written.
        system: Name of the model in reports.
        store: Vectors of the documents.
        queries: Vectors of the task's queries.
        dims: The resolutions.
        index: Of the same vectors; where it stores them as int8, these are evaluated too.
        packings: Other ways to store vectors.

    Shapes: queries [Q, D].
    """
    keeper = _Keeper(task, output, Catalogue.of_store(store, is_chunked=task.data.is_chunked))
    judged, catalogue = keeper.judged, keeper.catalogue
    rows = showcase.choose_searches(judged)
    is_int8 = index is not None and index.layout.storage == "int8"
    results = {}
    for dim in dims:
        found = rankings.exact(store, catalogue, queries, dim, metrics.DEPTH)
        keeper.keep(system, dim, found)
        results[dim] = showcase.list_results(found, catalogue, judged, rows)
        for packing in dict.fromkeys([*packings, *(("int8",) if is_int8 else ())]):
            # Signs are asked for ten results, as they are when serving: for more they would also hand on more to be rescored.
            depth = metrics.SHALLOW if packing == "binary" else metrics.DEPTH
            found = rankings.exact(store, catalogue, queries, dim, depth, packing)
            keeper.keep(f"{system}+{packing}", dim, found, depth)
    shown = Searches([judged.query_ids[row] for row in rows], results)
    if index:
        searcher, plan = index.searcher(), index.plan
        # No more than it hands out: for more results it would keep more on the way, and be another funnel.
        depth = max(min(metrics.DEPTH, plan.steps[-1].keep), metrics.SHALLOW)
        found = rankings.through_funnel(searcher, catalogue, queries, depth)
        keeper.keep(f"{system}{evaluation.FUNNEL}", plan.shortlist.dim, found, depth)
        relevant = [showcase.relevant_documents(task.qrels, name) for name in shown.query_ids]
        shown = dataclasses.replace(shown, funnel=showcase.trace(searcher, catalogue, queries[judged.asked[rows]], relevant))
    seconds, num_rows = rankings.time_products(store, queries, dims), len(catalogue.numbers)
    microseconds = {dim: float(f"{1e6 * num_rows * one:.4g}") for dim, one in seconds.items()}
    return Findings(
        tuple(keeper.series), tuple(keeper.records), microseconds, len(catalogue.names), shown,
        index.frontier if index else None,
    )  # fmt: skip


def weigh(
    task: Task, made: Report, series: Sequence[Series], found: Findings, system: str, floor: float, required_gain: float | None
) -> Report:
    """Returns a report with what the queries tell of systems beside each other.

    Args:
        task: What was asked.
        made: The report so far.
        series: What every system got, those of earlier evaluations included; the first model is the one that is untouched.
        found: Of this evaluation.
        system: The one that the verdict is about.
        floor: Share of full width's quality that the recommended dim keeps.
        required_gain: Least gain that is worth it; None: nobody asks whether the one is tuned well enough.
    """
    rows, compared, texts = evaluation.figures(series), comparison.compare(series), task.texts
    before = next((own.system for own in series if evaluation.is_plain(own)), system)
    chosen = comparison.find(compared, before, system)
    words = comparison.find(compared, lexical.NAME, system)
    kept = comparison.resolutions(series, system, floor, found.microseconds, found.num_documents, task.count_rows())
    answer = _decide(chosen, words, rows, required_gain, found.training, kept) if chosen and required_gain is not None else None
    extremes = showcase.find_extremes(task.judged_ids, series, chosen, task.qrels, texts) if chosen else None
    wanted = {*(extremes.documents if extremes else ()), *(found.shown.documents if found.shown else ())}
    documents = task.find_texts(wanted)
    return dataclasses.replace(
        made,
        rows=rows,
        verdict=answer,
        comparisons=compared,
        resolutions=kept,
        extremes=extremes.with_texts(documents) if extremes else None,
        per_query=showcase.per_query(task.judged_ids, series, texts),
        searches=found.shown.as_json(task.qrels, texts, documents) if found.shown else None,
        frontier=found.frontier,
        remarks=(*made.remarks, *found.remarks),
    )


def _decide(
    chosen: comparison.Comparison,
    words: comparison.Comparison | None,
    rows: Sequence[evaluation.Row],
    required_gain: float,
    training: Training | None,
    kept: comparison.Resolutions | None,
) -> verdict.Verdict:
    answer = verdict.decide(chosen, rows, required_gain, words)
    return dataclasses.replace(answer, training=training, saving=verdict.saving_of(kept))
