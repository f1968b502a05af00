"""Single queries for a report: what each got, which gained and lost most, and a sample of searches at every resolution."""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from matryoshka import units
from matryoshka.comparison import Comparison
from matryoshka.funnel import Searcher
from matryoshka.metrics import NDCG, Judgements, Qrels
from matryoshka.rankings import Catalogue, Rankings, Vectors
from matryoshka.runs import Series

_EXTREMES, _SHOWN_RESULTS = 10, 5
_SHOWN_CHARACTERS, _SHOWN_QUERY_CHARACTERS = 300, 120
_DIGITS, _SCORE_DIGITS = 4, 4
_SEARCHES, _SALT, _RESULTS_PER_SEARCH = 100, "shown searches", 10


@dataclass(frozen=True, slots=True)
class Change:
    """A query that gained or lost much.

    Attributes:
        query_id: Its id.
        text: Its text.
        before: Value of the headline measure.
        after: The same, of the other system.
        results: First documents of both: id, text, grade (None: not judged).
    """

    query_id: str
    text: str
    before: float
    after: float
    results: Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Extremes:
    """The queries that gained and lost most, at one dim."""

    before: str
    after: str
    dim: int
    metric: str
    gained: tuple[Change, ...]
    lost: tuple[Change, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Returns what ``dataclasses.asdict`` described."""

        def read(change: Mapping[str, Any]) -> Change:
            return Change(**{**change, "results": {system: tuple(own) for system, own in change["results"].items()}})

        return cls(**{**value, **{name: tuple(map(read, value[name])) for name in ("gained", "lost")}})

    @property
    def documents(self) -> set[str]:
        """Ids of the documents that are shown."""
        changes = (*self.gained, *self.lost)
        return {result["id"] for change in changes for own in change.results.values() for result in own}

    def with_texts(self, texts: Mapping[str, str]) -> "Extremes":
        """Returns the same with the beginnings of the documents' texts."""

        def tell(change: Change) -> Change:
            results = {
                system: tuple({**one, "text": texts.get(one["id"], "")[:_SHOWN_CHARACTERS]} for one in own)
                for system, own in change.results.items()
            }
            return Change(change.query_id, change.text, change.before, change.after, results)

        gained, lost = (tuple(map(tell, own)) for own in (self.gained, self.lost))
        return dataclasses.replace(self, gained=gained, lost=lost)


def find_extremes(
    query_ids: Sequence[str], series: Sequence[Series], chosen: Comparison, qrels: Qrels, queries: Mapping[str, str]
) -> Extremes:
    """Returns the ten queries that gained most in a comparison and the ten that lost most, without texts of documents.

    Args:
        query_ids: Of the judged queries.
        series: Of all systems.
        chosen: The comparison.
        qrels: Judgements.
        queries: Texts of the queries by id.
    """
    before, after = (
        next(own for own in series if (own.system, own.dim) == wanted)
        for wanted in ((chosen.before, chosen.before_dim), (chosen.after, chosen.dim))
    )
    old, new = before.values[chosen.metric], after.values[chosen.metric]
    order = np.argsort(old - new, kind="stable").tolist()  # of equals, the first
    behind = np.argsort(new - old, kind="stable").tolist()

    def tell(row: int) -> Change:
        name = query_ids[row]
        grades = qrels[name]
        results = {
            own.system: tuple({"id": one, "text": "", "grade": grades.get(one)} for one in own.top[row][:_SHOWN_RESULTS])
            for own in (before, after)
        }
        text = queries.get(name, "")[:_SHOWN_CHARACTERS]
        return Change(name, text, round(float(old[row]), _DIGITS), round(float(new[row]), _DIGITS), results)

    gained = itertools.takewhile(lambda row: new[row] > old[row], order[:_EXTREMES])
    lost = itertools.takewhile(lambda row: new[row] < old[row], behind[:_EXTREMES])
    found = (tuple(map(tell, rows)) for rows in (gained, lost))
    return Extremes(chosen.before, chosen.after, chosen.dim, chosen.metric, *found)


def per_query(
    query_ids: Sequence[str], series: Sequence[Series], queries: Mapping[str, str], metric: str = NDCG
) -> dict[str, Any]:
    """Returns one measure of every query, system and dim as a JSON value, rounded to four digits; words have the dim ""."""
    values: dict[str, dict[str, list[float]]] = {}
    for own in series:
        rounded = own.values[metric].round(_DIGITS).tolist()
        values.setdefault(own.system, {})["" if own.dim is None else str(own.dim)] = rounded
    texts = [queries.get(name, "")[:_SHOWN_QUERY_CHARACTERS] for name in query_ids]
    return {"metric": metric, "ids": list(query_ids), "texts": texts, "values": values}


def choose_searches(judged: Judgements) -> list[int]:
    """Returns which of the judged queries that were asked are shown, by hash: the same ones of every system."""
    known = judged.query_ids[: len(judged.asked)]
    chosen = set(units.sample_keys(known, _SEARCHES, _SALT))
    return [row for row, name in enumerate(known) if name in chosen]


def list_results(
    rankings: Rankings, catalogue: Catalogue, judged: Judgements, rows: Sequence[int]
) -> list[list[tuple[str, float]]]:
    """Returns the first ten results of chosen queries: ids and scores."""
    found = []
    for place in judged.asked[list(rows)].tolist():
        pairs = zip(rankings.documents[place, :_RESULTS_PER_SEARCH], rankings.scores[place, :_RESULTS_PER_SEARCH], strict=True)
        found.append(
            [(str(catalogue.names[number]), round(float(score), _SCORE_DIGITS)) for number, score in pairs if number >= 0]
        )
    return found


def trace(
    searcher: Searcher, catalogue: Catalogue, queries: Vectors, relevant: Sequence[Collection[str]]
) -> list[list[dict[str, int]]]:
    """Returns, for each query, how many documents each step of a funnel keeps, and how many relevant ones are among them.

    Shapes: queries [Q, D], relevant [Q].
    """
    steps: list[list[dict[str, int]]] = [[] for _ in relevant]
    for dim, ids in searcher.trace(queries, _RESULTS_PER_SEARCH):
        for own, wanted, found in zip(steps, relevant, catalogue.find(ids), strict=True):
            kept = set(catalogue.names[found[found >= 0]])
            own.append({"dim": dim, "kept": len(kept), "relevant_kept": len(kept.intersection(wanted))})
    return steps


@dataclass(frozen=True, slots=True)
class Searches:
    """A sample of searches by one system.

    Attributes:
        query_ids: Of the sample.
        results: At each dim, the first results of each query.
        funnel: Of each query, what each step of the funnel keeps; empty where there is none.
    """

    query_ids: Sequence[str]
    results: Mapping[int, Sequence[Sequence[tuple[str, float]]]]
    funnel: Sequence[Sequence[Mapping[str, int]]] = ()

    @property
    def documents(self) -> set[str]:
        """Ids of the documents that are shown."""
        return {name for own in self.results.values() for one in own for name, _ in one}

    def as_json(self, qrels: Qrels, queries: Mapping[str, str], texts: Mapping[str, str]) -> dict[str, Any]:
        """Returns the sample with texts as a JSON value; of the relevant documents, all are counted, and those shown have grades.

        Args:
            qrels: Judgements.
            queries: Texts of the queries by id.
            texts: Texts of the documents by id.
        """
        return {
            "documents": {name: texts.get(name, "")[:_SHOWN_CHARACTERS] for name in sorted(self.documents)},
            "queries": [
                self._tell(row, name, queries, relevant_documents(qrels, name)) for row, name in enumerate(self.query_ids)
            ],
        }

    def _tell(self, row: int, name: str, queries: Mapping[str, str], relevant: Mapping[str, int]) -> dict[str, Any]:
        shown = sorted({document for own in self.results.values() for document, _ in own[row]}.intersection(relevant))
        return {
            "id": name,
            "text": queries.get(name, ""),
            "num_relevant": len(relevant),
            "relevant": {document: relevant[document] for document in shown},
            "results": {str(dim): [list(one) for one in own[row]] for dim, own in self.results.items()},
            "funnel": list(self.funnel[row]) if self.funnel else [],
        }


def relevant_documents(qrels: Qrels, query: str) -> dict[str, int]:
    """Returns the relevant documents of a query with their grades: of labelled data there may be thousands."""
    return {name: grade for name, grade in qrels.get(query, {}).items() if grade > 0}
